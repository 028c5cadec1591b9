//! Requests whose tokens somebody must allow.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use m40llm_engine::{Allowance, Engine, EngineConfig, Event, GenerateRequest, Generation, SamplingParams};

use crate::support::tiny::{Spec, model};

/// A purse that somebody fills.
#[derive(Debug, Default)]
struct Purse {
    left: AtomicUsize,
    drawn: AtomicUsize,
    returned: AtomicUsize,
}

impl Purse {
    fn add(&self, tokens: usize) {
        self.left.fetch_add(tokens, Ordering::SeqCst);
    }

    /// Tokens drawn and kept.
    fn spent(&self) -> usize {
        self.drawn.load(Ordering::SeqCst) - self.returned.load(Ordering::SeqCst)
    }
}

/// Short, as tests fill the purse without telling the worker.
const AGAIN: Duration = Duration::from_millis(1);

impl Allowance for Purse {
    fn draw(&self) -> Result<(), Duration> {
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) {
            Ok(_) => {
                self.drawn.fetch_add(1, Ordering::SeqCst);
                Ok(())
            }
            Err(_) => Err(AGAIN),
        }
    }

    fn give_back(&self) {
        self.returned.fetch_add(1, Ordering::SeqCst);
    }
}

/// A tiny model with places for `max_batch` and a pool of `blocks` KV blocks.
fn engine(max_batch: usize, blocks: u64) -> Engine {
    let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
    fs::write(file.path(), model(&Spec::default())).unwrap();
    // 32 tokens, 2 layers, keys and values, one head of 64, two bytes each.
    let block = 32 * 2 * 2 * 64 * 2;
    let config = EngineConfig {
        ctx_size: Some(256),
        max_batch,
        kv_memory: Some(blocks * block),
        ..EngineConfig::default()
    };
    let engine = Engine::load(file.path(), &config, |_| {}).unwrap();
    wait_until("the pool is there", || engine.stats().kv_blocks_total == blocks as usize);
    engine
}

fn request(start: u32, tokens: usize, allowance: Option<Arc<dyn Allowance>>) -> GenerateRequest {
    GenerateRequest {
        prompt: (start..start + 20).collect(),
        max_tokens: Some(tokens),
        sampling: SamplingParams { seed: Some(7), ..SamplingParams::default() },
        ignore_eos: true,
        allowance,
        ..GenerateRequest::default()
    }
}

