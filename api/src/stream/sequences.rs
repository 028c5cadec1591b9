//! The sequences that a request runs: submitted, followed, counted and settled.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::http::{HeaderName, HeaderValue};
use futures_util::stream::{self, BoxStream};
use m40llm_engine::{
    Admission, EngineError, Event, FinishReason, GenerateRequest, Generation, Meter, SubmitError, Timings,
    TokenOut,
};
use tokio_stream::{StreamExt as _, StreamMap};

use crate::{
    app::{AppState, Model},
    auth::ticket::{Caller, Shape, Ticket},
    error::ApiError,
    observe::{self, RequestLog, Work},
    openai::Usage,
};

/// The sequences of one request, their events merged as they come. Dropping it cancels all of them.
pub(crate) struct Sequences {
    events: StreamMap<usize, BoxStream<'static, Event>>,
    count: usize,
    /// Those that are submitted as others end, so that no more than `at_once` run.
    later: VecDeque<GenerateRequest>,
    at_once: usize,
    /// While some are left, so that the engine takes them although it drains.
    admission: Option<Admission>,
    model: Arc<Model>,
    /// Sequences that share a prompt: so many follow one another.
    per_prompt: usize,
    pub(super) usage: Usage,
    /// After `events`, as fields are dropped in their order: the work is given up before it is settled.
    pub(super) ticket: Ticket,
    pub(super) state: AppState,
    log: RequestLog,
    parts: Vec<Part>,
    started: Instant,
    first_output: Option<Duration>,
    failed: bool,
    /// Until the first token, as it was expected, and the place in the queue; of several the last.
    predicted: Duration,
    position: usize,
}

/// What is kept of a sequence for logs and metrics.
struct Part {
    timings: Timings,
    /// Tokens of its prompt, unless a sequence before it has the same.
    prompt_tokens: u64,
    /// Tokens so far.
    tokens: u64,
    last_output: Option<Instant>,
    reason: Option<FinishReason>,
}

/// In milliseconds.
pub(crate) const PREDICTED_TTFT: HeaderName = HeaderName::from_static("x-m40-predicted-ttft-ms");
/// 0 has a place in the batch at once.
pub(crate) const QUEUE_POSITION: HeaderName = HeaderName::from_static("x-m40-queue-position");

/// How long a queue that is full is left alone.
const LEAST_PAUSE: Duration = Duration::from_millis(20);
const MOST_PAUSE: Duration = Duration::from_secs(1);

/// What the engine did not take, for whoever asked.
fn refusal(error: SubmitError, state: &AppState, model: &Model, param: &str) -> ApiError {
    match error {
        SubmitError::QueueFull(_) => ApiError::submit(error, param).retry_after(model.engine.next_place()),
        // Nobody starts it again before somebody looks.
        SubmitError::Stopped(_) if !state.config().exit_on_failure => {
            ApiError::submit(error, param).hopeless()
        }
        error => ApiError::submit(error, param),
    }
}

/// A finished sequence.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The text.
    pub(crate) text: String,
    /// The tokens of the text.
    pub(crate) tokens: Vec<TokenOut>,
    /// The prompt's tokens, when they were scored.
    pub(crate) prompt: Vec<TokenOut>,
    /// Why it ended.
    pub(crate) reason: FinishReason,
    /// The token that ended it, if one did, which has no text.
    pub(crate) ending: Option<TokenOut>,
}

impl Sequences {
    /// Submits all `requests` of `caller`, of which each `per_prompt` share a prompt, or none. `param` is the
    /// field that prompts come from.
    pub(crate) fn submit(
        state: &AppState,
        caller: Caller,
        log: &RequestLog,
        model: &Arc<Model>,
        requests: Vec<GenerateRequest>,
        per_prompt: usize,
        param: &str,
    ) -> Result<Self, ApiError> {
        Self::submit_in_turn(state, caller, log, model, requests, per_prompt, param, usize::MAX)
    }

