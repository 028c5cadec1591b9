//! Tokens without a model: what the gateway's tests and `benches/gateway.rs` put in the engine's place.

use std::{
    collections::VecDeque,
    thread,
    time::{Duration, Instant},
};

use m40llm_engine::{
    Engine, EngineConfig, Event, FinishReason, Stats, TokenOut, Usage,
    source::{Inbox, Submitted},
};

/// How tokens come: in steps, as a worker's do, each of one token for some of the sequences, in turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// From one step's beginning to the next one's; zero: no waiting. A step that comes late does not put
    /// off those after it.
    pub(crate) step: Duration,
    /// Most tokens in one step.
    pub(crate) batch: usize,
    /// The text of a sequence's token number n, counted from 0. It is asked for just before it is sent.
    pub(crate) text: fn(usize) -> String,
}

impl Default for Pace {
    /// At once, to all: `t0 t1 t2 …`.
    fn default() -> Self {
        Self { step: Duration::ZERO, batch: usize::MAX, text: |n| format!("t{n} ") }
    }
}

/// An engine that gives every request its `max_tokens` tokens at this pace, as far as its allowance goes, then
/// ends it by [`FinishReason::Length`]. A prompt's bytes are its tokens; stop strings and log-probabilities are not
/// looked at.
pub(crate) fn engine(config: &EngineConfig, pace: Pace) -> Engine {
    Engine::from_source(config, move |inbox| Source { pace, stats: Stats::default() }.run(inbox)).unwrap()
}

struct Source {
    pace: Pace,
    stats: Stats,
}

/// A request under way, and how many tokens it has had.
type Running = (Submitted, usize);

impl Source {
    fn run(mut self, inbox: &mut Inbox) {
        let mut running: VecDeque<Running> = VecDeque::new();
        let mut due = Instant::now();
        loop {
            if running.is_empty() {
                let Some(job) = inbox.recv() else { return };
                self.take(job, &mut running);
                due = Instant::now();
            }
            // An error means that no more can come; those under way are finished.
            while let Ok(Some(job)) = inbox.try_recv() {
                self.take(job, &mut running);
            }
            let (given, waiting) = (self.stats.generated_tokens, running.len());
            for _ in 0..running.len().min(self.pace.batch) {
                if let Some(one) = running.pop_front().and_then(|one| self.advance(one)) {
                    running.push_back(one);
                }
            }
            self.stats.steps += 1;
            self.stats.running = running.len();
            inbox.publish(self.stats);
            due += self.pace.step;
            let all_paused = running.len() == waiting && self.stats.generated_tokens == given;
            let pause = if all_paused { Duration::from_millis(1) } else { Duration::ZERO };
            thread::sleep(due.saturating_duration_since(Instant::now()).max(pause));
        }
    }

    fn take(&mut self, job: Submitted, running: &mut VecDeque<Running>) {
        self.stats.prompt_tokens += job.request.prompt.len() as u64;
        running.push_back((job, 0));
    }

    /// One more token of a request; itself unless it has ended or was cancelled.
    fn advance(&mut self, (job, mut given): Running) -> Option<Running> {
        let most = job.request.max_tokens.unwrap_or_default();
        if given < most {
            if job.is_cancelled() {
                return None;
            }
            if job.request.allowance.as_ref().is_some_and(|allowance| allowance.draw().is_err()) {
                return Some((job, given));
            }
            let text = (self.pace.text)(given);
            let id = u32::from(text.as_bytes().first().copied().unwrap_or_default());
            job.send(Event::Text { text, tokens: vec![TokenOut { id, logprob: None }] });
            given += 1;
            self.stats.generated_tokens += 1;
        }
        if given < most {
            return Some((job, given));
        }
        let usage =
            Usage { prompt_tokens: job.request.prompt.len(), cached_tokens: 0, completion_tokens: given };
        job.send(Event::Done { reason: FinishReason::Length, matched: None, ending: None, usage });
        None
    }
}
