//! Run state: the step's batch and activations, made once.

use super::kv::KvCache;
use crate::{
    backend::{Capacity, Shape},
    error::EngineError,
    gguf::Tensor,
    sched::{BLOCK_TOKENS, Batch, BatchSequence},
};

/// Everything a step works on. `T` is the batch's tokens; buffers hold `capacity.tokens` of them.
pub(super) struct RunState {
    pub(super) shape: Shape,
    pub(super) capacity: Capacity,
    pub(super) batch: Batch,
    /// Residual stream, `[T, dim]`.
    pub(super) x: Vec<f32>,
    /// Queries, `[T, heads * head_dim]`.
    pub(super) q: Vec<f32>,
    /// Keys, `[T, kv_heads * head_dim]`.
    pub(super) k: Vec<f32>,
    /// Values, `[T, kv_heads * head_dim]`.
    pub(super) v: Vec<f32>,
    /// `[logit_rows, vocab]`.
    pub(super) logits: Vec<f32>,
    /// `[hidden_rows, dim]`, at most `T` of them.
    pub(super) hidden: Vec<f32>,
    /// Cosines of each token's angles, times the magnitude, `[T, rotary / 2]`.
    pub(super) cos: Vec<f32>,
    /// The sines.
    pub(super) sin: Vec<f32>,
    pub(super) cache: KvCache,
}

/// Where a token of the batch stands.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Its KV block.
    pub(super) block: u32,
    /// Its place in the block.
    pub(super) slot: usize,
}

fn buffer(rows: usize, width: usize) -> Result<Vec<f32>, EngineError> {
    let n = rows.checked_mul(width).filter(|&n| n <= isize::MAX as usize / 4);
    let n = n.ok_or_else(|| {
        EngineError::Backend(format!("run state of {rows} × {width} numbers is out of range"))
    })?;
    Ok(vec![0.0; n])
}

impl RunState {
    /// Reserves everything; the system commits the pages that a step touches.
    pub(super) fn new(shape: &Shape, capacity: &Capacity) -> Result<Self, EngineError> {
        let (s, tokens) = (shape, capacity.tokens);
        let rotary = 2 * s.rope.inverse_frequencies.len();
        let fits = s.head_dim > 0 && s.head_dim.is_multiple_of(8) && rotary <= s.head_dim;
        if !fits || s.kv_heads == 0 || !s.heads.is_multiple_of(s.kv_heads) {
            return Err(EngineError::Model(format!(
                "heads of {} (rotary {rotary}), {} query and {} KV heads: the CPU backend wants a head of a multiple of 8, \
                 a rotary width within it, and query heads in a multiple of KV heads",
                s.head_dim, s.heads, s.kv_heads
            )));
        }
        Ok(Self {
            batch: Batch::default(),
            x: buffer(tokens, s.dim)?,
            q: buffer(tokens, s.heads * s.head_dim)?,
            k: buffer(tokens, s.kv_heads * s.head_dim)?,
            v: buffer(tokens, s.kv_heads * s.head_dim)?,
            logits: buffer(capacity.logit_rows, s.vocab)?,
            hidden: buffer(tokens, s.dim)?,
            cos: buffer(tokens, rotary / 2)?,
            sin: buffer(tokens, rotary / 2)?,
            cache: KvCache::new(shape, capacity.kv_blocks, capacity.kv_type)?,
            shape: shape.clone(),
            capacity: *capacity,
        })
    }

    /// Takes the step's batch in, checked against the capacity, and turns positions into rotations.
    pub(super) fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.capacity.check(batch)?;
        self.batch.clone_from(batch);
        for copy in &batch.copies {
            self.cache.copy(copy.from, copy.to);
        }
        let rope = &self.shape.rope;
        let angles =
            batch.positions.iter().flat_map(|&p| rope.inverse_frequencies.iter().map(move |&f| (p, f)));
        for ((cos, sin), (position, frequency)) in self.cos.iter_mut().zip(&mut self.sin).zip(angles) {
            // In f64: at position 100,000 an f32 angle is off by 0.004 radians.
            let (s, c) = (f64::from(position) * f64::from(frequency)).sin_cos();
            (*cos, *sin) = (c as f32 * rope.magnitude, s as f32 * rope.magnitude);
        }
        Ok(())
    }

    /// A row of the step's logits.
    pub(super) fn row(&self, index: usize) -> &[f32] {
        &self.logits[index * self.shape.vocab..(index + 1) * self.shape.vocab]
    }

    /// One of the step's hidden states.
    pub(super) fn hidden(&self, index: usize) -> &[f32] {
        &self.hidden[index * self.shape.dim..(index + 1) * self.shape.dim]
    }

    /// The batch's tokens.
    pub(super) fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }
}

/// Each token's block and slot, in the batch's order.
pub(super) fn places(batch: &Batch) -> impl Iterator<Item = Place> {
    batch.sequences.iter().flat_map(move |s| (0..s.len).map(move |i| place(batch, s, i)))
}

/// Block and slot of token `i` of a sequence of the batch.
pub(super) fn place(batch: &Batch, sequence: &BatchSequence, i: usize) -> Place {
    let position = sequence.context + i;
    Place { block: batch.blocks_of(sequence)[position / BLOCK_TOKENS], slot: position % BLOCK_TOKENS }
}

/// The error of an operation before `allocate`.
pub(super) fn not_allocated() -> EngineError {
    EngineError::Backend("the CPU backend was asked to run before its run state was made".to_owned())
}

/// Holds a weight to the shape the operation needs.
pub(super) fn expect(weight: &Tensor, rows: usize, cols: usize) -> Result<(), EngineError> {
    if weight.rows() == rows && weight.cols() == cols {
        return Ok(());
    }
    Err(EngineError::Model(format!(
        "tensor {} is {} × {}, the model needs {rows} × {cols}",
        weight.info.name,
        weight.rows(),
        weight.cols()
    )))
}
