//! Chat templates in a Hugging-Face-compatible minijinja environment.

use serde_json::Value as Json;

use super::{TextError, Tokenizer};
use crate::gguf::Metadata;

/// `--prompt-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptFormat {
    /// The model's own template, else one this engine knows for its tokenizer.
    #[default]
    Auto,
    /// No template: text as it is.
    Raw,
    /// `templates/llama3.jinja`.
    Llama3Chat,
    /// `templates/chatml.jinja`.
    QwenChat,
    /// The model's own template, or an error.
    Template,
}

/// A compiled chat template with the model's `bos_token` and `eos_token`.
#[derive(Debug)]
pub struct ChatTemplate {}

impl ChatTemplate {
    /// The template that `format` chooses for this model; `None` for `Raw`. An error says what to choose.
    pub fn choose(
        format: PromptFormat,
        metadata: &Metadata,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>, TextError> {
        unimplemented!()
    }
    /// Renders `messages` (objects with `role`, `content`, `tool_calls`, … as OpenAI has them) and
    /// `tools`; `extra` holds further template variables (`chat_template_kwargs`).
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
        extra: Option<&serde_json::Map<String, Json>>,
    ) -> Result<String, TextError> {
        unimplemented!()
    }
    /// True when `prompt` already holds the template's markers (`<|im_start|>`, `<|start_header_id|>`, …).
    pub fn is_rendered(&self, prompt: &str) -> bool {
        unimplemented!()
    }
    /// True when the template knows the role `developer`.
    pub fn knows_developer(&self) -> bool {
        unimplemented!()
    }
}
