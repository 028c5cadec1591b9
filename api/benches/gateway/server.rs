//! The gateway in a process of its own, a token source in the engine's place.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Seek as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use m40llm::{
    AppState, ServerConfig,
    auth::{Gate, KeyLimits, NewKey, Store, Vault, vault::VaultConfig},
    observe::{self, LogConfig, LogFormat},
};
use m40llm_engine::EngineConfig;
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::oneshot};
use tracing::level_filters::LevelFilter;

use crate::{
    source::{self, Pace},
    system,
};

/// How the server runs.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Options {
    /// Sequences that it runs at once
    #[arg(long)]
    pub(crate) sequences: usize,
    /// Microseconds from one step of the source to the next; 0: none
    #[arg(long)]
    pub(crate) step: u64,
    /// Tokens in a step
    #[arg(long)]
    pub(crate) batch: usize,
    /// Ask for keys, which are in this directory
    #[arg(long)]
    pub(crate) state_dir: Option<PathBuf>,
}

fn vault(dir: &Path) -> VaultConfig {
    VaultConfig { dir: dir.into(), signing_secret: None }
}

/// Serves until the standard input ends. The first line of the output is the address.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    system::allow_many_files();
    // A line a request, as in earnest.
    let level = LevelFilter::INFO;
    let _logging = observe::init_logging(LogConfig { format: LogFormat::Text, level, collector: None })?;
    let config = EngineConfig {
        ctx_size: Some(1 << 20),
        max_batch: options.sequences,
        max_queue: 64,
        ..EngineConfig::default()
    };
    let pace =
        Pace { step: Duration::from_micros(options.step), batch: options.batch, text: |_| system::stamp() };
    let engine = source::engine(&config, pace);
    let (stop, stopped) = oneshot::channel::<()>();
    thread::spawn(move || {
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        drop(stop);
    });
    // As `m40llm run` makes it.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = options.state_dir.as_ref().map(|dir| Store::open(&vault(dir))).transpose()?;
        let gate = store.map_or_else(Gate::open, |store| Gate::guarded(store, false));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let state = AppState::guarded(ServerConfig::new("paced", 1_700_000_000), gate);
        state.set_engine(engine);
        println!("{}", listener.local_addr()?);
        m40llm::serve(listener, state, async { stopped.await.unwrap_or_default() }).await?;
        anyhow::Ok(())
    })
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    process: Child,
    /// Open as long as the server may write to it.
    _output: BufReader<ChildStdout>,
    log: File,
    pub(crate) addr: SocketAddr,
    /// Its key and where it is kept, when it asks for one.
    keys: Option<(String, TempDir)>,
}

/// A new state directory with a key that has every kind of limit, none of which it meets.
fn make_key() -> anyhow::Result<(String, TempDir)> {
    let dir = TempDir::new()?;
    let limits = KeyLimits {
        rpm: Some(u32::MAX),
        tpm: Some(u32::MAX),
        concurrency: Some(100_000),
        ..KeyLimits::default()
    };
    let new = NewKey { name: "caller".into(), limits, ..NewKey::default() };
    let (_, key) = Vault::open(&vault(dir.path()))?.create(new)?;
    Ok((key, dir))
}

impl Server {
    /// Starts it, with a key that it asks for when `keyed`.
    pub(crate) fn start(mut options: Options, keyed: bool) -> anyhow::Result<Self> {
        let log = tempfile::tempfile()?;
        let keys = keyed.then(make_key).transpose()?;
        options.state_dir = keys.as_ref().map(|(_, dir)| dir.path().into());
        let mut process = Command::new(std::env::current_exe()?)
            .args(["server", "--sequences", &options.sequences.to_string()])
            .args(["--step", &options.step.to_string(), "--batch", &options.batch.to_string()])
            .args(options.state_dir.iter().flat_map(|dir| [OsStr::new("--state-dir"), dir.as_os_str()]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()?;
        let mut output = BufReader::new(process.stdout.take().context("no output of the server")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let addr = line.trim().parse().with_context(|| format!("the server did not start: {line:?}"));
        let mut server = Self { process, _output: output, log, addr: SocketAddr::from(([0; 4], 0)), keys };
        server.addr = addr.map_err(|error| server.blame(error))?;
        Ok(server)
    }

    pub(crate) fn key(&self) -> Option<&str> {
        self.keys.as_ref().map(|(key, _)| key.as_str())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// The error with the server's last log lines, when it wrote of trouble.
    pub(crate) fn blame(&mut self, error: anyhow::Error) -> anyhow::Error {
        let mut log = String::new();
        let _ = self.log.rewind().and_then(|()| self.log.read_to_string(&mut log));
        let trouble = |line: &&str| ["ERROR", "WARN", "panicked"].iter().any(|word| line.contains(word));
        let lines: Vec<&str> = log.lines().filter(trouble).take(5).collect();
        if lines.is_empty() { error } else { anyhow!("{error:#}; the server's log: {}", lines.join("; ")) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
