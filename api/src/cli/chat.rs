//! `m40llm chat`: a conversation in the terminal.

use std::{
    io::{self, BufRead as _, IsTerminal as _},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, bail};
use m40llm_engine::{
    Engine, Event, GenerateRequest, SamplingParams,
    text::{ChatTemplate, PromptFormat},
};
use rustyline::{DefaultEditor, error::ReadlineError};
use serde_json::Value as Json;

use super::{Tracing, load, print, prompt, wait};
use crate::config::ModelArgs;

const HELP: &str = "\
/clear  forget the conversation
/exit   leave (as does Ctrl-D)
/help   this text
Ctrl-C stops an answer that is being written; at the prompt it discards the line.
";

/// Talk with a model in the terminal
///
/// The model sees the whole conversation; when the context is full, the oldest turns are left out.
/// Where stdin is not a terminal, every line of it is a turn.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
In the conversation: /clear forgets it, /exit leaves, /help explains; Ctrl-C stops an answer.

Examples:
  m40llm chat model.gguf
  m40llm chat model.gguf --temperature 0.7 --ctx-size 4096
  echo \"Why is the sky blue?\" | m40llm chat model.gguf --temperature 0")]
pub(crate) struct Args {
    /// The model, a GGUF file (of a split one, the first part)
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    #[command(flatten)]
    sampling: prompt::SamplingArgs,
    #[command(flatten)]
    settings: ModelArgs,
}

/// Loads, then reads turns until the input ends.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let mut config = args.settings.resolve()?;
    config.engine.max_batch = 1;
    let _tracing = Tracing::start(&mut config);
    let engine = load(&args.model, &config)?;
    let template = prompt::template(&engine, PromptFormat::Auto)?
        .context("this model has no chat template: use `m40llm generate --prompt-format raw`")?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let mut chat =
        Chat { engine, template, sampling: args.sampling.params(), interrupted, messages: Vec::new() };
    if io::stdin().is_terminal() { talk(&mut chat) } else { read(&mut chat) }
}

/// Lines from a pipe or a file; an answer that fails ends it.
fn read(chat: &mut Chat) -> anyhow::Result<()> {
    for line in io::stdin().lock().lines() {
        if !chat.turn(&line.context("cannot read stdin")?)? {
            break;
        }
    }
    Ok(())
}

/// Lines edited in the terminal; an answer that fails is told, and the conversation goes on.
fn talk(chat: &mut Chat) -> anyhow::Result<()> {
    let mut editor = DefaultEditor::new()?;
    // After the editor, which takes the signal for itself; this handler passes it on to the editor's.
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&chat.interrupted))?;
    print("/help explains, /exit leaves.\n")?;
    loop {
        match editor.readline("> ") {
            Ok(line) => {
                editor.add_history_entry(&line)?;
                match chat.turn(&line) {
                    Ok(true) => {}
                    Ok(false) => return Ok(()),
                    Err(error) if chat.engine.failure().is_some() => return Err(error),
                    Err(error) => eprintln!("{error:#}"),
                }
            }
            // A Ctrl-C that stopped an answer comes back from the editor, too, as a signal.
            Err(ReadlineError::Interrupted | ReadlineError::Signal(_)) => {}
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

struct Chat {
    engine: Engine,
    template: ChatTemplate,
    sampling: SamplingParams,
    /// Ctrl-C was pressed.
    interrupted: Arc<AtomicBool>,
    messages: Vec<Json>,
}

impl Chat {
    /// Takes one line in; false when it says to leave. A turn that fails leaves no trace.
    fn turn(&mut self, line: &str) -> anyhow::Result<bool> {
        match line.trim() {
            "" => {}
            "/exit" => return Ok(false),
            "/help" => print(HELP)?,
            "/clear" => self.messages.clear(),
            command if command.starts_with('/') => print(&format!("{command} is no command.\n{HELP}"))?,
            said => {
                let kept = self.messages.clone();
                self.messages.push(prompt::message("user", said));
                match self.answer() {
                    Ok(text) => self.messages.push(prompt::message("assistant", &text)),
                    Err(error) => {
                        self.messages = kept;
                        return Err(error);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Prints the answer as it comes; what was written until Ctrl-C counts as the answer.
    fn answer(&mut self) -> anyhow::Result<String> {
        let prompt = self.fit()?;
        self.interrupted.store(false, Ordering::Relaxed);
        let request = GenerateRequest { prompt, sampling: self.sampling.clone(), ..Default::default() };
        let mut generation = self.engine.submit(request)?;
        let mut whole = String::new();
        loop {
            let event = wait(generation.next(), || self.interrupted.load(Ordering::Relaxed));
            match event {
                Some(Some(Event::Text { text, .. })) => {
                    print(&text)?;
                    whole.push_str(&text);
                }
                Some(Some(Event::Prompt(_) | Event::Embedding(_))) => {}
                Some(Some(Event::Failed(error))) => return Err(error.into()),
                Some(None) => bail!("the engine stopped: {}", self.engine.failure().unwrap_or_default()),
                Some(Some(Event::Done { .. })) | None => break,
            }
        }
        print("\n")?;
        Ok(whole)
    }

    /// The prompt's tokens, the oldest turns dropped until a quarter of the context is left to answer.
    fn fit(&mut self) -> anyhow::Result<Vec<u32>> {
        let room = self.engine.info().ctx_size;
        loop {
            let tokens = prompt::encode_chat(&self.engine, &self.template, &self.messages)?;
            if tokens.len() <= room - room / 4 {
                return Ok(tokens);
            }
            if self.messages.len() < 3 {
                // Nothing older to drop; a long message may take the room meant for the answer.
                if tokens.len() < room {
                    return Ok(tokens);
                }
                bail!(
                    "this needs {} tokens, the context holds {room}: say less or raise --ctx-size",
                    tokens.len()
                );
            }
            self.messages.drain(..2);
        }
    }
}
