//! One line a request, at its end: when the last byte of its answer is on its way, or nobody wants it any more.
//!
//! What is known of a request is gathered in its [`RequestLog`], which lies in the request's extensions: the
//! gateway's layers say whose it is, the sequences what it cost. The line is written by the response's body,
//! so that a stream's line tells how the stream ended.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{MatchedPath, Request},
    http::{HeaderValue, Method, StatusCode},
    response::Response,
};
use hyper::body::{Frame, SizeHint};
use tracing::Span;

use super::{spans, trace_context::TraceParent};
use crate::{app::AppState, error::ErrorName};

/// Routes whose requests are work for the model.
const WORK: [&str; 6] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
    "/generate",
];

/// Nginx's number for a client that went before it had its answer. Nobody is sent it.
const CLIENT_CLOSED: StatusCode = match StatusCode::from_u16(499) {
    Ok(status) => status,
    Err(_) => StatusCode::REQUEST_TIMEOUT,
};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It has its answer.
    Done,
    /// It has its answer, cut by `max_tokens` or the end of the context.
    Length,
    /// The client went away.
    Cancelled,
    /// The server failed on it.
    Failed,
    /// The server did not take it.
    Refused,
}

impl Outcome {
    /// In the order of their declaration.
    pub(crate) const ALL: [Self; 5] =
        [Self::Done, Self::Length, Self::Cancelled, Self::Failed, Self::Refused];

    /// In logs and labels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Refused => "refused",
        }
    }

    /// Of an answer that was delivered whole.
    fn of(status: StatusCode) -> Self {
        match status {
            // Overloaded, loading, draining: said before anything was begun.
            StatusCode::SERVICE_UNAVAILABLE => Self::Refused,
            _ if status.is_server_error() => Self::Failed,
            _ if status.is_client_error() => Self::Refused,
            _ => Self::Done,
        }
    }
}

/// What a request's sequences came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Work {
    /// Tokens of the prompts that were taken up.
    pub(crate) prompt_tokens: u64,
    /// Of these, taken from a cache.
    pub(crate) cached_tokens: u64,
    /// Tokens generated; of a cancelled request, those delivered.
    pub(crate) generated_tokens: u64,
    /// The shortest wait of a sequence for its first step.
    pub(crate) queue: Option<Duration>,
    /// From submission to the first output.
    pub(crate) first_token: Option<Duration>,
    /// How they ended.
    pub(crate) outcome: Outcome,
}

/// What is known of a request so far. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RequestLog(Arc<Known>);

#[derive(Debug)]
struct Known {
    id: HeaderValue,
    started: Instant,
    method: &'static str,
    /// The pattern, not the path: a bounded set, and nothing a client wrote.
    route: Option<MatchedPath>,
    trace: Option<TraceParent>,
    span: Span,
    told: Mutex<Told>,
}

/// What others tell.
#[derive(Debug, Default)]
struct Told {
    key: Option<Box<str>>,
    model: Option<Box<str>>,
    work: Option<Work>,
}

impl RequestLog {
    pub(super) fn begin(request: &Request, id: HeaderValue) -> Self {
        let text = id.to_str().unwrap_or_default();
        // At the level of errors, so that every line within it carries the id, whatever is logged.
        let span = tracing::error_span!("request", id = text);
        let trace = TraceParent::of(request.headers());
        if let Some(trace) = trace {
            spans::annotate(&span, |data| data.continue_from(trace));
        }
        Self(Arc::new(Known {
            started: Instant::now(),
            method: known_method(request.method()),
            route: request.extensions().get::<MatchedPath>().cloned(),
            trace,
            span,
            told: Mutex::default(),
            id,
        }))
    }

    /// The request's id.
    pub fn id(&self) -> &str {
        self.0.id.to_str().unwrap_or_default()
    }

    /// The id of the key that the request came with; never the key.
    pub fn set_key(&self, id: &str) {
        self.told().key = Some(id.into());
    }

    /// The model that works on it.
    pub(crate) fn set_model(&self, id: &str) {
        self.told().model = Some(id.into());
    }

    /// What it came to, once its sequences are over.
    pub(crate) fn set_work(&self, work: Work) {
        self.told().work = Some(work);
    }

    pub(super) fn span(&self) -> &Span {
        &self.0.span
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.0.started.elapsed()
    }

