//! Request ids, timing, logs and Prometheus metrics. Prompts and keys never come here.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::Response,
};
use m40llm_engine::Stats;

use crate::{app::AppState, error::SHOULD_RETRY};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");

/// Log lines on stderr at `level` (`error`, `warn`, `info`, `debug`, `trace`, or filter directives).
/// Does nothing when logging is set up already.
pub fn init_logging(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .try_init();
}

/// Outermost layer: the request's id, its duration, a log line and a count.
pub(crate) async fn track(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(request.headers().get(&REQUEST_ID));
    let method = request.method().clone();
    // The pattern, not the path: a bounded set of labels, and nothing a client wrote.
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();

    let mut response = next.run(request).await;

    let (elapsed, status) = (started.elapsed(), response.status());
    let headers = response.headers_mut();
    tracing::info!(
        %method, route, status = status.as_u16(), ms = elapsed.as_millis() as u64,
        id = id.to_str().unwrap_or_default(), "request"
    );
    headers.insert(REQUEST_ID, id);
    headers.insert(PROCESSING_MS, HeaderValue::from(elapsed.as_millis() as u64));
    if status.is_client_error() && !may_retry(status) {
        headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
    }
    state.metrics().count_request(&route, method.as_str(), status);
    response
}

/// Client errors that may pass when tried again; the SDKs retry them by themselves.
fn may_retry(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS)
}

/// The caller's id when it is short and plain enough to be put into logs, else a new one.
fn request_id(given: Option<&HeaderValue>) -> HeaderValue {
    let sane = |v: &&HeaderValue| {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_.:/+=@".contains(b);
        (1..=128).contains(&v.len()) && v.as_bytes().iter().all(plain)
    };
    given.filter(sane).cloned().unwrap_or_else(|| {
        let id = format!("req_{}", uuid::Uuid::new_v4().simple());
        HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("req"))
    })
}

/// Upper bounds of the histograms' buckets, in seconds.
const BUCKETS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];

/// A Prometheus histogram of seconds.
#[derive(Debug, Default)]
struct Histogram {
    /// Observations up to each bound, not cumulated; the last has no bound.
    buckets: [AtomicU64; BUCKETS.len() + 1],
    sum_micros: AtomicU64,
}

