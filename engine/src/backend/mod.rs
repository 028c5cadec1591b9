//! What a device must do for the decoder: one trait of coarse operations, so that each side may fuse.
//!
//! A step is `begin`, `embed`, then per layer `qkv`, `attend`, `attention_output`, `feed_forward`,
//! then `logits`, `keep_hidden` where somebody wants hidden states instead, and `rows` for what sampling wants of them. Activations stay inside the backend, in run
//! state that `allocate` makes once; a step allocates nothing.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use std::time::Duration;

#[cfg(not(feature = "cuda"))]
use crate::device::Host;
use crate::{
    config::{BackendChoice, KvType},
    device::Devices,
    error::EngineError,
    gguf::{DType, Tensor},
    sched::{BLOCK_TOKENS, Batch},
};

/// The CUDA devices of this machine that this build could use.
pub fn devices() -> Devices {
    #[cfg(feature = "cuda")]
    let found = cuda::device::list();
    #[cfg(not(feature = "cuda"))]
    let found = Devices { note: Some(NO_CUDA.into()), ..Devices::default() };
    found
}

/// What a device does with nothing else to do, which a model's speed is held against.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeviceSpeed {
    /// GB/s of copying memory, bytes read and bytes written.
    pub copy_gb_per_s: f64,
    /// TFLOP/s of large products in FP32, by what multiplies: our own kernel, and cuBLAS where it can be loaded.
    pub products: Vec<(&'static str, f64)>,
}

/// Measures the device that `choice` stands for; `None` where that is the CPU.
pub fn device_speed(choice: &BackendChoice) -> Result<Option<DeviceSpeed>, EngineError> {
    #[cfg(feature = "cuda")]
    if let cuda::device::Chosen::Device(device) = cuda::device::chosen(choice)? {
        return cuda::measure(&device).map(Some);
    }
    let _ = choice;
    Ok(None)
}

/// Why a build without CUDA uses no device.
pub(crate) const NO_CUDA: &str =
    "this build runs models on the CPU only: build it with --features cuda (make run CUDA=1 does)";

/// Why a card that is there is not used, in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub(crate) fn unused_card(choice: &BackendChoice) -> Option<String> {
    let there = *choice == BackendChoice::Auto && !Host::read().cards.is_empty();
    there.then(|| NO_CUDA.to_owned())
}

/// Which halves of a head RoPE rotates together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pairs (0,1), (2,3), …: `llama`.
    Adjacent,
    /// Pairs (i, i + n/2): NeoX, `qwen2`, `qwen3`.
    SplitHalf,
}

/// Rotary embedding, scaling already folded in.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which elements pair up.
    pub style: RopeStyle,
    /// Angle per position of each pair, in radians; its length is half the rotated width, which may be
    /// less than the head.
    pub inverse_frequencies: Vec<f32>,
    /// Multiplies sine and cosine (`YaRN`'s magnitude); 1 otherwise.
    pub magnitude: f32,
}

/// The model's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward's inside.
    pub ffn_dim: usize,
    /// Rows of the output matrix.
    pub vocab: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_epsilon: f32,
    /// Rotary embedding.
    pub rope: Rope,
}

/// How much one step, and the cache, must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Most tokens in a step.
    pub tokens: usize,
    /// Most sequences in a step.
    pub sequences: usize,
    /// Most rows of logits in a step.
    pub logit_rows: usize,
    /// KV blocks of `sched::BLOCK_TOKENS` tokens.
    pub kv_blocks: usize,
    /// Storage of keys and values.
    pub kv_type: KvType,
}

