//! What callers are promised, on a machine with a virtual clock.

use std::{collections::BTreeMap, time::Duration};

use super::*;

/// About SmolLM2 on two cores: milliseconds of a step, of a decoding sequence, and of a prompt's token.
const STEP: f64 = 5.0;
const SEQUENCE: f64 = 1.5;
const TOKEN: f64 = 1.1;

struct Server {
    scheduler: Scheduler,
    /// Milliseconds.
    now: f64,
    next: u64,
    streams: BTreeMap<SequenceId, Stream>,
}

struct Stream {
    arrived: f64,
    left: usize,
    /// When its tokens came.
    times: Vec<f64>,
}

impl Stream {
    fn first(&self) -> f64 {
        self.times[0] - self.arrived
    }

    fn gaps(&self) -> impl Iterator<Item = f64> {
        self.times.windows(2).map(|pair| pair[1] - pair[0])
    }
}

impl Server {
    fn new(blocks: usize) -> Self {
        let limits = Limits { tokens: 512, sequences: 16, logit_rows: 32 };
        let prefix_cache = PrefixCache::PerCaller;
        let resources = Resources { limits, blocks, most_idle: blocks, prefix_cache };
        Self { scheduler: Scheduler::new(resources), now: 0.0, next: 0, streams: BTreeMap::new() }
    }

    fn submit(&mut self, caller: u64, prompt: usize, tokens: usize) -> SequenceId {
        let id = SequenceId(self.next);
        self.next += 1;
        self.scheduler.add(Arrival {
            id,
            choices: 1,
            caller: CallerId(caller),
            weight: 1,
            prompt: (0..prompt as u32).map(|i| i + 10_000 * id.0 as u32).collect(),
            score_prompt: false,
            hidden_from: None,
            most: prompt + tokens,
        });
        self.streams.insert(id, Stream { arrived: self.now, left: tokens, times: Vec::new() });
        id
    }

    /// One step; returns how long it took.
    fn step(&mut self) -> f64 {
        let (mut batch, mut planned) = (Batch::default(), Vec::new());
        self.scheduler.plan(&mut batch, &mut planned);
        assert!(!batch.tokens.is_empty(), "nothing to do");
        let (decoding, prompt) = self.scheduler.step_counts();
        let took = STEP + SEQUENCE * decoding as f64 + TOKEN * prompt as f64;
        self.now += took;
        self.scheduler.computed();
        for plan in planned.iter().filter(|p| p.samples) {
            let stream = self.streams.get_mut(&plan.id).unwrap();
            stream.times.push(self.now);
            stream.left -= 1;
            if stream.left == 0 {
                self.scheduler.remove(plan.id);
            } else {
                self.scheduler.push(plan.id, 1);
            }
        }
        self.scheduler.took(Duration::from_secs_f64(took / 1000.0));
        took
    }

    /// Steps until a sequence has had its first token.
    fn until_first(&mut self, id: SequenceId) -> f64 {
        while self.streams[&id].times.is_empty() {
            self.step();
        }
        self.streams[&id].first()
    }
}

#[test]
fn a_long_prompt_leaves_no_gap_in_running_streams_and_is_not_much_slower_itself() {
    let mut alone = Server::new(1000);
    let id = alone.submit(0, 3000, 2);
    let alone = alone.until_first(id);

    let mut server = Server::new(1000);
    let streams: Vec<_> = (0..6).map(|_| server.submit(0, 50, 2000)).collect();
    let mut before: Vec<f64> = (0..100).map(|_| server.step()).collect();
    before.drain(..50);
    before.sort_by(f64::total_cmp);
    let median = before[before.len() / 2];
    let long = server.submit(0, 3000, 2);
    let beside = server.until_first(long);
    for id in streams {
        let worst = server.streams[&id].gaps().skip(50).fold(0.0, f64::max);
        assert!(worst <= 4.0 * median && worst <= 400.0, "a gap of {worst} ms beside steps of {median} ms");
    }
    assert!(beside <= 1.8 * alone, "{beside} ms, alone {alone} ms");
}

#[test]
fn one_request_beside_fifty_waits_little_longer_than_alone() {
    for (prompt, begun) in [(200, 0), (200, 1), (200, 5), (200, 40), (20, 3), (20, 40), (900, 10), (900, 60)]
    {
        let mut solo = Server::new(1000);
        let id = solo.submit(1, prompt, 10);
        let solo = solo.until_first(id);

        let mut server = Server::new(1000);
        for _ in 0..50 {
            server.submit(0, 200, 100);
        }
        let mut longest = 0f64;
        for _ in 0..begun {
            longest = server.step();
        }
        let id = server.submit(1, prompt, 10);
        while server.streams[&id].times.is_empty() {
            longest = longest.max(server.step());
        }
        let beside = server.streams[&id].first();
        assert!(
            beside <= 2.0 * solo + longest,
            "{prompt} tokens after {begun} steps: {beside} ms, alone {solo} ms"
        );
    }
}

#[test]
fn a_quarter_of_the_memory_is_enough_for_all_to_end() {
    // Sixteen of 600 tokens would want 304 blocks.
    let mut server = Server::new(76);
    let ids: Vec<_> = (0..40).map(|i| server.submit(i % 3, 300, 300)).collect();
    while ids.iter().any(|id| server.streams[id].left > 0) {
        server.step();
    }
    assert!(server.scheduler.counts().preemptions > 0);
    assert_eq!(server.scheduler.pool().available(), 76);
}

#[test]
fn planning_costs_little_beside_a_step() {
    let mut server = Server::new(4000);
    for _ in 0..16 {
        server.submit(0, 600, 10_000);
    }
    for _ in 0..500 {
        server.submit(1, 600, 1);
    }
    for _ in 0..200 {
        server.step();
    }
    let (mut batch, mut planned) = (Batch::default(), Vec::new());
    let began = std::time::Instant::now();
    for _ in 0..1000 {
        server.scheduler.plan(&mut batch, &mut planned);
        server.scheduler.computed();
        for plan in planned.iter().filter(|p| p.samples) {
            server.scheduler.push(plan.id, 1);
        }
    }
    let each = began.elapsed() / 1000;
    println!("{each:?} a step");
    // Microseconds, ten of them on an idle machine; this bound is for busy ones without optimisation.
    assert!(each < Duration::from_millis(1), "{each:?} a step");
}
