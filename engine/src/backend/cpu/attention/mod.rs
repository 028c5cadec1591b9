//! Causal attention over the paged cache, by online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
//!
//! The unit of work is a tile: some consecutive queries of one sequence, whose query heads that share a KV
//! head are the rows of two small matrix products per KV block, `S = Q·Kᵀ` and `O += P·V`. Scores never
//! outlive a block.
//!
//! A row's result depends only on its own query and its sequence's keys and values: blocks are taken in
//! order, in chunks of [`CHUNK_BLOCKS`] from the sequence's start whose results are merged in order, and
//! every sum runs in one order whatever the tile holds. So chunks may be computed one after another or
//! apart, and tiles cut anywhere, without a bit changing.

#![allow(
    clippy::inline_always,
    reason = "vector code must unfold into the function compiled for its instruction set"
)]

mod product;
mod tile;

use super::{
    buffer::{Buffer, LINE},
    pool::{Pool, SharedMut},
    simd::{Level, Simd, Task},
    state::RunState,
};
use crate::sched::{BLOCK_TOKENS, BatchSequence};
use tile::{ChunkTask, Memory, Scratch, TILE_ROWS, row_stride};

/// Blocks whose softmax is taken together before it is merged with the rest's.
const CHUNK_BLOCKS: usize = 16;
const CHUNK_TOKENS: usize = CHUNK_BLOCKS * BLOCK_TOKENS;

/// With fewer tiles a thread than this, chunks are shared out singly, for long contexts of few sequences.
const TILES_PER_THREAD: usize = 4;

/// Working memory for attention, made once.
pub(super) struct Attention {
    threads: Vec<Scratch>,
    /// Results of chunks that were shared out: `[tile][chunk][rows, row_stride]`.
    parts: Buffer,
    /// The step's tiles, for one KV head.
    tiles: Vec<Tile>,
    /// Most chunks of a sequence.
    max_chunks: usize,
    max_rows: usize,
}

/// Consecutive queries of a sequence.
#[derive(Clone, Copy)]
struct Tile {
    /// Index of the sequence in the batch.
    sequence: usize,
    /// First query, within the sequence's part of the batch.
    first: usize,
    queries: usize,
    /// Chunks that its last query sees.
    chunks: usize,
}

impl Attention {
    /// For what `state` may hold, on `threads` threads.
    pub(super) fn new(state: &RunState, threads: usize) -> Self {
        let (shape, capacity) = (&state.shape, &state.capacity);
        let group = shape.heads / shape.kv_heads;
        let max_rows = TILE_ROWS.max(group);
        let max_chunks = capacity.kv_blocks.div_ceil(CHUNK_BLOCKS);
        let shared = threads * TILES_PER_THREAD;
        Self {
            threads: (0..threads).map(|_| Scratch::new(max_rows, shape.head_dim)).collect(),
            parts: Buffer::new(shared * max_chunks * max_rows * row_stride(shape.head_dim)),
            tiles: Vec::with_capacity(capacity.tokens + capacity.sequences),
            max_chunks,
            max_rows,
        }
    }

    /// Cuts the step's queries into tiles.
    pub(super) fn begin(&mut self, state: &RunState) {
        let queries = (TILE_ROWS * state.shape.kv_heads / state.shape.heads).max(1);
        self.tiles.clear();
        for (index, sequence) in state.batch.sequences.iter().enumerate() {
            for first in (0..sequence.len).step_by(queries) {
                let queries = queries.min(sequence.len - first);
                let chunks = (sequence.context + first + queries).div_ceil(CHUNK_TOKENS);
                self.tiles.push(Tile { sequence: index, first, queries, chunks });
            }
        }
        // The longest first, so that threads end together.
        self.tiles.sort_unstable_by_key(|t| std::cmp::Reverse(t.chunks * t.queries));
    }

    /// `a = softmax(q·kᵀ / sqrt(head_dim), causal)·v`, `[T, heads * head_dim]`.
    pub(super) fn run(&mut self, level: Level, pool: &Pool, state: &RunState, layer: usize, a: &mut [f32]) {
        let kv_heads = state.shape.kv_heads;
        assert!(
            self.threads.len() >= pool.threads()
                && a.len() >= state.tokens() * state.shape.heads * state.shape.head_dim
        );
        let step = Step { level, state, layer };
        let items = self.tiles.len() * kv_heads;
        let tiles = &self.tiles;
        let out = SharedMut::new(a);
        let scratch = SharedMut::new(&mut self.threads);
        let chunks = tiles.iter().map(|t| t.chunks).max().unwrap_or(0);
        if chunks <= 1 || pool.threads() == 1 || items >= self.threads.len() * TILES_PER_THREAD {
            pool.for_each(items, |item, thread| {
                // SAFETY: each thread has its own scratch.
                let scratch = unsafe { &mut scratch.part(thread, 1)[0] };
                step.whole_tile(&tiles[item / kv_heads], item % kv_heads, scratch, &out);
            });
            return;
        }
        assert!(chunks <= self.max_chunks);
        let slot = self.max_rows * row_stride(state.shape.head_dim);
        let parts = SharedMut::new(self.parts.as_mut_slice());
        pool.for_each(items * chunks, |item, thread| {
            let (tile, kv_head, chunk) =
                (&tiles[item / chunks / kv_heads], item / chunks % kv_heads, item % chunks);
            if chunk < tile.chunks {
                // SAFETY: each thread has its own scratch, each item its own part; `new` made room for
                // the parts of so few tiles.
                let (scratch, part) =
                    unsafe { (&mut scratch.part(thread, 1)[0], parts.part(item * slot, slot)) };
                let (queries, _, _, memory) = scratch.split();
                step.load_queries(tile, kv_head, queries);
                step.chunk(tile, kv_head, chunk, queries, memory, part);
            }
        });
        pool.for_each(items, |item, _| {
            let tile = &tiles[item / kv_heads];
            // SAFETY: each item merges its own parts, which nobody writes any more.
            let parts = unsafe { parts.part(item * chunks * slot, tile.chunks * slot) };
            let (total, parts) = parts.split_at_mut(slot);
            for part in parts.chunks_exact(slot) {
                step.merge(tile, total, part);
            }
            step.put(tile, item % kv_heads, total, &out);
        });
    }
}

