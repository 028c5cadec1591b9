//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's.

mod blocks;

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    http::{HeaderName, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use m40llm_engine::{Event, FinishReason, Meter};

use self::blocks::{Blocks, Tell};
use super::{
    WorkFailures,
    body::{Work, beside, constrain},
    new_item_id,
};
use crate::{
    anthropic::{
        CountTokensRequest, Delta, InputTokens, Message, MessageEvent, MessageUsage, MessagesRequest,
        OutputTokensDetails, Problem, StopReason,
    },
    app::AppState,
    error::{ApiError, ErrorDetail},
    observe::{REQUEST_ID, RequestLog},
    openai::Usage,
    stream::{Frames, Framing, Sequences, Wire, respond},
    tools::Turn,
    validate,
};

/// Continue a conversation, in the words of Anthropic's Messages.
///
/// With `"stream": true` events come as they happen, each with a line `event:` of its type. A failure after the
/// stream has begun is an `error` event, and the end. The header `anthropic-version` is ignored.
#[utoipa::path(
    post, path = "/v1/messages", operation_id = "createMessage", tag = "Anthropic",
    request_body = MessagesRequest,
    responses(
        (status = 200, description = "The answer, whole or as events.", content(
            (Message = "application/json"),
            (MessageEvent<'_> = "text/event-stream"),
        )),
        WorkFailures,
    ),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    Extension(log): Extension<RequestLog>,
    Work { caller, value, bytes }: Work<MessagesRequest>,
) -> Result<Response, ApiError> {
    let model = state.admit(value.model.as_deref())?;
    if value.max_tokens.is_none() {
        return Err(ApiError::invalid("max_tokens", "this field is required"));
    }
    let mut job = {
        let (model, state) = (model.clone(), state.clone());
        beside(bytes, move || validate::anthropic(value, &model, state.config())).await?
    };
    constrain(job.form, &model, &mut job.requests, "messages").await?;
    let stops = job.requests.first_mut().map(|request| request.stop.clone()).unwrap_or_default();
    let prompt = job.requests.first().map_or(0, |request| request.prompt.len());
    let sequences = Sequences::submit(&state, caller, &log, &model, job.requests, 1, "messages")?;
    let mut speech = Speech {
        turn: Turn::new(&job.reading),
        blocks: Blocks::default(),
        stops,
        ended: (StopReason::EndTurn, None),
    };
    let message = Message {
        id: new_item_id("msg"),
        r#type: "message",
        role: "assistant",
        model: state.config().model_id.clone(),
        content: Vec::new(),
        stop_reason: None,
        stop_sequence: None,
        usage: usage(Usage::new(prompt, 0, 0), 0),
    };
    if job.stream {
        let meter = sequences.meter(0);
        return respond(sequences, Events { message, speech, meter }, Framing::Sse).await;
    }
    let predicted = sequences.predicted();
    let counts = sequences.each(|_, event| speech.event(event, &mut |_| {})).await?;
    let (stop_reason, stop_sequence) = speech.ended;
    let message = Message {
        content: speech.blocks.take(),
        stop_reason: Some(stop_reason),
        stop_sequence,
        usage: usage(counts, speech.turn.reasoning_tokens().unwrap_or_default()),
        ..message
    };
    Ok((predicted, Json(message)).into_response())
}

/// Count the tokens of a conversation, without an answer.
///
/// It is refused for what `/v1/messages` is refused for, but for its length, and but for schemas that do not compile.
#[utoipa::path(
    post, path = "/v1/messages/count_tokens", operation_id = "countMessageTokens", tag = "Anthropic",
    request_body = CountTokensRequest,
    responses((status = 200, description = "How many.", body = InputTokens), WorkFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn count_tokens(
    State(state): State<AppState>,
    Work { caller: _caller, value, bytes }: Work<CountTokensRequest>,
) -> Result<Json<InputTokens>, ApiError> {
    let model = state.admit(value.model.as_deref())?;
    let value = MessagesRequest::from(value);
    let job = beside(bytes, move || validate::anthropic(value, &model, state.config())).await?;
    Ok(Json(InputTokens { input_tokens: job.requests.first().map_or(0, |request| request.prompt.len()) }))
}

/// The counts in Anthropic's words: what a cache had is no input.
fn usage(counts: Usage, thinking_tokens: usize) -> MessageUsage {
    let cached = counts.prompt_tokens_details.cached_tokens;
    MessageUsage {
        input_tokens: counts.prompt_tokens - cached,
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: cached,
        output_tokens: counts.completion_tokens,
        output_tokens_details: OutputTokensDetails { thinking_tokens },
    }
}

/// What the model says, from its events.
struct Speech {
    turn: Turn,
    blocks: Blocks,
    /// The stop sequences.
    stops: Vec<String>,
    /// Why it ended, once it has, and by which stop sequence.
    ended: (StopReason, Option<String>),
}

impl Speech {
    fn event(&mut self, event: Event, tell: Tell<'_>) {
        match event {
            Event::Text { text, tokens } => {
                let (pieces, _) = self.turn.push(&text, tokens);
                self.blocks.say(pieces, tell);
            }
            Event::Done { reason, matched, .. } => {
                let (pieces, _) = self.turn.finish();
                self.blocks.say(pieces, tell);
                self.blocks.finish(tell);
                let stop = matched.and_then(|i| self.stops.get(i).cloned());
                self.ended = match (reason, stop) {
                    (FinishReason::Length, _) => (StopReason::MaxTokens, None),
                    (FinishReason::Stop, _) if self.turn.called() => (StopReason::ToolUse, None),
                    (FinishReason::Stop, Some(stop)) => (StopReason::StopSequence, Some(stop)),
                    (FinishReason::Stop, None) => (StopReason::EndTurn, None),
                };
            }
            Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => {}
        }
    }
}

/// A streamed answer.
struct Events {
    /// As it begins.
    message: Message,
    speech: Speech,
    /// What is known of the counts by then.
    meter: Option<Arc<Meter>>,
}

fn send(event: &MessageEvent<'_>, out: &mut Frames) {
    out.event(event.r#type, event);
}

impl Wire for Events {
    fn open(&mut self, out: &mut Frames) {
        let known = self.meter.as_ref().map(|meter| meter.usage()).unwrap_or_default();
        let prompt = self.message.usage.input_tokens;
        self.message.usage = usage(Usage::new(prompt, known.cached_tokens.min(prompt), 0), 0);
        let message = Some(&self.message);
        send(&MessageEvent { r#type: "message_start", message, ..MessageEvent::default() }, out);
    }

    fn event(&mut self, _: usize, event: Event, out: &mut Frames) {
        self.speech.event(event, &mut |event| send(&event, out));
    }

    fn close(&mut self, counts: Usage, out: &mut Frames) {
        let (stop_reason, stop_sequence) = &self.speech.ended;
        let delta = Delta::End { stop_reason: *stop_reason, stop_sequence: stop_sequence.as_deref() };
        let usage = Some(usage(counts, self.speech.turn.reasoning_tokens().unwrap_or_default()));
        let delta = Some(delta);
        send(&MessageEvent { r#type: "message_delta", delta, usage, ..MessageEvent::default() }, out);
        send(&MessageEvent { r#type: "message_stop", ..MessageEvent::default() }, out);
    }

    fn failed(&mut self, error: &ApiError, out: &mut Frames) {
        out.event("error", &Problem::new(&error.body().error));
    }

    fn keep_alive(&self, out: &mut Frames) {
        send(&MessageEvent { r#type: "ping", ..MessageEvent::default() }, out);
    }
}

/// Beside `x-request-id`: where Anthropic's clients look for it.
const ANTHROPIC_ID: HeaderName = HeaderName::from_static("request-id");

/// The layer that puts errors of these routes into Anthropic's frame, whoever made them, and says the request's id
/// in its header.
pub(crate) async fn frame(request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path != "/v1/messages" && path != "/v1/messages/count_tokens" {
        return next.run(request).await;
    }
    let id = request.headers().get(REQUEST_ID).cloned();
    let mut response = next.run(request).await;
    if let Some(detail) = response.extensions().get::<ErrorDetail>() {
        let framed = Json(Problem::new(detail)).into_response().into_body();
        *response.body_mut() = framed;
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if let Some(id) = id {
        response.headers_mut().insert(ANTHROPIC_ID, id);
    }
    response
}
