//! Token log-probabilities in both of OpenAI's shapes.

use std::collections::BTreeMap;

use m40llm_engine::{TokenOut, text::Tokenizer};

use crate::openai::{
    chat::{ChatLogprobs, ChatTokenLogprob, TopLogprob},
    completions::CompletionLogprobs,
};

/// JSON has no -inf; clients take this for it.
const FLOOR: f32 = -9999.0;

fn floored(logprob: f32) -> f32 {
    // `max` takes the number where the other is NaN.
    logprob.max(FLOOR)
}

/// A token's text, U+FFFD for bytes that are no whole character by themselves.
fn text(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}

/// A token's text, or `bytes:\xe6\xb0` as OpenAI has it in the completions shape, which tells no bytes beside it
/// and in which tokens are keys.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}")),
    }
}

/// The chat shape.
pub(crate) fn chat(tokenizer: &Tokenizer, tokens: &[TokenOut]) -> ChatLogprobs {
    let content = tokens.iter().map(|token| {
        let scored = token.logprob.as_ref();
        let top = scored.map_or(&[][..], |l| &l.top);
        ChatTokenLogprob {
            token: text(tokenizer, token.id),
            logprob: floored(scored.and_then(|l| l.logprob).unwrap_or(FLOOR)),
            bytes: tokenizer.token_bytes(token.id).to_vec(),
            top_logprobs: top
                .iter()
                .map(|&(id, logprob)| TopLogprob {
                    token: text(tokenizer, id),
                    logprob: floored(logprob),
                    bytes: tokenizer.token_bytes(id).to_vec(),
                })
                .collect(),
        }
    });
    ChatLogprobs { content: content.collect(), refusal: None }
}

/// Where the tokens of a choice lie in its text, over all its chunks.
#[derive(Debug, Clone, Default)]
pub(crate) struct Offsets {
    /// Characters begun by the tokens so far.
    chars: usize,
}

impl Offsets {
    /// The completions shape of the prompt's tokens, whose text `prompt` is. Where the tokens say more
    /// than the text (BOS, a leading space), the encoder has put it in front.
    pub(crate) fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        tokens: &[TokenOut],
        prompt: &str,
    ) -> CompletionLogprobs {
        let total: usize = tokens.iter().map(|t| width(tokenizer, t.id)).sum();
        let length = prompt.chars().count();
        let surplus = total.saturating_sub(length);
        let mut seen = 0;
        let logprobs = legacy(tokenizer, tokens, |id| {
            let offset = seen.max(surplus) - surplus;
            seen += width(tokenizer, id);
            offset.min(length)
        });
        self.chars = length;
        logprobs
    }

    /// The completions shape of generated tokens; control tokens have no width, as they are not printed.
    pub(crate) fn output(&mut self, tokenizer: &Tokenizer, tokens: &[TokenOut]) -> CompletionLogprobs {
        legacy(tokenizer, tokens, |id| {
            let offset = self.chars;
            if !tokenizer.is_control(id) {
                self.chars += width(tokenizer, id);
            }
            offset
        })
    }
}

/// Characters that a token begins: all bytes but UTF-8's continuations.
fn width(tokenizer: &Tokenizer, id: u32) -> usize {
    tokenizer.token_bytes(id).iter().filter(|&&byte| byte & 0xC0 != 0x80).count()
}

fn legacy(
    tokenizer: &Tokenizer,
    tokens: &[TokenOut],
    mut offset: impl FnMut(u32) -> usize,
) -> CompletionLogprobs {
    let mut out = CompletionLogprobs::default();
    for token in tokens {
        let own_name = name(tokenizer.token_bytes(token.id));
        let logprob = token.logprob.as_ref().and_then(|l| l.logprob).map(floored);
        out.top_logprobs.push(logprob.map(|own| {
            let mut top = BTreeMap::from([(own_name.clone(), own)]);
            for &(id, logprob) in token.logprob.iter().flat_map(|l| &l.top) {
                // Of tokens of the same bytes, the likelier one, which comes first, stays.
                top.entry(name(tokenizer.token_bytes(id))).or_insert(floored(logprob));
            }
            top
        }));
        out.text_offset.push(offset(token.id));
        out.token_logprobs.push(logprob);
        out.tokens.push(own_name);
    }
    out
}

/// Puts `more` behind `all`.
pub(crate) fn append(all: &mut CompletionLogprobs, more: CompletionLogprobs) {
    all.tokens.extend(more.tokens);
    all.token_logprobs.extend(more.token_logprobs);
    all.top_logprobs.extend(more.top_logprobs);
    all.text_offset.extend(more.text_offset);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_are_no_characters_have_different_names() {
        assert_eq!(name("Zürich".as_bytes()), "Zürich");
        assert_eq!(name(b"\xe6\xb0"), r"bytes:\xe6\xb0");
        assert_eq!(name(b" \xe7"), r"bytes:\x20\xe7");
    }

    #[test]
    fn minus_infinity_has_a_floor() {
        assert_eq!(floored(f32::NEG_INFINITY).to_bits(), FLOOR.to_bits());
        assert_eq!(floored(f32::NAN).to_bits(), FLOOR.to_bits());
        assert_eq!(floored(-1.5).to_bits(), (-1.5_f32).to_bits());
    }
}