/// What all tiles of a call share.
#[derive(Clone, Copy)]
struct Step<'a> {
    level: Level,
    state: &'a RunState,
    layer: usize,
}

impl Step<'_> {
    fn sequence(&self, tile: &Tile) -> &BatchSequence {
        &self.state.batch.sequences[tile.sequence]
    }

    fn group(&self) -> usize {
        self.state.shape.heads / self.state.shape.kv_heads
    }

    /// Where the heads of a tile's query that share `kv_head` begin in `[T, heads * head_dim]`.
    fn row(&self, tile: &Tile, query: usize, kv_head: usize) -> usize {
        let shape = &self.state.shape;
        ((self.sequence(tile).start + tile.first + query) * shape.heads + kv_head * self.group())
            * shape.head_dim
    }

    /// All chunks of a tile, one after the other.
    fn whole_tile(&self, tile: &Tile, kv_head: usize, scratch: &mut Scratch, out: &SharedMut<f32>) {
        let (queries, total, part, mut memory) = scratch.split();
        self.load_queries(tile, kv_head, queries);
        self.chunk(tile, kv_head, 0, queries, memory.reborrow(), total);
        for chunk in 1..tile.chunks {
            self.chunk(tile, kv_head, chunk, queries, memory.reborrow(), part);
            self.merge(tile, total, part);
        }
        self.put(tile, kv_head, total, out);
    }

    /// The tile's queries, scaled by `1 / sqrt(head_dim)`, as rows.
    fn load_queries(&self, tile: &Tile, kv_head: usize, rows: &mut [f32]) {
        let width = self.group() * self.state.shape.head_dim;
        let scale = 1.0 / (self.state.shape.head_dim as f32).sqrt();
        for (query, rows) in rows.chunks_exact_mut(width).take(tile.queries).enumerate() {
            let at = self.row(tile, query, kv_head);
            for (to, from) in rows.iter_mut().zip(&self.state.q[at..at + width]) {
                *to = from * scale;
            }
        }
    }

    /// One chunk's result.
    fn chunk(
        &self,
        tile: &Tile,
        kv_head: usize,
        chunk: usize,
        queries: &[f32],
        memory: Memory<'_>,
        out: &mut [f32],
    ) {
        let sequence = self.sequence(tile);
        self.level.run(ChunkTask {
            cache: &self.state.cache,
            layer: self.layer,
            kv_head,
            head_dim: self.state.shape.head_dim,
            blocks: self.state.batch.blocks_of(sequence),
            chunk,
            position: sequence.context + tile.first,
            group: self.group(),
            rows: tile.queries * self.group(),
            queries,
            memory,
            out,
        });
    }

    /// Takes the next chunk's result into the total of those before.
    fn merge(&self, tile: &Tile, total: &mut [f32], part: &[f32]) {
        let stride = row_stride(self.state.shape.head_dim);
        let rows = tile.queries * self.group();
        for (total, part) in total.chunks_exact_mut(stride).zip(part.chunks_exact(stride)).take(rows) {
            self.level.run(Merge { total, part });
        }
    }

    /// Divides by the sum of weights and writes the tile's rows to `out`, `[T, heads * head_dim]`.
    fn put(&self, tile: &Tile, kv_head: usize, total: &[f32], out: &SharedMut<f32>) {
        let head_dim = self.state.shape.head_dim;
        let stride = row_stride(head_dim);
        for (r, row) in total.chunks_exact(stride).take(tile.queries * self.group()).enumerate() {
            let at = self.row(tile, r / self.group(), kv_head) + r % self.group() * head_dim;
            // SAFETY: `run` checked the output's length; these rows and this head are the tile's alone.
            let out = unsafe { out.part(at, head_dim) };
            let scale = 1.0 / row[stride - 2 * LINE];
            for (out, sum) in out.iter_mut().zip(row) {
                *out = sum * scale;
            }
        }
    }
}

/// Adds one row's result over a chunk to that over the chunks before.
struct Merge<'a> {
    total: &'a mut [f32],
    part: &'a [f32],
}

impl Task for Merge<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (total, part) = (self.total, self.part);
        let end = total.len();
        assert!(part.len() == end && end.is_multiple_of(LINE));
        if part[end - 2 * LINE] == 0.0 {
            // The row sees nothing of this chunk: leave no trace of whether it was asked.
            return;
        }
        let largest = total[end - LINE].max(part[end - LINE]);
        let fade = s.exp(s.splat(total[end - LINE] - largest));
        let weight = s.exp(s.splat(part[end - LINE] - largest));
        total[end - LINE] = largest;
        // The sums of weights lie behind the sums of values and merge alike.
        for i in (0..end - LINE).step_by(S::LANES) {
            // SAFETY: `i` and the vector after it are within both slices.
            unsafe {
                let sum = s.mul(s.load(total.as_ptr().add(i)), fade);
                s.store(total.as_mut_ptr().add(i), s.fma(s.load(part.as_ptr().add(i)), weight, sum));
            }
        }
    }
}
