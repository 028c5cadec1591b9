//! One tile of queries against one chunk of a sequence's keys and values.

#![allow(
    clippy::inline_always,
    reason = "vector code must unfold into the function compiled for its instruction set"
)]

use half::{f16, slice::HalfFloatSliceExt};

use super::{
    super::{
        buffer::{Buffer, LINE},
        kv::{GROUP, KvCache},
        simd::{Simd, Task},
    },
    CHUNK_BLOCKS,
    product::{Element, Product},
};
use crate::{config::KvType, sched::BLOCK_TOKENS};

/// Rows of a tile at most, unless one query has more heads to a KV head: enough to make expanding a block
/// cheap, few enough to stay in the nearest caches.
pub(super) const TILE_ROWS: usize = 32;

/// Above so many rows a block is expanded to f32 once instead of in every product.
const EXPAND_ROWS: usize = 8;

/// A row's maximum before it has seen a score: finite, so that differences are.
const NOTHING: f32 = -1e30;

/// Numbers of a row's partial result: the sums of values, padded; the sum of weights, one lane a vector
/// lane, of which the first holds the total once the chunk is done; the largest score.
pub(super) fn row_stride(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LINE) + 2 * LINE
}

/// A thread's working memory.
pub(super) struct Scratch {
    /// Scaled queries, `[rows, head_dim]`.
    pub(super) queries: Buffer,
    /// Scores, then weights, of one block, `[rows, BLOCK_TOKENS]`.
    scores: Buffer,
    /// A block's keys in f32, `[head_dim, BLOCK_TOKENS]`.
    keys: Buffer,
    /// A block's values in f32, `[BLOCK_TOKENS, head_dim padded]`.
    values: Buffer,
    /// The merged result of the chunks so far, `[rows, row_stride]`.
    pub(super) total: Buffer,
    /// The result of one chunk, `[rows, row_stride]`.
    pub(super) part: Buffer,
}

impl Scratch {
    pub(super) fn new(rows: usize, head_dim: usize) -> Self {
        Self {
            queries: Buffer::new(rows * head_dim),
            scores: Buffer::new(rows * BLOCK_TOKENS),
            keys: Buffer::new(head_dim * BLOCK_TOKENS),
            values: Buffer::new(head_dim.next_multiple_of(LINE) * BLOCK_TOKENS),
            total: Buffer::new(rows * row_stride(head_dim)),
            part: Buffer::new(rows * row_stride(head_dim)),
        }
    }
}

/// Attention of a tile's rows over one chunk.
pub(super) struct ChunkTask<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) layer: usize,
    pub(super) kv_head: usize,
    pub(super) head_dim: usize,
    /// The sequence's blocks.
    pub(super) blocks: &'a [u32],
    pub(super) chunk: usize,
    /// Position of the tile's first query.
    pub(super) position: usize,
    /// Query heads to a KV head; row `r` is query `r / group`, head `r % group`.
    pub(super) group: usize,
    pub(super) rows: usize,
    pub(super) queries: &'a [f32],
    pub(super) memory: Memory<'a>,
    /// `[rows, row_stride]`, overwritten.
    pub(super) out: &'a mut [f32],
}

/// The parts of [`Scratch`] that a chunk works in.
pub(super) struct Memory<'a> {
    scores: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl Scratch {
    /// The queries, the total, the part, and what a [`ChunkTask`] works in.
    pub(super) fn split(&mut self) -> (&mut [f32], &mut [f32], &mut [f32], Memory<'_>) {
        let memory = Memory {
            scores: self.scores.as_mut_slice(),
            keys: self.keys.as_mut_slice(),
            values: self.values.as_mut_slice(),
        };
        (self.queries.as_mut_slice(), self.total.as_mut_slice(), self.part.as_mut_slice(), memory)
    }
}

impl Memory<'_> {
    /// The same memory for a shorter time.
    pub(super) fn reborrow(&mut self) -> Memory<'_> {
        Memory { scores: self.scores, keys: self.keys, values: self.values }
    }
}

impl Task for ChunkTask<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let stride = row_stride(self.head_dim);
        assert!(self.out.len() >= self.rows * stride && self.queries.len() >= self.rows * self.head_dim);
        assert!(self.memory.scores.len() >= self.rows * BLOCK_TOKENS);
        for row in self.out.chunks_exact_mut(stride).take(self.rows) {
            row.fill(0.0);
            row[stride - LINE] = NOTHING;
        }
        let last = self.position + (self.rows - 1) / self.group;
        let first_block = self.chunk * CHUNK_BLOCKS;
        for index in first_block..(first_block + CHUNK_BLOCKS).min(last / BLOCK_TOKENS + 1) {
            self.block(s, index, (last + 1 - index * BLOCK_TOKENS).min(BLOCK_TOKENS));
        }
        for row in self.out.chunks_exact_mut(stride).take(self.rows) {
            let weights = &mut row[stride - 2 * LINE..stride - LINE];
            // SAFETY: a line is at least one vector.
            weights[0] = s.sum(unsafe { s.load(weights.as_ptr()) });
        }
    }
}

