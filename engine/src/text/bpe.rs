//! Byte-level BPE vocabularies (`tokenizer.ggml.model` = `gpt2`), on the `tokenizers` crate's BPE.
//!
//! Source: Radford et al. 2019 (GPT-2). Every byte is written as one printable character, so that
//! vocabularies and merges are plain text; see [`byte_chars`].

use std::collections::HashSet;

use tokenizers::{Model, models::bpe::BPE};

use super::{
    TextError,
    pretokenizer::{Pre, PreTokenizer},
};

/// A byte-level BPE encoder.
#[derive(Debug)]
pub(super) struct Bpe {
    words: PreTokenizer,
    model: BPE,
    byte_chars: [char; 256],
}

const MERGES: &str = "tokenizer.ggml.merges";

impl Bpe {
    /// `tokens`: the ids text may become; `reserved`: all other tokens. A merge that makes a reserved
    /// token is left out: text never becomes a control token by merging.
    pub(super) fn new<'v>(
        pre: Pre,
        tokens: impl Iterator<Item = (&'v str, u32)>,
        reserved: &HashSet<&str>,
        merges: &[String],
    ) -> Result<Self, TextError> {
        let vocab: ahash::AHashMap<String, u32> = tokens.map(|(token, id)| (token.to_owned(), id)).collect();
        let mut pairs = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for (index, merge) in merges.iter().enumerate() {
            let Some((left, right)) = merge.split_once(' ').filter(|(l, r)| !l.is_empty() && !r.is_empty())
            else {
                let what =
                    format!("{MERGES}[{index}] is {merge:?}, not two tokens with a space between them");
                return Err(TextError::Metadata(what));
            };
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            let parts = [left, right, joined.as_str()];
            if parts.iter().any(|part| reserved.contains(part)) {
                continue;
            }
            if let Some(missing) = parts.iter().find(|part| !vocab.contains_key(**part)) {
                let what =
                    format!("{MERGES}[{index}] needs {missing:?}, which is not in tokenizer.ggml.tokens");
                return Err(TextError::Metadata(what));
            }
            pairs.push((left.to_owned(), right.to_owned()));
        }
        let model = BPE::builder()
            .vocab_and_merges(vocab, pairs)
            .ignore_merges(pre.ignores_merges())
            .build()
            .map_err(|error| TextError::Metadata(format!("{MERGES}: {error}")))?;
        Ok(Self { words: PreTokenizer::new(pre), model, byte_chars: byte_chars() })
    }

    /// Appends the ids of `text`. Bytes that the vocabulary has no token for are left out, as the
    /// reference implementation does.
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        let mut spelt = String::new();
        self.words.split(text, &mut |word| {
            spelt.clear();
            spelt.extend(word.bytes().map(|byte| self.byte_chars[usize::from(byte)]));
            // Fails only for an unknown-token setting, which this model does not have.
            let tokens = self.model.tokenize(&spelt).unwrap_or_default();
            out.extend(tokens.iter().map(|token| token.id));
        });
    }
}

/// How each byte is written: printable Latin-1 as itself, the others from U+0100 on, in order.
pub(super) fn byte_chars() -> [char; 256] {
    let mut next = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        b @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(b),
        _ => next.next().unwrap_or(char::REPLACEMENT_CHARACTER),
    })
}

/// The bytes that a token spelt in [`byte_chars`] stands for. A character outside that alphabet stands
/// for its own UTF-8.
pub(super) fn spelt_bytes(token: &str, bytes: &mut Vec<u8>) {
    for c in token.chars() {
        match u32::from(c) {
            code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => bytes.push(code as u8),
            code @ 0x100..=0x120 => bytes.push((code - 0x100) as u8),
            code @ 0x121..=0x142 => bytes.push((code - 0x121 + 0x7F) as u8),
            0x143 => bytes.push(0xAD),
            _ => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{byte_chars, spelt_bytes};

    #[test]
    fn every_byte_is_spelt_and_read_back() {
        let chars = byte_chars();
        assert_eq!((chars[usize::from(b' ')], chars[usize::from(b'\n')], chars[0]), ('Ġ', 'Ċ', 'Ā'));
        for (byte, c) in chars.iter().enumerate() {
            let mut bytes = Vec::new();
            spelt_bytes(&c.to_string(), &mut bytes);
            assert_eq!(bytes, [byte as u8], "{c}");
        }
    }
}
