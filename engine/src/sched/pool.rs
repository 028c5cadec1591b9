//! The KV blocks: who holds them, and which are kept for whoever has the same tokens next.

use std::collections::HashMap;

use super::prefix::Key;

/// No block: the end of a list.
const NONE: u32 = u32::MAX;

/// One block's bookkeeping.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Sequences that hold it.
    holders: u32,
    /// What it is found by, once it is full and computed.
    key: Option<Key>,
    /// Neighbours among the idle blocks, from the least recently used on.
    previous: u32,
    next: u32,
}

/// Hands out block ids and counts their holders.
///
/// A block is free, held by one sequence or by several that share it, or idle: nobody's, but full, computed and to be
/// found by its key. Idle blocks are handed out when no free ones are left, the least recently used first, and with
/// that forgotten.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// Free ids; the lowest are handed out first and reused soonest, so a lightly used pool stays within
    /// the pages it has touched.
    free: Vec<u32>,
    /// Blocks by what they hold. Keys are random numbers already, but nothing here is worth a hasher of its own.
    index: HashMap<Key, u32, ahash::RandomState>,
    /// Least and most recently used of the idle blocks.
    oldest: u32,
    newest: u32,
    idle: usize,
    most_idle: usize,
    shared: usize,
}

impl BlockPool {
    /// A pool of blocks `0..total`, all free, which keeps at most `most_idle` blocks that nobody holds.
    pub fn new(total: usize, most_idle: usize) -> Self {
        let block = Block { holders: 0, key: None, previous: NONE, next: NONE };
        Self {
            blocks: vec![block; total],
            free: (0..total as u32).rev().collect(),
            index: HashMap::default(),
            oldest: NONE,
            newest: NONE,
            idle: 0,
            most_idle,
            shared: 0,
        }
    }

    /// A block for one holder; an idle one when no other is left.
    pub fn take(&mut self) -> Option<u32> {
        if self.free.is_empty() {
            self.forget_oldest();
        }
        let id = self.free.pop()?;
        self.blocks[id as usize].holders = 1;
        Some(id)
    }