fn ids(mut generation: Generation) -> Vec<u32> {
    let mut ids = Vec::new();
    loop {
        match generation.blocking_next().expect("a last event") {
            Event::Text { tokens, .. } => ids.extend(tokens.iter().map(|t| t.id)),
            Event::Prompt(_) | Event::Embedding(_) => {}
            Event::Done { usage, .. } => {
                assert_eq!(usage.completion_tokens, ids.len());
                return ids;
            }
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Rests, of an engine without work and of one whose work is paused, are part of no step.
#[test]
fn steps_are_timed_without_the_rests_between_them() {
    let engine = engine(4, 32);
    let start = Instant::now();
    ids(engine.submit(request(1, 40, None)).unwrap());
    let purse = Arc::new(Purse::default());
    purse.add(5);
    thread::sleep(Duration::from_millis(300));
    let generation = engine.submit(request(1, 40, Some(purse.clone()))).unwrap();
    wait_until("paused", || purse.spent() == 5 && engine.stats().paused == 1);
    thread::sleep(Duration::from_millis(300));
    purse.add(35);
    ids(generation);
    wait_until("at rest", || !engine.is_busy() && engine.stats().kv_blocks_used == 0);
    let (stats, wall) = (engine.stats(), start.elapsed().as_secs_f64());
    assert!(stats.idle_seconds > 0.0 && stats.busy_seconds > stats.idle_seconds, "{stats:?}");
    assert!(stats.idle_seconds + stats.busy_seconds < wall - 0.6, "{stats:?} in {wall} s");
}

#[test]
fn an_empty_purse_pauses_generation_and_changes_no_token() {
    let engine = engine(4, 32);
    let free = ids(engine.submit(request(1, 60, None)).unwrap());
    let purse = Arc::new(Purse::default());
    let generation = engine.submit(request(1, 60, Some(purse.clone()))).unwrap();
    for spent in [10, 20, 30, 40] {
        purse.add(10);
        wait_until("paused again", || purse.spent() == spent && engine.stats().paused == 1);
    }
    // Nothing is computed while it sleeps; not only is nothing told.
    let generated = engine.stats().generated_tokens;
    assert_eq!(generated, 60 + 40);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(engine.stats().generated_tokens, generated);
    assert!(engine.stats().kv_blocks_used > 0, "it keeps what it has computed");
    purse.add(1000);
    assert_eq!(ids(generation), free);
    assert_eq!(purse.spent(), 60);
}

#[test]
fn paused_requests_hold_up_nobody_and_lose_nothing() {
    // Two places, and blocks for one sequence of the longest length and little more.
    let engine = engine(2, 9);
    let alone: Vec<_> = (0..3).map(|i| ids(engine.submit(request(i, 100, None)).unwrap())).collect();
    let purse = Arc::new(Purse::default());
    let paused: Vec<_> =
        (0..3).map(|i| engine.submit(request(i, 100, Some(purse.clone()))).unwrap()).collect();
    purse.add(90);
    wait_until("all are paused", || purse.spent() == 90 && engine.stats().paused == 3);
    assert_eq!(engine.stats().running, 0);
    let long = GenerateRequest { prompt: vec![3; 200], ..request(0, 50, None) };
    assert_eq!(ids(engine.submit(long).unwrap()).len(), 50);
    purse.add(300 - 90);
    assert_eq!(paused.into_iter().map(ids).collect::<Vec<_>>(), alone);
    assert_eq!(purse.spent(), 300);
}

#[test]
fn those_who_share_a_purse_take_turns() {
    let engine = engine(4, 32);
    let purse = Arc::new(Purse::default());
    let shares: Vec<_> = (0..3).map(|_| Arc::new(Share(purse.clone(), AtomicUsize::new(0)))).collect();
    let streams: Vec<_> =
        shares.iter().map(|s| engine.submit(request(1, 50, Some(s.clone()))).unwrap()).collect();
    for spent in 1..=30 {
        purse.add(1);
        wait_until("one goes on", || purse.spent() == spent && engine.stats().paused == 3);
    }
    assert!(shares.iter().all(|s| s.1.load(Ordering::SeqCst) == 10), "{shares:?}");
    drop(streams);
}

/// A purse of several, and how many tokens this one has had.
#[derive(Debug)]
struct Share(Arc<Purse>, AtomicUsize);

impl Allowance for Share {
    fn draw(&self) -> Result<(), Duration> {
        self.0.draw()?;
        self.1.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn give_back(&self) {
        self.0.give_back();
    }
}

/// Allows nothing, and wants not to be asked again soon.
#[derive(Debug)]
struct Never;

impl Allowance for Never {
    fn draw(&self) -> Result<(), Duration> {
        Err(Duration::from_secs(3600))
    }

    fn give_back(&self) {}
}

#[test]
fn a_paused_request_is_cancelled_at_once() {
    let engine = engine(4, 32);
    let generation = engine.submit(request(1, 10, Some(Arc::new(Never)))).unwrap();
    wait_until("paused", || engine.stats().paused == 1);
    // A new request wakes the worker too.
    assert_eq!(ids(engine.submit(request(2, 5, None)).unwrap()).len(), 5);
    drop(generation);
    wait_until("gone", || !engine.is_busy() && engine.stats().kv_blocks_used == 0);
}

#[test]
fn what_a_cancelled_request_did_not_generate_is_given_back() {
    let engine = engine(1, 8);
    let purse = Arc::new(Purse::default());
    purse.add(1_000_000);
    let running = engine.submit(request(1, 200, None)).unwrap();
    let queued = engine.submit(request(2, 200, Some(purse.clone()))).unwrap();
    wait_until("it has asked", || purse.drawn.load(Ordering::SeqCst) == 1);
    drop(queued);
    wait_until("given back", || purse.spent() == 0);
    drop(running);
    // Only reading a prompt draws nothing.
    assert!(ids(engine.submit(request(3, 0, Some(purse.clone()))).unwrap()).is_empty());
    assert_eq!(purse.drawn.load(Ordering::SeqCst), 1);
}
