//! The values of settings: one parser each, whose error says what is allowed.

use std::{
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
    time::Duration,
};

use m40llm_engine::{DeviceId, KvType, PrefixCache, text::PromptFormat};
use tracing::level_filters::LevelFilter;

/// Where a server listens, and where `health` asks.
pub(crate) const DEFAULT_ADDR: &str = "127.0.0.1:58439";

/// `--backend`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Backend {
    /// A CUDA device where there is one, else the CPU.
    #[default]
    Auto,
    /// A CUDA device or an error.
    Cuda,
    /// The CPU.
    Cpu,
}

/// `HOST:PORT`, its form checked, the host not yet looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Addr(String);

impl Addr {
    /// The addresses the host stands for, at least one.
    pub(crate) fn resolve(&self) -> std::io::Result<Vec<SocketAddr>> {
        let found: Vec<_> = self.0.to_socket_addrs()?.collect();
        if found.is_empty() { Err(std::io::Error::other("the host has no address")) } else { Ok(found) }
    }
}

impl Addr {
    /// The host, an IPv6 address in brackets.
    #[cfg_attr(not(feature = "server"), allow(dead_code, reason = "run needs the server"))]
    pub(crate) fn host(&self) -> &str {
        self.0.rsplit_once(':').map_or(&self.0, |(host, _)| host)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `--cors-origins`: a list, in a type of its own as clap takes a plain `Vec` for a repeated flag.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Origins(pub(crate) Vec<String>);

impl Default for Addr {
    fn default() -> Self {
        Self(DEFAULT_ADDR.to_owned())
    }
}

fn choice<T: Copy>(s: &str, allowed: &[(&str, T)]) -> Result<T, String> {
    let found = allowed.iter().find(|(name, _)| *name == s).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let names: Vec<_> = allowed.iter().map(|(name, _)| *name).collect();
        format!("allowed are {}", names.join(", "))
    })
}

fn number(s: &str, from: usize, to: usize) -> Result<usize, String> {
    let n = s.parse().ok().filter(|n| (from..=to).contains(n));
    n.ok_or_else(|| format!("a whole number from {from} to {to} is allowed"))
}

/// `--backend`.
pub(crate) fn backend(s: &str) -> Result<Backend, String> {
    choice(s, &[("auto", Backend::Auto), ("cuda", Backend::Cuda), ("cpu", Backend::Cpu)])
}

/// `--kv-type`.
pub(crate) fn kv_type(s: &str) -> Result<KvType, String> {
    choice(s, &[("f16", KvType::F16), ("f32", KvType::F32), ("q8", KvType::Q8)])
}

/// `--prefix-cache`.
pub(crate) fn prefix_cache(s: &str) -> Result<PrefixCache, String> {
    let allowed =
        [("shared", PrefixCache::Shared), ("per-caller", PrefixCache::PerCaller), ("off", PrefixCache::Off)];
    choice(s, &allowed)
}

/// `--kv-memory`, in bytes.
pub(crate) fn kv_memory(s: &str) -> Result<u64, String> {
    let digits = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let unit = match s[digits..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => Some(1),
        "k" | "kb" => Some(1000),
        "m" | "mb" => Some(1_000_000),
        "g" | "gb" => Some(1_000_000_000),
        "kib" => Some(1 << 10),
        "mib" => Some(1 << 20),
        "gib" => Some(1u64 << 30),
        _ => None,
    };
    let bytes = s[..digits].parse::<u64>().ok().zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
    bytes
        .filter(|&n| n > 0)
        .ok_or_else(|| "a size such as 512MB, 4GiB or a number of bytes is allowed".into())
}

/// `--drain-timeout`: seconds, or with a unit.
pub(crate) fn drain_timeout(s: &str) -> Result<Duration, String> {
    let (digits, unit) = match s.strip_suffix(['s', 'm', 'h']) {
        Some(digits) if s.ends_with('m') => (digits, 60),
        Some(digits) if s.ends_with('h') => (digits, 3600),
        Some(digits) => (digits, 1),
        None => (s, 1),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let seconds = plain.then(|| digits.parse::<u32>().ok()).flatten();
    seconds
        .map(|n| Duration::from_secs(u64::from(n) * unit))
        .ok_or_else(|| "a time such as 30s, 5m or a number of seconds is allowed".into())
}

/// `--on-device-failure`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum OnDeviceFailure {
    /// End the process, with exit code 1.
    #[default]
    Exit,
    /// Stay, refuse requests, and say so in `/health`.
    Stay,
}

