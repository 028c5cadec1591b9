//! The one thread that runs the model: take requests, plan a step, run it, sample, emit.

mod output;
mod running;
mod vector;

use std::{
    collections::{HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, error::TryRecvError};

use self::running::{Progress, Running};
use crate::{
    backend::{Backend, Counters, Need, StepTimes},
    error::{EngineError, public_panic_words},
    handle::{Place, Stats, lock},
    meter::Meter,
    model::{Decoder, Pooling},
    request::{Event, GenerateRequest},
    sampling::Masks,
    sched::{Arrival, Batch, Forecast, Planned, Resources, Scheduler, SequenceId},
    spans::Trace,
    text::Tokenizer,
};

/// A request on its way to the worker.
pub(crate) struct Job {
    pub(crate) request: GenerateRequest,
    pub(crate) ctx_size: usize,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) place: Place,
    pub(crate) trace: Trace,
}

/// What the worker lets others see.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) stats: Mutex<Stats>,
    /// Set once, when the worker ends by a lost device or a panic.
    pub(crate) failure: Mutex<Option<String>>,
    /// What a new request would wait for.
    pub(crate) forecast: Mutex<Forecast>,
    /// Set when what is unfinished is to end.
    pub(crate) ending: AtomicBool,
    /// Rung with every request that comes or goes.
    pub(crate) bell: Bell,
}

/// Wakes the worker where it sleeps because all that it has is paused.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    wake: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        *lock(&self.rung) = true;
        self.wake.notify_one();
    }

    /// Returns when it is rung, at once when it was rung since the last call, and after `most`.
    fn wait(&self, most: Duration) {
        let rung = self.wake.wait_timeout_while(lock(&self.rung), most, |rung| !*rung);
        *rung.unwrap_or_else(PoisonError::into_inner).0 = false;
    }
}

/// Runs until every [`crate::Engine`] is gone and the work is done. A lost device or a panic fails all
/// requests, leaves its words in `shared` and ends the thread; it never leaves a client waiting.
pub(crate) fn run<B: Backend>(
    decoder: Decoder<B>,
    tokenizer: &Tokenizer,
    resources: Resources,
    inbox: UnboundedReceiver<Vec<Job>>,
    shared: &Shared,
) {
    let mut worker = Worker {
        decoder,
        tokenizer,
        scheduler: Scheduler::new(resources),
        running: HashMap::new(),
        rationed: VecDeque::new(),
        inbox,
        next_id: 0,
        needs: Vec::new(),
        masks: Masks::default(),
        computed_at: None,
        shared,
        stats: Stats { kv_blocks_total: resources.blocks, ..Stats::default() },
    };
    let failure = match catch_unwind(AssertUnwindSafe(|| worker.serve())) {
        Ok(Ok(())) => return,
        Ok(Err(lost)) => lost,
        Err(panic) => {
            EngineError::Backend(format!("the model's worker failed: {}", public_panic_words(&*panic)))
        }
    };
    // In this order: who is refused, or finds the inbox closed, finds the reason too.
    *lock(&shared.failure) = Some(failure.to_string());
    worker.inbox.close();
    worker.fail_all(&failure);
}

struct Worker<'a, B: Backend> {
    decoder: Decoder<B>,
    tokenizer: &'a Tokenizer,
    scheduler: Scheduler,
    /// Waiting and running requests.
    running: HashMap<SequenceId, Running>,
    /// Those of them that have an allowance; who has waited longest for a token comes first.
    rationed: VecDeque<SequenceId>,
    inbox: UnboundedReceiver<Vec<Job>>,
    next_id: u64,
    /// What the step's requests need of each row of logits.
    needs: Vec<Need>,
    /// Computes what constrained requests may go on with.
    masks: Masks,
    /// When the last step's work had ended; none after a rest, which is part of no step.
    computed_at: Option<Instant>,
    shared: &'a Shared,
    stats: Stats,
}

