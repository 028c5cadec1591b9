//! Room in the pool: who gets blocks, and who gives them back.

use super::{
    BLOCK_TOKENS, Batch, BlockCopy, CallerId, PrefixCache, Scheduler, SequenceId, blocks_for,
    sequence::Sequence,
};

impl Scheduler {
    /// Whether the caller's oldest waiting sequence would find room, if who does not run, and the one at
    /// `giver`, gave back all that is theirs alone.
    pub(super) fn can_hold(&mut self, caller: CallerId, giver: Option<usize>) -> bool {
        let missing = self.missing_for(caller);
        // Where nobody runs, all blocks can be had, and any sequence fits them.
        if missing <= self.pool.available() || self.running.is_empty() {
            return true;
        }
        let head = self.queue.head(caller).map(|s| s.id);
        let paused = self.paused.iter().map(|s| s.blocks.as_slice());
        let giver = giver.map(|at| self.running[at].blocks.as_slice());
        let tables = paused.chain(giver).chain(self.queue.tables(head)).flatten();
        let alone = tables.filter(|&&block| self.pool.holders(block) == 1).count();
        missing <= self.pool.available() + alone
    }

    /// Blocks that must be there for the caller's oldest waiting sequence: its own, less what it holds or
    /// shares with who runs, and one for each that runs.
    pub(super) fn missing_for(&mut self, caller: CallerId) -> usize {
        let Self { queue, pool, keys, running, .. } = self;
        let Some(sequence) = queue.head(caller) else { return 0 };
        let wanted = blocks_for(sequence.tokens.len());
        if !sequence.blocks.is_empty() {
            let written = sequence.blocks.get(sequence.computed / BLOCK_TOKENS);
            let copied = written.is_some_and(|&block| pool.holders(block) > 1);
            return wanted.saturating_sub(sequence.blocks.len()) + usize::from(copied) + running.len();
        }
        if wanted + running.len() <= pool.available() {
            return wanted + running.len();
        }
        let mut shared = 0;
        for at in 0..sequence.may_find() {
            let Some(block) = pool.find(sequence.key(keys, at)) else { break };
            shared += usize::from(pool.holders(block) > 0);
        }
        wanted - shared + running.len()
    }

    /// Gives a sequence all its blocks: what the cache has of them, then fresh ones, which are there.
    pub(super) fn provide(&mut self, sequence: &mut Sequence) {
        if sequence.blocks.is_empty() {
            sequence.tokens.reserve(sequence.most.saturating_sub(sequence.tokens.len()));
            sequence.blocks.reserve(blocks_for(sequence.most));
            for at in 0..sequence.may_find() {
                let Some(block) = self.pool.find(sequence.key(&self.keys, at)) else { break };
                self.pool.share(block);
                sequence.blocks.push(block);
                sequence.found();
            }
        }
        while sequence.blocks.len() < blocks_for(sequence.tokens.len()) {
            let Some(block) = self.pool.take() else { return };
            sequence.blocks.push(block);
        }
    }

    /// Gives the decoding sequence at `at` a block for its next token, and one of its own to write to, preempting
    /// whom need be. False when that was itself.
    pub(super) fn make_room(&mut self, at: usize, batch: &mut Batch) -> bool {
        loop {
            let Self { pool, running, .. } = self;
            let sequence = &mut running[at];
            let wanted = blocks_for(sequence.tokens.len());
            let written = sequence.computed / BLOCK_TOKENS;
            let shared = written < sequence.blocks.len() && pool.holders(sequence.blocks[written]) > 1;
            let missing = wanted.saturating_sub(sequence.blocks.len()) + usize::from(shared);
            if missing > pool.available() {
                if self.reclaim(None) {
                    continue;
                }
                let youngest = self.running.len() - 1;
                let mut victim = self.displace(youngest);
                self.preempt(&mut victim);
                self.queue.insert(victim);
                if youngest == at {
                    return false;
                }
                continue;
            }
            if shared && let Some(own) = pool.take() {
                let from = std::mem::replace(&mut sequence.blocks[written], own);
                pool.release(from, true);
                batch.copies.push(BlockCopy { from, to: own });
                self.counts.copies += 1;
            }
            while sequence.blocks.len() < wanted {
                let Some(block) = pool.take() else { return false };
                sequence.blocks.push(block);
            }
            return true;
        }
    }

    /// Takes the blocks of the youngest paused sequence, else of the youngest waiting one but `except`. False
    /// where none holds any.
    pub(super) fn reclaim(&mut self, except: Option<SequenceId>) -> bool {
        let holders = self.paused.iter().enumerate().filter(|(_, s)| !s.blocks.is_empty());
        if let Some((at, _)) = holders.max_by_key(|(_, s)| s.id) {
            let mut sequence = self.paused.swap_remove(at);
            self.preempt(&mut sequence);
            self.paused.push(sequence);
            return true;
        }
        let youngest = self.queue.youngest_holder(except);
        let Some(mut sequence) = youngest.and_then(|id| self.queue.remove(id)) else { return false };
        self.preempt(&mut sequence);
        self.queue.insert(sequence);
        true
    }

    /// Takes a sequence's blocks; the cache keeps what it can.
    pub(super) fn preempt(&mut self, sequence: &mut Sequence) {
        self.release(sequence, true);
        sequence.computed = 0;
        sequence.published = 0;
        self.counts.preemptions += 1;
    }

    pub(super) fn forget(&mut self, mut sequence: Sequence) {
        let keep = self.prefix_cache != PrefixCache::Off;
        self.release(&mut sequence, keep);
    }

    /// The last blocks first: what is forgotten of them is forgotten from the end.
    fn release(&mut self, sequence: &mut Sequence, keep: bool) {
        for block in sequence.blocks.drain(..).rev() {
            self.pool.release(block, keep);
        }
    }
}
