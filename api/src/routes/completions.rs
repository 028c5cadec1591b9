//! `POST /v1/completions`.

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
    logprobs::{self, Offsets},
    observe::RequestLog,
    openai::{
        Usage,
        completions::{Completion, CompletionChoice, CompletionLogprobs, CompletionRequest},
    },
    stream::{Frames, Framing, Outcome, Sequences, Wire, respond},
    validate::{self, CompletionJob},
};

/// Continue text.
///
/// No chat template is applied. With `"stream": true` the answer comes as server-sent events of the same
/// shape, each with a piece of one choice; at last `data: [DONE]`. `echo` with `max_tokens: 0` and
/// `logprobs` scores the prompt.
#[utoipa::path(
    post, path = "/v1/completions", operation_id = "createCompletion", tag = "OpenAI",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The continuations, whole or in pieces.", content(
            (Completion<'_> = "application/json"),
            (Completion<'_> = "text/event-stream"),
        )),
        WorkFailures,
    ),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    Extension(log): Extension<RequestLog>,
    Work { caller, value, bytes }: Work<CompletionRequest>,
) -> Result<Response, ApiError> {
    let model = state.admit(value.model.as_deref())?;
    let mut job = {
        let (model, most) = (model.clone(), state.config().max_queue);
        beside(bytes, move || validate::completions(value, &model, most)).await?
    };
    let mut requests = std::mem::take(&mut job.requests);
    constrain(job.form.take(), &model, &mut requests, "prompt").await?;
    let sequences = Sequences::submit(&state, caller, &log, &model, requests, job.best_of, "prompt")?;
    let head = Head::new("cmpl", &state, &model);
    if job.stream {
        return respond(sequences, Pieces::new(head, model, &job), Framing::Sse).await;
    }
    let predicted = sequences.predicted();
    let (outcomes, usage) = sequences.collect().await?;
    let answer = Json(Completion {
        id: &head.id,
        object: "text_completion",
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        choices: choices(outcomes, &job, &model),
        usage: Some(Some(usage)),
    });
    Ok((predicted, answer).into_response())
}

/// The best `n` of each prompt's candidates, as whole choices.
fn choices(outcomes: Vec<Outcome>, job: &CompletionJob, model: &Model) -> Vec<CompletionChoice> {
    let mut outcomes = outcomes.into_iter();
    let mut choices = Vec::with_capacity(job.prompts.len() * job.n);
    for source in &job.prompts {
        let mut candidates: Vec<Outcome> = outcomes.by_ref().take(job.best_of).collect();
        for outcome in &mut candidates {
            // It is scored as every token that was generated, `max_tokens` of them at most: who asks for one
            // behind a text finds it last, whatever it is.
            outcome.tokens.extend(outcome.ending.take());
        }
        if job.best_of > job.n {
            candidates.sort_by(|a, b| mean(&b.tokens).total_cmp(&mean(&a.tokens)));
            candidates.truncate(job.n);
        }
        let echoed = if job.echo { source.text(model.engine.tokenizer()) } else { String::new() };
        for outcome in candidates {
            let logprobs = job.logprobs.then(|| scored(&outcome, &echoed, job.echo, model));
            choices.push(CompletionChoice {
                index: choices.len(),
                text: format!("{echoed}{}", outcome.text),
                logprobs,
                finish_reason: Some(finish_reason(outcome.reason)),
            });
        }
    }
    choices
}

/// A whole choice's log-probabilities, the prompt's first when it is echoed.
fn scored(outcome: &Outcome, echoed: &str, echo: bool, model: &Model) -> CompletionLogprobs {
    let tokenizer = model.engine.tokenizer();
    let mut offsets = Offsets::default();
    let mut all = CompletionLogprobs::default();
    if echo {
        all = offsets.prompt(tokenizer, &outcome.prompt, echoed);
    }
    logprobs::append(&mut all, offsets.output(tokenizer, &outcome.tokens));
    all
}

/// Mean log-probability of a token, which `best_of` ranks by.
fn mean(tokens: &[TokenOut]) -> f32 {
    let scores = tokens.iter().filter_map(|t| t.logprob.as_ref()?.logprob);
    scores.sum::<f32>() / tokens.len().max(1) as f32
}

/// A streamed answer.
struct Pieces {
    head: Head,
    model: Arc<Model>,
    include_usage: bool,
    logprobs: bool,
    /// Each choice's prompt, when it is echoed.
    echoed: Vec<Option<String>>,
    offsets: Vec<Offsets>,
}

impl Pieces {
    fn new(head: Head, model: Arc<Model>, job: &CompletionJob) -> Self {
        let mut echoed = Vec::new();
        for source in &job.prompts {
            let text = job.echo.then(|| source.text(model.engine.tokenizer()));
            echoed.extend(std::iter::repeat_n(text, job.n));
        }
        let offsets = vec![Offsets::default(); echoed.len()];
        Self { head, model, include_usage: job.include_usage, logprobs: job.logprobs, echoed, offsets }
    }

    fn push(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>, out: &mut Frames) {
        out.push(&Completion {
            id: &self.head.id,
            object: "text_completion",
            created: self.head.created,
            model: &self.head.model,
            system_fingerprint: &self.head.fingerprint,
            choices,
            usage: self.include_usage.then_some(usage),
        });
    }
}

impl Wire for Pieces {
    fn open(&mut self, out: &mut Frames) {
        if self.logprobs {
            // The prompt comes with its tokens, in the engine's first event.
            return;
        }
        for index in 0..self.echoed.len() {
            if let Some(text) = self.echoed[index].take() {
                self.push(
                    vec![CompletionChoice { index, text, logprobs: None, finish_reason: None }],
                    None,
                    out,
                );
            }
        }
    }

    fn event(&mut self, index: usize, event: Event, out: &mut Frames) {
        let tokenizer = self.model.engine.tokenizer();
        let choice = match event {
            Event::Prompt(tokens) => {
                let Some(text) = self.echoed[index].take() else { return };
                let logprobs = Some(self.offsets[index].prompt(tokenizer, &tokens, &text));
                CompletionChoice { index, text, logprobs, finish_reason: None }
            }
            Event::Text { text, tokens } => {
                let logprobs = (self.logprobs && !tokens.is_empty())
                    .then(|| self.offsets[index].output(tokenizer, &tokens));
                if text.is_empty() && logprobs.is_none() {
                    return;
                }
                CompletionChoice { index, text, logprobs, finish_reason: None }
            }
            Event::Done { reason, ending, .. } => {
                let finish_reason = Some(finish_reason(reason));
                let ending = ending.filter(|_| self.logprobs);
                let logprobs = ending.map(|token| self.offsets[index].output(tokenizer, &[token]));
                CompletionChoice { index, text: String::new(), logprobs, finish_reason }
            }
            Event::Embedding(_) | Event::Failed(_) => return,
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
