//! Engine events to one answer, or to server-sent events or NDJSON lines.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use futures_util::stream::{self, BoxStream};
use m40llm_engine::{EngineError, Event, FinishReason, GenerateRequest, Generation, TokenOut};
use serde::Serialize;
use tokio_stream::{StreamExt as _, StreamMap};

use crate::{
    app::{AppState, Model},
    error::ApiError,
    openai::Usage,
};

/// The sequences of one request, their events merged as they come. Dropping it cancels all of them.
pub(crate) struct Sequences {
    events: StreamMap<usize, BoxStream<'static, Event>>,
    count: usize,
    /// Sequences that share a prompt: so many follow one another.
    per_prompt: usize,
    usage: Usage,
    state: AppState,
    /// When the request was submitted; taken when the first output has come.
    waiting_since: Option<Instant>,
    started: Instant,
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
}

impl Sequences {
    /// Submits all `requests`, of which each `per_prompt` share a prompt, or none. `param` is the field
    /// that prompts come from.
    pub(crate) fn submit(
        state: &AppState,
        model: &Arc<Model>,
        requests: Vec<GenerateRequest>,
        per_prompt: usize,
        param: &str,
    ) -> Result<Self, ApiError> {
        let count = requests.len();
        let mut streams = StreamMap::with_capacity(count);
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let choices = requests.by_ref().take(per_prompt).collect();
            // On an error the generations before these are dropped, and so cancelled.
            let generations = model.engine.submit_choices(choices).map_err(|e| ApiError::submit(e, param))?;
            for generation in generations {
                streams.insert(streams.len(), events(generation));
            }
        }
        let now = Instant::now();
        Ok(Self {
            events: streams,
            count,
            per_prompt,
            usage: Usage::default(),
            state: state.clone(),
            waiting_since: Some(now),
            started: now,
        })
    }

    /// The next event of any sequence; `None` after the last sequence's end.
    pub(crate) async fn next(&mut self) -> Option<(usize, Event)> {
        let (i, event) = self.events.next().await?;
        if let Event::Text { .. } | Event::Done { .. } = &event
            && let Some(since) = self.waiting_since.take()
        {
            self.state.metrics().observe_first_token(since.elapsed());
        }
        if let Event::Done { usage, .. } = &event {
            let first = i % self.per_prompt == 0;
            self.usage = Usage::new(
                self.usage.prompt_tokens + if first { usage.prompt_tokens } else { 0 },
                self.usage.prompt_tokens_details.cached_tokens + if first { usage.cached_tokens } else { 0 },
                self.usage.completion_tokens + usage.completion_tokens,
            );
            self.state.metrics().observe_generation(self.started.elapsed());
        }
        Some((i, event))
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
        Ok((outcomes, self.usage))
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
    let pause = sequences.state.config().keep_alive;
    let first = match tokio::time::timeout(pause, sequences.next()).await {
        Ok(Some((_, Event::Failed(error)))) => return Err(error.into()),
        Ok(event) => event,
        Err(_) => None,
    };
    let mut frames = Frames::new(framing);
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
    Ok((headers, body).into_response())
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
                    self.wire.close(self.sequences.usage, frames);
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
