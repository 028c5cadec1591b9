//! What a step is about, in one block of words that one copy brings to the device.

use super::gpu::{Buffer, Gpu, Pinned};
use crate::{
    backend::Capacity,
    error::EngineError,
    sched::{BLOCK_TOKENS, Batch, BatchSequence},
};

/// Words of a `Sequence` in `kernels/attention.cuh`: start, length, context, table.
const SEQUENCE_WORDS: usize = 4;
/// Words of a `Tile` there: sequence, first row.
const TILE_WORDS: usize = 2;
/// Rows of a tile: a sequence has one for each of its tokens and each query head of a KV head.
const TILE_ROWS: usize = 64;

/// Where each array lies, in words; fixed, so that graphs may hold the addresses. The tables come last, as
/// only their used part is copied.
#[derive(Debug, Clone, Copy)]
struct Places {
    tokens: usize,
    positions: usize,
    slots: usize,
    logit_rows: usize,
    sequences: usize,
    decoding: usize,
    tiles: usize,
    tables: usize,
    end: usize,
}

impl Places {
    fn new(capacity: &Capacity, group: usize) -> Self {
        let Capacity { tokens, sequences, logit_rows, kv_blocks, .. } = *capacity;
        let most_tiles = (tokens * group).div_ceil(TILE_ROWS) + sequences;
        let mut end = 0;
        let mut take = |words: usize| {
            let start = end;
            // Each array begins on 16 bytes.
            end += words.next_multiple_of(4);
            start
        };
        Self {
            tokens: take(tokens),
            positions: take(tokens),
            slots: take(tokens),
            logit_rows: take(logit_rows),
            sequences: take(sequences * SEQUENCE_WORDS),
            decoding: take(sequences),
            tiles: take(most_tiles * TILE_WORDS),
            tables: take(kv_blocks),
            end,
        }
    }
}

/// The step's arrays, on the host and on the device.
pub(super) struct Metadata {
    places: Places,
    host: Pinned,
    device: Buffer,
    /// Query heads of a KV head.
    group: usize,
    /// Tokens of the step.
    pub(super) tokens: usize,
    /// Rows of logits of the step.
    pub(super) logit_rows: usize,
    /// Sequences with one new token.
    pub(super) decoding: usize,
    /// Tiles of the others.
    pub(super) tiles: usize,
    /// Tokens whose keys and values the step's attention reads, summed over the sequences.
    pub(super) attended: usize,
}

impl Metadata {
    pub(super) fn new(gpu: &Gpu, capacity: &Capacity, group: usize) -> Result<Self, EngineError> {
        let places = Places::new(capacity, group);
        let bytes = places.end * 4;
        Ok(Self {
            places,
            host: Pinned::new(gpu.context(), bytes, "the step's metadata")?,
            device: Buffer::zeroed(gpu.context(), bytes, "the step's metadata")?,
            group,
            tokens: 0,
            logit_rows: 0,
            decoding: 0,
            tiles: 0,
            attended: 0,
        })
    }

    /// Bytes it takes on the device.
    pub(super) fn bytes(capacity: &Capacity, group: usize) -> usize {
        Places::new(capacity, group).end * 4
    }

    /// Takes a batch in and queues its copy. The step before has ended: the host may write.
    pub(super) fn begin(&mut self, gpu: &Gpu, batch: &Batch) -> Result<(), EngineError> {
        let places = self.places;
        let words = self.host.slice_mut::<u32>();
        let mut put = |at: usize, values: &[u32]| words[at..at + values.len()].copy_from_slice(values);
        put(places.tokens, &batch.tokens);
        put(places.positions, &batch.positions);
        put(places.logit_rows, &batch.logit_rows);
        put(places.tables, &batch.block_tables);
        (self.decoding, self.tiles, self.attended) = (0, 0, 0);
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let &BatchSequence { start, len, context, table } = sequence;
            let blocks = batch.blocks_of(sequence);
            for i in 0..len {
                let position = context + i;
                let slot = blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS;
                put(places.slots + start + i, &[slot as u32]);
            }
            let fields = [start, len, context, table].map(|n| n as u32);
            put(places.sequences + index * SEQUENCE_WORDS, &fields);
            self.attended += context + len;
            if len == 1 {
                put(places.decoding + self.decoding, &[index as u32]);
                self.decoding += 1;
            } else {
                // The last rows see the most keys: first, so that what is left at the end is short.
                for first in (0..len * self.group).step_by(TILE_ROWS).rev() {
                    put(places.tiles + self.tiles * TILE_WORDS, &[index as u32, first as u32]);
                    self.tiles += 1;
                }
            }
        }
        (self.tokens, self.logit_rows) = (batch.tokens.len(), batch.logit_rows.len());
        let bytes = (places.tables + batch.block_tables.len()) * 4;
        // SAFETY: the next write is in the next `begin`, after the step's one wait.
        unsafe { gpu.upload(&self.host, &self.device, bytes) }
    }

    fn at(&self, words: usize) -> u64 {
        self.device.at(words * 4)
    }

    /// `u32 [T]`
    pub(super) fn token_ids(&self) -> u64 {
        self.at(self.places.tokens)
    }

    /// `u32 [T]`
    pub(super) fn positions(&self) -> u64 {
        self.at(self.places.positions)
    }

    /// `u32 [T]`: block · 32 + place in the block.
    pub(super) fn slots(&self) -> u64 {
        self.at(self.places.slots)
    }

    /// `u32 [logit_rows]`
    pub(super) fn rows(&self) -> u64 {
        self.at(self.places.logit_rows)
    }

    /// `Sequence []`
    pub(super) fn sequences(&self) -> u64 {
        self.at(self.places.sequences)
    }

    /// `u32 [decoding]`: indices of the sequences with one new token.
    pub(super) fn decoding_list(&self) -> u64 {
        self.at(self.places.decoding)
    }

    /// `Tile [tiles]`
    pub(super) fn tile_list(&self) -> u64 {
        self.at(self.places.tiles)
    }

    /// `u32 []`: block ids.
    pub(super) fn tables(&self) -> u64 {
        self.at(self.places.tables)
    }
}
