//! The unit of work: one step's tokens, over one or many sequences.

/// One sequence's part of a [`Batch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchSequence {
    /// First of its tokens in `Batch::tokens`.
    pub start: usize,
    /// How many of them: some of the prompt, or one new token.
    pub len: usize,
    /// Tokens whose keys and values are in the cache already; the position of the first token here.
    pub context: usize,
    /// First of its entries in `Batch::block_tables`; it has `ceil((context + len) / BLOCK_TOKENS)`.
    pub table: usize,
}

/// A block to be copied before anything of the step is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Holds the keys and values.
    pub from: u32,
    /// Gets them, in all layers.
    pub to: u32,
}

/// One step: packed tokens without padding, block tables, and the rows whose logits are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all sequences, packed.
    pub tokens: Vec<u32>,
    /// Each token's position in its sequence.
    pub positions: Vec<u32>,
    /// The sequences, covering `tokens` in order.
    pub sequences: Vec<BatchSequence>,
    /// KV block ids of all sequences, packed.
    pub block_tables: Vec<u32>,
    /// Indices into `tokens` whose next-token logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// Indices into `tokens` whose hidden states are wanted, ascending.
    pub hidden_rows: Vec<u32>,
    /// Copies of blocks, to be made in this order at the beginning of the step.
    pub copies: Vec<BlockCopy>,
}

impl Batch {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.block_tables.clear();
        self.logit_rows.clear();
        self.hidden_rows.clear();
        self.copies.clear();
    }

    /// The block ids of one of its sequences.
    pub fn blocks_of(&self, sequence: &BatchSequence) -> &[u32] {
        let n = (sequence.context + sequence.len).div_ceil(super::BLOCK_TOKENS);
        &self.block_tables[sequence.table..sequence.table + n]
    }
}
