//! Random work against a model of the cache, with every rule checked in every step; and a machine with a virtual
//! clock, which bounds are measured on.

use std::{collections::HashMap, hash::BuildHasher, time::Duration};

use proptest::{
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner},
};

use super::{pace::LEAST, *};

/// What happens from outside between steps. Indices are taken modulo the number of live sequences.
#[derive(Debug, Clone)]
enum Action {
    /// A request whose prompt begins with `common` tokens of one of three texts.
    Arrive {
        caller: u64,
        text: u32,
        common: usize,
        own: usize,
        choices: usize,
        generate: usize,
        score: bool,
    },
    Cancel(usize),
    Pause(usize),
    Resume(usize),
    /// The next step fails, and with it all sequences in it.
    Fail,
    Steps(usize),
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let arrive =
        (0u64..4, 0u32..3, 0usize..160, 1usize..60, 1usize..5, 0usize..90, prop::bool::weighted(0.1));
    let arrive = arrive.prop_map(|(caller, text, common, own, choices, generate, score)| {
        let choices = if choices > 3 { 6 } else { choices.saturating_sub(1).max(1) };
        Action::Arrive { caller, text, common, own, choices, generate, score }
    });
    let action = prop_oneof![
        4 => arrive,
        1 => any::<usize>().prop_map(Action::Cancel),
        1 => any::<usize>().prop_map(Action::Pause),
        2 => any::<usize>().prop_map(Action::Resume),
        1 => Just(Action::Fail),
        8 => (1usize..12).prop_map(Action::Steps),
    ];
    prop::collection::vec(action, 40..160)
}

fn resources() -> impl Strategy<Value = Resources> {
    let cache = prop_oneof![Just(PrefixCache::Shared), Just(PrefixCache::PerCaller), Just(PrefixCache::Off)];
    (7usize..40, 0usize..40, 2usize..7, 8usize..80, cache).prop_map(
        |(blocks, most_idle, sequences, tokens, prefix_cache)| Resources {
            limits: Limits { tokens: tokens.max(sequences), sequences, logit_rows: sequences + 3 },
            blocks,
            most_idle,
            prefix_cache,
        },
    )
}

/// A sequence as the model knows it.
struct Live {
    /// For each token, a number that stands for it, all before it, and who may see it.
    contents: Vec<u64>,
    tokens: Vec<u32>,
    prompt: usize,
    caller: u64,
    scope: u64,
    left: usize,
    /// The name under which its prompt is computed.
    group: SequenceId,
    scored: usize,
    score: bool,
    is_paused: bool,
    /// Steps since it last went on.
    idle: usize,
}

struct Simulation {
    scheduler: Scheduler,
    resources: Resources,
    live: Vec<(SequenceId, Live)>,
    /// What each slot of each block holds.
    cache: Vec<[u64; BLOCK_TOKENS]>,
    /// Positions of each prompt that its own sequence has computed.
    computed: HashMap<SequenceId, Vec<bool>>,
    hasher: ahash::RandomState,
    next: u64,
    steps: usize,
    fails: bool,
    longest_wait: usize,
    cached: usize,
}

/// Live sequences at once, so that waiting has a bound.
const MOST_LIVE: usize = 24;
/// Steps that any of them may wait for: the others' work, once each, and what preemptions repeat of it.
const LONGEST_WAIT: usize = 2500;

impl Simulation {
    fn new(resources: Resources) -> Self {
        Self {
            scheduler: Scheduler::new(resources),
            resources,
            live: Vec::new(),
            cache: vec![[0; BLOCK_TOKENS]; resources.blocks],
            computed: HashMap::new(),
            hasher: ahash::RandomState::with_seed(7),
            next: 0,
            steps: 0,
            fails: false,
            longest_wait: 0,
            cached: 0,
        }
    }

    fn content(&self, live: &Live, position: usize) -> u64 {
        let before = if position == 0 { live.scope } else { live.contents[position - 1] };
        self.hasher.hash_one((before, live.tokens[position]))
    }

