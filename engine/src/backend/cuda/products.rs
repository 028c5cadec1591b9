//! Which kernel multiplies, and how it is launched: the one place that knows the geometry of `gemv.cu`, `small.cu`,
//! `skinny.cu` and `gemm.cu`.

use std::collections::HashMap;

use super::{
    arguments::{Mode, Product},
    gpu::{Dims, Gpu, Kernel, arguments},
    state::State,
    weights::{Matrix, suffix},
};
use crate::{error::EngineError, gguf::DType};

/// Most tokens of a small step.
pub(super) const SMALL_BATCH: usize = 8;

/// What is multiplied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    /// `[tokens, columns]`, in permuted order for a small batch.
    pub(super) x: u64,
    /// The norm to be fused into reading x, in permuted order; 0: none. Small batches only.
    pub(super) norm: u64,
    /// The kernels for small batches, and permuted order.
    pub(super) small: bool,
    pub(super) tokens: usize,
}
