//! Engine events to one answer, or to server-sent events or NDJSON lines.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension,
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::stream::{self, BoxStream};
use m40llm_engine::{
    EngineError, Event, FinishReason, GenerateRequest, Generation, SubmitError, Timings, TokenOut,
};
use serde::Serialize;
use tokio_stream::{StreamExt as _, StreamMap};

use crate::{
    app::{AppState, Model},
    auth::ticket::{Caller, Shape, Ticket},
    error::ApiError,
    observe::{self, RequestLog, Work},
    openai::Usage,
    transport::Filler,
};

/// The sequences of one request, their events merged as they come. Dropping it cancels all of them.
pub(crate) struct Sequences {
    events: StreamMap<usize, BoxStream<'static, Event>>,
    count: usize,
    /// Sequences that share a prompt: so many follow one another.
    per_prompt: usize,
    usage: Usage,
    /// After `events`, as fields are dropped in their order: the work is given up before it is settled.
    ticket: Ticket,
    state: AppState,
    log: RequestLog,
    parts: Vec<Part>,
    started: Instant,
    first_output: Option<Duration>,
    failed: bool,
    /// Until the first token, as it was expected.
    predicted: Duration,
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
}

impl Sequences {
    /// Submits all `requests` of `caller`, of which each `per_prompt` share a prompt, or none. `param` is the
    /// field that prompts come from.
    pub(crate) fn submit(
        state: &AppState,
        caller: Caller,
        log: &RequestLog,
        model: &Arc<Model>,
        mut requests: Vec<GenerateRequest>,
        per_prompt: usize,
        param: &str,
    ) -> Result<Self, ApiError> {
        let count = requests.len();
        let most = model.engine.info().ctx_size;
        let mut ticket = Ticket::open(state, caller, &mut requests, &Shape { per_prompt, param, most })?;
        let mut meters = Vec::with_capacity(count);
        log.set_model(&state.config().model_id);
        let mut streams = StreamMap::with_capacity(count);
        let mut parts = Vec::with_capacity(count);
        let mut predicted = Duration::ZERO;
        let mut requests = requests.into_iter().peekable();
        while let Some(prompt_tokens) = requests.peek().map(|first| first.prompt.len() as u64) {
            let choices = requests.by_ref().take(per_prompt).collect();
            // On an error the generations before these are dropped, and so cancelled.
            let generations = model.engine.submit_choices(choices).map_err(|e| {
                ticket.forgive();
                let full = matches!(e, SubmitError::QueueFull(_));
                let error = ApiError::submit(e, param);
                if full { error.retry_after(model.engine.next_place()) } else { error }
            })?;
            for (choice, generation) in generations.into_iter().enumerate() {
                meters.push(Arc::clone(generation.meter()));
                predicted = predicted.max(generation.predicted_first_token());
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
        })
    }

    /// A header of the answer: after how long its first token was expected.
    pub(crate) fn predicted(&self) -> [(HeaderName, HeaderValue); 1] {
        [(PREDICTED_TTFT, HeaderValue::from(self.predicted.as_millis() as u64))]
    }

