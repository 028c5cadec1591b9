//! `POST /generate`: one prompt, in this server's own words.

use axum::{
    Extension, Json,
    extract::State,
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use m40llm_engine::{Event, GenerateRequest};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    WorkFailures,
    body::{Work, beside},
    finish_reason,
};
use crate::{
    app::{AppState, Model, ServerConfig},
    error::ApiError,
    observe::RequestLog,
    openai::{FinishReason, Stop, Usage, int, number, object_only, seed},
    stream::{Frames, Framing, Sequences, Wire, respond},
    validate::{self, Sampling},
};

/// A prompt to answer. A `null` is the same as an absent field; unknown fields are ignored.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"prompt": "Why is the sky blue?", "max_tokens": 32, "temperature": 0}))]
pub(super) struct NativeRequest {
    /// The prompt; not empty.
    prompt: String,
    /// Most tokens to generate; what the context leaves when absent, 0 only reads the prompt.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0)]
    max_tokens: Option<i64>,
    /// Randomness, 0 to 2, 1 when absent. 0 always takes the most likely token.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f64>,
    /// Keep the k most likely tokens; 0 or -1 keeps all, 1 is greedy.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Keep the fewest tokens that together reach this probability, 0 to 1; 0 is greedy.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Keep tokens at least this likely relative to the best, 0 to 1.
    #[serde(default, deserialize_with = "number")]
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f64>,
    /// The same seed gives the same tokens.
    #[serde(default, deserialize_with = "seed")]
    seed: Option<i64>,
    /// Text that ends the output and is left out of it: a string, or up to 16.
    stop: Option<Stop>,
    /// Refuse the request at once, with 503, when its first token is expected later than so many milliseconds.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 0)]
    max_wait_ms: Option<i64>,
    /// Send NDJSON lines, or server-sent events when the request accepts `text/event-stream`.
    stream: Option<bool>,
    /// `auto`, `raw`, `llama3-chat`, `qwen-chat` or `template`; the server's own when absent. All but
    /// `raw` make the prompt a user's message, unless it holds the template's markers already.
    #[schema(example = "auto")]
    prompt_format: Option<String>,
}
object_only!(NativeRequest);

/// The whole output.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NativeResponse {
    /// Generated text only, never the prompt.
    #[schema(example = "Because air scatters blue light more than red.")]
    output: String,
    /// Why it ended.
    finish_reason: FinishReason,
    /// Token counts.
    usage: Usage,
}

/// A piece of the output; the last one is empty and has `done: true` and the rest.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct NativePiece<'a> {
    /// More text.
    #[schema(example = "The capital")]
    output: &'a str,
    /// True in the last piece.
    done: bool,
    /// In the last piece: why it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    finish_reason: Option<FinishReason>,
    /// In the last piece: token counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// Answer a prompt.
///
/// With `"stream": true` the output comes as NDJSON lines, or as server-sent events with the same
/// objects when the request accepts `text/event-stream`. A failure after the stream has begun is one
/// object `{"error":{…}}`, and the end.
#[utoipa::path(
    post, path = "/generate", operation_id = "generate", tag = "Native",
    request_body = NativeRequest,
    responses(
        (status = 200, description = "The output, whole or in pieces.", content(
            (NativeResponse = "application/json"),
            (NativePiece<'_> = "application/x-ndjson"),
            (NativePiece<'_> = "text/event-stream"),
        )),
        WorkFailures,
    ),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn generate(
    State(state): State<AppState>,
    Extension(log): Extension<RequestLog>,
    headers: HeaderMap,
    Work { caller, value, bytes }: Work<NativeRequest>,
) -> Result<Response, ApiError> {
    let model = state.admit(None)?;
    let stream = value.stream.unwrap_or(false);
    let request = {
        let (model, state) = (model.clone(), state.clone());
        beside(bytes, move || prepare(value, &model, state.config())).await?
    };
    let sequences = Sequences::submit(&state, caller, &log, &model, vec![request], 1, "prompt")?;
    if stream {
        let framing = if accepts_sse(&headers) { Framing::Sse } else { Framing::Ndjson };
        return respond(sequences, Pieces { framing, reason: FinishReason::Stop }, framing).await;
    }
    let predicted = sequences.predicted();
    let (outcomes, usage) = sequences.collect().await?;
    let outcome =
        outcomes.into_iter().next().ok_or_else(|| ApiError::internal("The engine gave no output."))?;
    let finish_reason = finish_reason(outcome.reason);
    Ok((predicted, Json(NativeResponse { output: outcome.text, finish_reason, usage })).into_response())
}

fn accepts_sse(headers: &HeaderMap) -> bool {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok());
    accepts.flat_map(|v| v.split(',')).any(|item| {
        item.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("text/event-stream")
    })
}

/// Checks every field, renders the prompt and tokenises it.
fn prepare(
    request: NativeRequest,
    model: &Model,
    config: &ServerConfig,
) -> Result<GenerateRequest, ApiError> {
    let tokenizer = model.engine.tokenizer();
    let sampling = Sampling {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        seed: request.seed,
        ..Sampling::default()
    }
    .check(tokenizer.vocab_size())?;
    let max_tokens = validate::max_tokens(request.max_tokens, None, 0)?;
    let max_wait = validate::max_wait(request.max_wait_ms)?;
    let stop = validate::stop(request.stop)?;
    let format =
        request.prompt_format.as_deref().map_or(Ok(config.prompt_format), validate::prompt_format)?;
    if request.prompt.is_empty() {
        return Err(ApiError::invalid("prompt", "it must not be empty"));
    }
    let template = model.template(format).map_err(|e| ApiError::invalid("prompt_format", e))?;
    let prompt = match template {
        Some(template) if !template.is_rendered(&request.prompt) => {
            let message = serde_json::json!({"role": "user", "content": request.prompt});
            template.render(&[message], None, true, None).map_err(|e| ApiError::template(e, "prompt"))?
        }
        _ => request.prompt,
    };
    let prompt = tokenizer.encode(&prompt, true, true);
    Ok(GenerateRequest { prompt, max_tokens, max_wait, sampling, stop, ..GenerateRequest::default() })
}

/// A streamed output.
struct Pieces {
    framing: Framing,
    reason: FinishReason,
}

impl Wire for Pieces {
    fn event(&mut self, _: usize, event: Event, out: &mut Frames) {
        match event {
            Event::Text { text, .. } if !text.is_empty() => {
                out.push(&NativePiece { output: &text, done: false, finish_reason: None, usage: None });
            }
            Event::Done { reason, .. } => self.reason = finish_reason(reason),
            Event::Text { .. } | Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => {}
        }
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) {
        out.push(&NativePiece {
            output: "",
            done: true,
            finish_reason: Some(self.reason),
            usage: Some(usage),
        });
    }

    fn keep_alive(&self, out: &mut Frames) {
        match self.framing {
            Framing::Sse => out.comment("keep-alive"),
            // NDJSON has no comments; a piece without text changes nothing.
            Framing::Ndjson => {
                out.push(&NativePiece { output: "", done: false, finish_reason: None, usage: None });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn sse_is_for_those_who_accept_it() {
        let check =
            |value| accepts_sse(&HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(value))]));
        assert!(check("text/event-stream") && check("application/json, Text/Event-Stream;q=0.9"));
        assert!(!check("*/*") && !check("application/json"));
        assert!(!accepts_sse(&HeaderMap::new()));
    }
}
