//! What a block holds, as one number: a hash over its tokens and all before them.

use std::hash::{BuildHasher, Hash, RandomState};

use super::BLOCK_TOKENS;

/// Stands for a full block's content: its tokens, those before them, and whose they are.
///
/// 128 bits of two keyed hashes that nobody outside sees: two contents with one key are not to be met with, nor to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(u64, u64);

/// Who may find what another one's prompt has left in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefixCache {
    /// Everybody: the fastest, but the time to a first token tells whether somebody else had the same beginning.
    Shared,
    /// The same caller only.
    #[default]
    PerCaller,
    /// Nobody: blocks are kept for the sequences of one request alone.
    Off,
}

/// Makes keys. The hashes are keyed at random, anew in each process.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys(RandomState, RandomState);

impl Keys {
    fn of(&self, content: &impl Hash) -> Key {
        Key(self.0.hash_one(content), self.1.hash_one(content))
    }

    /// What the first blocks of all within `scope` follow.
    pub(super) fn root(&self, scope: &impl Hash) -> Key {
        self.of(scope)
    }

    /// The key of a block of `tokens` that follows `before`.
    pub(super) fn next(&self, before: Key, tokens: &[u32]) -> Key {
        debug_assert_eq!(tokens.len(), BLOCK_TOKENS);
        self.of(&(before, tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stands_for_all_tokens_up_to_its_end_and_for_the_scope() {
        let keys = Keys::default();
        let tokens: Vec<u32> = (0..BLOCK_TOKENS as u32).collect();
        let mut other = tokens.clone();
        other[31] = 0;
        let chain = |scope: u64, blocks: &[&[u32]]| {
            blocks.iter().fold(keys.root(&scope), |before, tokens| keys.next(before, tokens))
        };
        let key = chain(1, &[&tokens, &tokens]);
        assert_eq!(key, chain(1, &[&tokens, &tokens]));
        for different in
            [chain(2, &[&tokens, &tokens]), chain(1, &[&other, &tokens]), chain(1, &[&tokens]), chain(1, &[])]
        {
            assert_ne!(key, different);
        }
    }
}