    /// The next event of any sequence; `None` after the last sequence's end.
    pub(crate) async fn next(&mut self) -> Option<(usize, Event)> {
        let (i, event) = self.events.next().await?;
        self.note(i, &event);
        Some((i, event))
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
            Event::Prompt(_) => {}
            Event::Text { tokens, .. } => {
                part.tokens += tokens.len() as u64;
                if let Some(last) = part.last_output.replace(now) {
                    metrics.observe_inter_token(now - last);
                }
            }
            Event::Done { reason, usage } => {
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
    pub(crate) async fn collect(mut self) -> Result<(Vec<Outcome>, Usage), ApiError> {
        let empty =
            || Outcome { text: String::new(), tokens: vec![], prompt: vec![], reason: FinishReason::Stop };
        let mut outcomes: Vec<Outcome> = (0..self.count).map(|_| empty()).collect();
        while let Some((i, event)) = self.next().await {
            let outcome = &mut outcomes[i];
            match event {
                Event::Prompt(tokens) => outcome.prompt = tokens,
                Event::Text { text, tokens } => {
                    outcome.text.push_str(&text);
                    outcome.tokens.extend(tokens);
                }
                Event::Done { reason, .. } => outcome.reason = reason,
                Event::Failed(error) => return Err(error.into()),
            }
        }
        self.ticket.finish().await?;
        Ok((outcomes, self.usage))
    }
}

/// However they end, the request's log is told what they came to.
impl Drop for Sequences {
    fn drop(&mut self) {
        let outcome = if self.failed {
            observe::Outcome::Failed
        } else if self.parts.iter().any(|part| part.reason.is_none()) {
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

/// How a stream's objects are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Server-sent events: `data: {…}` and a blank line.
    Sse,
    /// A line for each.
    Ndjson,
}

/// Bytes on their way to the client.
#[derive(Debug)]
pub struct Frames {
    framing: Framing,
    buffer: String,
}

impl Frames {
    /// Nothing yet.
    pub fn new(framing: Framing) -> Self {
        Self { framing, buffer: String::new() }
    }

    /// Adds an object.
    pub fn push(&mut self, object: &impl Serialize) {
        // Only maps with keys that are no strings fail, and the wire types have none.
        let json = serde_json::to_string(object).unwrap_or_else(|_| "null".to_owned());
        self.raw(&escape(json));
    }

    /// Adds text that holds no line break.
    pub fn raw(&mut self, line: &str) {
        match self.framing {
            Framing::Sse => self.buffer.extend(["data: ", line, "\n\n"]),
            Framing::Ndjson => self.buffer.extend([line, "\n"]),
        }
    }

    /// Adds a line that SSE clients pass over.
    pub fn comment(&mut self, text: &str) {
        self.buffer.extend([": ", text, "\n\n"]);
    }

    /// Takes what there is.
    pub fn take(&mut self) -> String {
        std::mem::take(&mut self.buffer)
    }
}

/// Escapes what some clients take for line breaks. In JSON these characters only occur in strings.
fn escape(json: String) -> String {
    if json.contains(['\u{85}', '\u{2028}', '\u{2029}']) {
        json.replace('\u{85}', "\\u0085").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
    } else {
        json
    }
}

/// A route's way to put events into words.
pub(crate) trait Wire: Send + 'static {
    /// What comes before the first event.
    fn open(&mut self, _out: &mut Frames) {}
    /// An event of sequence `i`; never a failure.
    fn event(&mut self, i: usize, event: Event, out: &mut Frames);
    /// What comes after the last event.
    fn close(&mut self, usage: Usage, out: &mut Frames);
    /// What keeps a silent stream alive.
    fn keep_alive(&self, out: &mut Frames) {
        out.comment("keep-alive");
    }
}

/// A response that streams. Its headers wait for the first event or for `keep_alive`, whichever comes
/// first, so that a request that fails at once gets its real status.
pub(crate) async fn respond(
    mut sequences: Sequences,
    mut wire: impl Wire,
    framing: Framing,
) -> Result<Response, ApiError> {
    let predicted = sequences.predicted();
    let pause = sequences.state.config().keep_alive;
    let first = match tokio::time::timeout(pause, sequences.next()).await {
        Ok(Some((_, Event::Failed(error)))) => return Err(error.into()),
        Ok(event) => event,
        Err(_) => None,
    };
    let mut frames = Frames::new(framing);
    wire.keep_alive(&mut frames);
    let filler = Filler(frames.take());
    wire.open(&mut frames);
    if let Some((i, event)) = first {
        wire.event(i, event, &mut frames);
    }
    let running = Running { sequences, wire, frames, pause };
    let body = Body::from_stream(stream::unfold(Some(running), |running| async move {
        let (bytes, rest) = running?.step().await;
        Some((Ok::<_, Infallible>(bytes), rest))
    }));
    let content_type = match framing {
        Framing::Sse => "text/event-stream; charset=utf-8",
        Framing::Ndjson => "application/x-ndjson; charset=utf-8",
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(content_type)),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, predicted, Extension(filler), body).into_response())
}

/// A stream under way; dropped when the client goes, and the work with it.
struct Running<W> {
    sequences: Sequences,
    wire: W,
    frames: Frames,
    pause: Duration,
}

impl<W: Wire> Running<W> {
    /// The next bytes, and the stream unless it has ended.
    async fn step(mut self) -> (Bytes, Option<Self>) {
        let frames = &mut self.frames;
        let mut more = true;
        while more && frames.buffer.is_empty() {
            match tokio::time::timeout(self.pause, self.sequences.next()).await {
                Err(_) => self.wire.keep_alive(frames),
                Ok(Some((_, Event::Failed(error)))) => {
                    frames.push(&ApiError::from(error).body());
                    more = false;
                }
                Ok(Some((i, event))) => self.wire.event(i, event, frames),
                Ok(None) => {
                    match self.sequences.ticket.finish().await {
                        Ok(()) => self.wire.close(self.sequences.usage, frames),
                        Err(error) => frames.push(&error.body()),
                    }
                    more = false;
                }
            }
        }
        (Bytes::from(self.frames.take()), more.then_some(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_breaks_of_other_worlds_are_escaped() {
        let mut frames = Frames::new(Framing::Sse);
        frames.push(&serde_json::json!({"a": "x\u{85}y\u{2028}z\u{2029}\n"}));
        let text = frames.take();
        assert_eq!(text, "data: {\"a\":\"x\\u0085y\\u2028z\\u2029\\n\"}\n\n");
        let json: serde_json::Value = serde_json::from_str(text["data: ".len()..].trim_end()).unwrap();
        assert_eq!(json["a"], "x\u{85}y\u{2028}z\u{2029}\n");
    }

    #[test]
    fn framings() {
        let mut frames = Frames::new(Framing::Ndjson);
        frames.push(&1);
        frames.push(&"é");
        assert_eq!(frames.take(), "1\n\"é\"\n");
        let mut frames = Frames::new(Framing::Sse);
        frames.comment("keep-alive");
        frames.raw("[DONE]");
        assert_eq!(frames.take(), ": keep-alive\n\ndata: [DONE]\n\n");
        assert_eq!(frames.take(), "");
    }
}
