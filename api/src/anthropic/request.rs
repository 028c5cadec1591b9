//! What is asked.

use serde::Deserialize;
use serde_json::Value as Json;
use utoipa::ToSchema;

use crate::openai::{TextOr, int, number, object_only, seed};

/// A conversation to continue. A `null` is the same as an absent field; unknown fields are ignored, as are
/// `metadata`, `service_tier`, `container` and every `cache_control`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({
    "max_tokens": 32, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "temperature": 0
}))]
pub struct MessagesRequest {
    /// The loaded model's id; absent or empty means that one too. Another is a 404.
    pub model: Option<String>,
    /// The conversation so far: at least one message, the last of them not the assistant's.
    pub messages: Vec<InputMessage>,
    /// Most tokens to generate, thinking included. At least 1.
    #[serde(default, deserialize_with = "int")]
    #[schema(required, minimum = 1, value_type = i64)]
    pub max_tokens: Option<i64>,
    /// What the model is told before the conversation: a string, or blocks of text.
    #[schema(value_type = Option<BlocksSchema>)]
    pub system: Option<TextOr<Block>>,
    /// Text that ends the answer and is left out of it; up to 16.
    pub stop_sequences: Option<Vec<String>>,
    /// Randomness, 0 to 2, 1 when absent. 0 always takes the most likely token.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 keeps all, 1 is greedy.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Keep the fewest tokens that together reach this probability, 0 to 1; 0 is greedy.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Send events as they happen.
    pub stream: Option<bool>,
    /// Functions the model may call.
    pub tools: Option<Vec<Tool>>,
    /// Whether functions are called, and which.
    pub tool_choice: Option<ToolChoice>,
    /// Whether the model thinks first.
    pub thinking: Option<Thinking>,
    /// The shape of the text.
    pub output_config: Option<OutputConfig>,
    /// Keep tokens at least this likely relative to the best, 0 to 1. An extension, as are those below.
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
object_only!(MessagesRequest);

/// A conversation whose tokens are counted.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"messages": [{"role": "user", "content": "Why is the sky blue?"}]}))]
pub struct CountTokensRequest {
    /// The loaded model's id; absent or empty means that one too. Another is a 404.
    pub model: Option<String>,
    /// The conversation so far: at least one message, the last of them not the assistant's.
    pub messages: Vec<InputMessage>,
    /// What the model is told before the conversation: a string, or blocks of text.
    #[schema(value_type = Option<BlocksSchema>)]
    pub system: Option<TextOr<Block>>,
    /// Functions the model may call.
    pub tools: Option<Vec<Tool>>,
    /// Whether functions are called, and which.
    pub tool_choice: Option<ToolChoice>,
    /// Whether the model thinks first.
    pub thinking: Option<Thinking>,
    /// The shape of the text.
    pub output_config: Option<OutputConfig>,
}
object_only!(CountTokensRequest);

impl From<CountTokensRequest> for MessagesRequest {
    fn from(count: CountTokensRequest) -> Self {
        let CountTokensRequest { model, messages, system, tools, tool_choice, thinking, output_config } =
            count;
        Self { model, messages, system, tools, tool_choice, thinking, output_config, ..Self::default() }
    }
}

/// One turn of the conversation. Turns of the same role that follow one another are one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct InputMessage {
    /// `user`, `assistant` or `system`.
    #[schema(example = "user")]
    pub role: String,
    /// What was said: a string, or blocks.
    #[schema(value_type = BlocksSchema)]
    pub content: TextOr<Block>,
}
object_only!(InputMessage);

/// A string, or a list of blocks.
#[derive(ToSchema)]
#[schema(as = Blocks)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum BlocksSchema {
    /// The text.
    Text(String),
    /// The blocks.
    Blocks(Vec<Block>),
}

/// A part of a turn. Which fields there are depends on `type`: `text`, `tool_use`, `tool_result`, `thinking` or
/// `redacted_thinking`. Another type is a 400.
#[derive(Debug, Clone, PartialEq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = InputBlock)]
pub struct Block {
    /// What it is.
    #[schema(example = "text")]
    pub r#type: String,
    /// Of text.
    pub text: Option<String>,
    /// Of a call: its id.
    pub id: Option<String>,
    /// Of a call: the function.
    pub name: Option<String>,
    /// Of a call: its arguments, an object.
    #[schema(value_type = Option<Object>)]
    pub input: Option<Json>,
    /// Of a call's result: which call.
    pub tool_use_id: Option<String>,
    /// Of a call's result: a string, or blocks of text.
    #[schema(value_type = Option<BlocksSchema>, no_recursion)]
    pub content: Option<TextOr<Block>>,
    /// Of thinking: for templates that show it.
    pub thinking: Option<String>,
}
object_only!(Block);

/// A function the model may call.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = MessagesTool)]
pub struct Tool {
    /// `custom`, or absent. Anthropic's own tools are refused.
    pub r#type: Option<String>,
    /// Its name.
    #[schema(example = "get_weather")]
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// A JSON schema of its arguments.
    #[schema(required, value_type = Object)]
    pub input_schema: Option<Json>,
    /// Whether arguments must follow the schema.
    pub strict: Option<bool>,
}
object_only!(Tool);

/// Whether functions are called, and which.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = MessagesToolChoice)]
pub struct ToolChoice {
    /// `auto`, `any`, `tool` or `none`.
    #[schema(example = "auto")]
    pub r#type: String,
    /// The function, for `tool`.
    pub name: Option<String>,
    /// At most one call.
    pub disable_parallel_tool_use: Option<bool>,
}
object_only!(ToolChoice);

/// Whether the model thinks first.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct Thinking {
    /// `enabled` and `disabled` are told to templates that can (`enable_thinking`); with any other the template
    /// decides. Budgets are ignored.
    #[schema(example = "disabled")]
    pub r#type: String,
}
object_only!(Thinking);

/// The shape of the text.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct OutputConfig {
    /// `{"type":"json_schema","schema":{…}}`.
    #[schema(value_type = Option<Object>, example = json!({"type": "json_schema", "schema": {"type": "object"}}))]
    pub format: Option<Json>,
}
object_only!(OutputConfig);
