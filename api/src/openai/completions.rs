//! `/v1/completions`.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

use super::{FinishReason, LogitBias, Stop, StreamOptions, Usage, int, number, object_only, seed};

/// Text to continue, without a chat template. A `null` is the same as an absent field; unknown fields
/// are ignored.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}))]
pub struct CompletionRequest {
    /// The loaded model's id; absent or empty means that one too. Another is a 404.
    pub model: Option<String>,
    /// A string, strings, token ids, or lists of token ids.
    pub prompt: Prompt,
    /// Most tokens to generate for each choice, 16 when absent; 0 only reads the prompt.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0)]
    pub max_tokens: Option<i64>,
    /// The same, and it wins when both come.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0)]
    pub max_completion_tokens: Option<i64>,
    /// Refuse the request at once, with 503, when its first token is expected later than so many milliseconds.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0)]
    pub max_wait_ms: Option<i64>,
    /// Randomness, 0 to 2, 1 when absent. 0 always takes the most likely token.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Keep the fewest tokens that together reach this probability, 0 to 1; 0 is greedy.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Keep the k most likely tokens; 0 or -1 keeps all, 1 is greedy.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Keep tokens at least this likely relative to the best, 0 to 1.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// Lowers tokens that were generated already, -2 to 2.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// Lowers tokens by how often they were generated, -2 to 2.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    /// Divides the logits of tokens seen; above 0, 1 is off.
    #[serde(default, deserialize_with = "number")]
    #[schema(exclusive_minimum = 0, maximum = 100)]
    pub repetition_penalty: Option<f64>,
    /// Token ids (as strings) to biases from -100 to 100, added to the logits.
    #[schema(value_type = Option<std::collections::BTreeMap<String, f64>>)]
    pub logit_bias: Option<LogitBias>,
    /// The same seed gives the same tokens, whatever else the server does. Choice j of a prompt uses
    /// seed + j.
    #[serde(default, deserialize_with = "seed")]
    pub seed: Option<i64>,
    /// Text that ends a choice and is left out of it: a string, or up to 16.
    pub stop: Option<Stop>,
    /// How many choices for each prompt, 1 to 128. Choice j of prompt i has the index i·n + j.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<i64>,
    /// Generate so many and return the `n` most likely per token; at least `n`, not with `stream`.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1, maximum = 128)]
    pub best_of: Option<i64>,
    /// Send chunks as server-sent events.
    pub stream: Option<bool>,
    /// Only with `stream`.
    pub stream_options: Option<StreamOptions>,
    /// Return log-probabilities with so many alternatives, 0 to 20.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<i64>,
    /// Put the prompt before the output; with `logprobs` its tokens are scored too.
    pub echo: Option<bool>,
    /// What follows the output: the model fills the gap between `prompt` and this. A 400 unless the model has tokens
    /// for it, and with `echo` and `logprobs` together.
    pub suffix: Option<String>,
    /// What the output must be: `{"type":"text"}`, any JSON object, or what a schema allows.
    pub response_format: Option<super::format::ResponseFormat>,
    /// The output matches this regular expression, from end to end.
    pub regex: Option<String>,
    /// The output is one of these texts.
    pub choice: Option<Vec<String>>,
    /// The output follows this grammar, in llguidance's variant of Lark.
    pub grammar: Option<String>,
    /// The same in vLLM's field.
    pub structured_outputs: Option<super::format::StructuredOutputs>,
    /// `structured_outputs.json` by its older name, as are the following.
    #[schema(ignore)]
    pub guided_json: Option<serde_json::Value>,
    /// A regular expression.
    #[schema(ignore)]
    pub guided_regex: Option<String>,
    /// Texts.
    #[schema(ignore)]
    pub guided_choice: Option<Vec<String>>,
    /// A grammar.
    #[schema(ignore)]
    pub guided_grammar: Option<String>,
}
object_only!(CompletionRequest);

/// One prompt or several, as text or as token ids.
#[derive(Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text; several when the request had a list.
    Texts(Vec<String>),
    /// Token ids; several when the request had lists.
    Tokens(Vec<Vec<u32>>),
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum PromptSchema {
    /// One text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// One list of token ids.
    Tokens(Vec<u32>),
    /// Several lists of token ids.
    TokenLists(Vec<Vec<u32>>),
}

