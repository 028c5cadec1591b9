//! Where a request's time goes: its timings, and its spans for whoever traces.
//!
//! The spans `queue`, `prompt` and `decode` follow one another as children of the span that was entered when
//! the request was submitted. That span names the request; the engine knows no other name for it. They are at
//! level debug and cost next to nothing where nobody listens. None of them holds text or tokens.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tracing::{Span, debug, debug_span};

use crate::request::{FinishReason, Usage};

/// When a request's work began, told by the worker as it happens: also of a request that is cancelled or
/// fails. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Timings(Arc<Moments>);

#[derive(Debug)]
struct Moments {
    submitted: Instant,
    scheduled: OnceLock<Duration>,
}

impl Timings {
    fn begin() -> Self {
        Self(Arc::new(Moments { submitted: Instant::now(), scheduled: OnceLock::new() }))
    }

    /// How long the request waited until a step took it up; `None` while it waits.
    pub fn queue(&self) -> Option<Duration> {
        self.0.scheduled.get().copied()
    }
}

/// A request's spans and timings on the engine's side.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The caller's span.
    request: Span,
    /// What the request is in now.
    phase: Span,
    timings: Timings,
}

impl Trace {
    /// A request is submitted, by a caller in its own span.
    pub(crate) fn begin() -> Self {
        let request = Span::current();
        let phase = debug_span!(parent: &request, "queue");
        Self { request, phase, timings: Timings::begin() }
    }

    pub(crate) fn timings(&self) -> Timings {
        self.timings.clone()
    }

    /// A step takes the request up. Only the first time counts.
    pub(crate) fn scheduled(&mut self, prompt_tokens: usize) {
        let moments = &*self.timings.0;
        if moments.scheduled.get().is_some() {
            return;
        }
        let queue = moments.submitted.elapsed();
        let _ = moments.scheduled.set(queue);
        self.phase = debug_span!(parent: &self.request, "prompt", tokens = prompt_tokens);
        debug!(parent: &self.request, queue_us = queue.as_micros() as u64, prompt_tokens, "scheduled");
    }

    /// The first token is there.
    pub(crate) fn first_token(&mut self) {
        self.phase = debug_span!(parent: &self.request, "decode", tokens = tracing::field::Empty);
    }

    /// The request has all that it asked for.
    pub(crate) fn done(&self, reason: FinishReason, usage: Usage) {
        if usage.completion_tokens > 0 {
            self.phase.record("tokens", usage.completion_tokens);
        }
        debug!(parent: &self.request, ?reason, generated_tokens = usage.completion_tokens, "done");
    }

    /// The request fails, and its caller is told why.
    pub(crate) fn failed(&self, error: &impl std::fmt::Display) {
        debug!(parent: &self.request, %error, "failed");
    }

    /// Nobody waits for the request any more.
    pub(crate) fn cancelled(&self) {
        debug!(parent: &self.request, "cancelled");
    }
}