    fn route(&self) -> &str {
        self.0.route.as_ref().map_or("unmatched", MatchedPath::as_str)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's entry in the log. Written when the answer is complete, or else when this is dropped.
pub(super) struct Entry {
    log: RequestLog,
    state: AppState,
    status: StatusCode,
    error: Option<ErrorName>,
    written: bool,
}

impl Entry {
    pub(super) fn begin(log: RequestLog, state: AppState) -> Self {
        state.metrics().begin_request();
        Self { log, state, status: CLIENT_CLOSED, error: None, written: false }
    }

    /// Leaves the rest to the response's body.
    pub(super) fn follow(mut self, response: Response) -> Response {
        self.status = response.status();
        self.error = response.extensions().get::<ErrorName>().copied();
        // What asked for no body gets none, and nothing reads it to its end.
        if response.body().is_end_stream() || self.log.0.method == "HEAD" {
            self.write(true);
        }
        response.map(|body| Body::new(Logged { body, entry: self }))
    }

    fn write(&mut self, complete: bool) {
        if std::mem::replace(&mut self.written, true) {
            return;
        }
        let log = &self.log;
        let told = std::mem::take(&mut *log.told());
        let outcome = match told.work {
            Some(work) => work.outcome,
            None if complete => Outcome::of(self.status),
            None => Outcome::Cancelled,
        };
        let metrics = self.state.metrics();
        metrics.end_request(log.route(), log.0.method, self.status);
        if log.0.method == "POST" && WORK.contains(&log.route()) {
            metrics.count_outcome(outcome);
        }
        if let Some(work) = told.work {
            metrics.count_tokens(work.prompt_tokens, work.cached_tokens, work.generated_tokens);
        }
        self.line(&told, outcome);
        self.export(&told, outcome);
    }

    fn line(&self, told: &Told, outcome: Outcome) {
        let known = &*self.log.0;
        let (route, work) = (self.log.route(), told.work.as_ref());
        let trace_id = known.trace.map(|trace| format!("{:032x}", trace.trace));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "m40llm::request",
                    id = self.log.id(),
                    key = told.key.as_deref(),
                    model = told.model.as_deref(),
                    method = known.method,
                    route,
                    status = self.status.as_u16(),
                    error = self.error.map(|error| error.0),
                    prompt_tokens = work.map(|w| w.prompt_tokens),
                    cached_tokens = work.map(|w| w.cached_tokens),
                    generated_tokens = work.map(|w| w.generated_tokens),
                    queue_ms = work.and_then(|w| w.queue).map(milliseconds),
                    ttft_ms = work.and_then(|w| w.first_token).map(milliseconds),
                    duration_ms = milliseconds(self.log.elapsed()),
                    outcome = outcome.name(),
                    trace_id = trace_id.as_deref(),
                    "request"
                )
            };
        }
        // Probes and scrapers come every few seconds, and say something only when they fail.
        if matches!(route, "/health" | "/metrics") && self.status.is_success() {
            line!(debug);
        } else {
            line!(info);
        }
    }

    /// The request's span, where spans are exported.
    fn export(&self, told: &Told, outcome: Outcome) {
        let known = &*self.log.0;
        spans::annotate(&known.span, |span| {
            span.rename(format!("{} {}", known.method, self.log.route()));
            span.set("http.request.method", known.method);
            span.set("http.route", self.log.route());
            span.set("http.response.status_code", i64::from(self.status.as_u16()));
            span.set("m40llm.outcome", outcome.name());
            if let Some(key) = &told.key {
                span.set("m40llm.key_id", &**key);
            }
            if let Some(model) = &told.model {
                span.set("gen_ai.request.model", &**model);
            }
            if let Some(work) = &told.work {
                span.set("gen_ai.usage.input_tokens", work.prompt_tokens as i64);
                span.set("gen_ai.usage.output_tokens", work.generated_tokens as i64);
            }
            if outcome == Outcome::Failed {
                span.fail(self.error.map_or("server_error", |error| error.0));
            }
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.write(false);
    }
}

/// Methods are free text in HTTP; unknown ones share a name.
fn known_method(method: &Method) -> &'static str {
    let known = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"];
    known.into_iter().find(|known| method == known).unwrap_or("other")
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

/// A response's body. Its parts are dropped in this order: what works on it first, then the entry, which so
/// knows the last of it.
struct Logged {
    body: Body,
    entry: Entry,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.entry.write(true);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_methods_share_a_name() {
        assert_eq!(known_method(&Method::PATCH), "PATCH");
        assert_eq!(known_method(&Method::from_bytes(b"BREW").unwrap()), "other");
    }

    #[test]
    fn outcomes_follow_the_status_where_nothing_worked() {
        for (status, outcome) in [
            (200, Outcome::Done),
            (304, Outcome::Done),
            (400, Outcome::Refused),
            (429, Outcome::Refused),
            (503, Outcome::Refused),
            (500, Outcome::Failed),
        ] {
            assert_eq!(Outcome::of(StatusCode::from_u16(status).unwrap()), outcome, "{status}");
        }
        assert_eq!(CLIENT_CLOSED.as_u16(), 499);
    }
}