impl ChunkTask<'_> {
    /// One block of the chunk, of whose tokens the tile's last query sees `seen`.
    #[inline(always)]
    fn block<S: Simd>(&mut self, s: S, index: usize, seen: usize) {
        let (keys, values) = (
            self.cache.keys(self.blocks[index], self.layer, self.kv_head),
            self.cache.values(self.blocks[index], self.layer, self.kv_head),
        );
        let kv_type = self.cache.kv_type();
        let count = self.head_dim * BLOCK_TOKENS;
        // Padded values are only made by expanding.
        let dense = self.head_dim.is_multiple_of(S::LANES);
        if kv_type == KvType::F16 && dense && self.rows <= EXPAND_ROWS {
            let (keys, values) = (numbers::<f16>(keys, 0, count), numbers(values, 0, count));
            self.products(s, index, seen, keys.as_ptr(), values.as_ptr(), self.head_dim);
            return;
        }
        let (keys, values, stride) = if kv_type == KvType::F32 && dense {
            let (keys, values) = (numbers::<f32>(keys, 0, count), numbers(values, 0, count));
            (keys.as_ptr(), values.as_ptr(), self.head_dim)
        } else {
            expand(s, kv_type, self.head_dim, (keys, values), &mut self.memory);
            let padded = self.head_dim.next_multiple_of(LINE);
            (self.memory.keys.as_ptr(), self.memory.values.as_ptr(), padded)
        };
        self.products(s, index, seen, keys, values, stride);
    }

    /// `S = Q·Kᵀ`, softmax so far, `O += P·V`. `value_stride` is a multiple of the vector.
    #[inline(always)]
    fn products<S: Simd, E: Element>(
        &mut self,
        s: S,
        index: usize,
        seen: usize,
        keys: *const E,
        values: *const E,
        value_stride: usize,
    ) {
        let stride = row_stride(self.head_dim);
        self.memory.scores[..self.rows * BLOCK_TOKENS].fill(0.0);
        let scores = Product {
            rows: self.rows,
            depth: self.head_dim,
            width: BLOCK_TOKENS,
            a: self.queries.as_ptr(),
            a_stride: self.head_dim,
            b: keys,
            b_stride: BLOCK_TOKENS,
            c: self.memory.scores.as_mut_ptr(),
            c_stride: BLOCK_TOKENS,
        };
        // SAFETY: `run` checked the buffers' lengths; keys are `[head_dim, BLOCK_TOKENS]`.
        unsafe { scores.run::<S, false>(s) };
        for row in 0..self.rows {
            let visible = (self.position + row / self.group + 1).saturating_sub(index * BLOCK_TOKENS);
            let scores = &mut self.memory.scores[row * BLOCK_TOKENS..(row + 1) * BLOCK_TOKENS];
            scores[visible.min(BLOCK_TOKENS)..].fill(f32::NEG_INFINITY);
            soften(s, scores, &mut self.out[row * stride..(row + 1) * stride]);
        }
        let sums = Product {
            rows: self.rows,
            depth: seen,
            width: value_stride,
            a: self.memory.scores.as_ptr(),
            a_stride: BLOCK_TOKENS,
            b: values,
            b_stride: value_stride,
            c: self.out.as_mut_ptr(),
            c_stride: stride,
        };
        // SAFETY: as above; values are `[≥ seen, value_stride]`.
        unsafe { sums.run::<S, true>(s) };
    }
}

/// Turns a block's scores into weights against the largest score so far, and brings what the row summed
/// before to that scale. `row` is laid out as [`row_stride`] says.
#[inline(always)]
fn soften<S: Simd>(s: S, scores: &mut [f32], row: &mut [f32]) {
    let end = row.len();
    let before = row[end - LINE];
    // SAFETY: all accesses are to whole vectors within the slices: scores are a block, `row` whole lines.
    unsafe {
        let mut largest = s.load(scores.as_ptr());
        for i in (S::LANES..BLOCK_TOKENS).step_by(S::LANES) {
            largest = s.max(largest, s.load(scores.as_ptr().add(i)));
        }
        let largest = s.largest(largest).max(before);
        if largest > before {
            row[end - LINE] = largest;
            let fade = s.exp(s.splat(before - largest));
            for i in (0..end - LINE).step_by(S::LANES) {
                let p = row.as_mut_ptr().add(i);
                s.store(p, s.mul(s.load(p), fade));
            }
        }
        let shift = s.splat(-largest);
        let total = row.as_mut_ptr().add(end - 2 * LINE);
        let mut sum = s.load(total);
        for i in (0..BLOCK_TOKENS).step_by(S::LANES) {
            let p = scores.as_mut_ptr().add(i);
            let weight = s.exp(s.add(s.load(p), shift));
            s.store(p, weight);
            sum = s.add(sum, weight);
        }
        s.store(total, sum);
    }
}