/// `--on-device-failure`.
pub(crate) fn on_device_failure(s: &str) -> Result<OnDeviceFailure, String> {
    choice(s, &[("exit", OnDeviceFailure::Exit), ("stay", OnDeviceFailure::Stay)])
}

/// `--log-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// `--log-format`.
pub(crate) fn log_format(s: &str) -> Result<LogFormat, String> {
    choice(s, &[("text", LogFormat::Text), ("json", LogFormat::Json)])
}

/// `--log-level`.
pub(crate) fn log_level(s: &str) -> Result<LevelFilter, String> {
    let allowed = [
        ("error", LevelFilter::ERROR),
        ("warn", LevelFilter::WARN),
        ("info", LevelFilter::INFO),
        ("debug", LevelFilter::DEBUG),
        ("trace", LevelFilter::TRACE),
    ];
    choice(s, &allowed)
}

/// `--otlp-endpoint`: a collector's URL, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OtlpEndpoint {
    /// `HOST:PORT`.
    pub(crate) authority: String,
    /// Where it takes traces, such as `/v1/traces`.
    pub(crate) path: String,
}

/// `--otlp-endpoint`.
pub(crate) fn otlp_endpoint(s: &str) -> Result<OtlpEndpoint, String> {
    let parse = || {
        let rest = s.strip_prefix("http://")?;
        let (authority, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = rest.bytes().all(|b| b.is_ascii_graphic() && !b"?#@\"\\".contains(&b));
        let authority = addr(authority).ok().filter(|_| plain && !authority.ends_with(":0"))?.to_string();
        let prefix = prefix.trim_end_matches('/');
        let slash = if prefix.is_empty() { "" } else { "/" };
        Some(OtlpEndpoint { authority, path: format!("{slash}{prefix}/v1/traces") })
    };
    parse().ok_or_else(|| {
        "a URL without TLS and with a port is allowed, such as http://127.0.0.1:4318; /v1/traces is added to it"
            .into()
    })
}

/// `--no-auth`, `--private-docs`, `--require-sm52`.
pub(crate) fn boolean(s: &str) -> Result<bool, String> {
    choice(s, &[("true", true), ("false", false), ("1", true), ("0", false)])
}

/// `--prompt-format`, here and on `generate`.
pub(crate) fn prompt_format(s: &str) -> Result<PromptFormat, String> {
    let allowed = [
        ("auto", PromptFormat::Auto),
        ("raw", PromptFormat::Raw),
        ("llama3-chat", PromptFormat::Llama3Chat),
        ("qwen-chat", PromptFormat::QwenChat),
        ("template", PromptFormat::Template),
    ];
    choice(s, &allowed)
}

/// `--addr`.
pub(crate) fn addr(s: &str) -> Result<Addr, String> {
    let well_formed = s.rsplit_once(':').is_some_and(|(host, port)| {
        let host_ok =
            !host.is_empty() && (!host.contains(':') || host.starts_with('[') && host.ends_with(']'));
        host_ok && port.parse::<u16>().is_ok()
    });
    if well_formed {
        Ok(Addr(s.to_owned()))
    } else {
        Err(format!("HOST:PORT is allowed, such as {DEFAULT_ADDR} or [::1]:58439, the port up to 65535"))
    }
}

/// `--model-alias`.
pub(crate) fn model_alias(s: &str) -> Result<String, String> {
    if s.is_empty() || s.chars().any(char::is_control) {
        return Err("a name of at least one character, none of them a control character, is allowed".into());
    }
    Ok(s.to_owned())
}

/// `--cors-origins`.
pub(crate) fn cors_origins(s: &str) -> Result<Origins, String> {
    let origins: Vec<_> = s.split(',').map(|origin| origin.trim().to_owned()).collect();
    let is_origin = |origin: &String| {
        let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
        origin == "*"
            || host.is_some_and(|h| !h.is_empty() && h.bytes().all(|b| b.is_ascii_graphic() && b != b'/'))
    };
    if origins.iter().all(is_origin) {
        return Ok(Origins(origins));
    }
    Err("origins such as https://app.example or http://localhost:3000, separated by commas, or * are allowed"
        .into())
}

/// `--device`.
pub(crate) fn device(s: &str) -> Result<DeviceId, String> {
    s.parse()
}

/// `--ctx-size`.
pub(crate) fn ctx_size(s: &str) -> Result<usize, String> {
    number(s, 1, 1 << 24)
}

/// `--threads`.
pub(crate) fn threads(s: &str) -> Result<usize, String> {
    number(s, 1, 1024)
}

/// `--max-connections`.
pub(crate) fn max_connections(s: &str) -> Result<usize, String> {
    number(s, 1, 1 << 20)
}

/// `--tls-cert`, `--tls-key`.
pub(crate) fn pem_file(s: &str) -> Result<PathBuf, String> {
    if s.is_empty() { Err("the path of a PEM file is allowed".into()) } else { Ok(PathBuf::from(s)) }
}

/// `--trace-kernels`.
pub(crate) fn trace_file(s: &str) -> Result<PathBuf, String> {
    if s.is_empty() { Err("the path of a file is allowed".into()) } else { Ok(PathBuf::from(s)) }
}

/// `--state-dir`.
pub(crate) fn state_dir(s: &str) -> Result<PathBuf, String> {
    if s.is_empty() { Err("the path of a directory is allowed".into()) } else { Ok(PathBuf::from(s)) }
}

/// `--max-batch`.
pub(crate) fn max_batch(s: &str) -> Result<usize, String> {
    number(s, 1, 512)
}

/// `--default-rpm`, `--default-tpm`, `--default-concurrency`.
pub(crate) fn key_limit(s: &str) -> Result<u32, String> {
    number(s, 1, u32::MAX as usize).map(|n| n as u32)
}

/// `--max-queue`.
pub(crate) fn max_queue(s: &str) -> Result<usize, String> {
    number(s, 1, 1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_to_drain_have_units() {
        for (s, seconds) in [("0", 0), ("45", 45), ("30s", 30), ("5m", 300), ("1h", 3600)] {
            assert_eq!(drain_timeout(s), Ok(Duration::from_secs(seconds)));
        }
        for bad in ["", "s", "-1s", "1.5s", "1d", "soon", "99999999999s"] {
            assert!(drain_timeout(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (s, bytes) in [("1", 1), ("512MB", 512_000_000), ("4GiB", 4 << 30), ("2 g", 2_000_000_000)] {
            assert_eq!(kv_memory(s), Ok(bytes));
        }
        for bad in ["", "0", "GB", "1.5GB", "-1", "4 bananas", "99999999999GiB"] {
            assert!(kv_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["127.0.0.1:0", "localhost:80", "[::1]:58439", "0.0.0.0:65535"] {
            assert!(addr(good).is_ok(), "{good}");
        }
        for bad in ["", "localhost", ":80", "127.0.0.1:65536", "::1:80", "a:b:80", "host:"] {
            assert!(addr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn collectors_are_plain_http() {
        let parts = |url: &str| otlp_endpoint(url).map(|e| format!("{} {}", e.authority, e.path));
        assert_eq!(parts("http://127.0.0.1:4318").as_deref(), Ok("127.0.0.1:4318 /v1/traces"));
        assert_eq!(parts("http://[::1]:4318/").as_deref(), Ok("[::1]:4318 /v1/traces"));
        assert_eq!(parts("http://tempo:80/otlp/").as_deref(), Ok("tempo:80 /otlp/v1/traces"));
        for bad in [
            "",
            "127.0.0.1:4318",
            "https://a:4318",
            "http://a",
            "http://:1",
            "http://a:0",
            "http://a:b",
            "http://user@a:1",
            "http://a:1/x?y",
            "http://a:1/x y",
            "http://a:1/\r\n",
        ] {
            assert!(parts(bad).is_err(), "{bad:?}");
        }
    }
}
