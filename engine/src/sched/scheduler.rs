//! Which tokens run next: decode first, then prompts, within one step's limits; and who has which blocks.

use std::time::Duration;

use super::{
    Arrival, BLOCK_TOKENS, Batch, BatchSequence, BlockPool, CallerLoad, Forecast, Load, Pace, PrefixCache,
    SequenceId, blocks_for,
    fairness::{Offer, RoundRobin},
    prefix::Keys,
    queue::Queue,
    sequence::Sequence,
};

/// Tokens of prompts that a caller computes before it is another one's turn.
pub(super) const QUANTUM: usize = BLOCK_TOKENS;

/// Tokens that others may compute before a caller who has been alone goes on with its prompts.
const CREDIT: usize = 2048;

/// The weight of a new measurement of how long places are held.
const HELD_RATE: f64 = 0.1;

/// What one step may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most tokens in a step, prompts and decode together.
    pub tokens: usize,
    /// Most sequences running.
    pub sequences: usize,
    /// Most rows of logits in a step; at least `sequences`.
    pub logit_rows: usize,
}

/// What a scheduler has to share out, and how.
#[derive(Debug, Clone, Copy)]
pub struct Resources {
    /// Of a step.
    pub limits: Limits,
    /// KV blocks.
    pub blocks: usize,
    /// Most blocks that are kept for their content while nobody holds them.
    pub most_idle: usize,
    /// Who may find whose blocks.
    pub prefix_cache: PrefixCache,
}

/// One sequence's logits in the step just planned. Choices that still share their prompt share its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Whose.
    pub id: SequenceId,
    /// First of its rows in `Batch::logit_rows`.
    pub first_row: usize,
    /// How many rows it has; none while its prompt goes on.
    pub rows: usize,
    /// How many of its tokens are in the step; those that choices share are the first one's.
    pub tokens: usize,
    /// How many of its tokens are computed after it.
    pub computed: usize,
    /// Position of the token behind the first row; row `i` predicts the token at `position + i + 1`.
    pub position: usize,
    /// First of its hidden states in `Batch::hidden_rows`.
    pub first_hidden: usize,
    /// How many it has.
    pub hidden: usize,
    /// True when the last row predicts a token that does not exist yet; where hidden states are wanted, when its last
    /// one is there.
    pub samples: bool,
    /// Tokens of its prompt that were taken from the cache.
    pub cached: usize,
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences that had to give their blocks back.
    pub preemptions: u64,
    /// Sequences that gave their place to a caller with fewer.
    pub displaced: u64,
    /// Blocks copied because one of their holders went on in them.
    pub copies: u64,
}

/// Sequences waiting, running and paused, and the blocks between them.
///
/// A sequence is admitted when the pool can hold all tokens it has. When the pool runs dry, blocks are taken from
/// who is not running, else from the youngest that is: its tokens are kept and computed again, as far as the cache
/// has lost them, so nobody sees more than a pause. The oldest always runs, so the work always ends.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) limits: Limits,
    pub(super) prefix_cache: PrefixCache,
    pub(super) pool: BlockPool,
    pub(super) keys: Keys,
    pub(super) queue: Queue,
    /// By age, oldest first.
    pub(super) running: Vec<Sequence>,
    /// Left out of steps until they are resumed.
    pub(super) paused: Vec<Sequence>,
    pub(super) pace: Pace,
    pub(super) prompts: RoundRobin,
    pub(super) offers: Vec<(Offer, usize)>,
    /// What is in the step planned last.
    pub(super) step: Load,
    pub(super) counts: Counts,
    /// Seconds that steps have taken in all.
    pub(super) clock: f64,
    /// Seconds that a sequence has its place for, of late; 0 before the first has ended.
    pub(super) held: f64,
}

