//! Settings of `run`.

use std::{path::PathBuf, time::Duration};

use m40llm::auth::{DefaultLimits, vault::VaultConfig};
use m40llm_engine::{PrefixCache, text::PromptFormat};
use tracing::level_filters::LevelFilter;

use super::{
    ConfigError, ModelArgs, ModelConfig,
    layers::Layers,
    values::{
        Addr, LogFormat, OnDeviceFailure, Origins, OtlpEndpoint, addr, boolean, cors_origins, drain_timeout,
        key_limit, log_format, log_level, max_batch, max_connections, max_queue, model_alias,
        on_device_failure, otlp_endpoint, pem_file, prefix_cache, prompt_format, state_dir,
    },
};

/// Flags of `run`.
#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "run needs the server"))]
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ServeArgs {
    /// Address to listen on [default: 127.0.0.1:58439]
    #[arg(long, value_name = "HOST:PORT", value_parser = addr)]
    addr: Option<Addr>,
    /// The model's id in the API [default: the file's name without .gguf]
    #[arg(long, value_name = "NAME", value_parser = model_alias)]
    model_alias: Option<String>,
    /// Most sequences in one step [default: 16]
    #[arg(long, value_name = "N", value_parser = max_batch)]
    max_batch: Option<usize>,
    /// Most requests waiting for a place in the batch; one more is answered 503 [default: 256]
    #[arg(long, value_name = "N", value_parser = max_queue)]
    max_queue: Option<usize>,
    /// Who may reuse what is computed of whose prompts: everybody, each caller their own, or nobody
    /// [default: per-caller]
    #[arg(long, value_name = "shared|per-caller|off", value_parser = prefix_cache)]
    prefix_cache: Option<PrefixCache>,
    /// How long running requests may go on after SIGTERM; then they end with an error [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = drain_timeout)]
    drain_timeout: Option<Duration>,
    /// How messages become a prompt: auto, raw, llama3-chat, qwen-chat or template [default: auto]
    #[arg(long, value_name = "FORMAT", value_parser = prompt_format)]
    prompt_format: Option<PromptFormat>,
    /// Pages that may call from a browser, comma-separated origins; * is any
    /// [default: pages served from loopback addresses]
    #[arg(long, value_name = "LIST", value_parser = cors_origins)]
    cors_origins: Option<Origins>,
    /// Where keys and accounts are kept [default: m40llm in `XDG_STATE_HOME`, else ~/.local/state/m40llm]
    #[arg(long, value_name = "DIR", value_parser = state_dir)]
    state_dir: Option<PathBuf>,
    /// Ask for a key at /, /docs and /openapi.json too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    private_docs: Option<bool>,
    /// Serve whoever asks, on any address
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    no_auth: Option<bool>,
    /// Most requests a minute of a key that has no limit of its own [default: no limit]
    #[arg(long, value_name = "N", value_parser = key_limit)]
    default_rpm: Option<u32>,
    /// Most tokens a minute of a key that has no limit of its own [default: no limit]
    #[arg(long, value_name = "N", value_parser = key_limit)]
    default_tpm: Option<u32>,
    /// Most requests at once of a key that has no limit of its own [default: no limit]
    #[arg(long, value_name = "N", value_parser = key_limit)]
    default_concurrency: Option<u32>,
    /// Once the device has failed: exit, with code 1, or stay and refuse requests [default: exit]
    #[arg(long, value_name = "exit|stay", value_parser = on_device_failure)]
    on_device_failure: Option<OnDeviceFailure>,
    /// Serve https with this certificate chain (PEM, read again when it changes); needs --tls-key
    #[arg(long, value_name = "FILE.pem", value_parser = pem_file)]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE.pem", value_parser = pem_file)]
    tls_key: Option<PathBuf>,
    /// Most connections at once; further ones wait [default: 4096, as far as file descriptors allow]
    #[arg(long, value_name = "N", value_parser = max_connections)]
    max_connections: Option<usize>,
    /// How log lines are written: text, or json, an object a line [default: text]
    #[arg(long, value_name = "text|json", value_parser = log_format)]
    log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = log_level)]
    log_level: Option<LevelFilter>,
    /// Send spans to this OpenTelemetry collector, by OTLP over HTTP; also OTEL_EXPORTER_OTLP_ENDPOINT
    /// [default: to none]
    #[arg(long, value_name = "http://HOST:PORT", value_parser = otlp_endpoint)]
    otlp_endpoint: Option<OtlpEndpoint>,
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

