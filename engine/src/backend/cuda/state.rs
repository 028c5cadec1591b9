//! Run state: everything a step works on, made once. `T` is the step's tokens; buffers hold `capacity.tokens`.

use super::{
    gpu::{Buffer, Gpu},
    metadata::Metadata,
    products::{partial_bytes, squares_bytes},
};
use crate::{
    backend::{Capacity, MOST_BEST, RopeStyle, Shape},
    config::KvType,
    error::EngineError,
    sched::BLOCK_TOKENS,
};

/// Kernels may read this far past the activations of the last token.
const PAD: usize = 4096;
/// Counters, of products and of attention each.
const COUNTERS: usize = 64 << 10;

/// Query heads per KV head of an attention block, and how many such blocks a KV head takes: the geometry of
/// `attention_decode.cu`.
pub(super) fn decode_heads(shape: &Shape) -> (usize, usize) {
    let group = shape.heads / shape.kv_heads;
    let heads = if group <= 4 { 4 } else { 8 };
    (heads, group.div_ceil(heads))
}

/// Threads of such a block, and how many blocks a multiprocessor holds.
pub(super) fn decode_block(shape: &Shape, kv_type: KvType) -> (u32, usize) {
    let (heads, _) = decode_heads(shape);
    let wide = kv_type == KvType::F32 || !shape.head_dim.is_multiple_of(32);
    match (heads, wide) {
        (4, false) => (256, 2),
        (4, true) | (_, false) => (128, 3),
        (_, true) => (128, 2),
    }
}

/// Blocks that share a sequence's keys and values, for so many sequences: one sequence takes all blocks that are resident,
/// since those beyond would wait for the others; several take twice as many, since not all are equally long.
pub(super) fn decode_splits(shape: &Shape, kv_type: KvType, sms: usize, sequences: usize) -> usize {
    let (_, tiles) = decode_heads(shape);
    let (_, resident) = decode_block(shape, kv_type);
    let turns = if sequences == 1 { 1 } else { 2 };
    (turns * resident * sms / (shape.kv_heads * tiles * sequences.max(1)))
        .clamp(1, most_splits(shape, sequences))
}

/// Most of these blocks, for which there is room on every card.
fn most_splits(shape: &Shape, sequences: usize) -> usize {
    let (_, tiles) = decode_heads(shape);
    1024usize.div_ceil(shape.kv_heads * tiles * sequences.max(1)).min(64)
}

/// Activations, the KV cache and logits.
pub(super) struct State {
    pub(super) shape: Shape,
    pub(super) capacity: Capacity,
    pub(super) metadata: Metadata,
    /// Residual stream, `[T, dim]`, in the order of the step.
    pub(super) x: Buffer,
    /// Normalised rows, `[max(T, logit_rows), dim]`.
    pub(super) hidden: Buffer,
    /// Sums of squares of the residual stream, by 64 numbers and token of a wide step.
    pub(super) squares: Buffer,
    /// `[T, heads * head_dim]`
    pub(super) q: Buffer,
    /// `[T, kv_heads * head_dim]`
    pub(super) k: Buffer,
    /// `[T, kv_heads * head_dim]`
    pub(super) v: Buffer,
    /// Attention's result, `[T, heads * head_dim]`.
    pub(super) attended: Buffer,
    /// The feed-forward's inside, `[T, ffn_dim]`.
    pub(super) inside: Buffer,
    /// Frequencies, `[rotary / 2]`.
    pub(super) frequencies: Buffer,
    /// `[T, rotary / 2]`
    pub(super) cos: Buffer,
    /// `[T, rotary / 2]`
    pub(super) sin: Buffer,
    /// Keys and values of all layers; see `kernels/attention.cuh`.
    pub(super) cache: Buffer,
    /// `[logit_rows, vocab]`
    pub(super) logits: Buffer,
    /// The best tokens' ids, `[logit_rows, MOST_BEST]`.
    pub(super) best_ids: Buffer,
    /// Their logits.
    pub(super) best_logits: Buffer,
    /// Sums beside the best, `f64 [logit_rows]`, and the workspace of finding them.
    pub(super) best_sums: Buffer,
    pub(super) best_partial: Buffer,
    /// Workspace and counters of products, then of attention.
    pub(super) product_partial: Buffer,
    pub(super) product_counters: Buffer,
    pub(super) attention_partial: Buffer,
    pub(super) attention_counters: Buffer,
}

/// Bytes of the buffers of [`State`], in the order of its fields.
struct Sizes {
    x: usize,
    hidden: usize,
    squares: usize,
    q: usize,
    kv: usize,
    inside: usize,
    angles: usize,
    logits: usize,
    best: usize,
    best_partial: usize,
    attention_partial: usize,
}

