//! Bookkeeping over integers: which sequences run, which blocks hold their keys and values.
//!
//! Knows ids and lengths only; tested without a model.

mod batch;
mod pool;
mod scheduler;

pub use batch::{Batch, BatchSequence};
pub use pool::BlockPool;
pub use scheduler::{Limits, Planned, Scheduler, SequenceId};

/// Tokens in a KV block.
pub const BLOCK_TOKENS: usize = 32;

/// Blocks that `tokens` tokens take.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
