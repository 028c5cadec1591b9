//! Request ids, logs, spans and metrics. Prompts and keys never come here.
//!
//! | module | holds |
//! | --- | --- |
//! | `logging` | log lines on stderr |
//! | `request_log` | one line a request, at its end |
//! | `metrics` | counters and the page that Prometheus reads |
//! | `spans`, `otlp` | spans, and their way to a collector |
//! | `trace_context` | the trace that a caller is in |

mod logging;
mod metrics;
mod otlp;
mod request_log;
mod spans;
mod trace_context;

use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode},
    middleware::Next,
    response::Response,
};
use tracing::Instrument as _;

use self::request_log::Entry;
use crate::{app::AppState, error::SHOULD_RETRY};

pub use self::{
    logging::{LogConfig, LogFormat, Logging, init_logging},
    metrics::{Metrics, Refusal},
    otlp::Collector,
    request_log::RequestLog,
};
pub(crate) use self::{
    metrics::{Gauges, METRICS_TYPE},
    request_log::{Outcome, Work},
};

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");

/// Outermost layer: the request's id, span and entry in the log, its duration, and counts.
pub(crate) async fn track(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers().get(&REQUEST_ID));
    let log = RequestLog::begin(&request, id.clone());
    // What is within finds the same id.
    request.headers_mut().insert(REQUEST_ID, id.clone());
    request.extensions_mut().insert(log.clone());
    // Dropped without an answer when the client goes before there is one, after what works on it.
    let entry = Entry::begin(log.clone(), state);

    let mut response = next.run(request).instrument(log.span().clone()).await;

    let status = response.status();
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    headers.insert(PROCESSING_MS, HeaderValue::from(log.elapsed().as_millis() as u64));
    if status.is_client_error() && !may_retry(status) {
        headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    entry.follow(response)
}

/// Client errors that may pass when tried again; the SDKs retry them by themselves.
fn may_retry(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS)
}

/// The caller's id when it is short and plain enough to be put into logs, else a new one.
fn request_id(given: Option<&HeaderValue>) -> HeaderValue {
    let sane = |v: &&HeaderValue| {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_.:/+=@".contains(b);
        // Somebody's key is no id, wherever it was put.
        let secret = v.as_bytes().windows(3).any(|w| w == b"sk-");
        (1..=128).contains(&v.len()) && v.as_bytes().iter().all(plain) && !secret
    };
    given.filter(sane).cloned().unwrap_or_else(|| {
        let id = format!("req_{}", uuid::Uuid::new_v4().simple());
        HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("req"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sane_ids_are_kept() {
        let keep = HeaderValue::from_static("trace-1:a/b");
        assert_eq!(request_id(Some(&keep)), keep);
        for bad in ["", "a b", "x\"y", "sk-m40-e30.e30.c2ln", &"a".repeat(129)] {
            let id = request_id(Some(&HeaderValue::from_str(bad).unwrap()));
            assert!(id.to_str().unwrap().starts_with("req_"), "{bad:?} was kept");
        }
    }
}
