//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::State,
    response::{IntoResponse, Response},
};
use m40llm_engine::{Event, TokenOut};

use super::{
    Head, WorkFailures,
    body::{Work, beside, constrain},
    finish_reason,
};
use crate::{
    app::{AppState, Model},
    error::ApiError,
    logprobs,
    observe::RequestLog,
    openai::{
        FinishReason, Usage,
        chat::{
            AssistantMessage, CallDelta, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatRequest,
            Delta, FunctionDelta, MadeCall, MadeFunctionCall,
        },
    },
    stream::{Frames, Framing, Sequences, Wire, respond},
    tools::{Piece, Reading, Said, Turn},
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
    let mut job = {
        let (model, state) = (model.clone(), state.clone());
        beside(bytes, move || validate::chat(value, &model, state.config())).await?
    };
    constrain(job.form, &model, &mut job.requests, "messages").await?;
    let n = job.requests.len();
    let sequences = Sequences::submit(&state, caller, &log, &model, job.requests, n, "messages")?;
    let head = Head::new("chatcmpl", &state, &model);
    if job.stream {
        let turns = (0..n).map(|_| Turn::new(&job.reading)).collect();
        let wire = Chunks { head, turns, model, include_usage: job.include_usage, logprobs: job.logprobs };
        return respond(sequences, wire, Framing::Sse).await;
    }
    let predicted = sequences.predicted();
    let (said, usage) = collect(sequences, &job.reading).await?;
    let choices = said.into_iter().enumerate().map(|(index, said)| ChatChoice {
        index,
        logprobs: job.logprobs.then(|| logprobs::chat(model.engine.tokenizer(), &said.tokens)),
        finish_reason: ended(said.reason, said.called),
        message: message(said),
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

/// All choices to their end, read. The first failure ends them all.
async fn collect(sequences: Sequences, reading: &Reading) -> Result<(Vec<Said>, Usage), ApiError> {
    let mut choices: Vec<(Turn, Said)> =
        (0..sequences.count()).map(|_| (Turn::new(reading), Said::default())).collect();
    let usage = sequences
        .each(|i, event| {
            let (turn, said) = &mut choices[i];
            match event {
                Event::Text { text, tokens } => said.take(turn.push(&text, tokens)),
                Event::Done { reason, .. } => {
                    said.take(turn.finish());
                    (said.reason, said.called) = (reason, turn.called());
                }
                Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => {}
            }
        })
        .await?;
    let thoughts = choices.iter().map(|(turn, _)| turn.reasoning_tokens()).sum();
    let usage = usage.with_reasoning(thoughts);
    Ok((choices.into_iter().map(|(_, said)| said).collect(), usage))
}

/// Why a choice ended: a call that is whole comes before all that the engine may say, but for the limit.
fn ended(reason: m40llm_engine::FinishReason, called: bool) -> FinishReason {
    match finish_reason(reason) {
        FinishReason::Stop if called => FinishReason::ToolCalls,
        reason => reason,
    }
}

fn message(said: Said) -> AssistantMessage {
    let only_calls = said.text.is_empty() && !said.calls.is_empty();
    let calls = said.calls.into_iter().map(|call| MadeCall {
        id: call.id,
        r#type: "function",
        function: MadeFunctionCall { name: call.name, arguments: call.arguments },
    });
    AssistantMessage {
        role: "assistant",
        content: (!only_calls).then_some(said.text),
        refusal: None,
        reasoning_content: (!said.reasoning.is_empty()).then_some(said.reasoning),
        tool_calls: calls.collect(),
    }
}

/// What a piece adds to its choice.
fn delta(piece: &Piece) -> Delta<'_> {
    let call = |index, id, name, arguments| CallDelta {
        index,
        id,
        r#type: id.map(|_| "function"),
        function: FunctionDelta { name, arguments },
    };
    match piece {
        Piece::Text(text) => Delta { content: Some(text), ..Delta::default() },
        Piece::Reasoning(text) => Delta { reasoning_content: Some(text), ..Delta::default() },
        Piece::Call { index, id, name } => Delta {
            tool_calls: Some([call(*index, Some(id.as_str()), Some(name.as_str()), "")]),
            ..Delta::default()
        },
        Piece::Arguments { index, text } => {
            Delta { tool_calls: Some([call(*index, None, None, text)]), ..Delta::default() }
        }
    }
}

/// A streamed answer.
struct Chunks {
    head: Head,
    /// One for each choice.
    turns: Vec<Turn>,
    model: Arc<Model>,
    include_usage: bool,
    logprobs: bool,
}

impl Chunks {
    /// A chunk for each piece; the tokens go with the text among them.
    fn say(&self, index: usize, (mut pieces, tokens): (Vec<Piece>, Vec<TokenOut>), out: &mut Frames) {
        let mut logprobs = (self.logprobs && !tokens.is_empty())
            .then(|| logprobs::chat(self.model.engine.tokenizer(), &tokens));
        if logprobs.is_some() && !pieces.iter().any(|piece| matches!(piece, Piece::Text(_))) {
            // Tokens that print nothing.
            pieces.push(Piece::Text(String::new()));
        }
        for piece in &pieces {
            let logprobs = if let Piece::Text(_) = piece { logprobs.take() } else { None };
            let choice = ChatChunkChoice { index, delta: delta(piece), logprobs, finish_reason: None };
            self.push(vec![choice], None, out);
        }
    }

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
        for index in 0..self.turns.len() {
            let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
            self.push(vec![ChatChunkChoice { index, delta, logprobs: None, finish_reason: None }], None, out);
        }
    }

    fn event(&mut self, index: usize, event: Event, out: &mut Frames) {
        match event {
            Event::Text { text, tokens } => {
                let said = self.turns[index].push(&text, tokens);
                self.say(index, said, out);
            }
            Event::Done { reason, .. } => {
                let turn = &mut self.turns[index];
                let (rest, called) = (turn.finish(), turn.called());
                self.say(index, rest, out);
                let finish_reason = Some(ended(reason, called));
                let last = ChatChunkChoice { index, delta: Delta::default(), logprobs: None, finish_reason };
                self.push(vec![last], None, out);
            }
            Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => {}
        }
    }

    fn close(&mut self, usage: Usage, out: &mut Frames) {
        if self.include_usage {
            let usage = usage.with_reasoning(self.turns.iter().map(Turn::reasoning_tokens).sum());
            self.push(Vec::new(), Some(usage), out);
        }
        out.raw("[DONE]");
    }
}
