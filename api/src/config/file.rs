//! The TOML file: its keys are the flags' names.

use std::path::Path;

use super::{
    ConfigError, one_line,
    values::{
        addr, backend, boolean, cors_origins, ctx_size, device, drain_timeout, key_limit, kv_memory, kv_type,
        log_format, log_level, max_batch, max_connections, max_queue, model_alias, on_device_failure,
        otlp_endpoint, pem_file, prefix_cache, prompt_format, state_dir, threads, trace_file,
    },
};

/// How a setting is written in TOML.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    /// A number, or a string.
    Name,
    Truth,
}

/// A TOML key: its name, how it is written, and the check of its value.
struct Key(&'static str, Kind, fn(&str) -> Result<(), String>);

/// Every key a TOML file may hold, whichever command reads it: one file serves them all.
const KEYS: &[Key] = &[
    Key("addr", Kind::Text, |s| addr(s).map(drop)),
    Key("model-alias", Kind::Text, |s| model_alias(s).map(drop)),
    Key("backend", Kind::Text, |s| backend(s).map(drop)),
    Key("device", Kind::Name, |s| device(s).map(drop)),
    Key("require-sm52", Kind::Truth, |s| boolean(s).map(drop)),
    Key("ctx-size", Kind::Number, |s| ctx_size(s).map(drop)),
    Key("max-batch", Kind::Number, |s| max_batch(s).map(drop)),
    Key("drain-timeout", Kind::Name, |s| drain_timeout(s).map(drop)),
    Key("max-queue", Kind::Number, |s| max_queue(s).map(drop)),
    Key("threads", Kind::Number, |s| threads(s).map(drop)),
    Key("kv-type", Kind::Text, |s| kv_type(s).map(drop)),
    Key("kv-memory", Kind::Name, |s| kv_memory(s).map(drop)),
    Key("prefix-cache", Kind::Text, |s| prefix_cache(s).map(drop)),
    Key("cuda-graphs", Kind::Truth, |s| boolean(s).map(drop)),
    Key("enable-cublas", Kind::Truth, |s| boolean(s).map(drop)),
    Key("trace-kernels", Kind::Text, |s| trace_file(s).map(drop)),
    Key("prompt-format", Kind::Text, |s| prompt_format(s).map(drop)),
    Key("cors-origins", Kind::Text, |s| cors_origins(s).map(drop)),
    Key("state-dir", Kind::Text, |s| state_dir(s).map(drop)),
    Key("private-docs", Kind::Truth, |s| boolean(s).map(drop)),
    Key("no-auth", Kind::Truth, |s| boolean(s).map(drop)),
    Key("default-rpm", Kind::Number, |s| key_limit(s).map(drop)),
    Key("default-tpm", Kind::Number, |s| key_limit(s).map(drop)),
    Key("default-concurrency", Kind::Number, |s| key_limit(s).map(drop)),
    Key("on-device-failure", Kind::Text, |s| on_device_failure(s).map(drop)),
    Key("tls-cert", Kind::Text, |s| pem_file(s).map(drop)),
    Key("tls-key", Kind::Text, |s| pem_file(s).map(drop)),
    Key("max-connections", Kind::Number, |s| max_connections(s).map(drop)),
    Key("log-format", Kind::Text, |s| log_format(s).map(drop)),
    Key("log-level", Kind::Text, |s| log_level(s).map(drop)),
    Key("otlp-endpoint", Kind::Text, |s| otlp_endpoint(s).map(drop)),
];

/// A file's keys and values, checked, as their parsers read them.
pub(super) type Values = Vec<(&'static str, String)>;

/// Reads and checks a whole TOML file: a wrong line is an error even where a flag overrides it.
pub(super) fn read_file(path: &Path) -> Result<Values, ConfigError> {
    let file = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| ConfigError(format!("cannot read the configuration file {file}: {e}")))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let line = e.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        ConfigError(format!("{file} is not TOML: line {line}: {}", one_line(e.message())))
    })?;
    let mut values = Vec::new();
    for (name, value) in &table {
        let Some(Key(key, kind, check)) = KEYS.iter().find(|k| k.0 == name) else {
            let known: Vec<_> = KEYS.iter().map(|k| k.0).collect();
            return Err(ConfigError(format!(
                "unknown key {name:?} in {file}: known are {}",
                known.join(", ")
            )));
        };
        let written = match (kind, value) {
            (Kind::Text | Kind::Name, toml::Value::String(s)) => Ok(s.clone()),
            (Kind::Number | Kind::Name, toml::Value::Integer(n)) => Ok(n.to_string()),
            (Kind::Truth, toml::Value::Boolean(b)) => Ok(b.to_string()),
            (Kind::Text, _) => Err("a string in quotes is allowed"),
            (Kind::Name, _) => Err("a whole number without quotes or a string in quotes is allowed"),
            (Kind::Number, _) => Err("a whole number without quotes is allowed"),
            (Kind::Truth, _) => Err("true and false, without quotes, are allowed"),
        };
        let written = written.map_err(str::to_owned).and_then(|s| check(&s).map(|()| s));
        let written = written.map_err(|allowed| {
            ConfigError(format!("the key {key:?} in {file} is {}: {allowed}", one_line(&value.to_string())))
        })?;
        values.push((*key, written));
    }
    Ok(values)
}
