//! `/v1/responses`: what is asked. What is answered is in [`answer`].

pub mod answer;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;

use super::{
    TextOr,
    chat::{Content, ContentSchema},
    int, number, object_only, seed,
};

/// A conversation to continue. Nothing is stored, whatever `store` says, so each request brings all of its
/// conversation. A `null` is the same as an absent field; unknown fields are ignored, as are
/// `stream_options`, `prompt_cache_options` and `moderation`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({
    "input": "Why is the sky blue?", "max_output_tokens": 32, "temperature": 0
}))]
pub struct ResponsesRequest {
    /// The loaded model's id; absent or empty means that one too. Another is a 404.
    pub model: Option<String>,
    /// A string, which the user says, or the conversation's items.
    #[schema(value_type = InputSchema)]
    pub input: TextOr<InputItem>,
    /// What the model is told before the conversation.
    pub instructions: Option<String>,
    /// Most tokens to generate, reasoning included; what the context leaves when absent. At least 1.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
    pub max_output_tokens: Option<i64>,
    /// Randomness, 0 to 2, 1 when absent. 0 always takes the most likely token.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Keep the fewest tokens that together reach this probability, 0 to 1; 0 is greedy.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// So many alternatives for each token of the text, 0 to 20; above 0 they come without being included.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    /// Send events as they happen.
    pub stream: Option<bool>,
    /// Functions the model may call. Tools of other types are refused.
    #[schema(value_type = Option<Vec<FunctionTool>>)]
    pub tools: Option<Vec<Json>>,
    /// `none`, `auto`, `required`, `{"type":"function","name":"…"}`, or
    /// `{"type":"allowed_tools","mode":"auto"|"required","tools":[…]}`.
    #[schema(value_type = Option<ToolChoiceSchema>)]
    pub tool_choice: Option<Json>,
    /// Whether one answer may call several functions; true when absent.
    pub parallel_tool_calls: Option<bool>,
    /// The shape of the text.
    pub text: Option<TextConfig>,
    /// How the model thinks.
    pub reasoning: Option<Reasoning>,
    /// More of the output: `message.output_text.logprobs`. What OpenAI's own tools and stores would add is
    /// accepted and never there.
    pub include: Option<Vec<String>>,
    /// `disabled`: what does not fit into the context is refused. `auto` is refused.
    #[schema(example = "disabled")]
    pub truncation: Option<String>,
    /// Repeated in the answer.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Accepted; nothing is stored.
    pub store: Option<bool>,
    /// Refused, as nothing is stored.
    #[schema(ignore)]
    pub previous_response_id: Option<Json>,
    /// Refused, as nothing is stored.
    #[schema(ignore)]
    pub conversation: Option<Json>,
    /// Refused, as nothing is stored.
    #[schema(ignore)]
    pub prompt: Option<Json>,
    /// False; true is refused.
    pub background: Option<bool>,
    /// Repeated in the answer: the limit is for OpenAI's own tools.
    #[serde(default, deserialize_with = "int")]
    pub max_tool_calls: Option<i64>,
    /// Repeated in the answer.
    pub prompt_cache_key: Option<String>,
    /// Repeated in the answer.
    pub safety_identifier: Option<String>,
    /// Accepted; the answer says `default`.
    pub service_tier: Option<String>,
    /// Repeated in the answer.
    pub user: Option<String>,
    /// Keep the k most likely tokens; 0 or -1 keeps all, 1 is greedy. An extension, as are those below.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Keep tokens at least this likely relative to the best, 0 to 1.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// The same seed gives the same tokens, whatever else the server does.
    #[serde(default, deserialize_with = "seed")]
    pub seed: Option<i64>,
    /// Refuse the request at once, with 503, when its first token is expected later than so many milliseconds.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0)]
    pub max_wait_ms: Option<i64>,
}
object_only!(ResponsesRequest);

/// A string, which the user says, or the conversation's items.
#[derive(ToSchema)]
#[schema(as = ResponsesInput)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum InputSchema {
    /// What the user says.
    Text(String),
    /// The conversation so far, at least one item.
    Items(Vec<InputItem>),
}

/// A part of the conversation. Which fields there are depends on `type`: `message` (when absent too),
/// `function_call`, `function_call_output` or `reasoning`. Another type is a 400.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct InputItem {
    /// What it is.
    #[schema(example = "message")]
    pub r#type: Option<String>,
    /// Of a message: `user`, `assistant`, `system` or `developer`.
    #[schema(example = "user")]
    pub role: Option<String>,
    /// Of a message: a string, null, or parts of type `input_text`, `output_text` or `refusal`. Of reasoning: parts of
    /// type `reasoning_text`.
    #[schema(value_type = Option<ContentSchema>)]
    pub content: Option<Content>,
    /// Of a call and its output: which call.
    pub call_id: Option<String>,
    /// Of a call: the function.
    pub name: Option<String>,
    /// Of a call: JSON in a string; an object is accepted too.
    #[schema(value_type = Option<String>, example = "{\"city\":\"Paris\"}")]
    pub arguments: Option<Json>,
    /// Of a call's output: a string, or parts of type `input_text`.
    #[schema(value_type = Option<ContentSchema>)]
    pub output: Option<Content>,
}
object_only!(InputItem);

/// A function the model may call.
#[derive(ToSchema)]
#[schema(as = ResponsesFunctionTool)]
#[allow(dead_code, reason = "only its schema is used")]
pub struct FunctionTool {
    /// `function`.
    #[schema(example = "function")]
    r#type: String,
    /// Its name.
    #[schema(example = "get_weather")]
    name: String,
    /// What it does.
    description: Option<String>,
    /// A JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Json>,
    /// Whether arguments must follow the schema.
    strict: Option<bool>,
}

/// Whether functions are called, and which.
#[derive(ToSchema)]
#[schema(as = ResponsesToolChoice)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum ToolChoiceSchema {
    /// `none`, `auto` or `required`.
    Mode(String),
    /// A function by its name, or those that are allowed.
    #[schema(value_type = Object)]
    Named(Json),
}

/// The shape of the text.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = ResponsesText)]
pub struct TextConfig {
    /// `{"type":"text"}`, `{"type":"json_object"}`, or `{"type":"json_schema","name":"…","schema":{…}}`.
    #[schema(value_type = Option<Object>, example = json!({"type": "text"}))]
    pub format: Option<Json>,
    /// Accepted and repeated.
    pub verbosity: Option<String>,
}
object_only!(TextConfig);

impl Serialize for TextConfig {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

/// How the model thinks.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = ResponsesReasoning)]
pub struct Reasoning {
    /// `none` asks templates that can (`enable_thinking`) for an answer without; any other is only repeated.
    #[schema(required)]
    pub effort: Option<String>,
    /// Accepted and repeated; there are no summaries.
    #[schema(required)]
    pub summary: Option<String>,
}
object_only!(Reasoning);

impl Serialize for Reasoning {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}
