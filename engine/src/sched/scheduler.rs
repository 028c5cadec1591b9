//! Which tokens run next: decode first, then prompts in order of arrival, within one step's limits.

use std::collections::VecDeque;

use super::{Batch, BatchSequence, BlockPool, blocks_for};

/// Names a sequence for as long as the scheduler knows it; later ones are larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

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

/// One sequence's logits in the step just planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planned {
    /// Whose.
    pub id: SequenceId,
    /// First of its rows in `Batch::logit_rows`.
    pub first_row: usize,
    /// How many rows it has; none while its prompt goes on.
    pub rows: usize,
    /// How many of its tokens are in the step.
    pub tokens: usize,
    /// How many of its tokens are computed after it.
    pub computed: usize,
    /// Position of the token behind the first row; row `i` predicts the token at `position + i + 1`.
    pub position: usize,
    /// True when the last row predicts a token that does not exist yet.
    pub samples: bool,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    /// The prompt and what has been generated since.
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in `blocks`.
    computed: usize,
    blocks: Vec<u32>,
    /// Positions below this need no logits row any more; `usize::MAX` when the prompt is not scored.
    score_from: usize,
    /// Takes no part until it is resumed.
    paused: bool,
}

/// Sequences waiting and running, and the blocks between them.
///
/// A sequence is admitted when the pool can hold all tokens it has. When the pool runs dry, the youngest
/// running sequence gives its blocks back and waits in the queue again; its tokens are kept and computed
/// again, so nobody sees more than a pause. The oldest always runs, so the work always ends.
///
/// A paused sequence waits too, but keeps its blocks, and so goes on where it stopped, unless somebody who
/// may run needs them: those who are paused hold up nobody else.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    /// Oldest first.
    waiting: VecDeque<Sequence>,
    /// Oldest first.
    running: Vec<Sequence>,
}