/// A block's keys and values to `memory` in f32; values padded with zeros to whole lines.
#[inline(always)]
fn expand<S: Simd>(s: S, kv_type: KvType, head_dim: usize, from: (&[u8], &[u8]), memory: &mut Memory<'_>) {
    let padded = head_dim.next_multiple_of(LINE);
    let keys = &mut memory.keys[..head_dim * BLOCK_TOKENS];
    let values = &mut memory.values[..padded * BLOCK_TOKENS];
    let groups = head_dim.div_ceil(GROUP);
    match kv_type {
        KvType::F32 => {
            keys.copy_from_slice(numbers(from.0, 0, keys.len()));
            for (row, from) in values
                .chunks_exact_mut(padded)
                .zip(numbers::<f32>(from.1, 0, head_dim * BLOCK_TOKENS).chunks_exact(head_dim))
            {
                row[..head_dim].copy_from_slice(from);
            }
        }
        KvType::F16 => {
            widen(s, numbers(from.0, 0, keys.len()), keys);
            let from: &[f16] = numbers(from.1, 0, head_dim * BLOCK_TOKENS);
            if padded == head_dim {
                widen(s, from, values);
            } else {
                for (row, from) in values.chunks_exact_mut(padded).zip(from.chunks_exact(head_dim)) {
                    from.convert_to_f32_slice(&mut row[..head_dim]);
                }
            }
        }
        KvType::Q8 => {
            let n = head_dim * BLOCK_TOKENS;
            let mut scales = [0f32; BLOCK_TOKENS];
            for (g, keys) in keys.chunks_mut(GROUP * BLOCK_TOKENS).enumerate() {
                widen(s, numbers(from.0, n + 2 * g * BLOCK_TOKENS, BLOCK_TOKENS), &mut scales);
                let first = g * GROUP * BLOCK_TOKENS;
                let bytes: &[i8] = numbers(from.0, first, keys.len());
                for (keys, bytes) in keys.chunks_exact_mut(BLOCK_TOKENS).zip(bytes.chunks_exact(BLOCK_TOKENS))
                {
                    for ((key, &byte), scale) in keys.iter_mut().zip(bytes).zip(&scales) {
                        *key = f32::from(byte) * scale;
                    }
                }
            }
            let scales: &[f16] = numbers(from.1, n, groups * BLOCK_TOKENS);
            let bytes: &[i8] = numbers(from.1, 0, n);
            for (t, row) in values.chunks_exact_mut(padded).enumerate() {
                let bytes = &bytes[t * head_dim..(t + 1) * head_dim];
                for ((row, bytes), scale) in
                    row.chunks_mut(GROUP).zip(bytes.chunks(GROUP)).zip(&scales[t * groups..])
                {
                    let scale = scale.to_f32();
                    for (value, &byte) in row.iter_mut().zip(bytes) {
                        *value = f32::from(byte) * scale;
                    }
                }
            }
        }
    }
}

/// Half precision to single, whole vectors.
#[inline(always)]
fn widen<S: Simd>(s: S, from: &[f16], to: &mut [f32]) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(S::LANES));
    for i in (0..from.len()).step_by(S::LANES) {
        // SAFETY: `i + LANES` is within both.
        unsafe { s.store(to.as_mut_ptr().add(i), s.load_half(from.as_ptr().add(i))) };
    }
}

/// `count` numbers at a byte offset of a piece of the cache, which is aligned to lines.
fn numbers<T: Stored>(piece: &[u8], at: usize, count: usize) -> &[T] {
    let bytes = &piece[at..at + count * size_of::<T>()];
    // SAFETY: all bit patterns are numbers; pieces are aligned and `at` is a multiple of the number's size.
    let (before, numbers, _) = unsafe { bytes.align_to::<T>() };
    assert!(before.is_empty() && numbers.len() == count, "a piece of the cache is not aligned");
    numbers
}

/// Numbers the cache holds.
trait Stored: Copy {}
impl Stored for f32 {}
impl Stored for f16 {}
impl Stored for i8 {}