impl Sizes {
    fn new(shape: &Shape, capacity: &Capacity) -> Self {
        let floats = |rows: usize, width: usize| rows * width * 4 + PAD;
        let tokens = capacity.tokens;
        let (heads, tiles) = decode_heads(shape);
        let attention = (1..=capacity.sequences)
            .map(|n| n * shape.kv_heads * tiles * most_splits(shape, n) * heads * (shape.head_dim + 2))
            .max()
            .unwrap_or(0);
        Self {
            x: floats(tokens, shape.dim),
            hidden: floats(tokens.max(capacity.logit_rows), shape.dim),
            squares: squares_bytes(shape.dim),
            q: floats(tokens, shape.heads * shape.head_dim),
            kv: floats(tokens, shape.kv_heads * shape.head_dim),
            inside: floats(tokens, shape.ffn_dim),
            angles: floats(tokens, shape.rope.inverse_frequencies.len()),
            logits: floats(capacity.logit_rows, shape.vocab),
            best: floats(capacity.logit_rows, MOST_BEST),
            best_partial: capacity.logit_rows * shape.vocab.div_ceil(4096) * (MOST_BEST * 8).max(16),
            attention_partial: floats(1, attention),
        }
    }

    /// All but the KV cache.
    fn total(&self) -> usize {
        let activations = self.x + self.hidden + 2 * self.q + 2 * self.kv + self.inside + 3 * self.angles;
        activations
            + self.squares
            + self.logits
            + 3 * self.best
            + self.best_partial
            + self.attention_partial
            + 2 * COUNTERS * 4
    }
}

/// Bytes of a layer's part of one KV block: of all KV heads, keys and values.
pub(super) fn block_bytes(shape: &Shape, kv_type: KvType) -> usize {
    2 * shape.kv_heads * BLOCK_TOKENS * kv_type.bytes(shape.head_dim)
}

impl State {
    /// Bytes of everything but the KV cache.
    pub(super) fn bytes(gpu: &Gpu, shape: &Shape, capacity: &Capacity) -> usize {
        let sizes = Sizes::new(shape, capacity);
        sizes.total() + partial_bytes(gpu.sms()) + Metadata::bytes(capacity, shape.heads / shape.kv_heads)
    }

    pub(super) fn new(gpu: &mut Gpu, shape: &Shape, capacity: &Capacity) -> Result<Self, EngineError> {
        let sizes = Sizes::new(shape, capacity);
        let layer = capacity.kv_blocks * block_bytes(shape, capacity.kv_type);
        let frequencies = gpu.clone_to_device(&shape.rope.inverse_frequencies, "rotary frequencies")?;
        let make = |bytes: usize, what: &str| Buffer::zeroed(gpu.context(), bytes, what);
        Ok(Self {
            metadata: Metadata::new(gpu, capacity, shape.heads / shape.kv_heads)?,
            x: make(sizes.x, "the residual stream")?,
            hidden: make(sizes.hidden, "normalised activations")?,
            squares: make(sizes.squares, "sums of squares")?,
            q: make(sizes.q, "queries")?,
            k: make(sizes.kv, "keys")?,
            v: make(sizes.kv, "values")?,
            attended: make(sizes.q, "attention's result")?,
            inside: make(sizes.inside, "the feed-forward's inside")?,
            frequencies,
            cos: make(sizes.angles, "rotations")?,
            sin: make(sizes.angles, "rotations")?,
            cache: make(shape.layers * layer, "the KV cache")?,
            logits: make(sizes.logits, "logits")?,
            best_ids: make(sizes.best, "the best tokens")?,
            best_logits: make(sizes.best, "the best tokens")?,
            best_sums: make(sizes.best, "the best tokens")?,
            best_partial: make(sizes.best_partial, "finding the best tokens")?,
            product_partial: make(partial_bytes(gpu.sms()), "partial products")?,
            product_counters: make(COUNTERS * 4, "counters")?,
            attention_partial: make(sizes.attention_partial, "partial attention")?,
            attention_counters: make(COUNTERS * 4, "counters")?,
            shape: shape.clone(),
            capacity: *capacity,
        })
    }

    /// The address of a layer's part of the cache.
    pub(super) fn layer_cache(&self, layer: usize) -> u64 {
        let bytes = self.capacity.kv_blocks * block_bytes(&self.shape, self.capacity.kv_type);
        self.cache.at(layer * bytes)
    }

    /// What earlier steps have stored of a layer.
    #[cfg(feature = "gpu-tests")]
    pub(super) fn read_cache(&self, layer: usize) -> Result<Vec<u8>, EngineError> {
        let bytes = self.capacity.kv_blocks * block_bytes(&self.shape, self.capacity.kv_type);
        self.cache.read(layer * bytes, bytes)
    }

    /// Queues the copy of a KV block, layer by layer.
    pub(super) fn copy_block(&self, gpu: &Gpu, from: u32, to: u32) -> Result<(), EngineError> {
        let bytes = block_bytes(&self.shape, self.capacity.kv_type);
        for layer in 0..self.shape.layers {
            let first = layer * self.capacity.kv_blocks * bytes;
            gpu.copy(&self.cache, first + from as usize * bytes, first + to as usize * bytes, bytes)?;
        }
        Ok(())
    }

    pub(super) fn split_half(&self) -> i32 {
        i32::from(self.shape.rope.style == RopeStyle::SplitHalf)
    }
}
