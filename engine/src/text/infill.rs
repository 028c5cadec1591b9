//! Filling in the middle: the tokens that tell a model where a text has its gap.
//!
//! Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle" (arXiv 2207.14255), in its
//! order prefix, suffix, middle, which Qwen-Coder, `CodeLlama`, `StarCoder`, Granite and DeepSeek-Coder were all trained in.

use super::{
    TextError,
    vocab::{special_id, tokens},
};
use crate::gguf::Metadata;

/// What stands before the text before the gap, before the text after it, and before what fills it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillInMiddle {
    /// The text up to the gap follows.
    pub prefix: u32,
    /// The text after the gap follows.
    pub suffix: u32,
    /// What fills the gap follows.
    pub middle: u32,
}

/// `tokenizer.ggml.{…}_token_id` of prefix, suffix and middle; the later names, then those of older files.
const KEYS: [[&str; 3]; 2] = [["fim_pre", "fim_suf", "fim_mid"], ["prefix", "suffix", "middle"]];

/// How models spell the three where the file does not say which they are.
const SPELLINGS: [[&str; 3]; 7] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
    ["<PRE>", "<SUF>", "<MID>"],
    ["<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"],
];

impl FillInMiddle {
    /// The three tokens, if the vocabulary has them all.
    pub(super) fn from_metadata(metadata: &Metadata) -> Result<Option<Self>, TextError> {
        let tokens = tokens(metadata)?;
        for names in KEYS {
            let [prefix, suffix, middle] = names.map(|name| special_id(metadata, name, tokens.len()));
            if let (Some(prefix), Some(suffix), Some(middle)) = (prefix?, suffix?, middle?) {
                return Ok(Some(Self { prefix, suffix, middle }));
            }
        }
        let id = |name: &str| tokens.iter().position(|token| token == name).map(|id| id as u32);
        Ok(SPELLINGS.iter().find_map(|[prefix, suffix, middle]| {
            Some(Self { prefix: id(prefix)?, suffix: id(suffix)?, middle: id(middle)? })
        }))
    }

    /// All three: a model that writes one of them has begun another text.
    pub fn ids(self) -> [u32; 3] {
        [self.prefix, self.suffix, self.middle]
    }
}
