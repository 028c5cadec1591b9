//! What a connection is doing.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::body::Bytes;
use tokio::time::Instant;

/// The text that says nothing in a stream, such as a comment, for a client of which it is unknown
/// whether it still reads. An extension of responses that stream.
#[derive(Debug, Clone)]
pub(crate) struct Filler(pub(crate) String);

/// Where in an exchange a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// No request has begun.
    Idle,
    /// The headers of one are coming.
    Head,
    /// Its body is.
    Body,
    /// It is complete, and nothing of the answer is there.
    Waiting,
    /// The answer is on its way.
    Answering,
}

impl Phase {
    fn of(value: u8) -> Self {
        [Self::Idle, Self::Head, Self::Body, Self::Waiting, Self::Answering][usize::from(value)]
    }
}

/// What a connection is doing. Bodies may be read on other tasks, so all of it is atomic.
#[derive(Debug)]
pub(super) struct Link {
    phase: AtomicU8,
    /// The client speaks HTTP/1.1: it knows interim responses and chunks.
    modern: AtomicBool,
    /// Something is to be sent to see whether the client still reads.
    probe: AtomicBool,
    /// The client was sending a body that nobody read to its end.
    unread: AtomicBool,
    filler: Mutex<Bytes>,
    created: Instant,
    /// Milliseconds from then to the last answer's end.
    answered_at: AtomicU64,
}

impl Link {
    pub(super) fn new() -> Self {
        Self {
            phase: AtomicU8::new(Phase::Idle as u8),
            modern: AtomicBool::new(false),
            probe: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            filler: Mutex::default(),
            created: Instant::now(),
            answered_at: AtomicU64::new(0),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        Phase::of(self.phase.load(Ordering::Acquire))
    }

    fn set(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// The first bytes of a request are there.
    pub(super) fn begin(&self) {
        self.advance(Phase::Idle, Phase::Head);
    }

    /// A request's headers are there.
    pub(super) fn request(&self, modern: bool, has_body: bool) {
        self.modern.store(modern, Ordering::Release);
        self.set(if has_body { Phase::Body } else { Phase::Waiting });
    }

    /// A request's body has been read, to its end when `whole`.
    pub(super) fn body_read(&self, whole: bool) {
        if !whole {
            self.unread.store(true, Ordering::Release);
        }
        if !self.advance(Phase::Body, Phase::Waiting) {
            // The rest of a body whose request was answered before its end.
            self.advance(Phase::Head, Phase::Idle);
        }
    }

    /// The answer's headers are there, and how to fill it, if it is a stream.
    pub(super) fn answer(&self, filler: Option<Filler>) {
        let chunk = filler.map(|Filler(text)| Bytes::from(format!("{:x}\r\n{text}\r\n", text.len())));
        *self.filler.lock().unwrap_or_else(PoisonError::into_inner) = chunk.unwrap_or_default();
        self.set(Phase::Answering);
    }

    /// The answer is complete.
    pub(super) fn answered(&self) {
        self.answered_at.store(self.created.elapsed().as_millis() as u64, Ordering::Release);
        self.set(Phase::Idle);
    }

    /// For how long there has been no request; `None` when there is one.
    pub(super) fn idle(&self) -> Option<Duration> {
        let since = Duration::from_millis(self.answered_at.load(Ordering::Acquire));
        (self.phase() == Phase::Idle).then(|| self.created.elapsed().saturating_sub(since))
    }

    /// Whether the client sent what was not read.
    pub(super) fn has_unread(&self) -> bool {
        self.unread.load(Ordering::Acquire)
    }

    /// Asks for a probe. False when this client does not understand any.
    pub(super) fn ask(&self) -> bool {
        if matches!(self.phase(), Phase::Waiting | Phase::Answering) {
            self.probe.store(true, Ordering::Release);
            return self.modern.load(Ordering::Acquire);
        }
        true
    }

    /// What to send when a probe was asked for and fits here, between two of hyper's writes.
    pub(super) fn take_probe(&self) -> Option<Bytes> {
        if !self.probe.swap(false, Ordering::AcqRel) {
            return None;
        }
        match self.phase() {
            Phase::Waiting => Some(Bytes::from_static(b"HTTP/1.1 100 Continue\r\n\r\n")),
            Phase::Answering => {
                let filler = self.filler.lock().unwrap_or_else(PoisonError::into_inner).clone();
                (!filler.is_empty()).then_some(filler)
            }
            _ => None,
        }
    }

    fn advance(&self, from: Phase, to: Phase) -> bool {
        self.phase.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_goes_through_its_phases() {
        let link = Link::new();
        link.begin();
        assert_eq!(link.phase(), Phase::Head);
        link.request(true, true);
        link.begin();
        assert_eq!(link.phase(), Phase::Body, "bytes of a body begin no request");
        link.body_read(true);
        assert_eq!(link.phase(), Phase::Waiting);
        link.answer(None);
        link.answered();
        assert_eq!((link.phase(), link.has_unread()), (Phase::Idle, false));
    }

    #[test]
    fn an_answer_before_the_bodys_end_leaves_its_rest_unread() {
        let link = Link::new();
        link.request(true, true);
        link.answer(None);
        link.answered();
        // The rest of the body comes and is thrown away.
        link.begin();
        link.body_read(false);
        assert_eq!((link.phase(), link.has_unread()), (Phase::Idle, true));
    }

    #[test]
    fn probes_fit_where_the_exchange_is() {
        let link = Link::new();
        assert!(link.ask() && link.take_probe().is_none(), "nothing to ask for without a request");
        link.request(true, false);
        assert!(link.take_probe().is_none(), "nobody asked");
        assert!(link.ask());
        assert!(link.take_probe().is_some_and(|p| p.starts_with(b"HTTP/1.1 100 ")));
        assert!(link.take_probe().is_none(), "one for each question");
        link.answer(Some(Filler(": keep-alive\n\n".into())));
        assert!(link.ask());
        assert_eq!(link.take_probe().as_deref(), Some(b"e\r\n: keep-alive\n\n\r\n".as_slice()));
        link.answer(None);
        assert!(link.ask() && link.take_probe().is_none(), "an answer of a known length has no gaps");
        link.answered();
        link.request(false, false);
        assert!(!link.ask(), "HTTP/1.0 knows no interim responses");
    }
}
