//! Wire types of the OpenAI API: what clients send and what they parse, and nothing else.
//!
//! An explicit `null` is the same as an absent field, integral floats pass for integers, unknown fields
//! are ignored, and JSON arrays never stand for objects. Ranges are checked in `validate`.

pub mod chat;
pub mod completions;
pub mod embeddings;
pub mod format;
mod lenient;
pub mod models;
pub mod responses;

pub(crate) use lenient::{TextOr, int, number, object_only, seed};

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

/// `stop`: one string or several.
#[derive(Debug, Clone, PartialEq, Eq, ToSchema)]
#[schema(value_type = StopSchema)]
pub struct Stop(pub Vec<String>);

/// A string, or up to 16 of them. Empty strings are ignored.
#[derive(ToSchema)]
#[schema(as = Stop)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum StopSchema {
    /// One.
    One(String),
    /// Up to 16.
    Many(Vec<String>),
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Stop;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, items: A) -> Result<Stop, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(items)).map(Stop)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Biases by token id; the ids are the keys and so strings.
pub type LogitBias = BTreeMap<String, f64>;

/// What a stream carries beside text.
#[derive(Debug, Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StreamOptions {
    /// Every chunk gets `"usage": null`, and one more chunk with the totals and no choices ends the stream.
    pub include_usage: Option<bool>,
}
object_only!(StreamOptions);

/// Token counts of the whole request, over all prompts and choices.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens in the prompts; a prompt with several choices counts once.
    #[schema(example = 13)]
    pub prompt_tokens: usize,
    /// Tokens generated, over all choices.
    #[schema(example = 7)]
    pub completion_tokens: usize,
    /// Both together.
    #[schema(example = 20)]
    pub total_tokens: usize,
    /// Of the prompt's tokens, those a cache had.
    pub prompt_tokens_details: PromptTokensDetails,
    /// What the generated tokens were for; of models that think before they answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

/// What the generated tokens were for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct CompletionTokensDetails {
    /// Tokens of thoughts, which `reasoning_content` has.
    pub reasoning_tokens: usize,
}

/// Where the prompt's tokens came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens that were not computed again.
    pub cached_tokens: usize,
}

impl Usage {
    /// The counts with their total.
    pub fn new(prompt_tokens: usize, cached_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
            completion_tokens_details: None,
        }
    }

    /// With the tokens of thoughts, of a model that has some.
    #[must_use]
    pub fn with_reasoning(mut self, tokens: Option<usize>) -> Self {
        self.completion_tokens_details =
            tokens.map(|reasoning_tokens| CompletionTokensDetails { reasoning_tokens });
        self
    }
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended its turn, or a stop string matched.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
    /// The model called tools.
    ToolCalls,
}
