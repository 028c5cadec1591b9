//! `POST /v1/responses`.

mod output;

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use m40llm_engine::{Event, FinishReason};

use self::output::{Output, Tell};
use super::{
    WorkFailures,
    body::{Work, beside, constrain},
    new_item_id, now,
};
use crate::{
    app::{AppState, Model},
    error::ApiError,
    logprobs,
    observe::RequestLog,
    openai::{
        Usage,
        chat::ChatTokenLogprob,
        responses::{
            ResponsesRequest,
            answer::{
                self, Incomplete, InputTokensDetails, OutputTokensDetails, ResponseEvent, ResponseUsage,
                Status,
            },
        },
    },
    stream::{Frames, Framing, Sequences, Wire, respond},
    tools::Turn,
    validate,
};

/// Continue a conversation, in the words of OpenAI's Responses.
///
/// Nothing is stored: each request brings its whole conversation. With `"stream": true` events come as they
/// happen, each with a line `event:` of its type; the last one is `response.completed` or
/// `response.incomplete`. A failure after the stream has begun is an `error` event, and the end.
#[utoipa::path(
    post, path = "/v1/responses", operation_id = "createResponse", tag = "OpenAI",
    request_body = ResponsesRequest,
    responses(
        (status = 200, description = "The answer, whole or as events.", content(
            (answer::Response = "application/json"),
            (ResponseEvent<'_> = "text/event-stream"),
        )),
        WorkFailures,
    ),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    Extension(log): Extension<RequestLog>,
    Work { caller, value, bytes }: Work<ResponsesRequest>,
) -> Result<Response, ApiError> {
    let model = state.admit(value.model.as_deref())?;
    let (mut job, asked) = {
        let (model, state) = (model.clone(), state.clone());
        beside(bytes, move || validate::responses(value, &model, state.config())).await?
    };
    constrain(job.form, &model, &mut job.requests, "input").await?;
    let sequences = Sequences::submit(&state, caller, &log, &model, job.requests, 1, "input")?;
    let answer = answer::Response {
        id: new_item_id("resp"),
        object: "response",
        created_at: now(),
        completed_at: None,
        status: Status::InProgress,
        error: None,
        incomplete_details: None,
        model: state.config().model_id.clone(),
        output: Vec::new(),
        usage: None,
        asked,
    };
    let mut speech = Speech {
        turn: Turn::new(&job.reading),
        output: Output::default(),
        reason: FinishReason::Stop,
        logprobs: job.logprobs.then_some(model),
    };
    if job.stream {
        let wire = Events { answer, speech, told: 0 };
        return respond(sequences, wire, Framing::Sse).await;
    }
    let predicted = sequences.predicted();
    let usage = sequences.each(|_, event| speech.event(event, &mut |_| {})).await?;
    Ok((predicted, Json(speech.end(answer, usage))).into_response())
}

/// What the model says, from its events.
struct Speech {
    turn: Turn,
    output: Output,
    /// Why it ended, once it has.
    reason: FinishReason,
    /// Whose tokens have log-probabilities, when these are wanted.
    logprobs: Option<Arc<Model>>,
}

impl Speech {
    fn event(&mut self, event: Event, tell: Tell<'_>) {
        let ((pieces, tokens), ended) = match event {
            Event::Text { text, tokens } => (self.turn.push(&text, tokens), None),
            Event::Done { reason, .. } => (self.turn.finish(), Some(reason)),
            Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => return,
        };
        let logprobs: Vec<ChatTokenLogprob> = match &self.logprobs {
            Some(model) => logprobs::chat(model.engine.tokenizer(), &tokens).content,
            None => Vec::new(),
        };
        self.output.say(pieces, logprobs, tell);
        if let Some(reason) = ended {
            self.reason = reason;
            self.output.finish(reason == FinishReason::Stop || self.turn.called(), tell);
        }
    }

    /// The answer, whole.
    fn end(&mut self, answer: answer::Response, usage: Usage) -> answer::Response {
        let whole = self.reason == FinishReason::Stop;
        answer::Response {
            status: if whole { Status::Completed } else { Status::Incomplete },
            completed_at: whole.then(now),
            incomplete_details: (!whole).then_some(Incomplete { reason: "max_output_tokens" }),
            output: self.output.take_items(),
            usage: Some(ResponseUsage {
                input_tokens: usage.prompt_tokens,
                input_tokens_details: InputTokensDetails {
                    cached_tokens: usage.prompt_tokens_details.cached_tokens,
                    cache_write_tokens: 0,
                },
                output_tokens: usage.completion_tokens,
                output_tokens_details: OutputTokensDetails {
                    reasoning_tokens: self.turn.reasoning_tokens().unwrap_or_default(),
                },
                total_tokens: usage.total_tokens,
            }),
            ..answer
        }
    }
}

/// A streamed answer.
struct Events {
    /// As it began.
    answer: answer::Response,
    speech: Speech,
    /// Events so far.
    told: u64,
}

/// Numbers an event and sends it.
fn send(mut event: ResponseEvent<'_>, told: &mut u64, out: &mut Frames) {
    event.sequence_number = *told;
    *told += 1;
    out.event(event.r#type, &event);
}

impl Events {
    /// The answer as it is now.
    fn state(&mut self, r#type: &'static str, answer: &answer::Response, out: &mut Frames) {
        send(
            ResponseEvent { r#type, response: Some(answer), ..ResponseEvent::default() },
            &mut self.told,
            out,
        );
    }
}

impl Wire for Events {
    fn open(&mut self, out: &mut Frames) {
        for r#type in ["response.created", "response.in_progress"] {
            let response = Some(&self.answer);
            send(ResponseEvent { r#type, response, ..ResponseEvent::default() }, &mut self.told, out);
        }
    }

    fn event(&mut self, _: usize, event: Event, out: &mut Frames) {
        let told = &mut self.told;
        self.speech.event(event, &mut |event| send(event, told, out));
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) {
        let answer = self.speech.end(self.answer.clone(), usage);
        let r#type = match answer.status {
            Status::Completed => "response.completed",
            _ => "response.incomplete",
        };
        self.state(r#type, &answer, out);
    }

    /// One event, and the one that every client takes for a failure: OpenAI's SDKs raise on its `error`, and pass
    /// `response.failed` on as one event among others.
    fn failed(&mut self, error: &ApiError, out: &mut Frames) {
        let detail = error.body().error;
        let event = ResponseEvent {
            r#type: "error",
            code: Some(detail.code),
            message: Some(&detail.message),
            param: Some(detail.param.as_deref()),
            error: Some(&detail),
            ..ResponseEvent::default()
        };
        send(event, &mut self.told, out);
    }
}
