//! `/v1/chat/completions`.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use utoipa::ToSchema;

pub use super::format::ResponseFormat;
use super::{
    FinishReason, LogitBias, Stop, StreamOptions, TextOr, Usage, format::StructuredOutputs, int, number,
    object_only, seed,
};

/// A conversation to continue. A `null` is the same as an absent field; unknown fields are ignored, as
/// are `user`, `store`, `metadata`, `service_tier`, `prediction`, `verbosity`, `safety_identifier` and
/// `prompt_cache_key`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({
    "messages": [{"role": "user", "content": "Why is the sky blue?"}],
    "max_tokens": 32, "temperature": 0
}))]
pub struct ChatRequest {
    /// The loaded model's id; absent or empty means that one too. Another is a 404.
    pub model: Option<String>,
    /// The conversation so far, at least one message.
    pub messages: Vec<ChatMessage>,
    /// Most tokens to generate; what the context leaves when absent. At least 1.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
    pub max_tokens: Option<i64>,
    /// The same, and it wins when both come.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
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
    /// The same seed gives the same tokens, whatever else the server does. Choice j uses seed + j.
    #[serde(default, deserialize_with = "seed")]
    pub seed: Option<i64>,
    /// Text that ends a choice and is left out of it: a string, or up to 16.
    pub stop: Option<Stop>,
    /// How many choices, 1 to 128.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<i64>,
    /// Send chunks as server-sent events.
    pub stream: Option<bool>,
    /// Only with `stream`.
    pub stream_options: Option<StreamOptions>,
    /// Return each token's log-probability.
    pub logprobs: Option<bool>,
    /// So many alternatives for each token, 0 to 20; only with `logprobs: true`.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<i64>,
    /// Tools that the model may call. It is told of them in the words of its chat template.
    #[schema(value_type = Option<Vec<Tool>>)]
    pub tools: Option<Vec<Json>>,
    /// `auto`: the model may call tools, the default; `none`: it is told of none; `required`: it must call one or
    /// more; `{"type":"function","function":{"name":…}}`: this one, once;
    /// `{"type":"allowed_tools","allowed_tools":{"mode":…,"tools":[…]}}`: `auto` or `required`, of these only.
    #[schema(value_type = Option<ToolChoice>)]
    pub tool_choice: Option<Json>,
    /// Whether one answer may make several calls; true when absent.
    pub parallel_tool_calls: Option<bool>,
    /// What the answer must be: `{"type":"text"}`, any JSON object, or what a schema allows.
    pub response_format: Option<ResponseFormat>,
    /// The answer matches this regular expression, from end to end.
    pub regex: Option<String>,
    /// The answer is one of these texts.
    pub choice: Option<Vec<String>>,
    /// The answer follows this grammar, in llguidance's variant of Lark.
    pub grammar: Option<String>,
    /// The same in vLLM's field.
    pub structured_outputs: Option<StructuredOutputs>,
    /// `structured_outputs.json` by its older name, as are the following.
    #[schema(ignore)]
    pub guided_json: Option<Json>,
    /// A regular expression.
    #[schema(ignore)]
    pub guided_regex: Option<String>,
    /// Texts.
    #[schema(ignore)]
    pub guided_choice: Option<Vec<String>>,
    /// A grammar.
    #[schema(ignore)]
    pub guided_grammar: Option<String>,
    /// Further variables for the model's chat template, such as `enable_thinking`.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<serde_json::Map<String, Json>>,
    /// Refused: use `tools`.
    #[schema(ignore)]
    pub functions: Option<Json>,
    /// Refused: use `tool_choice`.
    #[schema(ignore)]
    pub function_call: Option<Json>,
}
object_only!(ChatRequest);

/// One turn of the conversation.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    #[schema(example = "user")]
    pub role: String,
    /// What was said: a string, null, or parts of text.
    #[schema(value_type = Option<ContentSchema>)]
    pub content: Option<Content>,
    /// The speaker's name.
    pub name: Option<String>,
    /// An assistant's reasoning, for templates that show it.
    pub reasoning_content: Option<String>,
    /// The calls an assistant made.
    pub tool_calls: Option<Vec<ToolCall>>,
    /// Which call a tool's message answers.
    pub tool_call_id: Option<String>,
}
object_only!(ChatMessage);

/// A message's content: parts are joined.
pub type Content = TextOr<ContentPart>;

/// A string, or a list of text parts, which are joined.
#[derive(ToSchema)]
#[schema(as = Content)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum ContentSchema {
    /// The text.
    Text(String),
    /// Its parts.
    Parts(Vec<ContentPart>),
}

/// A part of a message. Only text is understood; another `type` is a 400.
#[derive(Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ContentPart {
    /// `text`.
    #[schema(example = "text")]
    pub r#type: String,
    /// The text.
    #[schema(example = "Why is the sky blue?")]
    pub text: Option<String>,
    /// An assistant's refusal, in parts of type `refusal`.
    pub refusal: Option<String>,
}
object_only!(ContentPart);

/// A call that an assistant made earlier in the conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ToolCall {
    /// Its id, which the tool's answer repeats.
    #[schema(example = "call_1")]
    pub id: Option<String>,
    /// `function`.
    #[schema(example = "function")]
    pub r#type: Option<String>,
    /// What was called.
    pub function: FunctionCall,
}
object_only!(ToolCall);