impl Histogram {
    fn observe(&self, value: Duration) {
        let seconds = value.as_secs_f64();
        let bucket = BUCKETS.iter().position(|&bound| seconds <= bound).unwrap_or(BUCKETS.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(value.as_micros() as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut count = 0;
        for (i, bucket) in self.buckets.iter().enumerate() {
            count += bucket.load(Ordering::Relaxed);
            let bound = BUCKETS.get(i).map_or("+Inf".to_owned(), ToString::to_string);
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let sum = self.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(out, "{name}_sum {sum}\n{name}_count {count}");
    }
}

/// What the gateway counts. The engine counts for itself, see [`Stats`].
#[derive(Debug, Default)]
pub struct Metrics {
    /// By route, method and status.
    requests: Mutex<BTreeMap<(String, String, u16), u64>>,
    time_to_first_token: Histogram,
    generation_time: Histogram,
}

impl Metrics {
    fn count_request(&self, route: &str, method: &str, status: StatusCode) {
        // Methods are free text in HTTP; unknown ones share a label.
        let method = if ["GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"].contains(&method) {
            method
        } else {
            "other"
        };
        let key = (route.to_owned(), method.to_owned(), status.as_u16());
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
    }

    /// From the request's submission to its first output.
    pub(crate) fn observe_first_token(&self, after: Duration) {
        self.time_to_first_token.observe(after);
    }

    /// From the request's submission to its last output.
    pub(crate) fn observe_generation(&self, after: Duration) {
        self.generation_time.observe(after);
    }

    /// The Prometheus text format, version 0.0.4.
    pub(crate) fn render(&self, stats: Stats) -> String {
        let mut out = String::with_capacity(4096);
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        out.push_str("# HELP m40llm_requests_total HTTP requests.\n# TYPE m40llm_requests_total counter\n");
        for ((route, method, status), count) in requests.iter() {
            let _ = writeln!(
                out,
                "m40llm_requests_total{{route=\"{route}\",method=\"{method}\",status=\"{status}\"}} {count}"
            );
        }
        drop(requests);
        let mut one = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
        };
        one("m40llm_prompt_tokens_total", "counter", "Prompt tokens processed.", stats.prompt_tokens);
        one("m40llm_generated_tokens_total", "counter", "Tokens generated.", stats.generated_tokens);
        one("m40llm_steps_total", "counter", "Steps of the model.", stats.steps);
        one("m40llm_sequences_running", "gauge", "Sequences in the batch.", stats.running as u64);
        one("m40llm_sequences_waiting", "gauge", "Sequences waiting for a place.", stats.waiting as u64);
        one("m40llm_kv_blocks_used", "gauge", "KV cache blocks in use.", stats.kv_blocks_used as u64);
        one("m40llm_kv_blocks", "gauge", "KV cache blocks in all.", stats.kv_blocks_total as u64);
        let launches = stats.kernel_launches;
        one(
            "m40llm_kernel_launches_total",
            "counter",
            "Kernels launched on the device; 0 on a CPU.",
            launches,
        );
        let syncs = stats.device_syncs;
        one(
            "m40llm_device_syncs_total",
            "counter",
            "Times the host waited for the device; 0 on a CPU.",
            syncs,
        );
        self.time_to_first_token.write(
            &mut out,
            "m40llm_time_to_first_token_seconds",
            "From a request's submission to its first output.",
        );
        self.generation_time.write(
            &mut out,
            "m40llm_generation_seconds",
            "From a request's submission to its last output.",
        );
        let _ = writeln!(
            out,
            "# HELP m40llm_build_info The running version.\n# TYPE m40llm_build_info gauge\n\
             m40llm_build_info{{version=\"{}\"}} 1",
            env!("CARGO_PKG_VERSION")
        );
        out
    }
}

/// The content type of [`Metrics::render`].
pub(crate) const METRICS_TYPE: (HeaderName, HeaderValue) =
    (header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sane_ids_are_kept() {
        let keep = HeaderValue::from_static("trace-1:a/b");
        assert_eq!(request_id(Some(&keep)), keep);
        for bad in ["", "a b", "x\"y", &"a".repeat(129)] {
            let id = request_id(Some(&HeaderValue::from_str(bad).unwrap()));
            assert!(id.to_str().unwrap().starts_with("req_"), "{bad:?} was kept");
        }
    }

    #[test]
    fn histograms_cumulate() {
        let metrics = Metrics::default();
        for ms in [5, 20, 20, 700_000] {
            metrics.observe_first_token(Duration::from_millis(ms));
        }
        let stats = Stats { running: 2, kernel_launches: 5, device_syncs: 3, ..Stats::default() };
        let text = metrics.render(stats);
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"0.01\"} 1\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"0.025\"} 3\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"120\"} 3\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"+Inf\"} 4\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_count 4\n"));
        assert!(text.contains("m40llm_sequences_running 2\n"));
        assert!(
            text.contains("# TYPE m40llm_kernel_launches_total counter\nm40llm_kernel_launches_total 5\n")
        );
        assert!(text.contains("# TYPE m40llm_device_syncs_total counter\nm40llm_device_syncs_total 3\n"));
    }

    #[test]
    fn requests_are_counted_by_route_and_status() {
        let metrics = Metrics::default();
        metrics.count_request("/health", "GET", StatusCode::OK);
        metrics.count_request("/health", "GET", StatusCode::OK);
        metrics.count_request("unmatched", "BREW", StatusCode::NOT_FOUND);
        let text = metrics.render(Stats::default());
        assert!(text.contains("m40llm_requests_total{route=\"/health\",method=\"GET\",status=\"200\"} 2\n"));
        assert!(text.contains("{route=\"unmatched\",method=\"other\",status=\"404\"} 1\n"));
    }
}
