//! `x-ratelimit-*`, as OpenAI writes them.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue};

use super::bucket::Bucket;

/// Names of a bucket's limit, what remains of it, and when it will be full.
type Names = [HeaderName; 3];

const REQUESTS: Names = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: Names = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Writes how these buckets stand.
pub(super) fn write(requests: Option<&Bucket>, tokens: Option<&Bucket>, headers: &mut HeaderMap) {
    for (bucket, [limit, remaining, reset]) in [(requests, REQUESTS), (tokens, TOKENS)] {
        let Some(bucket) = bucket else { continue };
        headers.insert(limit, HeaderValue::from(bucket.limit()));
        headers.insert(remaining, HeaderValue::from(bucket.remaining()));
        let text = duration(Duration::from_nanos(bucket.reset()));
        headers.extend(HeaderValue::try_from(text).ok().map(|text| (reset, text)));
    }
}

/// A time in whole milliseconds, rounded up: `0s`, `120ms`, `1s`, `2.5s`, `6m0s`, `1h0m2.25s`.
pub(super) fn duration(time: Duration) -> String {
    let ms = time.as_nanos().div_ceil(1_000_000);
    if (1..1000).contains(&ms) {
        return format!("{ms}ms");
    }
    let (hours, minutes) = (ms / 3_600_000, ms / 60_000 % 60);
    let seconds = format!("{}.{:03}", ms / 1000 % 60, ms % 1000);
    let seconds = seconds.trim_end_matches('0').trim_end_matches('.');
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_openais() {
        for (nanos, text) in [
            (0, "0s"),
            (1, "1ms"),
            (6_400_000, "7ms"),
            (120_000_000, "120ms"),
            (999_000_001, "1s"),
            (1_000_000_000, "1s"),
            (8_640_000_000, "8.64s"),
            (10_000_000_000, "10s"),
            (60_000_000_000, "1m0s"),
            (90_951_000_000, "1m30.951s"),
            (360_000_000_000, "6m0s"),
            (3_602_250_000_000, "1h0m2.25s"),
        ] {
            assert_eq!(duration(Duration::from_nanos(nanos)), text, "{nanos}");
        }
    }

    #[test]
    fn only_what_is_limited_is_told() {
        let mut headers = HeaderMap::new();
        write(None, None, &mut headers);
        assert!(headers.is_empty());
        let mut bucket = Bucket::full(60, 0);
        bucket.spend(1).unwrap();
        write(None, Some(&bucket), &mut headers);
        let told = |name: &str| headers.get(name).map(|v| v.to_str().unwrap());
        assert_eq!(told("x-ratelimit-limit-tokens"), Some("60"));
        assert_eq!(told("x-ratelimit-remaining-tokens"), Some("59"));
        assert_eq!(told("x-ratelimit-reset-tokens"), Some("1s"));
        assert_eq!(headers.len(), 3);
    }
}
