//! What the gateway counts, and the page that Prometheus reads. docs/METRICS.md explains each; a test holds
//! the two equal.
//!
//! Labels are bounded: routes, methods, statuses and words of ours, never what a client wrote. Keys have no
//! labels either: a server may have thousands, and their usage is in the accounts.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use m40llm_engine::{Distribution, Stats};

use super::{otlp, request_log::Outcome};
use crate::version;

/// Why a request was refused, beside what is wrong with its fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No key came along.
    MissingKey,
    /// The key is no key of this server.
    InvalidKey,
    /// The key's time is over, or has not come.
    ExpiredKey,
    /// The key was revoked.
    RevokedKey,
    /// The key lacks the route's scope.
    InsufficientScope,
    /// The key may not use this model.
    ModelNotAllowed,
    /// The key may not use so long a context.
    ContextNotAllowed,
    /// Over the key's requests per minute.
    RequestsPerMinute,
    /// Over the key's tokens per minute.
    TokensPerMinute,
    /// The key has as many requests running as it may.
    ConcurrentRequests,
    /// Too many failed authentications from the address.
    FailedAuthentications,
}

impl Refusal {
    /// Each with its value of the label `reason`, in the order of their declaration.
    const ALL: [(Self, &'static str); 11] = [
        (Self::MissingKey, "missing_key"),
        (Self::InvalidKey, "invalid_key"),
        (Self::ExpiredKey, "expired_key"),
        (Self::RevokedKey, "revoked_key"),
        (Self::InsufficientScope, "insufficient_scope"),
        (Self::ModelNotAllowed, "model_not_allowed"),
        (Self::ContextNotAllowed, "context_not_allowed"),
        (Self::RequestsPerMinute, "requests_per_minute"),
        (Self::TokensPerMinute, "tokens_per_minute"),
        (Self::ConcurrentRequests, "concurrent_requests"),
        (Self::FailedAuthentications, "failed_authentications"),
    ];
}

/// Upper bounds of the buckets for whole requests, in seconds.
const LONG: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
/// The same for what happens between two tokens.
const SHORT: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];

/// A Prometheus histogram of seconds.
#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64; 12],
    /// Observations up to each bound, not cumulated; the last has no bound.
    buckets: [AtomicU64; 13],
    sum_micros: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64; 12]) -> Self {
        Self { bounds, buckets: Default::default(), sum_micros: AtomicU64::new(0) }
    }

    fn observe(&self, value: Duration) {
        let seconds = value.as_secs_f64();
        let bucket = self.bounds.iter().position(|&bound| seconds <= bound).unwrap_or(self.bounds.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_micros.fetch_add(value.as_micros() as u64, Ordering::Relaxed);
    }
}

/// What the gateway counts. The engine counts for itself, see [`Stats`].
#[derive(Debug)]
pub struct Metrics {
    /// By route, method and status.
    requests: Mutex<BTreeMap<(String, &'static str, u16), u64>>,
    in_flight: AtomicU64,
    outcomes: [AtomicU64; Outcome::ALL.len()],
    refused: [AtomicU64; Refusal::ALL.len()],
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    reloads: [AtomicU64; 2],
    queue: Histogram,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    generation_time: Histogram,
    started: SystemTime,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Mutex::default(),
            in_flight: AtomicU64::new(0),
            outcomes: Default::default(),
            refused: Default::default(),
            prompt_tokens: AtomicU64::new(0),
            cached_tokens: AtomicU64::new(0),
            generated_tokens: AtomicU64::new(0),
            reloads: Default::default(),
            queue: Histogram::new(&LONG),
            time_to_first_token: Histogram::new(&LONG),
            inter_token: Histogram::new(&SHORT),
            generation_time: Histogram::new(&LONG),
            started: SystemTime::now(),
        }
    }
}

/// What the page says that is not counted here.
pub(crate) struct Gauges {
    /// The engine's numbers.
    pub(crate) stats: Stats,
    /// Whether requests would be served.
    pub(crate) ready: bool,
}

