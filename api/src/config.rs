//! The only reader of settings: flags, `M40LLM_*` environment variables and the TOML file.
//!
//! A setting has one name: the flag `--ctx-size` is the variable `M40LLM_CTX_SIZE` and the TOML key
//! `ctx-size`. A flag wins over the environment, the environment over the file. One parser a setting
//! serves all three, so that they allow the same values and refuse with the same words.

mod hub;
#[cfg(feature = "server")]
mod reload;
mod values;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    time::Duration,
};

use m40llm::auth::{DefaultLimits, SigningSecret, vault::VaultConfig};
use m40llm_engine::{BackendChoice, DeviceId, EngineConfig, KvType, PrefixCache, text::PromptFormat};
use tracing::level_filters::LevelFilter;

pub(crate) use hub::{HubConfig, hub};
#[cfg(feature = "server")]
pub(crate) use reload::{Reloaded, Reloader};
pub(crate) use values::{Addr, LogFormat, OtlpEndpoint, addr, pem_file, prompt_format};
use values::{
    Backend, OnDeviceFailure, Origins, backend, boolean, cors_origins, ctx_size, device, drain_timeout,
    key_limit, kv_memory, kv_type, log_format, log_level, max_batch, max_connections, max_queue, model_alias,
    on_device_failure, otlp_endpoint, prefix_cache, state_dir, threads, trace_file,
};

/// The command line or the configuration is wrong: exit code 2. One line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConfigError(pub String);

/// Flags of every command that loads a model.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ModelArgs {
    /// Where the model runs; auto takes a CUDA device where there is one, else the CPU [default: auto]
    #[arg(long, value_name = "auto|cuda|cpu", value_parser = backend)]
    backend: Option<Backend>,
    /// Which CUDA device: its number from 0, or its UUID (`m40llm devices` lists them)
    #[arg(long, value_name = "N|GPU-UUID", value_parser = device)]
    device: Option<DeviceId>,
    /// Refuse to start on anything but a CUDA device of compute capability 5.2 (Tesla M40)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    require_sm52: Option<bool>,
    /// Longest one sequence may get, in tokens [default: the model's own, as far as memory allows]
    #[arg(long, value_name = "N", value_parser = ctx_size)]
    ctx_size: Option<usize>,
    /// CPU threads [default: one per core this process may use]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// How keys and values are stored [default: f16]
    #[arg(long, value_name = "f16|f32|q8", value_parser = kv_type)]
    kv_type: Option<KvType>,
    /// Most memory for keys and values, such as 512MB or 4GiB [default: what the device has left for them]
    #[arg(long, value_name = "SIZE", value_parser = kv_memory)]
    kv_memory: Option<u64>,
    /// Run small steps on a CUDA device as captured graphs [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    cuda_graphs: Option<bool>,
    /// Read prompts on a CUDA device with cuBLAS, loaded now, instead of our own kernels [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    enable_cublas: Option<bool>,
    /// Time every kernel on a CUDA device: at the end a table on stderr, and a Chrome trace in this file
    #[arg(long, value_name = "FILE.json", value_parser = trace_file)]
    trace_kernels: Option<PathBuf>,
    /// Read further settings from this TOML file; its keys are the flag names
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

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
    model: ModelArgs,
}

/// What a command that loads a model works with.
#[derive(Debug, Clone)]
pub(crate) struct ModelConfig {
    /// For the engine.
    pub engine: EngineConfig,
    /// The settings that ask for a CUDA device, as flags; empty where any backend will do.
    pub asked_device: String,
    /// Where a trace of kernels goes.
    pub trace_file: Option<PathBuf>,
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

impl ModelArgs {
    /// All layers taken together.
    pub(crate) fn resolve(self) -> Result<ModelConfig, ConfigError> {
        let layers = Layers::read(self.config.as_deref())?;
        self.resolve_in(&layers)
    }

