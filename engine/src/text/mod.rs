//! Text in and out: tokenizer, chat templates, streaming detokeniser, stop matcher.

mod bpe;
mod clock;
mod detokenizer;
mod jinja;
mod messages;
mod pretokenizer;
mod pyjson;
mod spm;
mod stop;
mod template;
mod tokenizer;
mod vocab;

pub use detokenizer::Detokenizer;
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatTemplate, PromptFormat};
pub use tokenizer::Tokenizer;

use crate::gguf::GgufError;

/// What is wrong with a tokenizer, a template or a rendering. One line.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TextError {
    /// Metadata this engine cannot use; names the key and what is supported.
    #[error("{0}")]
    Metadata(String),
    /// A template that does not compile.
    #[error("the chat template does not compile: {0}")]
    Template(String),
    /// A template called `raise_exception`, or failed on these messages: the caller's fault.
    #[error("the chat template refused the messages: {0}")]
    Rejected(String),
}

impl From<GgufError> for TextError {
    fn from(error: GgufError) -> Self {
        Self::Metadata(error.0)
    }
}
