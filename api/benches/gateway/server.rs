//! The gateway in a process of its own, a token source in the engine's place.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _, Seek as _},
    net::SocketAddr,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use m40llm::{
    AppState, ServerConfig,
    observe::{self, LogConfig, LogFormat},
};
use m40llm_engine::EngineConfig;
use tokio::{net::TcpListener, sync::oneshot};

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
}

/// Serves until the standard input ends. The first line of the output is the address.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    system::allow_many_files();
    let level = tracing::level_filters::LevelFilter::INFO;
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
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let state = AppState::loading(ServerConfig::new("paced", 1_700_000_000));
        state.set_engine(engine);
        println!("{}", listener.local_addr()?);
        m40llm::serve(listener, state, async { stopped.await.unwrap_or_default() }).await
    })?;
    Ok(())
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    process: Child,
    /// Open as long as the server may write to it.
    _output: BufReader<ChildStdout>,
    log: File,
    pub(crate) addr: SocketAddr,
}

impl Server {
    pub(crate) fn start(options: &Options) -> anyhow::Result<Self> {
        let log = tempfile::tempfile()?;
        let mut process = Command::new(std::env::current_exe()?)
            .args(["server", "--sequences", &options.sequences.to_string()])
            .args(["--step", &options.step.to_string(), "--batch", &options.batch.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.try_clone()?)
            .spawn()?;
        let mut output = BufReader::new(process.stdout.take().context("no output of the server")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        let addr = line.trim().parse().with_context(|| format!("the server did not start: {line:?}"));
        let mut server = Self { process, _output: output, log, addr: SocketAddr::from(([0; 4], 0)) };
        server.addr = addr.map_err(|error| server.blame(error))?;
        Ok(server)
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
