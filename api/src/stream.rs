//! Engine events to one answer, or to server-sent events or NDJSON lines.

mod frames;
mod sequences;

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

use axum::{
    Extension,
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use m40llm_engine::Event;
use tokio::time::Sleep;

pub use self::frames::{Frames, Framing};
pub(crate) use self::sequences::{Outcome, PREDICTED_TTFT, QUEUE_POSITION, Sequences};
use crate::{error::ApiError, openai::Usage, transport::Filler};

/// A route's way to put events into words.
pub(crate) trait Wire: Send + 'static {
    /// What comes before the first event.
    fn open(&mut self, _out: &mut Frames) {}
    /// An event of sequence `i`; never a failure.
    fn event(&mut self, i: usize, event: Event, out: &mut Frames);
    /// What comes after the last event.
    fn close(&mut self, usage: Usage, out: &mut Frames);
    /// What comes last after a failure.
    fn failed(&mut self, error: &ApiError, out: &mut Frames) {
        out.push(&error.body());
    }
    /// What keeps a silent stream alive.
    fn keep_alive(&self, out: &mut Frames) {
        out.comment("keep-alive");
    }
}

/// A response that streams. Its headers wait for the first event or for `keep_alive`, whichever comes
/// first, so that a request that fails at once gets its real status.
pub(crate) async fn respond(
    mut sequences: Sequences,
    mut wire: impl Wire,
    framing: Framing,
) -> Result<Response, ApiError> {
    let predicted = sequences.predicted();
    let pause = sequences.state.config().keep_alive;
    let first = match tokio::time::timeout(pause, sequences.next()).await {
        Ok(Some((_, Event::Failed(error)))) => return Err(error.into()),
        Ok(event) => event,
        Err(_) => None,
    };
    let mut frames = Frames::new(framing);
    wire.keep_alive(&mut frames);
    let filler = Filler(String::from_utf8_lossy(&frames.take()).into_owned());
    wire.open(&mut frames);
    if let Some((i, event)) = first {
        wire.event(i, event, &mut frames);
    }
    let now = tokio::time::Instant::now();
    let quiet = Box::pin(tokio::time::sleep_until(now + pause));
    let running = Running { sequences, wire, frames, pause, last: now, quiet };
    let body = Body::from_stream(stream::unfold(Some(running), |running| async move {
        let (bytes, rest) = running?.step().await;
        Some((Ok::<_, Infallible>(bytes), rest))
    }));
    let content_type = match framing {
        Framing::Sse => "text/event-stream; charset=utf-8",
        Framing::Ndjson => "application/x-ndjson; charset=utf-8",
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, predicted, Extension(filler), body).into_response())
}

/// A stream under way; dropped when the client goes, and the work with it.
struct Running<W> {
    sequences: Sequences,
    wire: W,
    frames: Frames,
    /// How long the stream may be silent.
    pause: Duration,
    /// When something last came.
    last: tokio::time::Instant,
    /// Ends no later than the pause; it is set anew when it has ended, and not with every token.
    quiet: Pin<Box<Sleep>>,
}

/// What follows in a stream.
type Next = Option<(usize, Event)>;

/// So much goes out in one piece, and what has come in the meantime with the next.
const PIECE: usize = 16 << 10;

impl<W: Wire> Running<W> {
    /// The next bytes, and the stream unless it has ended. Waits for one event; those that are there by then
    /// go along.
    async fn step(mut self) -> (Bytes, Option<Self>) {
        let mut more = true;
        while more && self.frames.buffer.len() < PIECE {
            let is_first = self.frames.buffer.is_empty();
            let next = if is_first { self.wait().await } else { self.ready().await };
            match next {
                None if is_first => self.wire.keep_alive(&mut self.frames),
                None => break,
                // The end waits until its account is settled; the tokens do not.
                Some(None) if !is_first => break,
                Some(None) => {
                    match self.sequences.ticket.finish().await {
                        Ok(()) => self.wire.close(self.sequences.usage, &mut self.frames),
                        Err(error) => self.wire.failed(&error, &mut self.frames),
                    }
                    more = false;
                }
                Some(Some((_, Event::Failed(error)))) => {
                    self.wire.failed(&ApiError::from(error), &mut self.frames);
                    more = false;
                }
                Some(Some((i, event))) => self.wire.event(i, event, &mut self.frames),
            }
        }
        (self.frames.take(), more.then_some(self))
    }

    /// What comes next; `None` after a pause in which nothing came.
    async fn wait(&mut self) -> Option<Next> {
        loop {
            tokio::select! {
                biased;
                next = self.sequences.next() => {
                    self.last = tokio::time::Instant::now();
                    return Some(next);
                }
                () = &mut self.quiet => {
                    let now = tokio::time::Instant::now();
                    let is_silent = now >= self.last + self.pause;
                    if is_silent {
                        self.last = now;
                    }
                    self.quiet.as_mut().reset(self.last + self.pause);
                    if is_silent {
                        return None;
                    }
                }
            }
        }
    }

    /// What comes next, if it is there.
    async fn ready(&mut self) -> Option<Next> {
        let mut next = pin!(self.sequences.next());
        poll_fn(|cx| match next.as_mut().poll(cx) {
            Poll::Ready(next) => Poll::Ready(Some(next)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }
}
