//! Bookkeeping over integers: which sequences run, which blocks hold their keys and values.
//!
//! Knows ids, lengths and measured times only; tested without a model.
//!
//! | module | holds |
//! | --- | --- |
//! | `scheduler` | plans steps: who runs, who computes what |
//! | `sharing` | whose prompts go on, and how far |
//! | `room` | who gets blocks and who gives them back |
//! | `sequence` | one sequence's tokens, blocks and how far it is |
//! | `queue` | those that wait, by caller |
//! | `fairness` | deficit round robin between callers |
//! | `pool` | KV blocks: their holders, and the idle ones that are kept |
//! | `prefix` | keys by which blocks of the same content are found |
//! | `pace` | how much of prompts a step may take beside running streams |
//! | `forecast` | how long a request would wait |
//! | `batch` | the step that comes out |

mod batch;
#[cfg(test)]
mod bounds;
mod fairness;
mod forecast;
mod pace;
mod pool;
mod prefix;
mod queue;
mod room;
mod scheduler;
#[cfg(test)]
mod scheduler_tests;
mod sequence;
mod sharing;
#[cfg(test)]
mod simulation;

pub use batch::{Batch, BatchSequence, BlockCopy};
pub use forecast::Forecast;
pub use pace::{Load, Pace};
pub use pool::BlockPool;
pub use prefix::PrefixCache;
pub use queue::CallerLoad;
pub use scheduler::{Counts, Limits, Planned, Resources, Scheduler};
pub use sequence::{Arrival, SequenceId};

/// Whom a request is for: a key or an address, as a number. The scheduler is fair between callers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallerId(pub u64);

/// Tokens in a KV block.
pub const BLOCK_TOKENS: usize = 32;

/// Blocks that `tokens` tokens take.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
