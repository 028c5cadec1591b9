//! The command line: one file a command, and here what they share.

mod bench;
mod chat;
mod completions;
mod devices;
mod generate;
mod health;
mod inspect;
mod keys;
mod man;
mod memory;
mod openapi;
mod prompt;
mod pull;
#[cfg(feature = "server")]
mod run;
mod trace;

use std::{
    future::Future,
    io::{self, IsTerminal as _, Write as _},
    path::Path,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
    time::Duration,
};

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};
use m40llm_engine::{Engine, EngineError};

use self::trace::Tracing;
use crate::config::ModelConfig;

/// Runs GGUF language models in process: an OpenAI-compatible server, and tools around it.
#[derive(Debug, clap::Parser)]
#[command(
    name = "m40llm",
    version = m40llm::version::FULL_VERSION.as_str(),
    max_term_width = 100,
    after_help = "\
Try it:
  m40llm run models/smollm2-135m-instruct-q4_1.gguf
  m40llm generate models/smollm2-135m-instruct-q4_1.gguf \"Why is the sky blue?\"

Settings come from flags, M40LLM_* environment variables and a TOML file (--config), in this order:
--ctx-size 4096, M40LLM_CTX_SIZE=4096 and the line `ctx-size = 4096` mean the same.

Exit codes: 0 done; 2 the command line or the configuration is wrong; 1 anything else."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    #[cfg(feature = "server")]
    Run(run::Args),
    Generate(generate::Args),
    Chat(chat::Args),
    Pull(pull::Args),
    Keys(keys::Args),
    Inspect(inspect::Args),
    Bench(bench::Args),
    Devices(devices::Args),
    Health(health::Args),
    Openapi(openapi::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Does what the command line says.
pub(crate) fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        #[cfg(feature = "server")]
        Command::Run(args) => run::execute(args),
        Command::Generate(args) => generate::execute(args),
        Command::Chat(args) => chat::execute(args),
        Command::Pull(args) => pull::execute(args),
        Command::Keys(args) => keys::execute(args),
        Command::Inspect(args) => inspect::execute(&args),
        Command::Bench(args) => bench::execute(args),
        Command::Devices(args) => devices::execute(&args),
        Command::Health(args) => health::execute(args),
        Command::Openapi(openapi::Args {}) => openapi::execute(),
        Command::Completions(args) => completions::execute(&args),
        Command::Man(args) => man::execute(&args),
    }
}

/// Writes to stdout and flushes; a closed pipe comes back as an [`io::Error`], which `main` takes for
/// the end of interest.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Loads the model, with a progress bar when stderr is a terminal.
fn load(path: &Path, config: &ModelConfig) -> anyhow::Result<Engine> {
    let bar = if io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("loading {bar:40} {bytes}/{total_bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let loaded = Engine::load(path, &config.engine, |progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    // An EngineError names the key, the tensor or the setting, but not the file.
    loaded.map_err(|e| match e {
        EngineError::Config(_) => e.into(),
        EngineError::Device(why) => {
            anyhow!("{}: {why}; leave it out, or use --backend cpu", config.asked_device)
        }
        e => anyhow::Error::new(e).context(format!("cannot load {}", path.display())),
    })
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future, without a runtime; `None` as soon as `cancelled` says so (asked every 50 ms).
fn wait<T>(future: impl Future<Output = T>, cancelled: impl Fn() -> bool) -> Option<T> {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if cancelled() {
            return None;
        }
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return Some(value);
        }
        std::thread::park_timeout(Duration::from_millis(50));
    }
}
