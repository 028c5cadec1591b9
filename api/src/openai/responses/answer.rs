//! `/v1/responses`: what is answered, whole and as events.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value as Json;
use utoipa::ToSchema;

use super::{FunctionTool, Reasoning, TextConfig, ToolChoiceSchema};
use crate::{error::ErrorDetail, openai::chat::ChatTokenLogprob};

/// An answer, whole or as far as it has come.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Response {
    /// Unique. Nothing can be fetched by it.
    #[schema(example = "resp_5e0c7b8d2f5b4a0c9a6d3c1f0e2b7a94")]
    pub id: String,
    /// Always `response`.
    #[schema(example = "response")]
    pub object: &'static str,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds; null unless `status` is `completed`.
    #[schema(required)]
    pub completed_at: Option<u64>,
    /// How far it is.
    pub status: Status,
    /// Always null: a failure is another status, or the event `error`.
    #[schema(required)]
    pub error: Option<String>,
    /// Why it is incomplete; null unless `status` is `incomplete`.
    #[schema(required)]
    pub incomplete_details: Option<Incomplete>,
    /// The model that answers.
    pub model: String,
    /// What the model said.
    pub output: Vec<OutputItem>,
    /// Null until the answer has ended.
    #[schema(required)]
    pub usage: Option<ResponseUsage>,
    /// What was asked for.
    #[serde(flatten)]
    pub asked: Asked,
}

/// A request's fields as they took effect.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponseSettings)]
pub struct Asked {
    /// Always false.
    pub background: bool,
    /// Always null: nothing is stored.
    #[schema(required)]
    pub previous_response_id: Option<String>,
    /// Always false: nothing is stored.
    pub store: bool,
    /// As given.
    #[schema(required)]
    pub instructions: Option<String>,
    /// As given.
    #[schema(required)]
    pub max_output_tokens: Option<i64>,
    /// As given.
    #[schema(required)]
    pub max_tool_calls: Option<i64>,
    /// As given.
    pub metadata: BTreeMap<String, String>,
    /// As given, or true.
    pub parallel_tool_calls: bool,
    /// As given.
    #[schema(required)]
    pub prompt_cache_key: Option<String>,
    /// As given.
    pub reasoning: Reasoning,
    /// As given.
    #[schema(required)]
    pub safety_identifier: Option<String>,
    /// Always `default`.
    #[schema(example = "default")]
    pub service_tier: &'static str,
    /// As given, or 1.
    pub temperature: f64,
    /// As given, or of the format `text`.
    pub text: TextConfig,
    /// As given, or `auto`.
    #[schema(value_type = ToolChoiceSchema)]
    pub tool_choice: Json,
    /// As given.
    #[schema(value_type = Vec<FunctionTool>)]
    pub tools: Vec<Json>,
    /// As given, or 0.
    pub top_logprobs: i64,
    /// As given, or 1.
    pub top_p: f64,
    /// Always `disabled`.
    #[schema(example = "disabled")]
    pub truncation: &'static str,
    /// As given.
    #[schema(required)]
    pub user: Option<String>,
}

/// How far an answer, or a part of it, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ResponseStatus)]
pub enum Status {
    /// More comes.
    InProgress,
    /// It is whole.
    Completed,
    /// It was cut by `max_output_tokens` or the context's end.
    Incomplete,
}

/// Why an answer is incomplete.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[schema(as = ResponseIncomplete)]
pub struct Incomplete {
    /// Always `max_output_tokens`, the context's end included.
    #[schema(example = "max_output_tokens")]
    pub reason: &'static str,
}

/// A part of what the model said.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// What the model thought before it answered.
    Reasoning {
        /// Unique.
        id: String,
        /// Always empty.
        #[schema(value_type = Vec<Object>, max_items = 0)]
        summary: [(); 0],
        /// One part.
        content: Vec<ReasoningText>,
        /// How far it is.
        status: Status,
    },
    /// Text for the user.
    Message {
        /// Unique.
        id: String,
        /// How far it is.
        status: Status,
        /// Always `assistant`.
        role: &'static str,
        /// One part.
        content: Vec<OutputText>,
    },
    /// A function the model wants called.
    FunctionCall {
        /// Unique.
        id: String,
        /// How far it is.
        status: Status,
        /// Unique too: what the call's output names.
        call_id: String,
        /// The function.
        name: String,
        /// JSON in a string, cut off when the answer was.
        arguments: String,
    },
}

/// Text for the user.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct OutputText {
    /// Always `output_text`.
    #[schema(example = "output_text")]
    pub r#type: &'static str,
    /// The text.
    #[schema(example = "Because air scatters blue light more than red.")]
    pub text: String,
    /// Always empty.
    #[schema(value_type = Vec<Object>, max_items = 0)]
    pub annotations: [(); 0],
    /// Of the text's tokens, when they were asked for.
    pub logprobs: Vec<ChatTokenLogprob>,
}

/// What the model thought.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct ReasoningText {
    /// Always `reasoning_text`.
    #[schema(example = "reasoning_text")]
    pub r#type: &'static str,
    /// The text.
    pub text: String,
}

/// Token counts of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct ResponseUsage {
    /// Tokens of the prompt.
    #[schema(example = 13)]
    pub input_tokens: usize,
    /// Of these.
    pub input_tokens_details: InputTokensDetails,
    /// Tokens generated.
    #[schema(example = 7)]
    pub output_tokens: usize,
    /// Of these.
    pub output_tokens_details: OutputTokensDetails,
    /// Both together.
    #[schema(example = 20)]
    pub total_tokens: usize,
}

/// Where the prompt's tokens came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct InputTokensDetails {
    /// Tokens that were not computed again.
    pub cached_tokens: usize,
    /// Always 0: the cache is nobody's to write.
    pub cache_write_tokens: usize,
}

/// What the generated tokens were for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct OutputTokensDetails {
    /// Tokens of reasoning.
    pub reasoning_tokens: usize,
}

/// What happened, with a line `event:` that repeats its `type`. Which of the other fields there are depends on it.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct ResponseEvent<'a> {
    /// In this order: `response.created`, `response.in_progress`; for each item `response.output_item.added`, for
    /// text and reasoning `response.content_part.added`, then `response.output_text.delta` …,
    /// `response.output_text.done` (or `response.reasoning_text.…`, `response.function_call_arguments.…`),
    /// `response.content_part.done`, `response.output_item.done`; at last `response.completed`,
    /// `response.incomplete` or `error`.
    #[schema(example = "response.output_text.delta")]
    pub r#type: &'static str,
    /// From 0.
    pub sequence_number: u64,
    /// The answer as far as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<&'a Response>,
    /// Which item of the output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_index: Option<usize>,
    /// The item.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub item: Option<&'a OutputItem>,
    /// The item's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub item_id: Option<&'a str>,
    /// Always 0: items have one part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_index: Option<usize>,
    /// The part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<Part<'a>>,
    /// What is new of the text or of the arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<&'a str>,
    /// The text, whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<&'a str>,
    /// Of the tokens of the text that is new, or whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<&'a [ChatTokenLogprob]>,
    /// The function whose arguments are whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    /// The arguments, whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arguments: Option<&'a str>,
    /// Of an error: for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub code: Option<Option<&'a str>>,
    /// Of an error: in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'a str>,
    /// Of an error: the field at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub param: Option<Option<&'a str>>,
    /// Of an error: the same as in every error's body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<&'a ErrorDetail>,
}

/// A part of an item.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Part<'a> {
    /// Text for the user.
    Text(&'a OutputText),
    /// What the model thought.
    Reasoning(&'a ReasoningText),
}
