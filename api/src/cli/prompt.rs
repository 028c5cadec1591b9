//! Prompts and sampling as `generate` and `chat` share them.

use m40llm_engine::{
    Engine, SamplingParams,
    text::{ChatTemplate, PromptFormat},
};
use serde_json::{Value as Json, json};

/// How tokens are chosen.
#[derive(Debug, clap::Args)]
pub(crate) struct SamplingArgs {
    /// Divides the logits, 0 to 2; 0 always takes the likeliest token [default: 1]
    #[arg(long, value_name = "T", value_parser = temperature)]
    temperature: Option<f32>,
    /// Choose among the K likeliest tokens; 1 always takes the likeliest, 0 means all [default: 0]
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that together reach probability P, 0 to 1 [default: 1]
    #[arg(long, value_name = "P", value_parser = probability)]
    top_p: Option<f32>,
    /// Choose among tokens at least P times as likely as the likeliest, 0 to 1 [default: 0]
    #[arg(long, value_name = "P", value_parser = probability)]
    min_p: Option<f32>,
    /// The same seed gives the same text [default: a fresh one each time]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

impl SamplingArgs {
    /// For the engine.
    pub(crate) fn params(&self) -> SamplingParams {
        let defaults = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            seed: self.seed,
            ..defaults
        }
    }
}

fn temperature(s: &str) -> Result<f32, String> {
    within(s, 2.0)
}

fn probability(s: &str) -> Result<f32, String> {
    within(s, 1.0)
}

fn within(s: &str, top: f32) -> Result<f32, String> {
    let value = s.parse().ok().filter(|v| (0.0..=top).contains(v));
    value.ok_or_else(|| format!("a number from 0 to {top} is allowed"))
}

/// The template that `format` chooses for the loaded model; `None` for raw text.
pub(crate) fn template(engine: &Engine, format: PromptFormat) -> anyhow::Result<Option<ChatTemplate>> {
    Ok(ChatTemplate::choose(format, engine.metadata(), engine.tokenizer())?)
}

/// Token ids of one prompt: rendered as a user's message, unless there is no template or the prompt
/// holds the template's markers already.
pub(crate) fn encode(
    engine: &Engine,
    template: Option<&ChatTemplate>,
    prompt: &str,
) -> anyhow::Result<Vec<u32>> {
    match template {
        Some(template) if !template.is_rendered(prompt) => {
            encode_chat(engine, template, &[message("user", prompt)])
        }
        _ => Ok(engine.tokenizer().encode(prompt, true, true)),
    }
}

/// Token ids of a conversation, up to where the assistant answers.
pub(crate) fn encode_chat(
    engine: &Engine,
    template: &ChatTemplate,
    messages: &[Json],
) -> anyhow::Result<Vec<u32>> {
    let text = template.render(messages, None, true, None)?;
    Ok(engine.tokenizer().encode(&text, true, true))
}

/// A message as templates see it.
pub(crate) fn message(role: &str, content: &str) -> Json {
    json!({ "role": role, "content": content })
}