impl utoipa::PartialSchema for Prompt {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        PromptSchema::schema()
    }
}
impl ToSchema for Prompt {
    fn name() -> std::borrow::Cow<'static, str> {
        "Prompt".into()
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PromptVisitor)
    }
}

struct PromptVisitor;

impl<'de> de::Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, a list of token ids or a list of lists of token ids")
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Texts(vec![text.to_owned()]))
    }
    fn visit_string<E: de::Error>(self, text: String) -> Result<Prompt, E> {
        Ok(Prompt::Texts(vec![text]))
    }
    /// The first item says what the others must be.
    fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Prompt, A::Error> {
        match items.next_element::<PromptItem>()? {
            None => Ok(Prompt::Texts(Vec::new())),
            Some(PromptItem::Text(text)) => rest(text, items).map(Prompt::Texts),
            Some(PromptItem::Token(id)) => {
                let ids: Vec<TokenId> = rest(TokenId(id), items)?;
                Ok(Prompt::Tokens(vec![ids.into_iter().map(|id| id.0).collect()]))
            }
            Some(PromptItem::Tokens(ids)) => {
                let lists: Vec<Vec<TokenId>> = rest(ids, items)?;
                let lists = lists.into_iter().map(|ids| ids.into_iter().map(|id| id.0).collect());
                Ok(Prompt::Tokens(lists.collect()))
            }
        }
    }
}

fn rest<'de, T: Deserialize<'de>, A: de::SeqAccess<'de>>(first: T, mut items: A) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    while let Some(item) = items.next_element()? {
        all.push(item);
    }
    Ok(all)
}

/// A token id on the wire; an integral float passes for one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenId(pub(crate) u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = TokenId;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a token id")
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<TokenId, E> {
                let id =
                    u32::try_from(id).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(id), &self))?;
                Ok(TokenId(id))
            }
            fn visit_f64<E: de::Error>(self, id: f64) -> Result<TokenId, E> {
                if id.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&id) {
                    Ok(TokenId(id as u32))
                } else {
                    Err(E::invalid_value(de::Unexpected::Float(id), &self))
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

enum PromptItem {
    Text(String),
    Token(u32),
    Tokens(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = PromptItem;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(text.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<PromptItem, E> {
                TokenId::deserialize(de::value::U64Deserializer::new(id)).map(|id| PromptItem::Token(id.0))
            }
            fn visit_f64<E: de::Error>(self, id: f64) -> Result<PromptItem, E> {
                TokenId::deserialize(de::value::F64Deserializer::new(id)).map(|id| PromptItem::Token(id.0))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, ids: A) -> Result<PromptItem, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(ids)).map(PromptItem::Tokens)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Whole texts, or with `stream` a piece of one; all pieces share `id`, `created`, `model` and
/// `system_fingerprint`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Completion<'a> {
    /// Unique.
    #[schema(example = "cmpl-5e0c7b8d2f5b4a0c9a6d3c1f0e2b7a94")]
    pub id: &'a str,
    /// Always `text_completion`.
    #[schema(example = "text_completion")]
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The model that answered.
    pub model: &'a str,
    /// The same for the same engine, model and backend.
    pub system_fingerprint: &'a str,
    /// `n` for each prompt; in a stream one, or none in the chunk that carries the usage.
    pub choices: Vec<CompletionChoice>,
    /// Of the whole request. In a stream only with `stream_options.include_usage`: null, and the totals
    /// in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

/// A continuation, or a piece of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Prompt number times `n`, plus the choice's number.
    pub index: usize,
    /// The text, after the prompt's when `echo` is set.
    #[schema(example = " Paris.")]
    pub text: String,
    /// With `logprobs`.
    #[schema(required)]
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended; null in a stream until the choice's last chunk.
    #[schema(required)]
    pub finish_reason: Option<FinishReason>,
}

/// Log-probabilities of a choice, or of one chunk of it; the four lists have the same length.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// The tokens' texts, or such as `bytes:\xe6\xb0` where their bytes are not whole characters. A token that ended the
    /// choice comes last, and is no part of its text.
    pub tokens: Vec<String>,
    /// Natural logarithms, at least -9999; null for an echoed first token, which nothing predicts.
    pub token_logprobs: Vec<Option<f32>>,
    /// The most likely tokens at each place and the one that was chosen; null for an echoed first token.
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where each token begins in the choice's text, in characters.
    pub text_offset: Vec<usize>,
}