impl Metrics {
    pub(super) fn begin_request(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// A request has ended, however it did.
    pub(super) fn end_request(&self, route: &str, method: &'static str, status: StatusCode) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let key = (route.to_owned(), method, status.as_u16());
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
    }

    /// A request for work has ended.
    pub(super) fn count_outcome(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A request was refused for what it is allowed, or who sent it.
    pub fn count_refused(&self, reason: Refusal) {
        self.refused[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// The configuration was read again, or could not be.
    pub fn count_reload(&self, ok: bool) {
        self.reloads[usize::from(ok)].fetch_add(1, Ordering::Relaxed);
    }

    /// Tokens of a request that has ended, as its answer counts them.
    pub(crate) fn count_tokens(&self, prompt: u64, cached: u64, generated: u64) {
        self.prompt_tokens.fetch_add(prompt, Ordering::Relaxed);
        self.cached_tokens.fetch_add(cached, Ordering::Relaxed);
        self.generated_tokens.fetch_add(generated, Ordering::Relaxed);
    }

    /// From a sequence's submission until a step took it up.
    pub(crate) fn observe_queue(&self, waited: Duration) {
        self.queue.observe(waited);
    }

    /// From the request's submission to its first output.
    pub(crate) fn observe_first_token(&self, after: Duration) {
        self.time_to_first_token.observe(after);
    }

    /// Between two outputs of a sequence.
    pub(crate) fn observe_inter_token(&self, gap: Duration) {
        self.inter_token.observe(gap);
    }

    /// From the request's submission to a sequence's end.
    pub(crate) fn observe_generation(&self, after: Duration) {
        self.generation_time.observe(after);
    }

    /// The Prometheus text format, version 0.0.4.
    pub(crate) fn render(&self, gauges: &Gauges) -> String {
        let mut page = Page(String::with_capacity(16 << 10));
        self.requests(&mut page);
        engine(&mut page, gauges);
        let spans = otlp::counts();
        page.many(
            "m40llm_spans_total",
            "counter",
            "Spans for the OTLP collector: sent, or dropped because it did not take them in time.",
        );
        page.sample("m40llm_spans_total", "result", "sent", spans.sent);
        page.sample("m40llm_spans_total", "result", "dropped", spans.dropped);
        page.many(
            "m40llm_config_reloads_total",
            "counter",
            "Times that SIGHUP had the configuration read again.",
        );
        for (result, count) in ["failed", "ok"].into_iter().zip(&self.reloads) {
            page.sample("m40llm_config_reloads_total", "result", result, count.load(Ordering::Relaxed));
        }
        build_info(&mut page);
        let started = self.started.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        page.one("process_start_time_seconds", "gauge", "Unix time at which the server started.", started);
        if let Some(bytes) = resident_bytes() {
            page.one("process_resident_memory_bytes", "gauge", "Memory that the process holds.", bytes);
        }
        page.0
    }

    /// What is counted of requests.
    fn requests(&self, page: &mut Page) {
        let name = "m40llm_requests_total";
        page.many(
            name,
            "counter",
            "HTTP requests that have ended; status 499: the client went before there was an answer.",
        );
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        for ((route, method, status), count) in requests.iter() {
            let _ = writeln!(
                page.0,
                "{name}{{route=\"{route}\",method=\"{method}\",status=\"{status}\"}} {count}"
            );
        }
        drop(requests);
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        page.one(
            "m40llm_requests_in_flight",
            "gauge",
            "HTTP requests whose answer is not complete.",
            load(&self.in_flight),
        );
        page.many("m40llm_outcomes_total", "counter", "Requests for work that have ended, by how.");
        for (outcome, count) in Outcome::ALL.into_iter().zip(&self.outcomes) {
            page.sample("m40llm_outcomes_total", "outcome", outcome.name(), load(count));
        }
        page.many(
            "m40llm_refused_total",
            "counter",
            "Requests refused for their key, its limits or their address.",
        );
        for ((_, reason), count) in Refusal::ALL.into_iter().zip(&self.refused) {
            page.sample("m40llm_refused_total", "reason", reason, load(count));
        }
        page.many("m40llm_tokens_total", "counter", "Tokens of requests that have ended, as `usage` counts them; of cancelled ones, what was delivered.");
        for (kind, count) in [
            ("prompt", &self.prompt_tokens),
            ("cached", &self.cached_tokens),
            ("generated", &self.generated_tokens),
        ] {
            page.sample("m40llm_tokens_total", "kind", kind, load(count));
        }
        page.histogram(
            "m40llm_queue_seconds",
            "From a sequence's submission until a step took it up.",
            &self.queue,
        );
        page.histogram(
            "m40llm_time_to_first_token_seconds",
            "From a request's submission to its first output.",
            &self.time_to_first_token,
        );
        page.histogram("m40llm_inter_token_seconds", "Between two outputs of a sequence.", &self.inter_token);
        page.histogram(
            "m40llm_generation_seconds",
            "From a request's submission to the end of a sequence.",
            &self.generation_time,
        );
    }
}

/// Which build runs; a revision that is not known is empty, which Prometheus takes for absent.
fn build_info(page: &mut Page) {
    let name = "m40llm_build_info";
    page.many(name, "gauge", "Always 1; the labels say which build runs.");
    let (version, revision, cuda) =
        (version::VERSION, version::REVISION.unwrap_or(""), cfg!(feature = "cuda"));
    let _ = writeln!(page.0, "{name}{{version=\"{version}\",revision=\"{revision}\",cuda=\"{cuda}\"}} 1");
}

/// What the engine counts.
fn engine(page: &mut Page, Gauges { stats, ready }: &Gauges) {
    page.one("m40llm_ready", "gauge", "1 while requests are served, else 0.", u64::from(*ready));
    page.one(
        "m40llm_prompt_tokens_total",
        "counter",
        "Prompt tokens processed by the engine.",
        stats.prompt_tokens,
    );
    page.one(
        "m40llm_generated_tokens_total",
        "counter",
        "Tokens generated by the engine.",
        stats.generated_tokens,
    );
    page.one("m40llm_steps_total", "counter", "Steps of the model.", stats.steps);
    page.one("m40llm_sequences_running", "gauge", "Sequences in the batch.", stats.running);
    page.one("m40llm_sequences_waiting", "gauge", "Sequences waiting for a place.", stats.waiting);
    page.one(
        "m40llm_sequences_paused",
        "gauge",
        "Sequences whose key has no tokens left for now.",
        stats.paused,
    );
    page.one("m40llm_kv_blocks_used", "gauge", "KV cache blocks in use.", stats.kv_blocks_used);
    page.one(
        "m40llm_kv_blocks_cached",
        "gauge",
        "KV cache blocks that nobody uses and that are kept for the prompts they hold.",
        stats.kv_blocks_cached,
    );
    page.one(
        "m40llm_prefix_cached_tokens_total",
        "counter",
        "Prompt tokens taken from the prefix cache.",
        stats.cached_tokens,
    );
    page.one(
        "m40llm_preemptions_total",
        "counter",
        "Times a sequence gave its blocks back, to be computed again.",
        stats.preemptions,
    );
    page.distribution("m40llm_step_seconds", "Time of a step.", &stats.step_seconds, 0.001);
    page.distribution("m40llm_step_sequences", "Sequences in a step.", &stats.step_sequences, 1.0);
    page.one("m40llm_kv_blocks", "gauge", "KV cache blocks in all.", stats.kv_blocks_total);
    page.one(
        "m40llm_kernel_launches_total",
        "counter",
        "Kernels launched on the device; 0 on a CPU.",
        stats.kernel_launches,
    );
    page.one(
        "m40llm_device_syncs_total",
        "counter",
        "Times the host waited for the device: once a step, and for each sequence that is sampled from whole rows of logits; 0 on a CPU.",
        stats.device_syncs,
    );
}

/// The page while it is written.
struct Page(String);

impl Page {
    /// A family whose samples follow.
    fn many(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A sample of the family above, with one label.
    fn sample(&mut self, name: &str, label: &str, value: &str, number: u64) {
        let _ = writeln!(self.0, "{name}{{{label}=\"{value}\"}} {number}");
    }

    /// A family of one sample without labels.
    fn one(&mut self, name: &str, kind: &str, help: &str, number: impl Display) {
        self.many(name, kind, help);
        let _ = writeln!(self.0, "{name} {number}");
    }

    /// A histogram of the engine's, whose bounds are powers of two of `unit`.
    fn distribution(&mut self, name: &str, help: &str, distribution: &Distribution, unit: f64) {
        self.many(name, "histogram", help);
        let mut count = 0;
        for (i, bucket) in distribution.buckets.iter().enumerate() {
            count += bucket;
            let last = i + 1 == distribution.buckets.len();
            let bound = if last { "+Inf".to_owned() } else { (unit * f64::from(1u32 << i)).to_string() };
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(self.0, "{name}_sum {}\n{name}_count {count}", distribution.sum);
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.many(name, "histogram", help);
        let mut count = 0;
        for (i, bucket) in histogram.buckets.iter().enumerate() {
            count += bucket.load(Ordering::Relaxed);
            let bound = histogram.bounds.get(i).map_or("+Inf".to_owned(), ToString::to_string);
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let sum = histogram.sum_micros.load(Ordering::Relaxed) as f64 / 1e6;
        let _ = writeln!(self.0, "{name}_sum {sum}\n{name}_count {count}");
    }
}

/// Linux counts it in kilobytes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(kilobytes.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The content type of [`Metrics::render`].
pub(crate) const METRICS_TYPE: (HeaderName, HeaderValue) =
    (header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"));

#[cfg(test)]
mod tests {
    use super::*;

    fn render(metrics: &Metrics, stats: &Stats) -> String {
        metrics.render(&Gauges { stats: *stats, ready: true })
    }

    #[test]
    fn histograms_cumulate() {
        let metrics = Metrics::default();
        for ms in [5, 20, 20, 700_000] {
            metrics.observe_first_token(Duration::from_millis(ms));
        }
        metrics.observe_inter_token(Duration::from_micros(1500));
        let mut stats = Stats { running: 2, kernel_launches: 5, device_syncs: 3, ..Stats::default() };
        stats.step_seconds.buckets[1] = 3;
        stats.step_seconds.buckets[13] = 1;
        stats.step_seconds.sum = 99.5;
        let text = render(&metrics, &stats);
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"0.01\"} 1\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"0.025\"} 3\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"120\"} 3\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_bucket{le=\"+Inf\"} 4\n"));
        assert!(text.contains("m40llm_time_to_first_token_seconds_count 4\n"));
        assert!(text.contains("m40llm_inter_token_seconds_bucket{le=\"0.001\"} 0\n"));
        assert!(text.contains("m40llm_inter_token_seconds_bucket{le=\"0.002\"} 1\n"));
        assert!(text.contains("m40llm_sequences_running 2\n"));
        assert!(text.contains("m40llm_step_seconds_bucket{le=\"0.001\"} 0\n"));
        assert!(text.contains("m40llm_step_seconds_bucket{le=\"0.002\"} 3\n"));
        assert!(text.contains("m40llm_step_seconds_bucket{le=\"4.096\"} 3\n"));
        assert!(text.contains("m40llm_step_seconds_bucket{le=\"+Inf\"} 4\n"));
        assert!(text.contains("m40llm_step_seconds_sum 99.5\nm40llm_step_seconds_count 4\n"));
        assert!(
            text.contains("# TYPE m40llm_kernel_launches_total counter\nm40llm_kernel_launches_total 5\n")
        );
        assert!(text.contains("# TYPE m40llm_device_syncs_total counter\nm40llm_device_syncs_total 3\n"));
    }

    #[test]
    fn requests_are_counted_by_route_and_status() {
        let metrics = Metrics::default();
        for _ in 0..4 {
            metrics.begin_request();
        }
        metrics.end_request("/health", "GET", StatusCode::OK);
        metrics.end_request("/health", "GET", StatusCode::OK);
        metrics.end_request("unmatched", "other", StatusCode::NOT_FOUND);
        let text = render(&metrics, &Stats::default());
        assert!(text.contains("m40llm_requests_total{route=\"/health\",method=\"GET\",status=\"200\"} 2\n"));
        assert!(text.contains("{route=\"unmatched\",method=\"other\",status=\"404\"} 1\n"));
        assert!(text.contains("\nm40llm_requests_in_flight 1\n"));
    }

    #[test]
    fn every_reason_and_outcome_has_its_own_counter() {
        let metrics = Metrics::default();
        for (i, (reason, name)) in Refusal::ALL.into_iter().enumerate() {
            for _ in 0..=i {
                metrics.count_refused(reason);
            }
            let line = format!("\nm40llm_refused_total{{reason=\"{name}\"}} {}\n", i + 1);
            assert!(render(&metrics, &Stats::default()).contains(&line), "{line}");
        }
        for (i, outcome) in Outcome::ALL.into_iter().enumerate() {
            for _ in 0..=i {
                metrics.count_outcome(outcome);
            }
            let line = format!("\nm40llm_outcomes_total{{outcome=\"{}\"}} {}\n", outcome.name(), i + 1);
            assert!(render(&metrics, &Stats::default()).contains(&line), "{line}");
        }
    }

    #[test]
    fn memory_is_known_on_linux() {
        assert!(resident_bytes().unwrap() > 1 << 20);
    }
}
