//! `m40llm run`: the server, from an address to the last request's end.

use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use anyhow::{Context as _, anyhow, bail};
use m40llm::{
    AppState, ServerConfig,
    auth::{Gate, Store},
    observe::{self, Collector, LogConfig, Logging},
    transport::{Limits, tls::Tls},
};
use m40llm_engine::Engine;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use super::{Tracing, load};
use crate::config::{ConfigError, LogFormat, Reloaded, Reloader, ServeArgs, ServeConfig};

/// Serve a model over an OpenAI-compatible HTTP API
///
/// Every flag may also be an `M40LLM_*` environment variable or a key of the TOML file given by --config:
/// --ctx-size is M40LLM_CTX_SIZE and ctx-size. A flag wins over the environment, that over the file.
///
/// SIGINT (Ctrl-C) and SIGTERM finish what is running, then end the server; a second one ends it at once.
/// SIGHUP reads the TOML file again: docs/CONFIGURATION.md says which keys a running server takes over.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm run model.gguf
  m40llm run model.gguf --addr 127.0.0.1:8080 --model-alias tiny --ctx-size 4096
  M40LLM_THREADS=4 m40llm run model.gguf --config m40llm.toml

Then:
  curl http://127.0.0.1:58439/v1/chat/completions -H 'content-type: application/json' \\
    -d '{\"messages\":[{\"role\":\"user\",\"content\":\"Why is the sky blue?\"}]}'")]
pub(crate) struct Args {
    /// The model, a GGUF file (of a split one, the first part)
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    #[command(flatten)]
    settings: ServeArgs,
}

/// Serves until a signal.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let (mut config, reloader) = Reloader::start(args.settings)?;
    let _tracing = Tracing::start(&mut config.model);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(args.model, config, reloader));
    // Connections that are still open, and a model that is still loading, end here.
    runtime.shutdown_background();
    served
}

async fn serve(model: PathBuf, config: ServeConfig, mut reloader: Reloader) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let mut hangups = signal(SignalKind::hangup())?;
    // What can fail fast fails before the model is loaded.
    let tls = config.tls.as_ref().map(|(cert, key)| Tls::load(cert, key)).transpose().map_err(ConfigError)?;
    let store = config.vault.as_ref().map(Store::open).transpose()?;
    let (listener, addr) = bind(&config, store.as_ref()).await?;
    let gate = store.clone().map_or_else(Gate::open, |store| Gate::guarded(store, config.private_docs));
    let state = AppState::guarded(ServerConfig { tls, ..server_config(&model, &config) }, gate);
    state.set_default_limits(config.default_limits);
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async { stopped.await.unwrap_or_default() };
    let mut server = tokio::spawn(m40llm::serve(listener, state.clone(), shutdown));

    // Until the model is there, /health says so and requests are told to come again.
    let engine = tokio::select! {
        loaded = load_aside(model, &config) => loaded?,
        () = signals.next() => return Ok(()),
    };
    let logging = observe::init_logging(log_config(&config)).context("cannot begin to log")?;
    state.set_engine(engine.clone());
    announce(&config, store.as_ref(), addr, &engine);
    drop(engine);

    loop {
        tokio::select! {
            ended = &mut server => { ended??; bail!("the server ended on its own: see its log, start it again") }
            () = signals.next() => break,
            _ = hangups.recv() => reload(&mut reloader, &state, &logging),
        }
    }
    tracing::info!("shutting down: finishing what is running; a second signal ends at once");
    let _ = stop.send(());
    tokio::select! {
        ended = server => Ok(ended??),
        () = signals.next() => Err(anyhow!("ended by a second signal, before the running requests were finished")),
    }
}

/// The gateway's part of the configuration.
fn server_config(model: &Path, config: &ServeConfig) -> ServerConfig {
    let stem = || model.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let modified = std::fs::metadata(model).and_then(|m| m.modified()).ok();
    let created = modified.and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |age| age.as_secs());
    ServerConfig {
        prompt_format: config.prompt_format,
        cors_origins: config.cors_origins.clone(),
        max_queue: config.model.engine.max_queue,
        exit_on_failure: config.exit_on_failure,
        drain_timeout: config.drain_timeout,
        // As long as there is no key; the address is a loopback one then.
        local_host: config.vault.is_some().then(|| config.addr.host().to_owned()),
        limits: Limits { connections: connections(config.max_connections), ..Limits::default() },
        ..ServerConfig::new(config.model_alias.clone().unwrap_or_else(stem), created)
    }
}

/// File descriptors that are not for connections.
const OTHER_FILES: usize = 64;