impl Capacity {
    /// Holds a batch to what was made room for, and to itself.
    pub(crate) fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        let tokens = batch.tokens.len();
        let sizes = tokens <= self.tokens
            && batch.positions.len() == tokens
            && batch.sequences.len() <= self.sequences
            && batch.logit_rows.len() <= self.logit_rows
            && batch.hidden_rows.len() <= tokens
            && batch.logit_rows.iter().chain(&batch.hidden_rows).all(|&r| (r as usize) < tokens)
            && batch.block_tables.iter().all(|&b| (b as usize) < self.kv_blocks)
            && batch.copies.iter().all(|c| (c.from.max(c.to) as usize) < self.kv_blocks);
        let mut next = 0;
        let covered = batch.sequences.iter().all(|s| {
            let starts = s.start == next && s.len <= tokens - next;
            next += if starts { s.len } else { 0 };
            let blocks = s.context.checked_add(s.len).map(|n| n.div_ceil(BLOCK_TOKENS));
            let end = blocks.and_then(|n| n.checked_add(s.table));
            starts
                && end.is_some_and(|end| end <= batch.block_tables.len())
                && (0..s.len).all(|i| batch.positions[s.start + i] as usize == s.context + i)
        });
        if sizes && covered && next == tokens {
            return Ok(());
        }
        Err(EngineError::Backend(format!(
            "a batch of {tokens} tokens does not fit the run state made for {self:?}"
        )))
    }
}

/// What sampling needs of a row of logits: the less, the less a device has to bring to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// So many of the best tokens, 1 to [`MOST_BEST`].
    Best(usize),
    /// The whole row.
    All,
}

impl Need {
    /// What serves both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Best(a), Self::Best(b)) => Self::Best(a.max(b)),
            _ => Self::All,
        }
    }
}

/// The largest [`Need::Best`]: covers the `top_k` that people use.
pub const MOST_BEST: usize = 64;

/// A row of logits as it was asked for, or more of it.
#[derive(Debug, Clone, Copy)]
pub enum Row<'a> {
    /// Ids and logits of the best tokens, best first, equal ones by id; none where no logit is a number.
    Best(&'a [(u32, f32)]),
    /// `[vocab]`
    All(&'a [f32]),
}

/// What a device has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Kernels launched, those within a graph counted one by one.
    pub launches: u64,
    /// Times the host waited for the device.
    pub syncs: u64,
}

/// A step's time, from the end of the work of the step before to the end of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepTimes {
    /// Until its own work began: the device waited for the host.
    pub idle: Duration,
    /// From there to the end.
    pub busy: Duration,
}

/// What is going to be asked of a backend's memory, beside keys and values.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    /// Bytes of all matrices in the backend's form.
    pub weights: u64,
    /// The model's dimensions.
    pub shape: &'a Shape,
    /// What run state must hold; `kv_blocks` are not known yet.
    pub capacity: &'a Capacity,
    /// The longest sequence asked for; `None`: whatever fits.
    pub ctx_size: Option<usize>,
}

/// A layer's attention weights. `W` is a matrix `[rows, cols]`, `V` a vector, in the backend's form.
#[derive(Debug)]
pub struct AttentionWeights<W, V = Vec<f32>> {
    /// RMSNorm before, `[dim]`.
    pub norm: V,
    /// `[heads * head_dim, dim]`.
    pub q: W,
    /// `[kv_heads * head_dim, dim]`.
    pub k: W,
    /// `[kv_heads * head_dim, dim]`.
    pub v: W,
    /// `[dim, heads * head_dim]`.
    pub output: W,
    /// Biases of q, k, v (`qwen2`).
    pub bias: Option<[V; 3]>,
    /// RMSNorm over each head of q and of k, `[head_dim]` each (`qwen3`).
    pub qk_norm: Option<[V; 2]>,
}

/// A layer's feed-forward weights.
#[derive(Debug)]
pub struct FeedForwardWeights<W, V = Vec<f32>> {
    /// RMSNorm before, `[dim]`.
    pub norm: V,
    /// `[ffn_dim, dim]`.
    pub gate: W,
    /// `[ffn_dim, dim]`.
    pub up: W,
    /// `[dim, ffn_dim]`.
    pub down: W,
}