impl Scheduler {
    /// A scheduler of these resources.
    pub fn new(resources: Resources) -> Self {
        let Resources { limits, blocks, most_idle, prefix_cache } = resources;
        debug_assert!(limits.logit_rows >= limits.sequences && limits.tokens >= limits.sequences);
        Self {
            limits,
            prefix_cache,
            pool: BlockPool::new(blocks, most_idle),
            keys: Keys::default(),
            queue: Queue::new(),
            running: Vec::with_capacity(limits.sequences),
            paused: Vec::new(),
            pace: Pace::new(limits.sequences),
            prompts: RoundRobin::new(QUANTUM, CREDIT),
            offers: Vec::with_capacity(limits.sequences),
            step: Load::default(),
            counts: Counts::default(),
            clock: 0.0,
            held: 0.0,
        }
    }

    /// Queues a request. Names are given in ascending order.
    pub fn add(&mut self, arrival: Arrival) {
        let root = match self.prefix_cache {
            PrefixCache::Shared => self.keys.root(&0u64),
            PrefixCache::PerCaller => self.keys.root(&(1u64, arrival.caller)),
            PrefixCache::Off => self.keys.root(&(2u64, arrival.id)),
        };
        self.queue.insert(Sequence::new(arrival, root));
    }

    /// Forgets a sequence, wherever it is, and frees its blocks.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(at) = self.position(id) {
            if self.running[at].others.is_empty() {
                let sequence = self.displace(at);
                let held = self.clock - sequence.placed.unwrap_or(self.clock);
                self.held += if self.held == 0.0 { held } else { HELD_RATE * (held - self.held) };
                self.forget(sequence);
            } else {
                leave(&mut self.running[at], id);
                self.restore_order(at);
            }
        } else if let Some(at) = self.paused.iter().position(|s| s.members().any(|m| m == id)) {
            if self.paused[at].others.is_empty() {
                let sequence = self.paused.swap_remove(at);
                self.forget(sequence);
            } else {
                leave(&mut self.paused[at], id);
                self.resume(id);
            }
        } else if let Some(sequence) = self.queue.of_member(id) {
            if sequence.others.is_empty() {
                if let Some(sequence) = self.queue.remove(id) {
                    self.forget(sequence);
                }
            } else {
                leave(sequence, id);
                self.queue.member_gone();
            }
        }
    }

    /// Appends a generated token, to be computed in the next step. A choice's first token parts it from the others:
    /// they share the blocks of the prompt from then on.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        let Some(at) = self.position(id) else { return };
        let sequence = &mut self.running[at];
        if sequence.others.is_empty() {
            sequence.tokens.push(token);
            return;
        }
        let mut choice = sequence.part(id, token);
        choice.blocks.extend_from_slice(&sequence.blocks[..blocks_for(sequence.computed)]);
        for &block in &choice.blocks {
            self.pool.share(block);
        }
        leave(sequence, id);
        self.restore_order(at);
        if self.running.len() < self.limits.sequences {
            self.place(choice);
        } else {
            self.queue.insert(choice);
        }
    }

    /// Leaves a sequence out of steps until [`Scheduler::resume`]. It keeps its blocks unless somebody needs them.
    pub fn pause(&mut self, id: SequenceId) {
        let mut sequence = if let Some(at) = self.position(id) {
            self.displace(at)
        } else if let Some(own) = self.queue.of_member(id).map(|s| s.id)
            && let Some(sequence) = self.queue.remove(own)
        {
            sequence
        } else if let Some(at) = self.paused.iter().position(|s| s.others.contains(&id) || s.id == id) {
            self.paused.swap_remove(at)
        } else {
            return;
        };
        if !sequence.held.contains(&id) {
            sequence.held.push(id);
        }
        self.paused.push(sequence);
    }

    /// Lets a paused sequence go on, as soon as there is a place. Choices that share their prompt go on when none of
    /// them is paused.
    pub fn resume(&mut self, id: SequenceId) {
        for sequence in &mut self.paused {
            sequence.held.retain(|&held| held != id);
        }
        while let Some(at) = self.paused.iter().position(|s| s.held.is_empty()) {
            let sequence = self.paused.swap_remove(at);
            self.queue.insert(sequence);
        }
    }

    /// Requests waiting for a place.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// Sequences with a place.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that are paused, or wait for choices that are.
    pub fn paused(&self) -> usize {
        self.paused.iter().map(|s| 1 + s.others.len()).sum()
    }

    /// The block pool, for gauges.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The measured speed of steps.
    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    /// How much each caller has going on.
    pub fn loads(&self) -> impl Iterator<Item = CallerLoad> {
        self.queue.loads()
    }

    /// What is going on and how fast that has been.
    pub fn forecast(&self, forecast: &mut Forecast) {
        forecast.callers.clear();
        forecast.callers.extend(self.loads());
        (forecast.places, forecast.running) = (self.limits.sequences, self.running.len());
        // Requests, of which several may share one sequence while their prompt is read.
        let running: usize = self.running.iter().map(|s| 1 + s.others.len()).sum();
        forecast.known = running + self.waiting() + self.paused();
        forecast.held = self.held;
        forecast.measure(&self.pace, Load { prompt: 0, lookback: 0, ..self.step });
    }

    /// Fills `batch` with the next step and `planned` with whose tokens and rows are in it, in the order of its
    /// sequences. An empty batch means that there is nothing to do.
    pub fn plan(&mut self, batch: &mut Batch, planned: &mut Vec<Planned>) {
        batch.clear();
        planned.clear();
        for sequence in &mut self.running {
            sequence.grant = 0;
        }
        self.admit();
        // Decode first: a running stream never waits for somebody's prompt longer than one step. Older
        // ones first: whoever is preempted is younger, so not in this step yet.
        self.step = Load::default();
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].is_decoding() && self.make_room(at, batch) {
                self.step.context += self.running[at].computed;
                self.schedule(at, 1, batch, planned);
            }
            at += 1;
        }
        self.step.decoding = batch.tokens.len();
        let budget = self.pace.budget(self.step, self.limits.tokens - batch.tokens.len());
        self.share_out(budget);
        for at in 0..self.running.len() {
            let Sequence { grant, computed, .. } = self.running[at];
            if grant > 0 {
                self.schedule(at, grant, batch, planned);
                self.step.read(self.running[at].computed - computed, computed);
            }
        }
        self.queue.note_reading(&self.running);
    }

    /// The step planned last has been computed: its full blocks may be found from now on.
    pub fn computed(&mut self) {
        for sequence in &mut self.running {
            while sequence.published < sequence.computed / BLOCK_TOKENS {
                let key = sequence.key(&self.keys, sequence.published);
                self.pool.publish(sequence.blocks[sequence.published], key);
                sequence.published += 1;
            }
        }
    }

    /// How long the step planned last took, with all that the worker did for it.
    pub fn took(&mut self, time: Duration) {
        self.clock += time.as_secs_f64();
        self.pace.observe(self.step, time.as_secs_f64());
    }

    /// Moves waiting sequences in while there are places and room for all their tokens, and a block's growth
    /// for each that runs already: one let in to be thrown out in the next step would be computed twice.
    fn admit(&mut self) {
        while !self.queue.is_empty() {
            let (caller, giver) = if self.running.len() < self.limits.sequences {
                (self.queue.next(), None)
            } else {
                let exchange = self.queue.exchange();
                let giver =
                    exchange.and_then(|(giver, _)| self.running.iter().rposition(|s| s.caller == giver));
                (exchange.map(|(_, taker)| taker).filter(|_| giver.is_some()), giver)
            };
            let Some(caller) = caller else { return };
            if !self.can_hold(caller, giver) {
                return;
            }
            if let Some(at) = giver {
                let sequence = self.displace(at);
                self.queue.insert(sequence);
                self.counts.displaced += 1;
            }
            let Some(id) = self.queue.head(caller).map(|s| s.id) else { return };
            while self.missing_for(caller) > self.pool.available() {
                if !self.reclaim(Some(id)) {
                    return;
                }
            }
            let Some(mut sequence) = self.queue.admit(caller) else { return };
            self.provide(&mut sequence);
            self.place(sequence);
        }
    }

    /// Adds to the step as many of `most` tokens of the sequence at `at` as fit.
    fn schedule(&mut self, at: usize, most: usize, batch: &mut Batch, planned: &mut Vec<Planned>) {
        let rows_left = self.limits.logit_rows - batch.logit_rows.len();
        let sequence = &mut self.running[at];
        let context = sequence.computed;
        let mut len = most.min(self.limits.tokens - batch.tokens.len());
        if sequence.score_from < sequence.tokens.len() {
            // Each scored position takes a row; positions scored before a preemption take none.
            len = len.min(sequence.score_from.saturating_sub(context) + rows_left);
        }
        if len == 0 || (rows_left == 0 && sequence.hidden_from.is_none()) {
            return;
        }
        let (start, end) = (batch.tokens.len(), context + len);
        batch.tokens.extend_from_slice(&sequence.tokens[context..end]);
        batch.positions.extend(context as u32..end as u32);
        batch.sequences.push(BatchSequence { start, len, context, table: batch.block_tables.len() });
        batch.block_tables.extend_from_slice(&sequence.blocks[..blocks_for(end)]);

        let samples = end == sequence.tokens.len();
        let position = sequence.score_from.max(context).min(if samples { end - 1 } else { end });
        let rows = if sequence.hidden_from.is_some() { 0 } else { end - position };
        let (first_row, cached) = (batch.logit_rows.len(), sequence.cached);
        let first_hidden = batch.hidden_rows.len();
        if let Some(from) = &mut sequence.hidden_from {
            let wanted = (*from).max(context)..end;
            batch.hidden_rows.extend(wanted.map(|position| (start + position - context) as u32));
            *from = (*from).max(end);
        }
        let hidden = batch.hidden_rows.len() - first_hidden;
        planned.extend(sequence.members().zip(0..).map(|(id, choice)| Planned {
            id,
            first_row,
            rows,
            tokens: if choice == 0 { len } else { 0 },
            computed: end,
            position,
            first_hidden,
            hidden,
            samples,
            cached,
        }));
        let first = start + position - context;
        batch.logit_rows.extend((first..first + rows).map(|row| row as u32));
        if sequence.score_from != usize::MAX {
            sequence.score_from = sequence.score_from.max(end);
        }
        sequence.compute(end);
    }

    /// Gives a sequence a place among the running ones, by its age.
    fn place(&mut self, mut sequence: Sequence) {
        sequence.grant = 0;
        sequence.placed.get_or_insert(self.clock);
        self.queue.placed(sequence.caller, sequence.weight);
        let at = self.running.partition_point(|s| s.id < sequence.id);
        self.running.insert(at, sequence);
    }

    pub(super) fn displace(&mut self, at: usize) -> Sequence {
        let sequence = self.running.remove(at);
        if self.queue.displaced(sequence.caller) {
            self.prompts.close(sequence.caller);
        }
        sequence
    }

    /// Where the running sequence is that has `id` among its members.
    fn position(&self, id: SequenceId) -> Option<usize> {
        match self.running.binary_search_by_key(&id, |s| s.id) {
            Ok(at) => Some(at),
            Err(_) => self.running.iter().position(|s| s.others.contains(&id)),
        }
    }

    /// The sequence at `at` has another name than before.
    fn restore_order(&mut self, at: usize) {
        let sequence = self.running.remove(at);
        let at = self.running.partition_point(|s| s.id < sequence.id);
        self.running.insert(at, sequence);
    }

    /// What is in the step planned last.
    #[cfg(test)]
    pub(super) fn load(&self) -> Load {
        self.step
    }

    /// Holds the pool to every table of blocks there is.
    #[cfg(test)]
    pub(super) fn audit(&self) {
        let own = self.running.iter().chain(&self.paused).map(|s| s.blocks.as_slice());
        self.pool.audit(own.chain(self.queue.tables(None)));
        assert!(self.running.is_sorted_by(|a, b| a.id < b.id));
    }
}

/// One of several choices is no longer among them.
fn leave(sequence: &mut Sequence, id: SequenceId) {
    sequence.held.retain(|&held| held != id);
    if sequence.id == id {
        sequence.id = sequence.others.remove(0);
    } else {
        sequence.others.retain(|&other| other != id);
    }
}
