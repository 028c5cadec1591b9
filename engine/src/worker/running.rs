//! A request being worked on: from the logits of a step to its events.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc::UnboundedSender;

use super::{Job, output::Output, vector::Vector};
use crate::{
    backend::{Need, Row},
    error::EngineError,
    handle::Place,
    meter::Meter,
    request::{Allowance, Event, FinishReason, TokenLogprob, TokenOut, Usage},
    sampling::{Masks, Sampler, Walk, log_softmax_of, top_logprobs},
    sched::Planned,
    spans::Trace,
    text::Tokenizer,
};

impl Job {
    /// Most tokens to generate: what the request says, and the context leaves.
    pub(super) fn most_tokens(&self) -> usize {
        let wanted = if self.request.embedding.is_some() { Some(0) } else { self.request.max_tokens };
        wanted.unwrap_or(usize::MAX).min(self.ctx_size - self.request.prompt.len())
    }
}

/// How a request stands after a step.
pub(super) enum Progress {
    /// Nothing generated: the prompt goes on.
    Prompt,
    /// Goes on with this token.
    Token(u32),
    /// Has had its last event.
    Ended,
}

/// A request being worked on.
pub(super) struct Running {
    pub(super) prompt: Vec<u32>,
    max_tokens: usize,
    printed: Vec<u32>,
    ignore_eos: bool,
    stop_tokens: Vec<u32>,
    logprobs: Option<usize>,
    prompt_logprobs: Option<usize>,
    sampler: Sampler,
    /// Where its constraint stands.
    walk: Option<Walk>,
    output: Output,
    /// What becomes of the prompt's hidden states, where they are asked for instead of an output.
    pub(super) vector: Option<Vector>,
    scored: Vec<TokenOut>,
    pub(super) generated: usize,
    /// Tokens of the prompt that came from the cache.
    pub(super) cached: usize,
    allowance: Option<Arc<dyn Allowance>>,
    /// A token has been drawn and not been generated yet.
    drawn: bool,
    /// It was allowed none.
    pub(super) paused: bool,
    pub(super) events: UnboundedSender<Event>,
    pub(super) meter: Arc<Meter>,
    pub(super) trace: Trace,
    _place: Place,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(allowance) = self.allowance.as_ref().filter(|_| self.drawn) {
            allowance.give_back();
        }
    }
}

impl Running {
    pub(super) fn new(job: Job) -> Self {
        let max_tokens = job.most_tokens();
        let Job { request, events, meter, place, trace, .. } = job;
        Self {
            max_tokens,
            printed: request.printed,
            ignore_eos: request.ignore_eos,
            stop_tokens: request.stop_tokens,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
            sampler: Sampler::new(request.sampling, &request.prompt),
            walk: request.constraint.map(Walk::Start),
            output: Output::new(&request.stop),
            vector: request.embedding.map(|_| Vector::default()),
            scored: Vec::new(),
            generated: 0,
            cached: 0,
            allowance: request.allowance,
            drawn: false,
            paused: false,
            prompt: request.prompt,
            events,
            meter,
            trace,
            _place: place,
        }
    }

    /// Has a token to generate, or is told how long to wait for one.
    pub(super) fn draw(&mut self) -> Result<(), Duration> {
        if let Some(allowance) = self.allowance.as_ref().filter(|_| !self.drawn && self.max_tokens > 0) {
            allowance.draw()?;
            self.drawn = true;
        }
        Ok(())
    }

    /// What the next step's logits are looked at for.
    pub(super) fn need(&self) -> Need {
        let scores = self.logprobs.is_some() || self.prompt_logprobs.is_some() || self.walk.is_some();
        if scores { Need::All } else { self.sampler.need() }
    }

    /// Has worked out beside the step what the token that it samples may be.
    pub(super) fn prepare(&mut self, masks: &mut Masks) {
        if let Some(walk) = self.walk.as_mut().filter(|_| self.max_tokens > 0) {
            walk.prepare(masks);
        }
    }

    /// Emits the prompt's vector, all of whose hidden states are there.
    pub(super) fn embedded(&mut self) -> Progress {
        let vector = self.vector.take().unwrap_or_default().mean();
        self.emit(Event::Embedding(vector));
        self.end(FinishReason::Stop, None)
    }