    fn arrive(&mut self, action: &Action) {
        let &Action::Arrive { caller, text, common, own, choices, generate, score } = action else { return };
        // It must fit the pool with what is to follow, or the engine would have refused it.
        let most = self.resources.blocks * BLOCK_TOKENS;
        let prompt = (common + own).min(most - 1);
        if self.live.len() + choices > MOST_LIVE {
            return;
        }
        let id = SequenceId(self.next);
        self.next += choices as u64;
        let token = |i: usize| {
            if i < common { text * 1000 + i as u32 } else { 10_000 + (id.0 * 100) as u32 + i as u32 }
        };
        let tokens: Vec<u32> = (0..prompt).map(token).collect();
        let generate = generate.min(most - prompt);
        self.scheduler.add(Arrival {
            id,
            choices,
            caller: CallerId(caller),
            weight: caller as u32 + 1,
            prompt: tokens.clone(),
            score_prompt: score,
            hidden_from: None,
            most: prompt + generate,
        });
        let scope = match self.resources.prefix_cache {
            PrefixCache::Shared => 0,
            PrefixCache::PerCaller => 1 + caller,
            PrefixCache::Off => 1000 + id.0,
        };
        self.computed.insert(id, vec![false; prompt]);
        for i in 0..choices as u64 {
            let mut live = Live {
                contents: Vec::new(),
                tokens: tokens.clone(),
                prompt,
                caller,
                scope,
                left: generate,
                group: id,
                scored: 0,
                score,
                is_paused: false,
                idle: 0,
            };
            for position in 0..prompt {
                live.contents.push(self.content(&live, position));
            }
            self.live.push((SequenceId(id.0 + i), live));
        }
    }

    fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        let chosen = |i: &usize| (!self.live.is_empty()).then(|| self.live[i % self.live.len().max(1)].0);
        match action {
            Action::Arrive { .. } => self.arrive(action),
            Action::Cancel(i) => {
                if let Some(id) = chosen(i) {
                    self.end(id);
                }
            }
            Action::Pause(i) => {
                if let Some(id) = chosen(i) {
                    self.set_paused(id, true);
                }
            }
            Action::Resume(i) => {
                if let Some(id) = chosen(i) {
                    self.set_paused(id, false);
                }
            }
            Action::Fail => self.fails = true,
            Action::Steps(n) => {
                for _ in 0..*n {
                    self.step()?;
                }
            }
        }
        self.scheduler.audit();
        Ok(())
    }

    /// Whether it is left out of steps: it is paused, or one that it still shares its prompt with.
    fn rests(&self, live: &Live) -> bool {
        let shares = |other: &Live| other.group == live.group && other.tokens.len() == other.prompt;
        let alone = live.tokens.len() > live.prompt;
        live.is_paused || !alone && self.live.iter().any(|(_, other)| other.is_paused && shares(other))
    }

    fn set_paused(&mut self, id: SequenceId, paused: bool) {
        let at = self.live.iter().position(|(i, _)| *i == id).unwrap();
        self.live[at].1.is_paused = paused;
        if paused { self.scheduler.pause(id) } else { self.scheduler.resume(id) }
    }

    fn end(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.live.retain(|(i, _)| *i != id);
    }

    /// Plans a step, checks it, computes it in the model, and answers it.
    fn step(&mut self) -> Result<(), TestCaseError> {
        self.steps += 1;
        let (mut batch, mut planned) = (Batch::default(), Vec::new());
        self.scheduler.plan(&mut batch, &mut planned);
        self.scheduler.audit();
        let goes_on = self.live.iter().any(|(_, live)| !self.rests(live));
        prop_assert_eq!(batch.tokens.is_empty(), !goes_on, "stuck, or at work for nobody");
        self.check_limits(&batch)?;
        let in_step: Vec<SequenceId> = planned.iter().map(|p| p.id).collect();
        self.compute(&batch, &planned)?;
        let resting: Vec<bool> = self.live.iter().map(|(_, live)| self.rests(live)).collect();
        for ((id, live), rests) in self.live.iter_mut().zip(resting) {
            live.idle = if in_step.contains(id) || rests { 0 } else { live.idle + 1 };
            self.longest_wait = self.longest_wait.max(live.idle);
            prop_assert!(live.idle <= LONGEST_WAIT, "{id:?} of caller {} starves", live.caller);
            prop_assert!(!(rests && in_step.contains(id)), "{id:?} is paused and runs");
        }
        if std::mem::take(&mut self.fails) {
            for id in in_step {
                self.end(id);
            }
            return Ok(());
        }
        self.scheduler.computed();
        self.scheduler.audit();
        for plan in planned {
            self.answer(plan)?;
        }
        self.scheduler.took(Duration::from_micros(3000 + 200 * batch.tokens.len() as u64));
        self.scheduler.audit();
        Ok(())
    }

    fn check_limits(&self, batch: &Batch) -> Result<(), TestCaseError> {
        let limits = self.resources.limits;
        prop_assert!(batch.tokens.len() <= limits.tokens);
        prop_assert!(batch.sequences.len() <= limits.sequences);
        prop_assert!(batch.logit_rows.len() <= limits.logit_rows);
        let load = self.scheduler.load();
        prop_assert_eq!(load.decoding + load.prompt, batch.tokens.len());
        let pace = self.scheduler.pace();
        let (expected, limit) = (pace.seconds(load), pace.limit(load));
        let kept = load.decoding == 0 || load.prompt <= LEAST || expected <= limit * (1.0 + 1e-6);
        prop_assert!(kept, "{load:?} is expected to take {expected} s, {limit} allowed");
        Ok(())
    }

    /// Replays the step on the model of the cache: what a sequence reads must be its own tokens and all before
    /// them, and what it writes must be nobody else's.
    fn compute(&mut self, batch: &Batch, planned: &[Planned]) -> Result<(), TestCaseError> {
        for copy in &batch.copies {
            self.cache[copy.to as usize] = self.cache[copy.from as usize];
        }
        let mut written = std::collections::HashSet::new();
        // Of choices that share their prompt, the first one has its tokens.
        let own: Vec<_> = planned.iter().filter(|p| p.tokens > 0).collect();
        prop_assert_eq!(own.len(), batch.sequences.len());
        for (sequence, &&Planned { id, tokens, computed, .. }) in batch.sequences.iter().zip(&own) {
            prop_assert_eq!((tokens, computed), (sequence.len, sequence.context + sequence.len));
            let live = &self.live.iter().find(|(i, _)| *i == id).unwrap().1;
            let table = batch.blocks_of(sequence);
            let end = sequence.context + sequence.len;
            let tokens = &batch.tokens[sequence.start..sequence.start + sequence.len];
            prop_assert_eq!(tokens, &live.tokens[sequence.context..end]);
            for position in 0..sequence.context {
                let held = self.cache[table[position / BLOCK_TOKENS] as usize][position % BLOCK_TOKENS];
                prop_assert_eq!(held, live.contents[position], "{:?} reads what is not its own", id);
            }
            for position in sequence.context..end {
                let block = table[position / BLOCK_TOKENS];
                prop_assert_eq!(self.scheduler.pool().holders(block), 1, "a shared block is written");
                prop_assert!(written.insert((block, position % BLOCK_TOKENS)), "a slot is written twice");
                self.cache[block as usize][position % BLOCK_TOKENS] = live.contents[position];
                if let Some(own) = self.computed.get_mut(&live.group).and_then(|own| own.get_mut(position)) {
                    *own = true;
                }
            }
        }
        Ok(())
    }

    /// The engine's side: a token for each row that asks for one, until there are enough.
    fn answer(&mut self, plan: Planned) -> Result<(), TestCaseError> {
        let at = self.live.iter().position(|(id, _)| *id == plan.id);
        prop_assert!(at.is_some(), "{:?} is planned and gone", plan.id);
        let live = &mut self.live[at.unwrap()].1;
        if live.score && live.tokens.len() == live.prompt && plan.rows > 0 {
            prop_assert_eq!(plan.position, live.scored, "positions are scored once, in their order");
            live.scored += plan.rows;
            prop_assert_eq!(plan.samples, live.scored == live.prompt);
        }
        if !plan.samples {
            return Ok(());
        }
        prop_assert_eq!(plan.position + plan.rows, live.tokens.len());
        if live.tokens.len() == live.prompt {
            let blocks = self.computed[&live.group].chunks(BLOCK_TOKENS);
            let saved = blocks.filter(|block| block.iter().all(|own| !own)).count() * BLOCK_TOKENS;
            prop_assert_eq!(plan.cached, saved, "cached tokens are those of blocks that were not computed");
            self.cached += plan.cached;
        }
        if live.left == 0 {
            self.end(plan.id);
            return Ok(());
        }
        live.left -= 1;
        // Few different tokens: what choices and neighbours write may be the same.
        let token = 100_000 + (plan.id.0 as u32 + live.tokens.len() as u32) % 2;
        live.tokens.push(token);
        let position = live.tokens.len() - 1;
        let content = self.content(&self.live[at.unwrap()].1, position);
        self.live[at.unwrap()].1.contents.push(content);
        self.scheduler.push(plan.id, token);
        Ok(())
    }

    /// Runs until nobody is left.
    fn drain(&mut self) -> Result<(), TestCaseError> {
        for id in self.live.iter().map(|(id, _)| *id).collect::<Vec<_>>() {
            self.set_paused(id, false);
        }
        let bound = self.steps + 5_000;
        while !self.live.is_empty() {
            self.step()?;
            prop_assert!(self.steps < bound, "{} never end", self.live.len());
        }
        let s = &self.scheduler;
        prop_assert_eq!((s.waiting(), s.running(), s.paused()), (0, 0, 0));
        prop_assert_eq!(s.pool().available(), s.pool().total(), "blocks leaked");
        prop_assert_eq!(s.loads().count(), 0, "callers are remembered");
        Ok(())
    }
}

