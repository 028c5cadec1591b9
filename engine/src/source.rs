//! An engine without a model: events come from a thread of the caller's. For tests and benchmarks of what
//! lies above the engine, which want tokens at times and in numbers of their own.
//!
//! [`Engine::from_source`](crate::Engine::from_source) keeps all of the handle: the checks of a request, the
//! bounded queue, draining, the end of a request by dropping its [`Generation`](crate::Generation), and
//! failures. Only the worker is another.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, error::TryRecvError};

use crate::{
    error::{EngineError, panic_words},
    gguf::{Metadata, Value},
    handle::{Place, Stats, lock},
    info::ModelInfo,
    meter::Meter,
    model::Pooling,
    request::{Event, GenerateRequest},
    text::byte_vocabulary,
    worker::{Job, Shared},
};

/// What a thread that stands for the worker gets: the requests, as they are submitted.
pub struct Inbox {
    jobs: UnboundedReceiver<Vec<Job>>,
    /// Choices of one prompt that are still to be handed out.
    ready: VecDeque<Job>,
    shared: Arc<Shared>,
}

/// A request that was taken. It holds its place in the queue until this is dropped.
pub struct Submitted {
    /// What was asked for; its `max_tokens` is what the context allows, when it was not given.
    pub request: GenerateRequest,
    events: UnboundedSender<Event>,
    meter: Arc<Meter>,
    _place: Place,
}

impl Submitted {
    /// Sends an event, and counts what it carries as used. After [`Event::Done`] or [`Event::Failed`], drop
    /// this. False: the request was cancelled.
    pub fn send(&self, event: Event) -> bool {
        match &event {
            Event::Text { tokens, .. } => {
                self.meter.prompt(self.request.prompt.len());
                self.meter.generated(self.meter.usage().completion_tokens + tokens.len());
            }
            Event::Done { usage, .. } => {
                self.meter.prompt(usage.prompt_tokens);
                self.meter.cached(usage.cached_tokens);
                self.meter.generated(usage.completion_tokens);
            }
            Event::Prompt(_) | Event::Embedding(_) | Event::Failed(_) => {}
        }
        self.events.send(event).is_ok()
    }

    /// Whether nobody waits for events any more.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }
}

impl From<Job> for Submitted {
    fn from(job: Job) -> Self {
        let Job { mut request, ctx_size, events, meter, place, mut trace, .. } = job;
        trace.scheduled(request.prompt.len());
        request.max_tokens.get_or_insert(ctx_size - request.prompt.len());
        Self { request, events, meter, _place: place }
    }
}

impl Inbox {
    /// The next request, waiting for it; `None` once no more can come.
    pub fn recv(&mut self) -> Option<Submitted> {
        while self.ready.is_empty() {
            self.ready.extend(self.jobs.blocking_recv()?);
        }
        self.ready.pop_front().map(Submitted::from)
    }

    /// The next request if there is one; an error once no more can come.
    pub fn try_recv(&mut self) -> Result<Option<Submitted>, Closed> {
        if self.ready.is_empty() {
            match self.jobs.try_recv() {
                Ok(choices) => self.ready.extend(choices),
                Err(TryRecvError::Empty) => return Ok(None),
                Err(TryRecvError::Disconnected) => return Err(Closed),
            }
        }
        Ok(self.ready.pop_front().map(Submitted::from))
    }

    /// What [`Engine::stats`](crate::Engine::stats) tells from now on.
    pub fn publish(&self, stats: Stats) {
        *lock(&self.shared.stats) = stats;
    }
}

/// All handles of the engine are gone.
#[derive(Debug, Clone, Copy)]
pub struct Closed;

/// Runs `source` as the worker's thread would run the model: a panic is the engine's end, by name.
pub(crate) fn run(source: impl FnOnce(&mut Inbox), jobs: UnboundedReceiver<Vec<Job>>, shared: Arc<Shared>) {
    let mut inbox = Inbox { jobs, ready: VecDeque::new(), shared };
    let Err(panic) = catch_unwind(AssertUnwindSafe(|| source(&mut inbox))) else { return };
    let failure = EngineError::Backend(format!("the token source failed: {}", panic_words(&*panic)));
    *lock(&inbox.shared.failure) = Some(failure.to_string());
    inbox.jobs.close();
    while let Ok(choices) = inbox.jobs.try_recv() {
        inbox.ready.extend(choices);
    }
    for job in inbox.ready {
        let _ = job.events.send(Event::Failed(failure.clone()));
    }
}

/// A chat template that puts each message on a line.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}{{ m.content }}\n{% endfor %}";