/// A function and what it was given.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct FunctionCall {
    /// The function.
    #[schema(example = "get_weather")]
    pub name: String,
    /// JSON in a string; an object is accepted too.
    #[schema(value_type = Option<String>, example = "{\"city\":\"Paris\"}")]
    pub arguments: Option<Json>,
}
object_only!(FunctionCall);

/// A tool the model may be told about. The template sees it as it came, the order of its keys too.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its schema is used")]
pub struct Tool {
    /// `function`.
    #[schema(example = "function")]
    r#type: String,
    /// The function.
    function: FunctionDefinition,
}

/// A function in the words the model reads.
#[derive(ToSchema)]
#[allow(dead_code, reason = "only its schema is used")]
pub struct FunctionDefinition {
    /// Its name: up to 64 letters, digits, `_` and `-`. Names differ.
    #[schema(example = "get_weather", pattern = "^[a-zA-Z0-9_-]{1,64}$")]
    name: String,
    /// What it does.
    description: Option<String>,
    /// A JSON schema of its arguments, which are an object. None are taken when it is absent.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Json>,
    /// Schemas are enforced either way. With it, as where a call is required, so must every `format` be.
    strict: Option<bool>,
}

/// A word, or an object that names what may be called.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum ToolChoice {
    /// A word.
    Word(ToolChoiceWord),
    /// A function, or the tools that are allowed.
    #[schema(value_type = Object)]
    Named(serde_json::Map<String, Json>),
}

/// Whether tools are called.
#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, reason = "only its schema is used")]
pub enum ToolChoiceWord {
    /// No call.
    None,
    /// As the model likes.
    Auto,
    /// At least one call.
    Required,
}

/// A whole answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// Unique.
    #[schema(example = "chatcmpl-5e0c7b8d2f5b4a0c9a6d3c1f0e2b7a94")]
    pub id: String,
    /// Always `chat.completion`.
    #[schema(example = "chat.completion")]
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The model that answered.
    pub model: String,
    /// The same for the same engine, model and backend.
    pub system_fingerprint: String,
    /// `n` of them.
    pub choices: Vec<ChatChoice>,
    /// Of the whole request.
    pub usage: Usage,
}

/// One of the answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// From 0.
    pub index: usize,
    /// What the model said.
    pub message: AssistantMessage,
    /// With `logprobs: true`.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// The model's turn.
#[derive(Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// Always `assistant`.
    #[schema(example = "assistant")]
    pub role: &'static str,
    /// The text; null when there is none but calls.
    #[schema(example = "Because air scatters blue light more than red.")]
    #[schema(required)]
    pub content: Option<String>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<String>,
    /// What it thought before, of models that tell it apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// The calls it made; absent when there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<MadeCall>,
}

/// A call that the model made.
#[derive(Debug, Serialize, ToSchema)]
pub struct MadeCall {
    /// Unique; the message with the tool's answer repeats it.
    #[schema(example = "call_0f1e2d3c")]
    pub id: String,
    /// Always `function`.
    #[schema(example = "function")]
    pub r#type: &'static str,
    /// What was called.
    pub function: MadeFunctionCall,
}

/// A function and what it is given.
#[derive(Debug, Serialize, ToSchema)]
pub struct MadeFunctionCall {
    /// The function.
    #[schema(example = "get_weather")]
    pub name: String,
    /// JSON in a string, as the model wrote it; cut off when `finish_reason` is `length`.
    #[schema(example = "{\"city\": \"Paris\"}")]
    pub arguments: String,
}

/// Log-probabilities of an answer, or of one chunk of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatTokenLogprob>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// A token that was chosen.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    /// Its text, lossily where its bytes are not whole characters.
    pub token: String,
    /// Natural logarithm of its probability; at least -9999.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens at this place, best first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that might have been chosen.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text, lossily where its bytes are not whole characters.
    pub token: String,
    /// Natural logarithm of its probability; at least -9999.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A piece of a streamed answer. All pieces share `id`, `created`, `model` and `system_fingerprint`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunk<'a> {
    /// Unique to the answer.
    pub id: &'a str,
    /// Always `chat.completion.chunk`.
    #[schema(example = "chat.completion.chunk")]
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// The model that answers.
    pub model: &'a str,
    /// The same for the same engine, model and backend.
    pub system_fingerprint: &'a str,
    /// One, or none in the chunk that carries the usage.
    pub choices: Vec<ChatChunkChoice<'a>>,
    /// Only with `stream_options.include_usage`: null, and the totals in the last chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

/// What a chunk adds to a choice.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice<'a> {
    /// Which choice.
    pub index: usize,
    /// What is new.
    pub delta: Delta<'a>,
    /// Of the tokens that this chunk releases.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// Null until the choice's last chunk.
    #[schema(required)]
    pub finish_reason: Option<FinishReason>,
}

/// New in a choice: the role once, then text, reasoning or calls, then nothing.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta<'a> {
    /// In the first chunk: `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    /// More of what it thinks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    /// A call that begins, or more of its arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<[CallDelta<'a>; 1]>,
}

/// New in a call. `id`, `type` and the function's name come once, with no arguments yet.
#[derive(Debug, Serialize, ToSchema)]
pub struct CallDelta<'a> {
    /// Which of the choice's calls, from 0.
    pub index: usize,
    /// Unique; in the call's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<&'a str>,
    /// `function`, in the call's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    /// What is called.
    pub function: FunctionDelta<'a>,
}

/// New in a called function.
#[derive(Debug, Serialize, ToSchema)]
pub struct FunctionDelta<'a> {
    /// The function, in the call's first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    /// More of the JSON text.
    pub arguments: &'a str,
}
