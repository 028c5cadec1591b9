//! The KV blocks nobody holds.

/// Hands out block ids. A block is taken by one sequence at a time.
#[derive(Debug)]
pub struct BlockPool {
    /// Free ids; the lowest are handed out first and reused soonest, so a lightly used pool stays within
    /// the pages it has touched.
    free: Vec<u32>,
    total: usize,
}

impl BlockPool {
    /// A pool of blocks `0..total`, all free.
    pub fn new(total: usize) -> Self {
        Self { free: (0..total as u32).rev().collect(), total }
    }

    /// Extends `table` to `count` blocks; all or nothing.
    pub fn grow(&mut self, table: &mut Vec<u32>, count: usize) -> bool {
        let missing = count.saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        table.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Takes a sequence's blocks back and empties its table.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        self.free.extend(table.drain(..).rev());
    }

    /// Blocks nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.total
    }
}