/// How many connections to take: what was asked for, as far as the process may have so many file
/// descriptors. Its limit is raised for them; it is low for programs that use `select`.
fn connections(asked: Option<usize>) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let asked = asked.unwrap_or(Limits::default().connections);
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = (asked + OTHER_FILES) as u64;
    let mut allowed = current.unwrap_or(u64::MAX);
    if allowed < wanted {
        let raised = maximum.map_or(wanted, |most| most.min(wanted));
        if setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum }).is_ok() {
            allowed = raised;
        }
    }
    let room = usize::try_from(allowed).unwrap_or(usize::MAX).saturating_sub(OTHER_FILES);
    asked.min(room.max(OTHER_FILES))
}

fn log_config(config: &ServeConfig) -> LogConfig {
    let collector = config.otlp_endpoint.clone();
    LogConfig {
        format: match config.log_format {
            LogFormat::Text => observe::LogFormat::Text,
            LogFormat::Json => observe::LogFormat::Json,
        },
        level: config.log_level,
        collector: collector.map(|at| Collector { authority: at.authority, path: at.path }),
    }
}

/// What SIGHUP does: the file is read again, and what can be taken over is. An error changes nothing.
fn reload(reloader: &mut Reloader, state: &AppState, logging: &Logging) {
    let reloaded = reloader.reload();
    state.metrics().count_reload(reloaded.is_ok());
    match reloaded {
        Err(error) => tracing::error!("the configuration stays as it was: {error}"),
        Ok(None) => tracing::info!("there is no configuration file (--config) to read again"),
        Ok(Some(Reloaded { config, taken, restart })) => {
            state.set_default_limits(config.default_limits);
            logging.set_level(config.log_level, || {
                tracing::info!("the configuration was read again, changed: {}", listed(&taken));
                if !restart.is_empty() {
                    tracing::warn!("a restart is needed for what else changed: {}", listed(&restart));
                }
            });
        }
    }
}

fn listed(keys: &[&str]) -> String {
    if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") }
}

/// Loads on a thread of its own, which may take long and must not keep the process from ending.
fn load_aside(model: PathBuf, config: &ServeConfig) -> impl Future<Output = anyhow::Result<Engine>> + use<> {
    let (done, loaded) = oneshot::channel();
    let config = config.model.clone();
    std::thread::spawn(move || done.send(load(&model, &config)));
    async { loaded.await.context("loading the model panicked: please report this with the lines above")? }
}

/// Takes the address, which must be loopback unless there are keys, or the configuration lets everybody in.
async fn bind(config: &ServeConfig, store: Option<&Store>) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let addr = &config.addr;
    let found =
        addr.resolve().with_context(|| format!("cannot find the address {addr}: choose another --addr"))?;
    let everybody = store.is_some_and(|store| !store.has_keys());
    if everybody && !found.iter().all(|a| a.ip().is_loopback()) {
        return Err(ConfigError(format!(
            "refusing to serve {addr} without an API key: others may reach it; make a key with `m40llm keys create \
             --name NAME`, listen on 127.0.0.1, or let everybody in with --no-auth"
        ))
        .into());
    }
    let listener = TcpListener::bind(found.as_slice()).await;
    let listener = listener.with_context(|| format!("cannot listen on {addr}: choose another --addr"))?;
    let bound = listener.local_addr()?;
    Ok((listener, bound))
}

/// The first lines of the log.
fn announce(config: &ServeConfig, store: Option<&Store>, addr: SocketAddr, engine: &Engine) {
    let info = engine.info();
    tracing::info!(
        architecture = info.architecture,
        quantization = info.quantization,
        context = info.ctx_size,
        cache_tokens = info.kv_tokens,
        backend = info.backend,
        "model loaded"
    );
    if let Some(speed) = info.load_speed() {
        tracing::info!("weights loaded to the device: {speed}");
    }
    for notice in &info.notices {
        tracing::info!("{notice}");
    }
    match store.map(Store::has_keys) {
        None => tracing::info!("requests need no key (--no-auth)"),
        Some(true) => tracing::info!("requests need an API key"),
        Some(false) => tracing::warn!(
            "no API key exists: requests need none, as this is a loopback address; `m40llm keys create` makes one"
        ),
    }
    let (scheme, trust) = match &config.tls {
        Some((cert, _)) => ("https", format!(" --cacert {}", cert.display())),
        None => ("http", String::new()),
    };
    tracing::info!("listening on {scheme}://{addr}");
    tracing::info!(
        "try it: curl{trust} {scheme}://{addr}/v1/chat/completions -H 'content-type: application/json' -d \
         '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Why is the sky blue?\"}}],\"temperature\":0}}'"
    );
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// SIGINT or SIGTERM.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
