//! What is answered, whole and as events.

use serde::Serialize;
use serde_json::Value as Json;
use utoipa::ToSchema;

use crate::error::ErrorDetail;

/// An answer, whole; in `message_start` as it begins.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Message {
    /// Unique.
    #[schema(example = "msg_5e0c7b8d2f5b4a0c9a6d3c1f0e2b7a94")]
    pub id: String,
    /// Always `message`.
    #[schema(example = "message")]
    pub r#type: &'static str,
    /// Always `assistant`.
    #[schema(example = "assistant")]
    pub role: &'static str,
    /// The model that answers.
    pub model: String,
    /// What the model said.
    pub content: Vec<ContentBlock>,
    /// Why it ended; null while it has not.
    #[schema(required)]
    pub stop_reason: Option<StopReason>,
    /// Which of the stop sequences ended it, if one did.
    #[schema(required)]
    pub stop_sequence: Option<String>,
    /// Token counts.
    pub usage: MessageUsage,
}

/// A part of what the model said.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentBlock {
    /// What the model thought before it answered.
    Thinking {
        /// The text.
        thinking: String,
        /// Always empty.
        signature: &'static str,
    },
    /// Text for the user.
    Text {
        /// The text.
        text: String,
    },
    /// A function the model wants called.
    ToolUse {
        /// Unique: what the call's result names.
        id: String,
        /// The function.
        name: String,
        /// Its arguments; empty where the answer was cut off within them.
        #[schema(value_type = Object)]
        input: Json,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// The model ended its turn.
    EndTurn,
    /// `max_tokens` or the context is used up.
    MaxTokens,
    /// A stop sequence came.
    StopSequence,
    /// The model called functions.
    ToolUse,
}

/// Token counts of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct MessageUsage {
    /// Tokens of the prompt that were computed. With those from the cache they are what `count_tokens` counts.
    #[schema(example = 13)]
    pub input_tokens: usize,
    /// Always 0: the cache is nobody's to write.
    pub cache_creation_input_tokens: usize,
    /// Tokens of the prompt that a cache had.
    pub cache_read_input_tokens: usize,
    /// Tokens generated.
    #[schema(example = 7)]
    pub output_tokens: usize,
    /// Of these.
    pub output_tokens_details: OutputTokensDetails,
}

/// What the generated tokens were for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = MessageOutputTokensDetails)]
pub struct OutputTokensDetails {
    /// Tokens of thinking.
    pub thinking_tokens: usize,
}

/// A conversation's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct InputTokens {
    /// How many a request with it would have.
    #[schema(example = 13)]
    pub input_tokens: usize,
}

/// What happened, with a line `event:` that repeats its `type`. Which of the other fields there are depends on it.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct MessageEvent<'a> {
    /// In this order: `message_start`; for each block `content_block_start`, `content_block_delta` …,
    /// `content_block_stop`; at last `message_delta` and `message_stop`. In between there may be `ping`.
    #[schema(example = "content_block_delta")]
    pub r#type: &'static str,
    /// The answer as it begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'a Message>,
    /// Which block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<usize>,
    /// The block as it begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_block: Option<&'a ContentBlock>,
    /// What is new.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<Delta<'a>>,
    /// Token counts, of the whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<MessageUsage>,
}

/// What is new in a block, or in the end of the answer.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = MessageEventDelta)]
pub enum Delta<'a> {
    /// More text.
    Text {
        /// Always `text_delta`.
        r#type: &'static str,
        /// The text.
        text: &'a str,
    },
    /// More thinking.
    Thinking {
        /// Always `thinking_delta`.
        r#type: &'static str,
        /// The text.
        thinking: &'a str,
    },
    /// More of a call's arguments.
    InputJson {
        /// Always `input_json_delta`.
        r#type: &'static str,
        /// A piece of JSON.
        partial_json: &'a str,
    },
    /// The end.
    End {
        /// Why.
        stop_reason: StopReason,
        /// Which of the stop sequences ended it, if one did.
        #[schema(required)]
        stop_sequence: Option<&'a str>,
    },
}

/// The body of every error on these routes: Anthropic's frame around what all routes say.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// Always `error`.
    pub r#type: &'static str,
    /// What went wrong.
    pub error: ErrorDetail,
}

impl Problem {
    /// In its frame.
    pub fn new(error: &ErrorDetail) -> Self {
        Self { r#type: "error", error: error.clone() }
    }
}