/// The metadata of a model that a source stands for: a token for each byte, so that a prompt's tokens are its bytes.
pub(crate) fn metadata(template: &str) -> Metadata {
    let mut pairs = byte_vocabulary();
    pairs.push(("tokenizer.chat_template".into(), Value::String(template.into())));
    Metadata::from_pairs(pairs)
}

pub(crate) fn info(ctx_size: usize, vocab_size: usize) -> ModelInfo {
    ModelInfo {
        name: Some("token source".into()),
        architecture: "none".into(),
        quantization: "none".into(),
        parameters: 0,
        size_bytes: 0,
        ctx_size,
        ctx_train: ctx_size,
        digest: 0,
        vocab_size,
        embedding_length: 0,
        pooling: Some(Pooling::Mean),
        layers: 0,
        backend: "token source".into(),
        notices: Vec::new(),
        kv_tokens: 0,
        kv_bytes: 0,
        load_time: None,
    }
}

#[cfg(test)]
mod tests {
    use crate::{Engine, EngineConfig, Event, FinishReason, GenerateRequest, SubmitError, Usage};

    fn config() -> EngineConfig {
        EngineConfig { ctx_size: Some(16), max_batch: 1, max_queue: 1, ..EngineConfig::default() }
    }

    fn request() -> GenerateRequest {
        GenerateRequest { prompt: vec![65, 66], ..GenerateRequest::default() }
    }

    #[test]
    fn a_source_answers_as_a_worker_would() {
        let engine = Engine::from_source(&config(), |inbox| {
            while let Some(job) = inbox.recv() {
                let completion_tokens = job.request.max_tokens.unwrap();
                assert!(job.send(Event::Text { text: "a".into(), tokens: vec![] }));
                let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens };
                assert!(job.send(Event::Done {
                    reason: FinishReason::Length,
                    matched: None,
                    ending: None,
                    usage
                }));
            }
        })
        .unwrap();
        assert_eq!(engine.tokenizer().encode("héllo\n", true, true).len(), 7, "bytes are tokens");
        let mut generation = engine.submit(request()).unwrap();
        assert!(matches!(generation.blocking_next(), Some(Event::Text { text, .. }) if text == "a"));
        let Some(Event::Done { usage, .. }) = generation.blocking_next() else { panic!("no end") };
        assert_eq!(usage.completion_tokens, 14, "what the context leaves");
        assert!(generation.blocking_next().is_none());
    }

    #[test]
    fn the_queue_and_cancelling_are_the_handles_own() {
        let (gone, told) = std::sync::mpsc::channel();
        let engine = Engine::from_source(&config(), move |inbox| {
            let (first, second) = (inbox.recv().unwrap(), inbox.recv().unwrap());
            while !first.is_cancelled() {
                std::thread::yield_now();
            }
            assert!(!first.send(Event::Text { text: "late".into(), tokens: vec![] }));
            drop((first, second));
            gone.send(()).unwrap();
            assert!(inbox.recv().is_none());
        })
        .unwrap();
        let (first, _second) = (engine.submit(request()).unwrap(), engine.submit(request()).unwrap());
        assert_eq!(engine.submit(request()).unwrap_err(), SubmitError::QueueFull(1));
        drop(first);
        told.recv().unwrap();
        assert!(!engine.is_busy());
    }

    #[test]
    fn a_panic_is_the_engines_end() {
        let engine = Engine::from_source(&config(), |inbox| {
            drop(inbox.recv());
            panic!("on purpose");
        })
        .unwrap();
        let mut generation = engine.submit(request()).unwrap();
        assert!(generation.blocking_next().is_none());
        while engine.failure().is_none() {
            std::thread::yield_now();
        }
        let refused = engine.submit(request()).unwrap_err();
        assert!(matches!(refused, SubmitError::Stopped(words) if words.contains("on purpose")));
    }

    #[test]
    fn what_was_let_in_is_finished_while_draining() {
        let engine = Engine::from_source(&config(), |inbox| {
            while let Some(job) = inbox.recv() {
                let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 0 };
                job.send(Event::Done { reason: FinishReason::Length, matched: None, usage, ending: None });
            }
        })
        .unwrap();
        let admission = engine.admit().unwrap();
        assert!(engine.is_busy(), "parts may come");
        engine.drain();
        assert!(matches!(engine.submit(request()), Err(SubmitError::Draining)));
        assert!(matches!(engine.admit(), Err(SubmitError::Draining)));
        let mut part = engine.submit_part(&admission, request()).unwrap();
        assert!(matches!(part.blocking_next(), Some(Event::Done { .. })));
        engine.end();
        assert!(matches!(engine.submit_part(&admission, request()), Err(SubmitError::Draining)));
        drop((part, admission));
        while engine.is_busy() {
            std::thread::yield_now();
        }
    }
}
