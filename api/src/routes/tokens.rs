//! `POST /tokenize`, `/detokenize` and `/apply-template`, `GET /tokenizer_info`.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    BodyFailures,
    body::{JsonBody, beside},
    models::ModelFailures,
};
use crate::{
    app::AppState,
    error::ApiError,
    openai::{
        chat::{ChatMessage, Tool},
        completions::TokenId,
        object_only,
    },
    validate,
};

/// Text to tokenise.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"content": "Hello, world!"}))]
pub(super) struct TokenizeRequest {
    /// The text; `prompt`, as vLLM has it, is the same.
    #[serde(alias = "prompt")]
    content: String,
    /// Add the beginning- and end-of-text tokens that the model wants; false when absent. `add_special_tokens`,
    /// as vLLM has it, is the same.
    #[serde(alias = "add_special_tokens")]
    add_special: Option<bool>,
    /// Recognise special tokens written out in the text; true when absent.
    parse_special: Option<bool>,
}
object_only!(TokenizeRequest);

/// Token ids.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Tokens {
    /// The ids.
    #[schema(example = json!([19556, 28, 905, 17]))]
    tokens: Vec<u32>,
}

/// Text to token ids.
#[utoipa::path(
    post, path = "/tokenize", operation_id = "tokenize", tag = "Native",
    request_body = TokenizeRequest,
    responses((status = 200, description = "The ids.", body = Tokens), BodyFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn tokenize(
    State(state): State<AppState>,
    JsonBody { value, bytes }: JsonBody<TokenizeRequest>,
) -> Result<Json<Tokens>, ApiError> {
    let model = state.model()?;
    let (add, parse) = (value.add_special.unwrap_or(false), value.parse_special.unwrap_or(true));
    let tokens = beside(bytes, move || model.engine.tokenizer().encode(&value.content, add, parse)).await;
    Ok(Json(Tokens { tokens }))
}

/// The tokens around a text.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TokenizerInfo {
    /// What texts begin with; null where the model knows no such token.
    #[schema(required, example = "<|im_start|>")]
    bos_token: Option<String>,
    /// What texts end with; null where the model knows no such token.
    #[schema(required, example = "<|im_end|>")]
    eos_token: Option<String>,
}

/// Describe the tokenizer, as vLLM does: clients that look for this take their tokens from `/tokenize`.
#[utoipa::path(
    get, path = "/tokenizer_info", operation_id = "tokenizerInfo", tag = "Native",
    responses((status = 200, description = "The special tokens.", body = TokenizerInfo), ModelFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn tokenizer_info(State(state): State<AppState>) -> Result<Json<TokenizerInfo>, ApiError> {
    let model = state.model()?;
    let tokenizer = model.engine.tokenizer();
    let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id).to_owned());
    Ok(Json(TokenizerInfo { bos_token: text(tokenizer.bos()), eos_token: text(tokenizer.eos()) }))
}

/// Token ids to turn into text.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"tokens": [19556, 28, 905, 17]}))]
pub(super) struct DetokenizeRequest {
    /// The ids, each in the vocabulary.
    #[schema(value_type = Vec<u32>)]
    tokens: Vec<TokenId>,
}
object_only!(DetokenizeRequest);

/// Text.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TextContent {
    /// The text, special tokens written out.
    #[schema(example = "Hello, world!")]
    content: String,
}

/// Token ids to text.
#[utoipa::path(
    post, path = "/detokenize", operation_id = "detokenize", tag = "Native",
    request_body = DetokenizeRequest,
    responses((status = 200, description = "The text.", body = TextContent), BodyFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn detokenize(
    State(state): State<AppState>,
    JsonBody { value, bytes }: JsonBody<DetokenizeRequest>,
) -> Result<Json<TextContent>, ApiError> {
    let model = state.model()?;
    let content = beside(bytes, move || {
        let tokenizer = model.engine.tokenizer();
        let ids: Vec<u32> = value.tokens.iter().map(|id| id.0).collect();
        validate::token_ids(&ids, tokenizer, |i| format!("tokens[{i}]"))?;
        Ok::<_, ApiError>(tokenizer.decode(&ids))
    })
    .await?;
    Ok(Json(TextContent { content }))
}

/// A conversation to render.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"messages": [{"role": "user", "content": "Hello!"}]}))]
pub(super) struct TemplateRequest {
    /// The conversation, at least one message.
    messages: Vec<ChatMessage>,
    /// Tools that the template is told about.
    #[schema(value_type = Option<Vec<Tool>>)]
    tools: Option<Vec<Value>>,
    /// Further variables for the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<serde_json::Map<String, Value>>,
}
object_only!(TemplateRequest);

/// What a model would read.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct RenderedPrompt {
    /// The prompt, up to where the assistant begins to speak.
    #[schema(example = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n")]
    prompt: String,
}

/// Messages to the prompt that a chat would send to the model.
#[utoipa::path(
    post, path = "/apply-template", operation_id = "applyTemplate", tag = "Native",
    request_body = TemplateRequest,
    responses((status = 200, description = "The prompt.", body = RenderedPrompt), BodyFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn apply_template(
    State(state): State<AppState>,
    JsonBody { value, bytes }: JsonBody<TemplateRequest>,
) -> Result<Json<RenderedPrompt>, ApiError> {
    let model = state.model()?;
    let format = state.config().prompt_format;
    let prompt = beside(bytes, move || {
        let template = model.chat_template(format)?;
        let tools = validate::told(value.tools)?;
        validate::render(value.messages, tools.as_deref(), value.chat_template_kwargs.as_ref(), template)
    })
    .await?;
    Ok(Json(RenderedPrompt { prompt }))
}