/// What `run` works with.
#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "run needs the server"))]
#[derive(Debug, Clone)]
pub(crate) struct ServeConfig {
    /// The model's part; its engine has `max_batch` and `max_queue`.
    pub model: ModelConfig,
    /// Where to listen.
    pub addr: Addr,
    /// The model's id, when it is not the file's stem.
    pub model_alias: Option<String>,
    /// The server's default.
    pub prompt_format: PromptFormat,
    /// Origins of pages that may call; empty: those served from loopback addresses.
    pub cors_origins: Vec<String>,
    /// Where keys are; absent: serve whoever asks.
    pub vault: Option<VaultConfig>,
    /// Ask for a key at the documentation too.
    pub private_docs: bool,
    /// What keys may use that have no limits of their own.
    pub default_limits: DefaultLimits,
    /// End the process once the device has failed.
    pub exit_on_failure: bool,
    /// How long running requests may go on at the end.
    pub drain_timeout: Duration,
    /// Certificate and key; without, plain HTTP.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Most connections at once, when said.
    pub max_connections: Option<usize>,
    /// The form of log lines.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: LevelFilter,
    /// The collector of spans.
    pub otlp_endpoint: Option<OtlpEndpoint>,
}

#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "run needs the server"))]
impl ServeArgs {
    pub(super) fn resolve_in(self, layers: &Layers) -> Result<ServeConfig, ConfigError> {
        let mut model = self.model.resolve_in(layers)?;
        if let Some(n) = layers.pick(self.max_batch, "max-batch", max_batch)? {
            model.engine.max_batch = n;
        }
        if let Some(n) = layers.pick(self.max_queue, "max-queue", max_queue)? {
            model.engine.max_queue = n;
        }
        if let Some(scope) = layers.pick(self.prefix_cache, "prefix-cache", prefix_cache)? {
            model.engine.prefix_cache = scope;
        }
        let cert = layers.pick(self.tls_cert, "tls-cert", pem_file)?;
        let key = layers.pick(self.tls_key, "tls-key", pem_file)?;
        let tls = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(ConfigError("tls-cert is set and tls-key is not: set both".into()));
            }
            (None, Some(_)) => {
                return Err(ConfigError("tls-key is set and tls-cert is not: set both".into()));
            }
        };
        let no_auth = layers.pick(self.no_auth, "no-auth", boolean)?.unwrap_or(false);
        let vault = if no_auth { None } else { Some(layers.vault(self.state_dir)?) };
        Ok(ServeConfig {
            model,
            addr: layers.pick(self.addr, "addr", addr)?.unwrap_or_default(),
            model_alias: layers.pick(self.model_alias, "model-alias", model_alias)?,
            prompt_format: layers
                .pick(self.prompt_format, "prompt-format", prompt_format)?
                .unwrap_or_default(),
            cors_origins: layers.pick(self.cors_origins, "cors-origins", cors_origins)?.unwrap_or_default().0,
            vault,
            private_docs: layers.pick(self.private_docs, "private-docs", boolean)?.unwrap_or(false),
            default_limits: DefaultLimits {
                rpm: layers.pick(self.default_rpm, "default-rpm", key_limit)?,
                tpm: layers.pick(self.default_tpm, "default-tpm", key_limit)?,
                concurrency: layers.pick(self.default_concurrency, "default-concurrency", key_limit)?,
            },
            drain_timeout: layers
                .pick(self.drain_timeout, "drain-timeout", drain_timeout)?
                .unwrap_or(Duration::from_secs(30)),
            exit_on_failure: layers
                .pick(self.on_device_failure, "on-device-failure", on_device_failure)?
                .unwrap_or_default()
                == OnDeviceFailure::Exit,
            tls,
            max_connections: layers.pick(self.max_connections, "max-connections", max_connections)?,
            log_format: layers.pick(self.log_format, "log-format", log_format)?.unwrap_or_default(),
            log_level: layers.pick(self.log_level, "log-level", log_level)?.unwrap_or(LevelFilter::INFO),
            otlp_endpoint: layers.pick_also(
                self.otlp_endpoint,
                "otlp-endpoint",
                Some("OTEL_EXPORTER_OTLP_ENDPOINT"),
                otlp_endpoint,
            )?,
        })
    }
}
