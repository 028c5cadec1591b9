//! The engine's public handle: load a model, submit requests, receive events.

mod load;
mod stats;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::sync::mpsc;

pub use self::{
    load::LoadProgress,
    stats::{Distribution, Stats},
};
use crate::{
    config::EngineConfig,
    error::{EngineError, SubmitError},
    gguf::Metadata,
    info::ModelInfo,
    meter::Meter,
    request::{Event, GenerateRequest},
    sampling::{Constraint, ConstraintError, Constraints, Grammar},
    source::{self, Inbox},
    spans::{Timings, Trace},
    text::Tokenizer,
    worker::{Job, Shared},
};

/// A submitted request. Dropping it cancels the work within one step.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::UnboundedReceiver<Event>,
    meter: Arc<Meter>,
    timings: Timings,
    shared: Arc<Shared>,
    predicted: Duration,
    position: usize,
}

impl Drop for Generation {
    fn drop(&mut self) {
        // The worker may sleep while all that it has is paused.
        self.events.close();
        self.shared.bell.ring();
    }
}

impl Generation {
    /// After how long the first token was expected when the request was submitted.
    pub fn predicted_first_token(&self) -> Duration {
        self.predicted
    }

    /// Where it stood in the queue when it was submitted: 0 has a place at once, 1 gets the next one.
    pub fn queue_position(&self) -> usize {
        self.position
    }

    /// The next event; `None` after [`Event::Done`] or [`Event::Failed`].
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// What it has used so far; still right after the generation is dropped.
    pub fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// As [`Generation::next`], for callers without a runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// When its work began; goes on telling it after the generation is dropped.
    pub fn timings(&self) -> Timings {
        self.timings.clone()
    }
}

