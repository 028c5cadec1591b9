//! What a device must do for the decoder: one trait of coarse operations, so that each side may fuse.
//!
//! A step is `begin`, `embed`, then per layer `qkv`, `attend`, `attention_output`, `feed_forward`,
//! then `logits`. Activations stay inside the backend, in run state that `allocate` makes once; a step
//! allocates nothing.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use crate::{config::KvType, device::Devices, error::EngineError, gguf::Tensor, sched::Batch};

/// The CUDA devices of this machine that this build could use.
pub fn devices() -> Devices {
    #[cfg(feature = "cuda")]
    let found = cuda::device::list();
    #[cfg(not(feature = "cuda"))]
    let found = Devices { note: Some(NO_CUDA.into()), ..Devices::default() };
    found
}

/// Why a build without CUDA uses no device.
#[cfg(not(feature = "cuda"))]
pub(crate) const NO_CUDA: &str =
    "this build runs models on the CPU only: build it with --features cuda (make run CUDA=1 does)";

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

/// A layer's attention weights. `W` is a matrix `[rows, cols]` in the backend's form.
#[derive(Debug)]
pub struct AttentionWeights<W> {
    /// RMSNorm before, `[dim]`.
    pub norm: Vec<f32>,
    /// `[heads * head_dim, dim]`.
    pub q: W,
    /// `[kv_heads * head_dim, dim]`.
    pub k: W,
    /// `[kv_heads * head_dim, dim]`.
    pub v: W,
    /// `[dim, heads * head_dim]`.
    pub output: W,
    /// Biases of q, k, v (`qwen2`).
    pub bias: Option<[Vec<f32>; 3]>,
    /// RMSNorm over each head of q and of k, `[head_dim]` each (`qwen3`).
    pub qk_norm: Option<[Vec<f32>; 2]>,
}

/// A layer's feed-forward weights.
#[derive(Debug)]
pub struct FeedForwardWeights<W> {
    /// RMSNorm before, `[dim]`.
    pub norm: Vec<f32>,
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

    /// In words, such as `cpu (avx512-vnni, 2 threads)`.
    fn describe(&self) -> String;

    /// What a user should know of the device, one line each: logged once the model has loaded.
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }

    /// Takes a matrix in.
    fn load(&mut self, tensor: &Tensor) -> Result<Self::Weight, EngineError>;

    /// Makes run state and KV cache, once, after all `load`s.
    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError>;

    /// Starts a step.
    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError>;

    /// `x = table[tokens]`.
    fn embed(&mut self, table: &Self::Weight) -> Result<(), EngineError>;

    /// `h = rmsnorm(x)`; q, k, v from `h`, with bias, QK norm and RoPE; k and v go to the layer's cache.
    fn qkv(&mut self, layer: usize, weights: &AttentionWeights<Self::Weight>) -> Result<(), EngineError>;

    /// `a = softmax(q·kᵀ / sqrt(head_dim), causal)·v` over each sequence's cached keys and values.
    fn attend(&mut self, layer: usize) -> Result<(), EngineError>;

    /// `x += output · a`.
    fn attention_output(&mut self, weights: &AttentionWeights<Self::Weight>) -> Result<(), EngineError>;

    /// `h = rmsnorm(x)`; `x += down · (silu(gate · h) * (up · h))`.
    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self::Weight>) -> Result<(), EngineError>;

    /// `output · rmsnorm(x[logit_rows])`, `[logit_rows, vocab]`, valid until the next `begin`.
    fn logits(&mut self, norm: &[f32], output: &Self::Weight) -> Result<&[f32], EngineError>;
}