/// A device that runs the decoder's operations on the batch given to `begin`.
///
/// Let `T` be the batch's tokens; the residual stream is `x: [T, dim]`.
pub trait Backend: Send + 'static {
    /// A weight matrix in the device's own form.
    type Weight: Send;
    /// Norms and biases in the device's own form.
    type Vector: Send;

    /// In words, such as `cpu (avx512-vnni, 2 threads)`.
    fn describe(&self) -> String;

    /// What a user should know of the device, one line each: logged once the model has loaded.
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether matrices are copied to memory of the device's own, so that the speed of it is worth telling.
    fn copies_weights(&self) -> bool {
        false
    }

    /// Takes a matrix in.
    fn load(&mut self, tensor: &Tensor) -> Result<Self::Weight, EngineError>;

    /// A matrix of random weights of about a trained one's size, for benchmarks without a file.
    fn random(
        &mut self,
        dtype: DType,
        rows: usize,
        cols: usize,
        seed: u32,
    ) -> Result<Self::Weight, EngineError>;

    /// Takes a norm or a bias in.
    fn load_vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, EngineError>;

    /// Bytes that a matrix takes in the backend's form.
    fn stored_bytes(&self, dtype: DType, rows: usize, cols: usize) -> u64 {
        (rows * dtype.row_bytes(cols)) as u64
    }

    /// Bytes that may go to keys and values, asked before anything is loaded; an error where not even the
    /// rest fits.
    fn kv_room(&self, demand: &Demand<'_>) -> Result<u64, EngineError>;

    /// Whether the whole KV cache is committed by `allocate`, so that keeping blocks that nobody holds costs nothing.
    fn commits_cache(&self) -> bool {
        false
    }

    /// Makes run state and KV cache, once, after all `load`s.
    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError>;

    /// Starts a step: makes the batch's copies of KV blocks, in their order, before anything else of it.
    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError>;

    /// `x = table[tokens]`.
    fn embed(&mut self, table: &Self::Weight) -> Result<(), EngineError>;

    /// `h = rmsnorm(x)`; q, k, v from `h`, with bias, QK norm and RoPE; k and v go to the layer's cache.
    fn qkv(
        &mut self,
        layer: usize,
        weights: &AttentionWeights<Self::Weight, Self::Vector>,
    ) -> Result<(), EngineError>;

    /// `a = softmax(q·kᵀ / sqrt(head_dim), causal)·v` over each sequence's cached keys and values.
    fn attend(
        &mut self,
        layer: usize,
        weights: &AttentionWeights<Self::Weight, Self::Vector>,
    ) -> Result<(), EngineError>;

    /// Says which norm reads x after the next addition to it, for a backend that has the two in one.
    fn next_norm(&mut self, _norm: &Self::Vector) {}

    /// `x += output · a`.
    fn attention_output(
        &mut self,
        weights: &AttentionWeights<Self::Weight, Self::Vector>,
    ) -> Result<(), EngineError>;

    /// `h = rmsnorm(x)`; `x += down · (silu(gate · h) * (up · h))`.
    fn feed_forward(
        &mut self,
        weights: &FeedForwardWeights<Self::Weight, Self::Vector>,
    ) -> Result<(), EngineError>;

    /// `output · rmsnorm(x[logit_rows])`, `[logit_rows, vocab]`.
    fn logits(&mut self, norm: &Self::Vector, output: &Self::Weight) -> Result<(), EngineError>;

    /// `rmsnorm(x[hidden_rows])` for [`Backend::hidden`]. Asked after `logits`, and only where there are such rows.
    fn keep_hidden(&mut self, norm: &Self::Vector) -> Result<(), EngineError>;

    /// Has what is needed of each row of the step's logits brought to the host, one need a row, and so ends the step:
    /// all is computed when this returns, though whole rows may still be on their way.
    fn rows(&mut self, needs: &[Need]) -> Result<(), EngineError>;

    /// Waits until the first `count` rows have come; each may be used while those after it still come.
    fn wait_for_rows(&mut self, _count: usize) -> Result<(), EngineError> {
        Ok(())
    }

    /// Row `index` of the step's logits, which has come; valid until the next `begin`.
    fn row(&self, index: usize) -> Row<'_>;

    /// Number `index` of the step's hidden states, `[dim]`; valid from `rows` until the next `begin`.
    fn hidden(&self, index: usize) -> &[f32];

    /// When the last step's work was done, by the device's own clock; none where it has no clock, or there was no step before.
    fn step_times(&self) -> Option<StepTimes> {
        None
    }

    /// What the device has done so far; all zero on a host.
    fn counters(&self) -> Counters {
        Counters::default()
    }
}