/// A request of several parts that are submitted one after another. While it lasts the engine counts as busy, and
/// takes its parts also when it drains.
#[derive(Debug)]
pub struct Admission(Arc<AtomicUsize>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A loaded model and the thread that runs it. Cheap to clone; the last clone dropped waits for the thread,
/// which ends once what was submitted is finished.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

/// A thread that is waited for when this is dropped. A worker that outlived `main` would free device memory
/// while the driver is being unloaded.
#[derive(Debug)]
struct Joined(Option<thread::JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // The worker catches its panics and says them in `Shared`.
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
struct Inner {
    info: ModelInfo,
    metadata: Metadata,
    tokenizer: Arc<Tokenizer>,
    constraints: Constraints,
    jobs: mpsc::UnboundedSender<Vec<Job>>,
    /// After `jobs`, as fields are dropped in their order: the worker ends once no more jobs can come.
    _worker: Joined,
    shared: Arc<Shared>,
    draining: AtomicBool,
    /// Requests whose parts may still come.
    admitted: Arc<AtomicUsize>,
    /// Requests taken and not ended, and how many there may be.
    active: Arc<AtomicUsize>,
    max_active: usize,
    max_batch: usize,
}

impl Engine {
    /// An engine without a model, whose events come from `source` on a thread of its own: see
    /// [`source`]. The context is 4096 tokens unless the configuration says otherwise.
    pub fn from_source(
        config: &EngineConfig,
        source: impl FnOnce(&mut Inbox) + Send + 'static,
    ) -> Result<Self, EngineError> {
        Self::from_source_with(config, source::TEMPLATE, source)
    }

    /// As [`Engine::from_source`], of a model with this chat template.
    pub fn from_source_with(
        config: &EngineConfig,
        template: &str,
        source: impl FnOnce(&mut Inbox) + Send + 'static,
    ) -> Result<Self, EngineError> {
        let metadata = source::metadata(template);
        let tokenizer = Arc::new(Tokenizer::from_metadata(&metadata)?);
        let info = source::info(config.ctx_size.unwrap_or(4096), tokenizer.vocab_size());
        Self::over(info, metadata, tokenizer, config, move |jobs, shared| source::run(source, jobs, shared))
    }

    /// The handle over a thread that takes the jobs.
    fn over(
        info: ModelInfo,
        metadata: Metadata,
        tokenizer: Arc<Tokenizer>,
        config: &EngineConfig,
        work: impl FnOnce(mpsc::UnboundedReceiver<Vec<Job>>, Arc<Shared>) + Send + 'static,
    ) -> Result<Self, EngineError> {
        let shared = Arc::new(Shared::default());
        let (jobs, inbox) = mpsc::unbounded_channel();
        let state = Arc::clone(&shared);
        let worker = thread::Builder::new()
            .name("m40llm-worker".into())
            .spawn(move || work(inbox, state))
            .map_err(|e| EngineError::Backend(format!("cannot start the worker thread: {e}")))?;
        let inner = Inner {
            info,
            metadata,
            tokenizer,
            constraints: Constraints::default(),
            jobs,
            _worker: Joined(Some(worker)),
            shared,
            draining: AtomicBool::new(false),
            admitted: Arc::default(),
            active: Arc::default(),
            max_active: config.max_batch + config.max_queue,
            max_batch: config.max_batch,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What is loaded.
    pub fn info(&self) -> &ModelInfo {
        &self.inner.info
    }

    /// The file's key-value section, for choosing a chat template.
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// Compiles what an output must be. It may take long: for the caller's task, not for one that serves others.
    pub fn constrain(&self, grammar: &Grammar) -> Result<Constraint, ConstraintError> {
        self.inner.constraints.compile(&self.inner.tokenizer, grammar)
    }

    /// Queues a request. Never blocks.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        let mut generations = self.submit_choices(vec![request])?;
        generations.pop().ok_or_else(|| SubmitError::InvalidPrompt("there is no request".into()))
    }

    /// Queues requests that go on from one prompt, all or none: it is computed and held once. Never blocks.
    pub fn submit_choices(&self, requests: Vec<GenerateRequest>) -> Result<Vec<Generation>, SubmitError> {
        // Until they have their places: who drains meanwhile does not find the engine idle.
        let _admission = self.admit().map_err(|no| self.failure().map_or(no, SubmitError::Stopped))?;
        self.queue(requests)
    }

    /// Lets a request in whose parts are submitted one after another.
    pub fn admit(&self) -> Result<Admission, SubmitError> {
        // Counted first: who drains and then looks whether the engine is busy sees it.
        self.inner.admitted.fetch_add(1, Ordering::SeqCst);
        let admission = Admission(Arc::clone(&self.inner.admitted));
        if self.inner.draining.load(Ordering::SeqCst) { Err(SubmitError::Draining) } else { Ok(admission) }
    }

    /// Queues a part of a request that was let in. Never blocks.
    pub fn submit_part(&self, _: &Admission, request: GenerateRequest) -> Result<Generation, SubmitError> {
        if self.inner.shared.ending.load(Ordering::Relaxed) {
            return Err(SubmitError::Draining);
        }
        let mut generations = self.queue(vec![request])?;
        generations.pop().ok_or_else(|| SubmitError::InvalidPrompt("there is no request".into()))
    }

    fn queue(&self, requests: Vec<GenerateRequest>) -> Result<Vec<Generation>, SubmitError> {
        let inner = &*self.inner;
        if let Some(words) = self.failure() {
            return Err(SubmitError::Stopped(words));
        }
        let (predicted, position) = requests.first().map_or((Duration::ZERO, 0), |first| {
            let forecast = lock(&inner.shared.forecast);
            let unseen = inner.active.load(Ordering::Relaxed).saturating_sub(forecast.known);
            (
                forecast.first_token(first.caller, first.weight, first.prompt.len()),
                forecast.position(first.caller, first.weight, unseen),
            )
        });
        let mut jobs: Vec<Job> = Vec::with_capacity(requests.len());
        let mut generations = Vec::with_capacity(requests.len());
        for request in requests {
            self.check(&request)?;
            if jobs.first().is_some_and(|first| first.request.prompt != request.prompt) {
                return Err(SubmitError::InvalidPrompt("choices must have one prompt".into()));
            }
            if let Some(most) = request.max_wait.filter(|&most| predicted > most) {
                return Err(SubmitError::WouldWait { predicted, most });
            }
            let place = Place::take(&inner.active, inner.max_active)
                .ok_or(SubmitError::QueueFull(inner.max_active - inner.max_batch))?;
            let (sender, events) = mpsc::unbounded_channel();
            let meter = Arc::new(Meter::default());
            let trace = Trace::begin();
            let timings = trace.timings();
            jobs.push(Job {
                request,
                ctx_size: inner.info.ctx_size,
                events: sender,
                meter: Arc::clone(&meter),
                place,
                trace,
            });
            let shared = Arc::clone(&inner.shared);
            generations.push(Generation { events, meter, timings, shared, predicted, position });
        }
        inner.jobs.send(jobs).map_err(|_| SubmitError::Stopped("its worker thread is gone".into()))?;
        inner.shared.bell.ring();
        Ok(generations)
    }

    /// Whether a request could be taken at all, by its prompt and its length.
    pub fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        let ModelInfo { ctx_size, vocab_size, .. } = self.inner.info;
        let prompt = request.prompt.len();
        if prompt == 0 {
            return Err(SubmitError::InvalidPrompt("the prompt is empty".into()));
        }
        // Without a bound there must be room for one token at least.
        let output = if request.embedding.is_some() { 0 } else { request.max_tokens.unwrap_or(1) };
        let requested = prompt.saturating_add(output);
        if requested > ctx_size {
            return Err(SubmitError::ContextLength { prompt, requested, limit: ctx_size });
        }
        match request.prompt.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(SubmitError::InvalidPrompt(format!(
                "the prompt holds token id {id}; ids are 0 to {}",
                vocab_size - 1
            ))),
            None => Ok(()),
        }
    }

    /// After how long a request that finds the queue full may come again: until somebody is expected to be done.
    pub fn next_place(&self) -> Duration {
        lock(&self.inner.shared.forecast).next_place()
    }

    /// Ends what is unfinished, with [`EngineError::Ended`], within one step.
    pub fn end(&self) {
        self.drain();
        self.inner.shared.ending.store(true, Ordering::Relaxed);
        self.inner.shared.bell.ring();
    }

    /// The worker's numbers now.
    pub fn stats(&self) -> Stats {
        *lock(&self.inner.shared.stats)
    }

    /// Refuses new requests from now on; what was taken is finished.
    pub fn drain(&self) {
        self.inner.draining.store(true, Ordering::SeqCst);
    }

    /// True while submitted work is unfinished.
    pub fn is_busy(&self) -> bool {
        self.inner.active.load(Ordering::Relaxed) > 0 || self.inner.admitted.load(Ordering::SeqCst) > 0
    }

    /// Returns the worker's last words when it has ended by a failure, and not before.
    pub async fn failed(&self) -> String {
        // The worker alone closes this channel's other end, after it has said why.
        self.inner.jobs.closed().await;
        self.failure().unwrap_or_else(|| "its worker thread is gone".into())
    }

    /// The worker's last words, when it has ended by a failure.
    pub fn failure(&self) -> Option<String> {
        lock(&self.inner.shared.failure).clone()
    }
}

/// A request's place among those the engine will hold; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(active: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        active
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limit).then_some(n + 1))
            .ok()
            .map(|_| Self(Arc::clone(active)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Locks a mutex whose data stay valid wherever a holder may have panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