/// Drives random work until `steps` steps are done; prints its seed, which `seed` takes.
fn drive(steps: usize, seed: Option<[u8; 32]>) {
    let seed = seed.unwrap_or_else(|| {
        let random = std::hash::RandomState::new();
        let mut seed = [0; 32];
        for (i, bytes) in seed.chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&random.hash_one(i).to_le_bytes());
        }
        seed
    });
    println!("seed {seed:?}");
    let totals = std::cell::RefCell::new(Totals::default());
    let config = Config { cases: 8, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let mut round = seed;
    while totals.borrow().steps < steps {
        let mut runner =
            TestRunner::new_with_rng(config.clone(), TestRng::from_seed(RngAlgorithm::ChaCha, &round));
        round[0] = round[0].wrapping_add(1);
        let result = runner.run(&(resources(), actions()), |(resources, actions)| {
            let mut simulation = Simulation::new(resources);
            for action in &actions {
                simulation.act(action)?;
            }
            simulation.drain()?;
            totals.borrow_mut().add(&simulation);
            Ok(())
        });
        if let Err(failure) = result {
            panic!("{failure}\nseed {seed:?}");
        }
    }
    let totals = totals.into_inner();
    println!("{totals:?}");
    // The work must have been such that everything happens.
    let Totals { preemptions, displaced, cached, copies, .. } = totals;
    assert!(preemptions > 0 && displaced > 0 && cached > 0 && copies > 0, "{totals:?}");
}

/// What has happened in all.
#[derive(Debug, Default)]
struct Totals {
    steps: usize,
    longest_wait: usize,
    preemptions: u64,
    displaced: u64,
    copies: u64,
    cached: usize,
}

impl Totals {
    fn add(&mut self, simulation: &Simulation) {
        let counts = simulation.scheduler.counts();
        self.steps += simulation.steps;
        self.longest_wait = self.longest_wait.max(simulation.longest_wait);
        self.preemptions += counts.preemptions;
        self.displaced += counts.displaced;
        self.copies += counts.copies;
        self.cached += simulation.cached;
    }
}

#[test]
fn random_work_keeps_every_rule_for_100_000_steps() {
    drive(100_000, None);
}