    /// Uses a step's logits: scores prompt tokens, samples the next one, emits what is settled.
    pub(super) fn advance<'r>(
        &mut self,
        tokenizer: &Tokenizer,
        plan: &Planned,
        row: impl Fn(usize) -> Row<'r>,
    ) -> Progress {
        if self.prompt_logprobs.is_some() && self.generated == 0 {
            self.score_prompt(plan, &row);
        }
        if !plan.samples {
            return Progress::Prompt;
        }
        if self.max_tokens == 0 {
            return self.finish(FinishReason::Length, None);
        }
        let logits = row(plan.rows - 1);
        let token = match self.choose(logits) {
            Ok(token) => token,
            Err(error) => return self.failed(error),
        };
        self.generated += 1;
        self.drawn = false;
        self.meter.generated(self.generated);
        if self.generated == 1 {
            self.trace.first_token();
        }
        let logprob = match (self.logprobs, logits) {
            (Some(n), Row::All(logits)) => Some(logprob_of(logits, token, n)),
            _ => None,
        };
        let ends = tokenizer.is_end_of_generation(token) && (self.walk.is_some() || !self.ignore_eos);
        if ends || self.stop_tokens.contains(&token) {
            return self.finish(FinishReason::Stop, Some(TokenOut { id: token, logprob }));
        }
        let complete = match self.walk.as_mut().map_or(Ok(false), |walk| walk.advance(token)) {
            Ok(complete) => complete,
            Err(error) => return self.failed(error),
        };
        let is_silent = tokenizer.is_control(token) && !self.printed.contains(&token);
        let bytes = if is_silent { &[][..] } else { tokenizer.token_bytes(token) };
        let (piece, stopped) = self.output.push(TokenOut { id: token, logprob }, bytes);
        if let Some(event) = piece {
            self.emit(event);
        }
        if stopped {
            return self.end(FinishReason::Stop, None);
        }
        if complete {
            return self.finish(FinishReason::Stop, None);
        }
        if self.generated >= self.max_tokens {
            return self.finish(FinishReason::Length, None);
        }
        Progress::Token(token)
    }

    /// Samples the next token, from those that the constraint allows.
    fn choose(&mut self, logits: Row<'_>) -> Result<u32, EngineError> {
        let token = match (&mut self.walk, logits) {
            (Some(walk), Row::All(logits)) => self.sampler.sample_within(logits, walk.mask()?),
            (_, logits) => self.sampler.sample(logits),
        };
        token.ok_or_else(|| EngineError::Backend("the model produced no finite logits".into()))
    }

    /// Row `i` predicts the prompt token at `plan.position + i + 1`.
    fn score_prompt<'r>(&mut self, plan: &Planned, row: impl Fn(usize) -> Row<'r>) {
        let top = self.prompt_logprobs.unwrap_or(0);
        if plan.position == 0 {
            let logprob = TokenLogprob { logprob: None, top: Vec::new() };
            self.scored.push(TokenOut { id: self.prompt[0], logprob: Some(logprob) });
        }
        for i in 0..plan.rows {
            if let (Some(&id), Row::All(logits)) = (self.prompt.get(plan.position + i + 1), row(i)) {
                self.scored.push(TokenOut { id, logprob: Some(logprob_of(logits, id, top)) });
            }
        }
        if plan.samples {
            let scored = std::mem::take(&mut self.scored);
            self.emit(Event::Prompt(scored));
        }
    }

    /// Emits what was held back, then the end.
    fn finish(&mut self, reason: FinishReason, ending: Option<TokenOut>) -> Progress {
        let (piece, stopped) = self.output.flush();
        if let Some(event) = piece {
            self.emit(event);
        }
        if stopped { self.end(FinishReason::Stop, None) } else { self.end(reason, ending) }
    }

    fn failed(&self, error: EngineError) -> Progress {
        self.trace.failed(&error);
        self.emit(Event::Failed(error));
        Progress::Ended
    }

    fn end(&self, reason: FinishReason, ending: Option<TokenOut>) -> Progress {
        let prompt_tokens = self.prompt.len();
        let usage = Usage { prompt_tokens, cached_tokens: self.cached, completion_tokens: self.generated };
        self.trace.done(reason, usage);
        self.emit(Event::Done { reason, matched: self.output.matched(), ending, usage });
        Progress::Ended
    }

    pub(super) fn emit(&self, event: Event) {
        // A closed channel is a cancelled request; the next step drops it.
        let _ = self.events.send(event);
    }
}

fn logprob_of(row: &[f32], token: u32, top: usize) -> TokenLogprob {
    let (logprob, normaliser) = log_softmax_of(row, token);
    TokenLogprob { logprob: Some(logprob), top: top_logprobs(row, normaliser, top) }
}
