//! Tokenizers built from a GGUF's own metadata.

use super::TextError;
use crate::gguf::Metadata;

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {}

impl Tokenizer {
    /// Builds the tokenizer that `tokenizer.ggml.*` describes.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TextError> {
        unimplemented!()
    }
    /// Ids of `text`; `add_special` adds BOS/EOS as the model wants them (BOS never doubled);
    /// `parse_special` recognises control tokens written out in the text.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        unimplemented!()
    }
    /// The text of `ids`, special tokens printed, invalid UTF-8 replaced.
    pub fn decode(&self, ids: &[u32]) -> String {
        unimplemented!()
    }
    /// The bytes a token stands for (for a control token, its name). Empty for ids out of range.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        unimplemented!()
    }
    /// Ids below this are valid.
    pub fn vocab_size(&self) -> usize {
        unimplemented!()
    }
    /// Control tokens: never printed in generated text.
    pub fn is_control(&self, id: u32) -> bool {
        unimplemented!()
    }
    /// Tokens that end a turn or the text (EOS, EOT, `<|im_end|>`, …).
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        unimplemented!()
    }
    /// Beginning of text.
    pub fn bos(&self) -> Option<u32> {
        unimplemented!()
    }
    /// End of text.
    pub fn eos(&self) -> Option<u32> {
        unimplemented!()
    }
    /// The text of BOS and EOS for templates; empty when there is none.
    pub fn token_text(&self, id: u32) -> &str {
        unimplemented!()
    }
}
