//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use m40llm_engine::Event;

use super::{
    Head, WorkFailures,
    body::{Work, beside},
    finish_reason,
};
use crate::{
    app::{AppState, Model},
    error::ApiError,
    logprobs,
    observe::RequestLog,
    openai::{
        Usage,
        chat::{
            AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatRequest, Delta,
        },
    },
    stream::{Frames, Framing, Sequences, Wire, respond},
    validate,
};

/// Continue a conversation.
///
/// With `"stream": true` the answer comes as server-sent events: per choice one chunk with the role, then
/// chunks with text, then one with `finish_reason`; at last `data: [DONE]`. A failure after the stream has
/// begun is one event `data: {"error":{…}}`, and the end.
#[utoipa::path(
    post, path = "/v1/chat/completions", operation_id = "createChatCompletion", tag = "OpenAI",
    request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer, whole or as chunks.", content(
            (ChatCompletion = "application/json"),
            (ChatChunk<'_> = "text/event-stream"),
        )),
        WorkFailures,
    ),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    Extension(log): Extension<RequestLog>,
    Work { caller, value, bytes }: Work<ChatRequest>,
) -> Result<Response, ApiError> {
    let model = state.admit(value.model.as_deref())?;
    let job = {
        let (model, state) = (model.clone(), state.clone());
        beside(bytes, move || validate::chat(value, &model, state.config())).await?
    };
    let n = job.requests.len();
    let sequences = Sequences::submit(&state, caller, &log, &model, job.requests, n, "messages")?;
    let head = Head::new("chatcmpl", &state, &model);
    if job.stream {
        let wire = Chunks { head, n, model, include_usage: job.include_usage, logprobs: job.logprobs };
        return respond(sequences, wire, Framing::Sse).await;
    }
    let predicted = sequences.predicted();
    let (outcomes, usage) = sequences.collect().await?;
    let choices = outcomes.into_iter().enumerate().map(|(index, outcome)| ChatChoice {
        index,
        message: AssistantMessage { role: "assistant", content: Some(outcome.text), refusal: None },
        logprobs: job.logprobs.then(|| logprobs::chat(model.engine.tokenizer(), &outcome.tokens)),
        finish_reason: finish_reason(outcome.reason),
    });
    let answer = Json(ChatCompletion {
        id: head.id,
        object: "chat.completion",
        created: head.created,
        model: head.model,
        system_fingerprint: head.fingerprint,
        choices: choices.collect(),
        usage,
    });
    Ok((predicted, answer).into_response())
}

/// A streamed answer.
struct Chunks {
    head: Head,
    n: usize,
    model: Arc<Model>,
    include_usage: bool,
    logprobs: bool,
}

impl Chunks {
    fn push(&self, choices: Vec<ChatChunkChoice<'_>>, usage: Option<Usage>, out: &mut Frames) {
        out.push(&ChatChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: &self.head.fingerprint,
            choices,
            usage: self.include_usage.then_some(usage),
        });
    }
}

impl Wire for Chunks {
    fn open(&mut self, out: &mut Frames) {
        for index in 0..self.n {
            let delta = Delta { role: Some("assistant"), content: Some("") };
            self.push(vec![ChatChunkChoice { index, delta, logprobs: None, finish_reason: None }], None, out);
        }
    }

    fn event(&mut self, index: usize, event: Event, out: &mut Frames) {
        let choice = match &event {
            Event::Text { text, tokens } => {
                let logprobs = (self.logprobs && !tokens.is_empty())
                    .then(|| logprobs::chat(self.model.engine.tokenizer(), tokens));
                if text.is_empty() && logprobs.is_none() {
                    return;
                }
                let delta = Delta { role: None, content: Some(text) };
                ChatChunkChoice { index, delta, logprobs, finish_reason: None }
            }
            Event::Done { reason, .. } => {
                let finish_reason = Some(finish_reason(*reason));
                ChatChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason }
            }
            Event::Prompt(_) | Event::Failed(_) => return,
        };
        self.push(vec![choice], None, out);
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) {
        if self.include_usage {
            self.push(Vec::new(), Some(usage), out);
        }
        out.raw("[DONE]");
    }
}
