//! Bodies that know their connection.

use std::{
    error::Error as StdError,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{Limits, phase::Link};

/// A body came too slowly.
#[derive(Debug, thiserror::Error)]
#[error("the body came too slowly")]
struct Stalled;

/// Whether `error` is about a body that came too slowly.
pub(crate) fn is_stalled(error: &(dyn StdError + 'static)) -> bool {
    error.is::<Stalled>() || error.source().is_some_and(is_stalled)
}

/// A request's body, which must keep coming.
pub(super) struct RequestBody {
    incoming: Incoming,
    link: Arc<Link>,
    stall: Duration,
    rate: u32,
    started: Instant,
    last: Instant,
    received: u64,
    timer: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming, link: Arc<Link>, limits: &Limits) -> Self {
        let now = Instant::now();
        let ended = incoming.is_end_stream();
        Self {
            incoming,
            link,
            stall: limits.body_stall,
            rate: limits.body_rate,
            started: now,
            last: now,
            received: 0,
            timer: None,
            ended,
        }
    }

    /// By when something must have come.
    fn deadline(&self) -> Instant {
        let average = Duration::from_millis(self.received.saturating_mul(1000) / u64::from(self.rate.max(1)));
        (self.last + self.stall).min(self.started + self.stall + average)
    }

    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let deadline = self.deadline();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(cx).is_ready()
    }

    fn end(&mut self, whole: bool) {
        if !std::mem::replace(&mut self.ended, true) {
            self.link.body_read(whole);
        }
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.received += frame.data_ref().map_or(0, Bytes::len) as u64;
                this.last = Instant::now();
                if this.incoming.is_end_stream() {
                    this.end(true);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.end(false);
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.end(true);
                Poll::Ready(None)
            }
            Poll::Pending if this.is_late(cx) => Poll::Ready(Some(Err(Stalled.into()))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.end(false);
    }
}

/// A response's body, whose end is the end of the exchange.
pub(super) struct ResponseBody {
    body: Body,
    link: Arc<Link>,
}

impl ResponseBody {
    pub(super) fn new(body: Body, link: Arc<Link>) -> Self {
        Self { body, link }
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() {
            self.link.answered();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.link.answered();
    }
}