impl<B: Backend> Worker<'_, B> {
    /// An error is fatal: no further step can work.
    fn serve(&mut self) -> Result<(), EngineError> {
        let (mut batch, mut planned) = (Batch::default(), Vec::new());
        self.publish();
        while self.receive() {
            let began = Instant::now();
            if self.shared.ending.load(Ordering::Relaxed) {
                self.fail_all(&EngineError::Ended);
                continue;
            }
            self.drop_cancelled();
            let pause = self.draw();
            self.scheduler.plan(&mut batch, &mut planned);
            self.publish();
            if !batch.tokens.is_empty() {
                self.step(&batch, &planned)?;
                let took = began.elapsed();
                self.scheduler.took(took);
                self.stats.step_seconds.observe(took.as_secs_f64(), 0.001);
                self.stats.step_sequences.observe(batch.sequences.len() as f64, 1.0);
                self.publish();
            } else if let Some(pause) = pause {
                self.computed_at = None;
                self.shared.bell.wait(pause);
            }
        }
        Ok(())
    }

    /// Takes new requests in; sleeps while there is nothing to do. False when no more can come and
    /// none is left.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() {
            self.computed_at = None;
            match self.inbox.blocking_recv() {
                Some(jobs) => self.take(jobs),
                None => return false,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(jobs) => self.take(jobs),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return !self.running.is_empty(),
            }
        }
    }

    /// Takes choices that go on from one prompt.
    fn take(&mut self, choices: Vec<Job>) {
        let Some(GenerateRequest { prompt, caller, weight, embedding, .. }) =
            choices.first().map(|job| &job.request)
        else {
            return;
        };
        self.scheduler.add(Arrival {
            id: SequenceId(self.next_id),
            choices: choices.len(),
            caller: *caller,
            weight: *weight,
            prompt: prompt.clone(),
            score_prompt: choices.iter().any(|job| job.request.prompt_logprobs.is_some()),
            hidden_from: embedding.map(|pooling| match pooling {
                Pooling::Mean => 0,
                Pooling::Last => prompt.len() - 1,
            }),
            most: prompt.len() + choices.iter().map(Job::most_tokens).max().unwrap_or(0),
        });
        for job in choices {
            if job.request.allowance.is_some() {
                self.rationed.push_back(SequenceId(self.next_id));
            }
            self.running.insert(SequenceId(self.next_id), Running::new(job));
            self.next_id += 1;
        }
    }

    fn drop_cancelled(&mut self) {
        let scheduler = &mut self.scheduler;
        self.running.retain(|&id, request| {
            let keep = !request.events.is_closed();
            if !keep {
                request.trace.cancelled();
                scheduler.remove(id);
            }
            keep
        });
    }

    /// Asks the allowances for the tokens that the next step may generate. Who is given none is paused; who was
    /// given one asks last the next time, so that those who share one take turns. Returns how long
    /// until the first may ask again.
    fn draw(&mut self) -> Option<Duration> {
        let Self { running, rationed, scheduler, .. } = self;
        let mut shortest: Option<Duration> = None;
        let mut served = Vec::new();
        rationed.retain(|&id| {
            let Some(request) = running.get_mut(&id) else { return false };
            let allowed = request.draw();
            if std::mem::replace(&mut request.paused, allowed.is_err()) != request.paused {
                if request.paused { scheduler.pause(id) } else { scheduler.resume(id) }
            }
            match allowed {
                Ok(()) => served.push(id),
                Err(wait) => shortest = Some(shortest.map_or(wait, |s| s.min(wait))),
            }
            allowed.is_err()
        });
        rationed.extend(served);
        shortest
    }

    /// A step that fails ends the requests it was for; only a lost device ends the others too.
    fn step(&mut self, batch: &Batch, planned: &[Planned]) -> Result<(), EngineError> {
        self.needs.clear();
        self.needs.resize(batch.logit_rows.len(), Need::Best(1));
        for plan in planned {
            if let Some(request) = self.running.get_mut(&plan.id) {
                request.trace.scheduled(request.prompt.len());
                if plan.samples {
                    request.prepare(&mut self.masks);
                }
                // Choices that share their prompt share its rows.
                for need in &mut self.needs[plan.first_row..plan.first_row + plan.rows] {
                    *need = need.and(request.need());
                }
            }
        }
        let started = Instant::now();
        let before = self.computed_at.take();
        match self.decoder.forward(batch, &self.needs) {
            Ok(()) => self.time_step(before, started),
            Err(lost @ EngineError::DeviceLost(_)) => return Err(lost),
            Err(error) => {
                tracing::error!(%error, "a step failed, and with it its requests");
                for plan in planned {
                    self.fail(plan.id, &error);
                }
                return Ok(());
            }
        }
        self.scheduler.computed();
        self.stats.steps += 1;
        let per_token = started.elapsed() / batch.tokens.len().max(1) as u32;
        for plan in planned {
            if !self.running.contains_key(&plan.id) {
                continue;
            }
            // The rows of those that come later are on their way meanwhile.
            match self.decoder.wait_for_rows(plan.first_row + plan.rows) {
                Ok(()) => {}
                Err(lost @ EngineError::DeviceLost(_)) => return Err(lost),
                Err(error) => {
                    self.fail(plan.id, &error);
                    continue;
                }
            }
            let Some(request) = self.running.get_mut(&plan.id) else { continue };
            let generated = request.generated;
            request.meter.prompt(plan.computed.min(request.prompt.len()));
            request.meter.spend(per_token * plan.tokens as u32);
            if plan.samples && request.generated == 0 {
                self.stats.prompt_tokens += request.prompt.len() as u64;
                self.stats.cached_tokens += plan.cached as u64;
                request.cached = plan.cached;
                request.meter.cached(plan.cached);
            }
            let row = |i: usize| self.decoder.row(plan.first_row + i);
            let hidden = (plan.first_hidden..plan.first_hidden + plan.hidden).map(|i| self.decoder.hidden(i));
            let progress = match &mut request.vector {
                Some(vector) => {
                    vector.add(hidden);
                    if plan.samples { request.embedded() } else { Progress::Prompt }
                }
                None => request.advance(self.tokenizer, plan, row),
            };
            match progress {
                Progress::Prompt => {}
                Progress::Token(token) => {
                    self.stats.generated_tokens += 1;
                    self.scheduler.push(plan.id, token);
                }
                Progress::Ended => {
                    self.stats.generated_tokens += (request.generated - generated) as u64;
                    self.scheduler.remove(plan.id);
                    self.running.remove(&plan.id);
                }
            }
        }
        Ok(())
    }

    /// Notes how long the device worked in a step, and how long it had waited since the one `before`.
    fn time_step(&mut self, before: Option<Instant>, started: Instant) {
        let now = Instant::now();
        self.computed_at = Some(now);
        let Some(before) = before else { return };
        let by_host = StepTimes { idle: started - before, busy: now - started };
        let StepTimes { idle, busy } = self.decoder.step_times().unwrap_or(by_host);
        self.stats.idle_seconds += idle.as_secs_f64();
        self.stats.busy_seconds += busy.as_secs_f64();
    }

    fn fail(&mut self, id: SequenceId, error: &EngineError) {
        self.scheduler.remove(id);
        if let Some(request) = self.running.remove(&id) {
            request.trace.failed(error);
            request.emit(Event::Failed(error.clone()));
        }
    }

    fn fail_all(&mut self, error: &EngineError) {
        let failed: Vec<_> = self.running.drain().collect();
        for (id, _) in &failed {
            self.scheduler.remove(*id);
        }
        // Before anybody is told: who hears of the end finds the gauges at their end too.
        self.publish();
        for (_, request) in failed {
            request.trace.failed(error);
            request.emit(Event::Failed(error.clone()));
        }
        while let Ok(choices) = self.inbox.try_recv() {
            for job in choices {
                let _ = job.events.send(Event::Failed(error.clone()));
            }
        }
    }

    fn publish(&mut self) {
        self.stats.waiting = self.scheduler.waiting();
        self.stats.running = self.scheduler.running();
        self.stats.paused = self.scheduler.paused();
        let pool = self.scheduler.pool();
        self.stats.kv_blocks_used = pool.total() - pool.available();
        self.stats.kv_blocks_cached = pool.idle();
        self.stats.preemptions = self.scheduler.counts().preemptions;
        let Counters { launches, syncs } = self.decoder.counters();
        (self.stats.kernel_launches, self.stats.device_syncs) = (launches, syncs);
        // In this order: who has seen the gauges is told what follows from them.
        self.scheduler.forecast(&mut lock(&self.shared.forecast));
        *lock(&self.shared.stats) = self.stats;
    }
}
