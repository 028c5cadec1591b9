//! Text in and out: tokenizer, chat templates, streaming detokeniser, stop matcher.

mod bpe;
mod clock;
mod detokenizer;
mod infill;
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
pub use infill::FillInMiddle;
pub use stop::{StopMatcher, StopOutcome};
pub use template::{ChatTemplate, PromptFormat};
pub use tokenizer::Tokenizer;

use crate::gguf::{GgufError, Metadata, Value};

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

/// Metadata of a tokenizer whose tokens are numbers, for models without text.
pub(crate) fn numbered_vocabulary(tokens: usize) -> Metadata {
    let pairs = [
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("default".into())),
        ("tokenizer.ggml.tokens", Value::Strings((0..tokens).map(|i| format!("{i},")).collect())),
        ("tokenizer.ggml.merges", Value::Strings(Vec::new())),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    ];
    Metadata::from_pairs(pairs.map(|(key, value)| (key.to_owned(), value)))
}

/// Metadata of a tokenizer that has a token for each byte, its id the byte, and none that ends a text.
pub(crate) fn byte_vocabulary() -> Vec<(String, Value)> {
    let tokens = bpe::byte_chars().iter().map(char::to_string).collect();
    let pairs = [
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("default".into())),
        ("tokenizer.ggml.tokens", Value::Strings(tokens)),
        ("tokenizer.ggml.merges", Value::Strings(Vec::new())),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
    ];
    pairs.map(|(key, value)| (key.to_owned(), value)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_numbered_vocabulary_is_a_tokenizer() {
        let tokenizer = Tokenizer::from_metadata(&numbered_vocabulary(1000)).unwrap();
        assert_eq!(tokenizer.token_bytes(999), b"999,");
        assert!((0..1000).all(|id| !tokenizer.is_end_of_generation(id) && !tokenizer.is_control(id)));
    }
}