    /// As [`Sequences::submit`], but with no more than `at_once` sequences at a time. Where that bounds them each has
    /// a prompt of its own.
    #[expect(clippy::too_many_arguments, reason = "each is another thing, and two callers know them all")]
    pub(crate) fn submit_in_turn(
        state: &AppState,
        caller: Caller,
        log: &RequestLog,
        model: &Arc<Model>,
        mut requests: Vec<GenerateRequest>,
        per_prompt: usize,
        param: &str,
        at_once: usize,
    ) -> Result<Self, ApiError> {
        let count = requests.len();
        let most = model.engine.info().ctx_size;
        let mut ticket = Ticket::open(state, caller, &mut requests, &Shape { per_prompt, param, most })?;
        let mut meters = Vec::with_capacity(count);
        log.set_model(&state.config().model_id);
        let mut streams = StreamMap::with_capacity(count);
        let mut parts = Vec::with_capacity(count);
        let (mut predicted, mut position) = (Duration::ZERO, 0);
        let later: VecDeque<_> = requests.split_off(requests.len().min(at_once)).into();
        let refuse = |error| refusal(error, state, model, param);
        let admission = (!later.is_empty()).then(|| model.engine.admit()).transpose().map_err(|error| {
            ticket.forgive();
            refuse(error)
        })?;
        let mut requests = requests.into_iter().peekable();
        while let Some(prompt_tokens) = requests.peek().map(|first| first.prompt.len() as u64) {
            let choices = requests.by_ref().take(per_prompt);
            // On an error the generations before these are dropped, and so cancelled.
            let generations = match &admission {
                Some(admission) => {
                    choices.map(|request| model.engine.submit_part(admission, request)).collect()
                }
                None => model.engine.submit_choices(choices.collect()),
            };
            let generations = generations.map_err(|error| {
                ticket.forgive();
                refuse(error)
            })?;
            for (choice, generation) in generations.into_iter().enumerate() {
                meters.push(Arc::clone(generation.meter()));
                predicted = predicted.max(generation.predicted_first_token());
                position = position.max(generation.queue_position());
                let prompt_tokens = if choice == 0 { prompt_tokens } else { 0 };
                let timings = generation.timings();
                parts.push(Part { timings, prompt_tokens, tokens: 0, last_output: None, reason: None });
                streams.insert(streams.len(), events(generation));
            }
        }
        ticket.start(meters, per_prompt);
        Ok(Self {
            events: streams,
            count,
            later,
            at_once,
            admission,
            model: Arc::clone(model),
            per_prompt,
            usage: Usage::default(),
            ticket,
            state: state.clone(),
            log: log.clone(),
            parts,
            started: Instant::now(),
            first_output: None,
            failed: false,
            predicted,
            position,
        })
    }

    /// What sequence `i` has used so far.
    pub(crate) fn meter(&self, i: usize) -> Option<Arc<Meter>> {
        self.ticket.meter(i)
    }

    /// Headers of the answer: after how long its first token was expected, and from which place in the queue.
    pub(crate) fn predicted(&self) -> [(HeaderName, HeaderValue); 2] {
        [
            (PREDICTED_TTFT, HeaderValue::from(self.predicted.as_millis() as u64)),
            (QUEUE_POSITION, HeaderValue::from(self.position)),
        ]
    }

    /// The next event of any sequence; `None` after the last sequence's end.
    pub(crate) async fn next(&mut self) -> Option<(usize, Event)> {
        let (i, event) = loop {
            if let Some(next) = self.events.next().await {
                break next;
            }
            if self.later.is_empty() {
                return None;
            }
            // Others have filled the queue since.
            tokio::time::sleep(self.model.engine.next_place().clamp(LEAST_PAUSE, MOST_PAUSE)).await;
            if let Err(error) = self.follow() {
                break (self.parts.len() - 1, Event::Failed(error));
            }
        };
        self.note(i, &event);
        if matches!(event, Event::Done { .. })
            && !self.later.is_empty()
            && let Err(error) = self.follow()
        {
            self.failed = true;
            return Some((i, Event::Failed(error)));
        }
        Some((i, event))
    }

    /// Submits more of those that wait. A queue that others have filled is tried again when the next one ends, or
    /// after a while.
    fn follow(&mut self) -> Result<(), EngineError> {
        let mut running = self.parts.iter().filter(|part| part.reason.is_none()).count();
        while running < self.at_once
            && let Some(request) = self.later.front()
            && let Some(admission) = &self.admission
        {
            let prompt_tokens = request.prompt.len() as u64;
            match self.model.engine.submit_part(admission, request.clone()) {
                Ok(generation) => {
                    self.later.pop_front();
                    self.ticket.add(Arc::clone(generation.meter()));
                    let timings = generation.timings();
                    self.parts.push(Part {
                        timings,
                        prompt_tokens,
                        tokens: 0,
                        last_output: None,
                        reason: None,
                    });
                    self.events.insert(self.parts.len() - 1, events(generation));
                    running += 1;
                }
                Err(SubmitError::QueueFull(_)) => return Ok(()),
                Err(SubmitError::Stopped(words)) => return Err(EngineError::Backend(words)),
                // The time to drain is over.
                Err(_) => return Err(EngineError::Ended),
            }
        }
        if self.later.is_empty() {
            self.admission = None;
        }
        Ok(())
    }