    /// One more holder of a block that is held or idle.
    pub fn share(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.holders > 0 || block.key.is_some(), "block {id} is free");
        block.holders += 1;
        match block.holders {
            1 => self.unlink(id),
            2 => self.shared += 1,
            _ => {}
        }
    }

    /// One holder less. The last one leaves the block idle if it has a key and `keep` says so, else free.
    pub fn release(&mut self, id: u32, keep: bool) {
        let block = &mut self.blocks[id as usize];
        debug_assert!(block.holders > 0, "block {id} is released by nobody");
        block.holders -= 1;
        match (block.holders, block.key) {
            (0, Some(_)) if keep => {
                self.link(id);
                if self.idle > self.most_idle {
                    self.forget_oldest();
                }
            }
            (0, key) => {
                block.key = None;
                if let Some(key) = key {
                    self.index.remove(&key);
                }
                self.free.push(id);
            }
            (1, _) => self.shared -= 1,
            _ => {}
        }
    }

    /// The block that holds what `key` stands for.
    pub fn find(&self, key: Key) -> Option<u32> {
        self.index.get(&key).copied()
    }

    /// Makes a full, computed block known by its key; a second one of the same content stays unknown.
    pub fn publish(&mut self, id: u32, key: Key) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.index.entry(key) {
            entry.insert(id);
            self.blocks[id as usize].key = Some(key);
        }
    }

    /// Sequences that hold a block.
    pub fn holders(&self, id: u32) -> u32 {
        self.blocks[id as usize].holders
    }

    /// Blocks that can be handed out: free and idle ones.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Blocks nobody holds that are kept for their content.
    pub fn idle(&self) -> usize {
        self.idle
    }

    /// Blocks that more than one sequence holds.
    pub fn shared(&self) -> usize {
        self.shared
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    fn forget_oldest(&mut self) {
        let id = self.oldest;
        if id == NONE {
            return;
        }
        self.unlink(id);
        if let Some(key) = self.blocks[id as usize].key.take() {
            self.index.remove(&key);
        }
        self.free.push(id);
    }

    /// Makes a block the most recently used of the idle ones.
    fn link(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = id,
            newest => self.blocks[newest as usize].next = id,
        }
        self.newest = id;
        self.idle += 1;
    }

    fn unlink(&mut self, id: u32) {
        let Block { previous, next, .. } = self.blocks[id as usize];
        match previous {
            NONE => self.oldest = next,
            previous => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.newest = previous,
            next => self.blocks[next as usize].previous = previous,
        }
        self.idle -= 1;
    }

    /// Holds the pool's own books against each other, and against `tables`: everything that is held, by whom.
    #[cfg(test)]
    pub(super) fn audit<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) {
        let mut holders = vec![0u32; self.blocks.len()];
        for &id in tables.flatten() {
            holders[id as usize] += 1;
        }
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[id], "holders of block {id}");
            let found = block.key.map(|key| self.find(key));
            assert!(found.is_none_or(|found| found == Some(id as u32)), "block {id} is not found by its key");
        }
        let mut seen = vec![false; self.blocks.len()];
        let mut at = self.oldest;
        let mut idle = 0;
        while at != NONE {
            let block = &self.blocks[at as usize];
            assert!(block.holders == 0 && block.key.is_some(), "block {at} is not idle");
            assert!(!std::mem::replace(&mut seen[at as usize], true), "block {at} is idle twice");
            (at, idle) = (block.next, idle + 1);
        }
        for &id in &self.free {
            let block = &self.blocks[id as usize];
            assert!(block.holders == 0 && block.key.is_none(), "block {id} is not free");
            assert!(
                !std::mem::replace(&mut seen[id as usize], true),
                "block {id} is free and idle, or free twice"
            );
        }
        let nobodys = holders.iter().filter(|&&n| n == 0).count();
        assert_eq!(nobodys, self.free.len() + idle, "blocks are lost");
        assert_eq!((idle, self.shared), (self.idle, holders.iter().filter(|&&n| n > 1).count()));
        assert!(self.idle <= self.most_idle);
        assert_eq!(self.index.len(), self.blocks.iter().filter(|b| b.key.is_some()).count());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sched::prefix::Keys;

    #[test]
    fn idle_blocks_go_least_recently_used_first_and_only_when_none_is_free() {
        let (mut pool, keys) = (BlockPool::new(4, 4), Keys::default());
        let key = |n: u64| keys.root(&n);
        let held: Vec<u32> = (0..3).map(|_| pool.take().unwrap()).collect();
        for (&id, n) in held.iter().zip(0..) {
            pool.publish(id, key(n));
        }
        for id in [held[1], held[0], held[2]] {
            pool.release(id, true);
        }
        assert_eq!((pool.available(), pool.idle()), (4, 3));
        pool.share(held[1]);
        pool.release(held[1], true);
        // The free one, then by age: 0, 2, 1.
        let taken: Vec<u32> = (0..4).map(|_| pool.take().unwrap()).collect();
        assert_eq!(taken, [3, held[0], held[2], held[1]]);
        assert!(pool.take().is_none() && pool.find(key(0)).is_none());
        pool.audit([taken.as_slice()].into_iter());
    }

    #[test]
    fn what_is_not_to_be_kept_or_more_than_may_be_is_free() {
        let (mut pool, keys) = (BlockPool::new(4, 1), Keys::default());
        let held: Vec<u32> = (0..3).map(|_| pool.take().unwrap()).collect();
        for (&id, n) in held.iter().zip(0u64..) {
            pool.publish(id, keys.root(&n));
        }
        pool.release(held[0], false);
        assert_eq!((pool.available(), pool.idle()), (2, 0));
        pool.release(held[1], true);
        pool.release(held[2], true);
        assert_eq!((pool.available(), pool.idle(), pool.find(keys.root(&2u64))), (4, 1, Some(held[2])));
        pool.audit(std::iter::empty());
    }

    #[test]
    fn a_second_block_of_the_same_content_is_not_found() {
        let (mut pool, keys) = (BlockPool::new(2, 2), Keys::default());
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.publish(a, keys.root(&1));
        pool.publish(b, keys.root(&1));
        pool.share(a);
        assert_eq!((pool.holders(a), pool.shared(), pool.find(keys.root(&1))), (2, 1, Some(a)));
        pool.release(b, true);
        assert_eq!((pool.available(), pool.idle()), (1, 0));
        pool.audit([&[a, a][..]].into_iter());
    }
}
