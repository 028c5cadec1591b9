//! A sequence as the scheduler knows it.

use super::{
    BLOCK_TOKENS, CallerId,
    prefix::{Key, Keys},
};

/// Names a sequence for as long as the scheduler knows it; later ones are larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A request to the scheduler: one prompt and what is to go on from it.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// The first sequence's name; further choices have the numbers after it.
    pub id: SequenceId,
    /// Sequences that go on from the prompt, at least one. It is computed and held once.
    pub choices: usize,
    /// Whose it is.
    pub caller: CallerId,
    /// The caller's weight beside others, at least 1.
    pub weight: u32,
    /// Token ids, at least one. The caller has checked that it fits the pool with what is to follow.
    pub prompt: Vec<u32>,
    /// Every prompt position gets a logits row.
    pub score_prompt: bool,
    /// From this position on every token's hidden state is wanted, and no logits at all: nothing follows the prompt.
    pub hidden_from: Option<usize>,
    /// Most tokens that prompt and output together come to.
    pub most: usize,
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    /// Choices that have not parted from it yet, ascending: they share its tokens, and its next row of logits.
    pub(super) others: Vec<SequenceId>,
    /// Those of its members that are paused: it runs when none is.
    pub(super) held: Vec<SequenceId>,
    pub(super) caller: CallerId,
    pub(super) weight: u32,
    /// The prompt and what has been generated since.
    pub(super) tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub(super) prompt: usize,
    /// Most there will be.
    pub(super) most: usize,
    /// Tokens whose keys and values are in `blocks`.
    pub(super) computed: usize,
    /// Most that `computed` has ever been: what is found in the cache below it is the sequence's own.
    pub(super) reached: usize,
    /// Blocks of the prompt that came from the cache and that it has never had to compute, and their tokens.
    saved: Vec<bool>,
    pub(super) cached: usize,
    pub(super) blocks: Vec<u32>,
    /// The key before the first block, and those of full blocks, as far as they were needed.
    pub(super) root: Key,
    pub(super) keys: Vec<Key>,
    /// Blocks that the pool knows by their keys, or need not.
    pub(super) published: usize,
    /// Positions below this need no logits row any more; `usize::MAX` when the prompt is not scored.
    pub(super) score_from: usize,
    /// Positions below this need no hidden state any more; absent where logits are wanted.
    pub(super) hidden_from: Option<usize>,
    /// When it first got a place, by the scheduler's clock.
    pub(super) placed: Option<f64>,
    /// Tokens of the prompt it may compute in the step being planned.
    pub(super) grant: usize,
}

impl Sequence {
    pub(super) fn new(arrival: Arrival, root: Key) -> Self {
        let Arrival { id, choices, caller, weight, prompt, score_prompt, hidden_from, most } = arrival;
        Self {
            id,
            others: (1..choices.max(1) as u64).map(|i| SequenceId(id.0 + i)).collect(),
            held: Vec::new(),
            caller,
            weight: weight.max(1),
            prompt: prompt.len(),
            most,
            tokens: prompt,
            computed: 0,
            reached: 0,
            saved: Vec::new(),
            cached: 0,
            blocks: Vec::new(),
            root,
            keys: Vec::new(),
            published: 0,
            score_from: if score_prompt { 0 } else { usize::MAX },
            hidden_from,
            placed: None,
            grant: 0,
        }
    }

    /// The choice `id` parted from the others, with its first token. Its blocks are yet to be shared.
    pub(super) fn part(&self, id: SequenceId, token: u32) -> Self {
        let mut tokens = Vec::with_capacity(self.most.max(self.tokens.len() + 1));
        tokens.extend_from_slice(&self.tokens);
        tokens.push(token);
        Self {
            id,
            others: Vec::new(),
            held: Vec::new(),
            tokens,
            blocks: Vec::with_capacity(self.blocks.capacity()),
            keys: self.keys.clone(),
            saved: Vec::new(),
            grant: 0,
            ..*self
        }
    }

    /// Itself and the choices that have not parted from it.
    pub(super) fn members(&self) -> impl Iterator<Item = SequenceId> {
        std::iter::once(self.id).chain(self.others.iter().copied())
    }

    /// Tokens yet to be computed.
    pub(super) fn left(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// It has one new token, and all before it are computed.
    pub(super) fn is_decoding(&self) -> bool {
        self.computed > 0 && self.left() == 1
    }

    /// It has a prompt, or what a preemption has cost, to compute.
    pub(super) fn is_reading(&self) -> bool {
        self.left() > 0 && !self.is_decoding()
    }

    /// Blocks that may come from the cache: at least one token is computed, and with it the logits that
    /// follow; so is every position whose row or hidden state is wanted.
    pub(super) fn may_find(&self) -> usize {
        let wanted = self.score_from.min(self.hidden_from.unwrap_or(usize::MAX));
        (self.tokens.len() - 1).min(wanted) / BLOCK_TOKENS
    }

    /// The key of its block `at`, all of whose tokens are known.
    pub(super) fn key(&mut self, keys: &Keys, at: usize) -> Key {
        while self.keys.len() <= at {
            let first = self.keys.len() * BLOCK_TOKENS;
            let before = self.keys.last().copied().unwrap_or(self.root);
            self.keys.push(keys.next(before, &self.tokens[first..first + BLOCK_TOKENS]));
        }
        self.keys[at]
    }

    /// Counts a block of the cache in its place, which is the next one to be computed.
    pub(super) fn found(&mut self) {
        let end = self.computed + BLOCK_TOKENS;
        if self.computed >= self.reached && end <= self.prompt {
            self.saved.resize(self.computed / BLOCK_TOKENS, false);
            self.saved.push(true);
            self.cached += BLOCK_TOKENS;
        }
        self.computed = end;
        self.published = self.published.max(end / BLOCK_TOKENS);
        self.reached = self.reached.max(end);
    }

    /// The tokens up to `end` are computed in this step.
    pub(super) fn compute(&mut self, end: usize) {
        // Blocks that the cache had and has lost meanwhile have saved nothing.
        for at in self.computed / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS).min(self.saved.len()) {
            if std::mem::take(&mut self.saved[at]) {
                self.cached -= BLOCK_TOKENS;
            }
        }
        self.computed = end;
        self.reached = self.reached.max(end);
    }
}
