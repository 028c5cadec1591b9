//! `m40llm generate`: one prompt, its continuation on stdout, nothing else.

use std::path::PathBuf;

use anyhow::bail;
use m40llm_engine::{Event, GenerateRequest, text::PromptFormat};

use super::{Tracing, load, print, prompt};
use crate::config::{self, ModelArgs};

/// Most tokens generated where `--max-tokens` is not given: an answer, not the whole context.
const DEFAULT_MAX_TOKENS: usize = 512;

/// Print what the model answers to one prompt
///
/// Prints the generated text only, never the prompt. The prompt is put into the model's chat template
/// first, unless it already holds the template's markers; --prompt-format raw continues the text as it is.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm generate model.gguf \"Why is the sky blue?\" --temperature 0
  m40llm generate model.gguf \"Once upon a time\" --prompt-format raw --max-tokens 50 --stream
  m40llm generate model.gguf \"Name a colour.\" --top-k 40 --top-p 0.95 --min-p 0.05 --seed 7")]
pub(crate) struct Args {
    /// The model, a GGUF file (of a split one, the first part)
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// What to answer or to continue
    #[arg(value_name = "PROMPT")]
    prompt: String,
    /// Most token ids to generate [default: 512, or what the context leaves]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// How the prompt is put to the model: auto, raw, llama3-chat, qwen-chat or template [default: auto]
    #[arg(long, value_name = "FORMAT", value_parser = config::prompt_format)]
    prompt_format: Option<PromptFormat>,
    /// Print the text as it comes
    #[arg(long)]
    stream: bool,
    #[command(flatten)]
    sampling: prompt::SamplingArgs,
    #[command(flatten)]
    settings: ModelArgs,
}

/// Loads, generates, prints.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let mut config = args.settings.resolve()?;
    config.engine.max_batch = 1;
    let _tracing = Tracing::start(&mut config);
    let engine = load(&args.model, &config)?;
    let template = prompt::template(&engine, args.prompt_format.unwrap_or_default())?;
    let tokens = prompt::encode(&engine, template.as_ref(), &args.prompt)?;
    let room = engine.info().ctx_size.saturating_sub(tokens.len()).max(1);
    let mut generation = engine.submit(GenerateRequest {
        prompt: tokens,
        max_tokens: Some(args.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS.min(room))),
        sampling: args.sampling.params(),
        ..Default::default()
    })?;
    let mut whole = String::new();
    while let Some(event) = generation.blocking_next() {
        match event {
            Event::Text { text, .. } if args.stream => print(&text)?,
            Event::Text { text, .. } => whole.push_str(&text),
            Event::Prompt(_) | Event::Embedding(_) => {}
            Event::Done { .. } => {
                whole.push('\n');
                return Ok(print(&whole)?);
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    bail!("the engine stopped before the text was complete: {}", engine.failure().unwrap_or_default())
}