    /// Counts an event.
    fn note(&mut self, i: usize, event: &Event) {
        let now = Instant::now();
        let (part, metrics) = (&mut self.parts[i], self.state.metrics());
        if let Event::Text { .. } | Event::Done { .. } = event
            && self.first_output.is_none()
        {
            let after = now - self.started;
            self.first_output = Some(after);
            metrics.observe_first_token(after);
        }
        match event {
            Event::Prompt(_) | Event::Embedding(_) => {}
            Event::Text { tokens, .. } => {
                part.tokens += tokens.len() as u64;
                if let Some(last) = part.last_output.replace(now) {
                    metrics.observe_inter_token(now - last);
                }
            }
            Event::Done { reason, usage, .. } => {
                let first = i.is_multiple_of(self.per_prompt);
                self.usage = Usage::new(
                    self.usage.prompt_tokens + if first { usage.prompt_tokens } else { 0 },
                    self.usage.prompt_tokens_details.cached_tokens
                        + if first { usage.cached_tokens } else { 0 },
                    self.usage.completion_tokens + usage.completion_tokens,
                );
                part.tokens = usage.completion_tokens as u64;
                part.reason = Some(*reason);
                metrics.observe_generation(now - self.started);
            }
            Event::Failed(_) => self.failed = true,
        }
    }

    /// All sequences to their end, in the order of their requests. The first failure ends them all.
    pub(crate) async fn collect(self) -> Result<(Vec<Outcome>, Usage), ApiError> {
        let empty = || Outcome {
            text: String::new(),
            tokens: vec![],
            prompt: vec![],
            reason: FinishReason::Stop,
            ending: None,
        };
        let mut outcomes: Vec<Outcome> = (0..self.count).map(|_| empty()).collect();
        let usage = self
            .each(|i, event| {
                let outcome = &mut outcomes[i];
                match event {
                    Event::Prompt(tokens) => outcome.prompt = tokens,
                    Event::Text { text, tokens } => {
                        outcome.text.push_str(&text);
                        outcome.tokens.extend(tokens);
                    }
                    Event::Done { reason, ending, .. } => (outcome.reason, outcome.ending) = (reason, ending),
                    Event::Embedding(_) | Event::Failed(_) => {}
                }
            })
            .await?;
        Ok((outcomes, usage))
    }

    /// Gives each event to `take`, up to the last sequence's end. The first failure ends them all.
    pub(crate) async fn each(mut self, mut take: impl FnMut(usize, Event)) -> Result<Usage, ApiError> {
        while let Some((i, event)) = self.next().await {
            match event {
                Event::Failed(error) => return Err(error.into()),
                event => take(i, event),
            }
        }
        self.ticket.finish().await?;
        Ok(self.usage)
    }

    /// How many sequences there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// However they end, the request's log is told what they came to.
impl Drop for Sequences {
    fn drop(&mut self) {
        let outcome = if self.failed {
            observe::Outcome::Failed
        } else if !self.later.is_empty() || self.parts.iter().any(|part| part.reason.is_none()) {
            observe::Outcome::Cancelled
        } else if self.parts.iter().any(|part| part.reason == Some(FinishReason::Length)) {
            observe::Outcome::Length
        } else {
            observe::Outcome::Done
        };
        let queues = || self.parts.iter().filter_map(|part| part.timings.queue());
        for queue in queues() {
            self.state.metrics().observe_queue(queue);
        }
        let begun = self.parts.iter().filter(|part| part.timings.queue().is_some() || part.reason.is_some());
        self.log.set_work(Work {
            prompt_tokens: begun.map(|part| part.prompt_tokens).sum(),
            cached_tokens: self.usage.prompt_tokens_details.cached_tokens as u64,
            generated_tokens: self.parts.iter().map(|part| part.tokens).sum(),
            queue: queues().min(),
            first_token: self.first_output,
            outcome,
        });
    }
}

/// A generation's events up to its end, which is never missing.
fn events(generation: Generation) -> BoxStream<'static, Event> {
    Box::pin(stream::unfold(Some(generation), |generation| async move {
        let mut generation = generation?;
        let event = generation.next().await.unwrap_or_else(|| {
            Event::Failed(EngineError::Backend("the engine has stopped in the midst of this request".into()))
        });
        let ended = matches!(event, Event::Done { .. } | Event::Failed(_));
        Some((event, (!ended).then_some(generation)))
    }))
}
