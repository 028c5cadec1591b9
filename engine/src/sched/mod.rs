//! Bookkeeping over integers: which sequences run, which blocks hold their keys and values.
mod batch;
pub use batch::{Batch, BatchSequence};

/// Tokens in a KV block.
pub const BLOCK_TOKENS: usize = 32;