impl Scheduler {
    /// A scheduler over `blocks` KV blocks.
    pub fn new(limits: Limits, blocks: usize) -> Self {
        debug_assert!(limits.logit_rows >= limits.sequences && limits.tokens >= limits.sequences);
        Self { limits, pool: BlockPool::new(blocks), waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Queues a sequence. With `score_prompt` every prompt position gets a logits row. The caller has
    /// checked that the prompt fits the pool.
    pub fn add(&mut self, id: SequenceId, prompt: Vec<u32>, score_prompt: bool) {
        let score_from = if score_prompt { 0 } else { usize::MAX };
        let sequence =
            Sequence { id, tokens: prompt, computed: 0, blocks: Vec::new(), score_from, paused: false };
        self.waiting.push_back(sequence);
    }

    /// Forgets a sequence, wherever it is, and frees its blocks.
    pub fn remove(&mut self, id: SequenceId) {
        let queued = self.waiting.iter().position(|s| s.id == id);
        let found = queued.and_then(|at| self.waiting.remove(at));
        if let Some(mut sequence) = found.or_else(|| self.take_running(id)) {
            self.pool.release(&mut sequence.blocks);
        }
    }

    /// Leaves a sequence out of steps until it is resumed. It keeps what it has for as long as nobody else
    /// needs it.
    pub fn pause(&mut self, id: SequenceId) {
        if let Some(sequence) = self.take_running(id) {
            self.requeue(sequence);
        }
        if let Some(sequence) = self.waiting.iter_mut().find(|s| s.id == id) {
            sequence.paused = true;
        }
    }

    /// Lets a paused sequence go on as soon as there is a place.
    pub fn resume(&mut self, id: SequenceId) {
        if let Some(sequence) = self.waiting.iter_mut().find(|s| s.id == id) {
            sequence.paused = false;
        }
    }

    /// Appends a generated token, to be computed in the next step.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Sequences waiting for a place.
    pub fn waiting(&self) -> usize {
        self.waiting.len() - self.paused()
    }

    /// Sequences paused.
    pub fn paused(&self) -> usize {
        self.waiting.iter().filter(|s| s.paused).count()
    }

    /// Sequences with a place.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// The block pool, for gauges.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Fills `batch` with the next step and `planned` with whose logits its rows are. An empty batch
    /// means that there is nothing to do.
    pub fn plan(&mut self, batch: &mut Batch, planned: &mut Vec<Planned>) {
        batch.clear();
        planned.clear();
        self.admit();
        // Decode first: a running stream never waits for somebody's prompt longer than one step. Older
        // ones first: whoever is preempted is younger, so not in this step yet.
        let mut at = 0;
        while at < self.running.len() {
            if self.running[at].is_decoding() && self.make_room(at) {
                self.schedule(at, batch, planned);
            }
            at += 1;
        }
        for at in 0..self.running.len() {
            if !self.running[at].is_decoding() {
                self.schedule(at, batch, planned);
            }
        }
    }

    /// Moves waiting sequences in while there is room for all their tokens, and a block's growth for each
    /// that runs already: one let in to be thrown out in the next step would be computed twice.
    fn admit(&mut self) {
        while self.running.len() < self.limits.sequences
            && let Some(at) = self.waiting.iter().position(|s| !s.paused)
        {
            let next = &self.waiting[at];
            let (id, count) = (next.id, blocks_for(next.tokens.len()));
            let needed = count - next.blocks.len() + self.running.len();
            while needed > self.pool.free() {
                if !self.reclaim(id) {
                    return;
                }
            }
            let Some(mut next) = self.waiting.remove(at) else { return };
            self.pool.grow(&mut next.blocks, count);
            let place = self.running.partition_point(|s| s.id < id);
            self.running.insert(place, next);
        }
    }

    /// Gives the decoding sequence at `at` a block for its next token, at the cost of those who wait with
    /// blocks, then of the youngest that runs. False when that was itself.
    fn make_room(&mut self, at: usize) -> bool {
        loop {
            let Self { pool, running, .. } = self;
            let sequence = &mut running[at];
            if pool.grow(&mut sequence.blocks, blocks_for(sequence.tokens.len())) {
                return true;
            }
            let id = sequence.id;
            if self.reclaim(id) {
                continue;
            }
            let youngest = self.running.len() - 1;
            let mut victim = self.running.remove(youngest);
            self.pool.release(&mut victim.blocks);
            victim.computed = 0;
            self.requeue(victim);
            if youngest == at {
                return false;
            }
        }
    }

    /// Takes the blocks of the youngest waiting sequence that has some, other than `id`. False when there
    /// is none.
    fn reclaim(&mut self, id: SequenceId) -> bool {
        let holder = self.waiting.iter_mut().rev().find(|s| s.id != id && !s.blocks.is_empty());
        let Some(holder) = holder else { return false };
        self.pool.release(&mut holder.blocks);
        holder.computed = 0;
        true
    }

    fn take_running(&mut self, id: SequenceId) -> Option<Sequence> {
        let at = self.running.iter().position(|s| s.id == id)?;
        Some(self.running.remove(at))
    }

    /// Puts a sequence that ran back into the queue, at its age.
    fn requeue(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|s| s.id < sequence.id);
        self.waiting.insert(place, sequence);
    }

    /// Adds to the step as many tokens of the sequence at `at` as fit.
    fn schedule(&mut self, at: usize, batch: &mut Batch, planned: &mut Vec<Planned>) {
        let rows_left = self.limits.logit_rows - batch.logit_rows.len();
        let sequence = &mut self.running[at];
        let context = sequence.computed;
        let mut len = (sequence.tokens.len() - context).min(self.limits.tokens - batch.tokens.len());
        if sequence.score_from < sequence.tokens.len() {
            // Each scored position takes a row; positions scored before a preemption take none.
            len = len.min(sequence.score_from.saturating_sub(context) + rows_left);
        }
        if len == 0 || rows_left == 0 {
            return;
        }
        let (start, end) = (batch.tokens.len(), context + len);
        batch.tokens.extend_from_slice(&sequence.tokens[context..end]);
        batch.positions.extend(context as u32..end as u32);
        batch.sequences.push(BatchSequence { start, len, context, table: batch.block_tables.len() });
        batch.block_tables.extend_from_slice(&sequence.blocks[..blocks_for(end)]);

        let samples = end == sequence.tokens.len();
        let position = sequence.score_from.max(context).min(if samples { end - 1 } else { end });
        let rows = end - position;
        planned.push(Planned {
            id: sequence.id,
            tokens: len,
            computed: end,
            first_row: batch.logit_rows.len(),
            rows,
            position,
            samples,
        });
        batch.logit_rows.extend((start + position - context..start + len).map(|row| row as u32));
        if sequence.score_from != usize::MAX {
            sequence.score_from = sequence.score_from.max(end);
        }
        sequence.computed = end;
    }
}

impl Sequence {
    fn is_decoding(&self) -> bool {
        self.computed > 0 && self.tokens.len() - self.computed == 1
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::sched::BLOCK_TOKENS;

    const LIMITS: Limits = Limits { tokens: 64, sequences: 4, logit_rows: 8 };

    fn step(s: &mut Scheduler) -> (Batch, Vec<Planned>) {
        let (mut batch, mut planned) = (Batch::default(), Vec::new());
        s.plan(&mut batch, &mut planned);
        (batch, planned)
    }

    #[test]
    fn a_prompt_is_cut_into_steps_and_then_decodes() {
        let mut s = Scheduler::new(LIMITS, 16);
        s.add(SequenceId(1), (0..100).collect(), false);
        let (batch, planned) = step(&mut s);
        assert_eq!((batch.tokens.len(), planned[0].tokens, planned[0].rows), (64, 64, 0));
        let (batch, planned) = step(&mut s);
        assert_eq!(batch.positions, (64..100).collect::<Vec<u32>>());
        assert_eq!(batch.logit_rows, [35]);
        assert!(planned[0].samples && planned[0].position == 99);
        assert!(step(&mut s).0.tokens.is_empty(), "nothing to do before the sampled token comes back");
        s.push(SequenceId(1), 7);
        let (batch, planned) = step(&mut s);
        assert_eq!((batch.tokens.as_slice(), batch.positions.as_slice()), (&[7][..], &[100][..]));
        assert_eq!(batch.blocks_of(&batch.sequences[0]).len(), 4);
        assert!(planned[0].samples);
    }

    #[test]
    fn running_streams_go_before_prompts() {
        let mut s = Scheduler::new(LIMITS, 32);
        s.add(SequenceId(1), vec![1; 10], false);
        step(&mut s);
        s.push(SequenceId(1), 5);
        s.add(SequenceId(2), vec![2; 200], false);
        let (batch, _) = step(&mut s);
        assert_eq!(batch.sequences.iter().map(|q| q.len).collect::<Vec<_>>(), [1, 63]);
    }

    #[test]
    fn every_prompt_position_is_scored_once() {
        let mut s = Scheduler::new(LIMITS, 32);
        s.add(SequenceId(1), (0..30).collect(), true);
        let mut scored = Vec::new();
        while scored.len() < 30 {
            let (batch, planned) = step(&mut s);
            assert!(batch.logit_rows.len() <= LIMITS.logit_rows);
            scored.extend(planned.iter().flat_map(|p| p.position..p.position + p.rows));
            assert_eq!(planned[0].samples, scored.len() == 30);
        }
        assert_eq!(scored, (0..30).collect::<Vec<_>>());
    }

    #[test]
    fn a_paused_sequence_keeps_its_blocks_and_place_in_line() {
        let mut s = Scheduler::new(LIMITS, 16);
        for id in 1..=2 {
            s.add(SequenceId(id), vec![id as u32; 40], false);
        }
        let (_, planned) = step(&mut s);
        assert_eq!(planned.len(), 1, "the second prompt takes another step");
        s.push(SequenceId(1), 7);
        s.pause(SequenceId(1));
        assert_eq!((s.waiting(), s.paused(), s.running()), (0, 1, 1));
        let (batch, planned) = step(&mut s);
        assert_eq!((batch.sequences.len(), planned[0].id), (1, SequenceId(2)));
        s.push(SequenceId(2), 8);
        s.resume(SequenceId(1));
        let (batch, _) = step(&mut s);
        assert_eq!(batch.tokens, [7, 8], "nothing is computed twice, the older comes first");
        s.pause(SequenceId(1));
        s.remove(SequenceId(1));
        s.remove(SequenceId(2));
        assert_eq!(s.pool().free(), s.pool().total());
    }

    #[test]
    fn paused_sequences_hold_up_nobody() {
        // All places are theirs, and 8 of 11 blocks.
        let mut s = Scheduler::new(LIMITS, 11);
        for id in 0..4 {
            s.add(SequenceId(id), vec![1; 33], false);
        }
        for _ in 0..3 {
            step(&mut s);
        }
        assert_eq!((s.running(), s.pool().free()), (4, 3));
        for id in 0..4 {
            s.push(SequenceId(id), 2);
            s.pause(SequenceId(id));
        }
        s.add(SequenceId(9), vec![3; 128], false);
        step(&mut s);
        let (batch, planned) = step(&mut s);
        assert_eq!((batch.tokens.len(), planned[0].id, s.paused()), (64, SequenceId(9), 4));
        // The youngest gave its blocks; it is computed again, the others go on.
        s.remove(SequenceId(9));
        for id in 0..4 {
            s.resume(SequenceId(id));
        }
        let (batch, _) = step(&mut s);
        assert_eq!(batch.sequences.iter().map(|q| q.len).collect::<Vec<_>>(), [1, 1, 1, 34]);
    }

    /// Runs sequences to their lengths and replays every step against a model of the cache: each token's
    /// block and slot must hold that sequence's own earlier tokens when it is read.
    ///
    /// Who has got a token is paused when the next of `pauses` has the bit of its id, until one of them has
    /// not; an empty list pauses nobody.
    fn drive(blocks: usize, work: &[(usize, usize, bool)], pauses: &[u16]) {
        let mut s = Scheduler::new(LIMITS, blocks);
        let mut paused = 0u16;
        let mut wanted: HashMap<SequenceId, (Vec<u32>, usize)> = HashMap::new();
        for (i, &(prompt, generate, score)) in work.iter().enumerate() {
            let id = SequenceId(i as u64);
            let tokens: Vec<u32> = (0..prompt as u32).map(|t| t + 1000 * i as u32).collect();
            s.add(id, tokens.clone(), score);
            wanted.insert(id, (tokens, generate));
        }
        let mut cache: HashMap<(u32, usize), u32> = HashMap::new();
        for round in 0..100_000 {
            let (batch, planned) = step(&mut s);
            if wanted.is_empty() {
                assert!(batch.tokens.is_empty());
                break;
            }
            let ready = wanted.keys().any(|id| paused >> id.0 & 1 == 0);
            assert!(!batch.tokens.is_empty() || !ready, "stuck with {} waiting", s.waiting());
            assert!(batch.tokens.len() <= LIMITS.tokens && batch.sequences.len() <= LIMITS.sequences);
            let mut held: Vec<u32> = batch.block_tables.clone();
            held.sort_unstable();
            assert!(held.windows(2).all(|w| w[0] != w[1]), "a block belongs to two sequences");
            for q in &batch.sequences {
                let table = batch.blocks_of(q);
                for (i, &token) in batch.tokens[q.start..q.start + q.len].iter().enumerate() {
                    let position = q.context + i;
                    cache.insert((table[position / BLOCK_TOKENS], position % BLOCK_TOKENS), token);
                }
                let base = batch.tokens[q.start] / 1000;
                assert_eq!(paused >> base & 1, 0, "a paused sequence runs");
                let own = &wanted[&SequenceId(u64::from(base))].0;
                for position in 0..q.context + q.len {
                    assert_eq!(
                        cache[&(table[position / BLOCK_TOKENS], position % BLOCK_TOKENS)],
                        own[position]
                    );
                }
            }
            for p in planned.iter().filter(|p| p.samples) {
                let (tokens, left) = wanted.get_mut(&p.id).unwrap();
                if *left == 0 {
                    wanted.remove(&p.id);
                    s.remove(p.id);
                } else {
                    *left -= 1;
                    let token = 1000 * p.id.0 as u32 + tokens.len() as u32;
                    tokens.push(token);
                    s.push(p.id, token);
                }
            }
            let next = pauses.get(round % pauses.len().max(1)).copied().unwrap_or_default();
            for i in 0..work.len() as u64 {
                if next >> i & 1 == 0 {
                    s.resume(SequenceId(i));
                }
            }
            paused &= next;
            for p in planned.iter().filter(|p| p.samples && next >> p.id.0 & 1 == 1) {
                s.pause(p.id);
                paused |= 1 << p.id.0;
            }
        }
        assert!(wanted.is_empty());
        assert_eq!(s.pool().free(), s.pool().total(), "blocks leaked");
    }

    #[test]
    fn a_dry_pool_preempts_and_everybody_finishes() {
        drive(8, &[(100, 100, false), (90, 120, true), (60, 60, false), (1, 200, false)], &[]);
    }

    proptest! {
        #[test]
        fn any_work_ends_with_its_own_tokens(
            blocks in 8usize..24,
            work in proptest::collection::vec((1usize..120, 0usize..120, any::<bool>()), 1..12),
        ) {
            drive(blocks, &work, &[]);
        }

        #[test]
        fn pauses_change_nothing(
            blocks in 8usize..24,
            work in proptest::collection::vec((1usize..120, 0usize..60, any::<bool>()), 1..12),
            mut pauses in proptest::collection::vec(any::<u16>(), 1..20),
        ) {
            // Everybody may run at last.
            pauses.push(0);
            drive(blocks, &work, &pauses);
        }
    }
}