    fn resolve_in(self, layers: &Layers) -> Result<ModelConfig, ConfigError> {
        let backend = layers.pick(self.backend, "backend", backend)?.unwrap_or_default();
        let device = layers.pick(self.device, "device", device)?;
        let require_sm52 = layers.pick(self.require_sm52, "require-sm52", boolean)?.unwrap_or(false);
        for (asked, name) in [(device.is_some(), "device"), (require_sm52, "require-sm52")] {
            if asked && backend == Backend::Cpu {
                return Err(ConfigError(format!(
                    "{name} asks for a CUDA device and backend cpu uses none: leave one of the two out"
                )));
            }
        }
        let asked = [
            (backend == Backend::Cuda).then(|| "--backend cuda".to_owned()),
            device.as_ref().map(|id| format!("--device {id}")),
            require_sm52.then(|| "--require-sm52".to_owned()),
        ];
        let asked_device = asked.into_iter().flatten().collect::<Vec<_>>().join(" ");
        let backend = match backend {
            Backend::Cpu => BackendChoice::Cpu,
            Backend::Auto if asked_device.is_empty() => BackendChoice::Auto,
            Backend::Auto | Backend::Cuda => BackendChoice::Cuda { device, require_sm52 },
        };
        let defaults = EngineConfig::default();
        let engine = EngineConfig {
            backend,
            ctx_size: layers.pick(self.ctx_size, "ctx-size", ctx_size)?,
            threads: layers.pick(self.threads, "threads", threads)?,
            kv_type: layers.pick(self.kv_type, "kv-type", kv_type)?.unwrap_or(defaults.kv_type),
            kv_memory: layers.pick(self.kv_memory, "kv-memory", kv_memory)?,
            cuda_graphs: layers
                .pick(self.cuda_graphs, "cuda-graphs", boolean)?
                .unwrap_or(defaults.cuda_graphs),
            cublas: layers.pick(self.enable_cublas, "enable-cublas", boolean)?.unwrap_or(defaults.cublas),
            ..defaults
        };
        let trace_file = layers.pick(self.trace_kernels, "trace-kernels", trace_file)?;
        Ok(ModelConfig { engine, asked_device, trace_file })
    }
}

#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "run needs the server"))]
impl ServeArgs {
    fn resolve_in(self, layers: &Layers) -> Result<ServeConfig, ConfigError> {
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

/// Flags of `keys`.
#[derive(Debug, clap::Args)]
pub(crate) struct StateArgs {
    /// Where keys and accounts are kept [default: m40llm in `XDG_STATE_HOME`, else ~/.local/state/m40llm]
    #[arg(long, global = true, value_name = "DIR", value_parser = state_dir)]
    state_dir: Option<PathBuf>,
    /// Read the state directory's path from this TOML file, as `run` does
    #[arg(long, global = true, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

impl StateArgs {
    /// All layers taken together.
    pub(crate) fn resolve(self) -> Result<VaultConfig, ConfigError> {
        Layers::read(self.config.as_deref())?.vault(self.state_dir)
    }
}

/// The address that `health` asks: its flag, else `M40LLM_ADDR`, else the default.
pub(crate) fn health_addr(flag: Option<Addr>) -> Result<Addr, ConfigError> {
    let layers = Layers { env: Box::new(environment), file: None };
    Ok(layers.pick(flag, "addr", addr)?.unwrap_or_default())
}

/// The certificate that `health` expects: its flag, else `M40LLM_TLS_CERT`.
#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "TLS comes with the server"))]
pub(crate) fn health_cert(flag: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
    let layers = Layers { env: Box::new(environment), file: None };
    layers.pick(flag, "tls-cert", pem_file)
}

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

/// A variable's value by its name.
type Environment = Box<dyn Fn(&str) -> Option<OsString>>;

/// The layers under the flags.
struct Layers {
    env: Environment,
    file: Option<Values>,
}

/// A file's keys and values, checked, as their parsers read them.
type Values = Vec<(&'static str, String)>;

#[expect(clippy::disallowed_methods, reason = "this is the place where the environment is read")]
fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl Layers {
    fn read(config: Option<&Path>) -> Result<Self, ConfigError> {
        Self::read_with(config, Box::new(environment))
    }

    fn read_with(config: Option<&Path>, env: Environment) -> Result<Self, ConfigError> {
        let path = config.map(Path::to_owned);
        let path = path.or_else(|| env("M40LLM_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from));
        let file = path.map(|path| read_file(&path)).transpose()?;
        Ok(Self { env, file })
    }

    /// The flag, else the environment (where an empty variable counts as absent), else the file.
    fn pick<T>(
        &self,
        flag: Option<T>,
        key: &str,
        parse: fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.pick_also(flag, key, None, parse)
    }

    /// As [`Layers::pick`], where other programs read the variable `also` for the same.
    fn pick_also<T>(
        &self,
        flag: Option<T>,
        key: &str,
        also: Option<&str>,
        parse: fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        if flag.is_some() {
            return Ok(flag);
        }
        let variable = format!("M40LLM_{}", key.to_uppercase().replace('-', "_"));
        for variable in [Some(variable.as_str()), also].into_iter().flatten() {
            let Some(value) = (self.env)(variable).filter(|v| !v.is_empty()) else { continue };
            let Some(value) = value.to_str() else {
                return Err(ConfigError(format!("the environment variable {variable} is not UTF-8")));
            };
            return parse(value).map(Some).map_err(|allowed| {
                ConfigError(format!("the environment variable {variable} is {value:?}: {allowed}"))
            });
        }
        let value = self.file.iter().flatten().find(|(k, _)| *k == key);
        // The file was checked whole when it was read.
        value.map(|(_, v)| parse(v).map_err(ConfigError)).transpose()
    }
}

impl Layers {
    /// Where keys are kept. The secret that signs them is a variable only: flags show in process lists, and
    /// files of settings are passed around.
    fn vault(&self, state_dir: Option<PathBuf>) -> Result<VaultConfig, ConfigError> {
        const SECRET: &str = "M40LLM_SIGNING_SECRET";
        let dir = match self.pick(state_dir, "state-dir", values::state_dir)? {
            Some(dir) => dir,
            None => self.default_state_dir()?,
        };
        let secret = (self.env)(SECRET).filter(|v| !v.is_empty());
        let signing_secret = secret.map(|secret| {
            let secret = secret.to_str().ok_or_else(|| "text is allowed".to_owned());
            secret.and_then(SigningSecret::new)
        });
        let signing_secret = signing_secret
            .transpose()
            .map_err(|allowed| ConfigError(format!("the environment variable {SECRET}: {allowed}")))?;
        Ok(VaultConfig { dir, signing_secret })
    }

    fn default_state_dir(&self) -> Result<PathBuf, ConfigError> {
        // A relative path counts as none, says the XDG specification.
        let path = |name: &str| (self.env)(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = path("XDG_STATE_HOME").or_else(|| path("HOME").map(|home| home.join(".local/state")));
        base.map(|base| base.join("m40llm")).ok_or_else(|| {
            ConfigError(
                "neither XDG_STATE_HOME nor HOME says where keys are kept: give --state-dir DIR".to_owned(),
            )
        })
    }
}

/// Reads and checks a whole TOML file: a wrong line is an error even where a flag overrides it.
fn read_file(path: &Path) -> Result<Values, ConfigError> {
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

/// Folds a message into one line.
pub(crate) fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A home is there unless `env` says otherwise.
    fn layers(env: &'static [(&'static str, &'static str)], toml: &str) -> Result<Layers, ConfigError> {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("m40llm.toml");
        std::fs::write(&path, toml).expect("a file");
        Layers::read_with(
            Some(&path),
            Box::new(move |name| {
                let set = env.iter().find(|(k, _)| *k == name).map(|(_, v)| v.into());
                set.or_else(|| (name == "HOME").then(|| "/home/u".into()))
            }),
        )
    }

    fn serve(
        args: ServeArgs,
        env: &'static [(&'static str, &'static str)],
        toml: &str,
    ) -> Result<ServeConfig, ConfigError> {
        args.resolve_in(&layers(env, toml)?)
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_that_over_the_file() {
        let toml = "threads = 1\nctx-size = 10\nmax-batch = 100\nno-auth = true\nmodel-alias = \"filed\"\n\
                    on-device-failure = \"stay\"\nenable-cublas = false";
        let env = &[
            ("M40LLM_ENABLE_CUBLAS", "1"),
            ("M40LLM_THREADS", "2"),
            ("M40LLM_CTX_SIZE", "20"),
            ("M40LLM_MODEL_ALIAS", ""),
        ];
        let args =
            ServeArgs { model: ModelArgs { threads: Some(3), ..Default::default() }, ..Default::default() };
        let config = serve(args, env, toml).expect("a configuration");
        assert_eq!(config.model.engine.threads, Some(3));
        assert_eq!(config.model.engine.ctx_size, Some(20));
        assert_eq!(config.model.engine.max_batch, 100);
        assert!(config.model.engine.cublas);
        assert_eq!(config.model_alias.as_deref(), Some("filed"), "an empty variable counts as absent");
        assert!(config.vault.is_none() && !config.exit_on_failure);
    }

    #[test]
    fn nothing_said_is_the_contracts_defaults() {
        let config = serve(ServeArgs::default(), &[], "").expect("a configuration");
        assert_eq!(config.addr.to_string(), "127.0.0.1:58439");
        assert_eq!(config.model.engine.max_queue, 256);
        assert_eq!(config.model.engine.kv_type, KvType::F16);
        assert_eq!(config.model.engine.prefix_cache, PrefixCache::PerCaller);
        assert_eq!(config.model.engine.kv_memory, None);
        assert!(!config.model.engine.cublas);
        assert_eq!(config.model.engine.backend, BackendChoice::Auto);
        assert_eq!(config.prompt_format, PromptFormat::Auto);
        let vault = config.vault.expect("keys");
        assert_eq!(vault.dir, Path::new("/home/u/.local/state/m40llm"));
        assert!(vault.signing_secret.is_none() && !config.private_docs);
        assert!(config.model.asked_device.is_empty());
        assert!(config.exit_on_failure);
        assert_eq!(config.drain_timeout, Duration::from_secs(30));
        assert_eq!((config.log_format, config.log_level), (LogFormat::Text, LevelFilter::INFO));
        assert_eq!(config.otlp_endpoint, None);
    }

    #[test]
    fn the_collectors_usual_variable_stands_between_ours_and_the_file() {
        const TOML: &str = "otlp-endpoint = \"http://file:1\"";
        const USUAL: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://usual:1");
        let chosen = |env| {
            let config = serve(ServeArgs::default(), env, TOML).expect("a configuration");
            config.otlp_endpoint.expect("an endpoint").authority
        };
        assert_eq!(chosen(&[]), "file:1");
        assert_eq!(chosen(&[USUAL]), "usual:1");
        assert_eq!(chosen(&[USUAL, ("M40LLM_OTLP_ENDPOINT", "http://ours:1")]), "ours:1");
        let error = serve(ServeArgs::default(), &[("OTEL_EXPORTER_OTLP_ENDPOINT", "grpc://a:1")], "");
        assert!(error.expect_err("grpc").0.contains("OTEL_EXPORTER_OTLP_ENDPOINT is \"grpc://a:1\""));
    }

    #[test]
    fn a_flag_set_to_false_overrides_the_layers_below() {
        let args = ServeArgs { no_auth: Some(false), ..Default::default() };
        let env = &[("M40LLM_NO_AUTH", "1")];
        assert!(serve(args, env, "no-auth = true").expect("a configuration").vault.is_some());
    }

    #[test]
    fn whatever_asks_for_a_device_asks_for_cuda() {
        let uuid = || Some(DeviceId::Uuid("GPU-5f2c".into()));
        for (toml, choice, asked) in [
            ("backend = \"cpu\"", BackendChoice::Cpu, ""),
            (
                "device = 1",
                BackendChoice::Cuda { device: Some(DeviceId::Index(1)), require_sm52: false },
                "--device 1",
            ),
            (
                "device = \"gpu-5F2C\"",
                BackendChoice::Cuda { device: uuid(), require_sm52: false },
                "--device GPU-5f2c",
            ),
            (
                "require-sm52 = true",
                BackendChoice::Cuda { device: None, require_sm52: true },
                "--require-sm52",
            ),
            (
                "backend = \"cuda\"\ndevice = 0\nrequire-sm52 = true",
                BackendChoice::Cuda { device: Some(DeviceId::Index(0)), require_sm52: true },
                "--backend cuda --device 0 --require-sm52",
            ),
        ] {
            let model = serve(ServeArgs::default(), &[], toml).expect(toml).model;
            assert_eq!((model.engine.backend, model.asked_device.as_str()), (choice, asked), "{toml}");
        }
        for toml in ["backend = \"cpu\"\ndevice = 0", "backend = \"cpu\"\nrequire-sm52 = true"] {
            let error = serve(ServeArgs::default(), &[], toml).expect_err(toml).0;
            assert!(error.contains("backend cpu"), "{error}");
        }
    }

    #[test]
    fn the_state_directory_follows_xdg() {
        const XDG: (&str, &str) = ("XDG_STATE_HOME", "/x");
        let dir = |env, toml| serve(ServeArgs::default(), env, toml).map(|c| c.vault.expect("keys").dir);
        assert_eq!(dir(&[XDG], ""), Ok("/x/m40llm".into()));
        assert_eq!(dir(&[("XDG_STATE_HOME", "x")], ""), Ok("/home/u/.local/state/m40llm".into()));
        assert_eq!(dir(&[XDG], "state-dir = \"/file\""), Ok("/file".into()));
        assert_eq!(dir(&[("M40LLM_STATE_DIR", "/env")], "state-dir = \"/file\""), Ok("/env".into()));
        assert!(dir(&[("HOME", "")], "").expect_err("nowhere").0.contains("--state-dir"));
    }

    #[test]
    fn a_bad_signing_secret_is_refused_and_not_shown() {
        const LONG: (&str, &str) = ("M40LLM_SIGNING_SECRET", "0123456789abcdef0123456789abcdef");
        let error =
            serve(ServeArgs::default(), &[("M40LLM_SIGNING_SECRET", "hunter2")], "").expect_err("short");
        assert!(error.0.contains("M40LLM_SIGNING_SECRET") && error.0.contains("32"), "{error}");
        assert!(!error.0.contains("hunter2"), "{error}");
        let config = serve(ServeArgs::default(), &[LONG], "").expect("a configuration");
        assert!(!format!("{config:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn certificate_and_key_come_together() {
        let both = "tls-cert = \"c.pem\"\ntls-key = \"k.pem\"";
        let tls = serve(ServeArgs::default(), &[], both).expect("a configuration").tls;
        assert_eq!(tls, Some(("c.pem".into(), "k.pem".into())));
        for (given, missing) in [("tls-cert", "tls-key is not"), ("tls-key", "tls-cert is not")] {
            let toml = format!("{given} = \"x.pem\"");
            let error = serve(ServeArgs::default(), &[], &toml).expect_err(given).0;
            assert!(error.starts_with(given) && error.contains(missing), "{error}");
        }
    }

    #[test]
    fn a_wrong_variable_is_named_with_what_is_allowed() {
        let error = serve(ServeArgs::default(), &[("M40LLM_KV_TYPE", "f8")], "").expect_err("f8");
        assert_eq!(error.0, "the environment variable M40LLM_KV_TYPE is \"f8\": allowed are f16, f32, q8");
    }

    #[test]
    fn a_wrong_file_names_the_key_the_file_and_what_is_allowed() {
        for (toml, parts) in [
            ("thread = 2", &["\"thread\"", "m40llm.toml", "threads, kv-type"] as &[&str]),
            ("threads = \"2\"", &["\"threads\"", "m40llm.toml", "whole number"]),
            ("threads = 0", &["\"threads\"", "m40llm.toml", "from 1 to 1024"]),
            ("device = \"M40\"", &["\"device\"", "m40llm.toml", "0 to 63", "UUID"]),
            ("device = true", &["\"device\"", "m40llm.toml", "a string in quotes"]),
            ("backend = \"gpu\"", &["\"backend\"", "m40llm.toml", "auto, cuda, cpu"]),
            ("on-device-failure = \"hang\"", &["\"on-device-failure\"", "exit, stay"]),
            ("prefix-cache = \"all\"", &["\"prefix-cache\"", "shared, per-caller, off"]),
            ("drain-timeout = \"soon\"", &["\"drain-timeout\"", "30s"]),
            ("kv-memory = \"4 bananas\"", &["\"kv-memory\"", "512MB"]),
            ("log-format = \"xml\"", &["\"log-format\"", "text, json"]),
            ("log-level = \"loud\"", &["\"log-level\"", "error, warn, info, debug, trace"]),
            ("otlp-endpoint = \"https://a:4318\"", &["\"otlp-endpoint\"", "http://127.0.0.1:4318"]),
            ("no-auth = 1", &["\"no-auth\"", "m40llm.toml", "true and false"]),
            ("cors-origins = \"https://a/b\"", &["\"cors-origins\"", "https://app.example"]),
            ("addr = \"localhost\"", &["\"addr\"", "m40llm.toml", "HOST:PORT"]),
            ("[server]\naddr = \"x\"", &["\"server\"", "m40llm.toml"]),
            ("max-connections = 0", &["\"max-connections\"", "from 1 to 1048576"]),
            ("tls-cert = \"\"", &["\"tls-cert\"", "PEM file"]),
            ("threads 2", &["m40llm.toml", "line 1"]),
        ] {
            let error = layers(&[], toml).err().expect(toml).0;
            for part in parts {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
            assert_eq!(error.lines().count(), 1, "{error:?}");
        }
    }
}
