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

/// Kernels by how many tokens they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Family {
    /// `gemv.cu`: one token.
    One,
    /// `small.cu`: up to so many.
    Small(usize),
    /// `skinny.cu`: up to so many.
    Skinny(usize),
    /// `gemm.cu`: any number.
    Tiled,
}

impl Family {
    const ALL: [Self; 8] = [
        Self::One,
        Self::Small(2),
        Self::Small(4),
        Self::Small(8),
        Self::Skinny(16),
        Self::Skinny(32),
        Self::Skinny(64),
        Self::Tiled,
    ];

    fn of(input: &Input) -> Self {
        match (input.small, input.tokens) {
            (true, 1) => Self::One,
            (true, 2) => Self::Small(2),
            (true, ..=4) => Self::Small(4),
            (true, _) => Self::Small(8),
            (false, ..=16) => Self::Skinny(16),
            (false, ..=32) => Self::Skinny(32),
            (false, ..=64) => Self::Skinny(64),
            (false, _) => Self::Tiled,
        }
    }

    /// The launch for matrices of so many rows.
    fn dims(self, sms: usize, rows: &[usize], columns: usize, tokens: usize, mode: Mode) -> Dims {
        let tiles: usize = rows.iter().map(|rows| rows.div_ceil(4)).sum();
        let units = if mode == Mode::Gated { tiles / 2 } else { tiles };
        let slices = columns.div_ceil(1024);
        match self {
            Self::One => {
                let warps = if slices >= 8 { slices.min(14) } else { slices * (8 / slices) };
                Dims { grid: [units.min(sms * 2) as u32, 1, 1], block: [32, warps as u32], shared: 0 }
            }
            Self::Small(_) | Self::Skinny(_) => Dims::new(sms * 2, 256),
            Self::Tiled => {
                Dims::new(rows.iter().map(|r| r.div_ceil(128)).sum::<usize>() * tokens.div_ceil(64), 128)
            }
        }
    }

    fn kernel(self, dtype: DType) -> String {
        let suffix = suffix(dtype);
        match self {
            Self::One => format!("gemv_{suffix}"),
            Self::Small(n) => format!("small_{suffix}_b{n}"),
            Self::Skinny(n) => format!("skinny_{suffix}_n{n}"),
            Self::Tiled => format!("gemm_{suffix}"),
        }
    }
}

/// The kernels of the types that a model has.
pub(super) struct Products {
    kernels: HashMap<(Family, DType), Kernel>,
}

impl Products {
    pub(super) fn find(gpu: &Gpu, types: &[DType]) -> Result<Self, EngineError> {
        let mut kernels = HashMap::new();
        for &dtype in types {
            for family in Family::ALL {
                kernels.insert((family, dtype), gpu.kernel(&family.kernel(dtype))?);
            }
        }
        Ok(Self { kernels })
    }

    /// Multiplies the input by up to three matrices of one type and as many columns, each with its output and bias
    /// (0: none).
    pub(super) fn run(
        &self,
        gpu: &mut Gpu,
        state: &State,
        input: &Input,
        mode: Mode,
        matrices: &[(&Matrix, u64, u64)],
    ) -> Result<(), EngineError> {
        let Some(&(first, _, _)) = matrices.first() else { return Ok(()) };
        let mut product = Product {
            matrices: matrices.len() as i32,
            columns: first.columns as i32,
            tokens: input.tokens as i32,
            mode: mode as i32,
            out_permuted: i32::from(input.small),
            epsilon: state.shape.norm_epsilon,
            x: input.x,
            norm: input.norm,
            partial: state.product_partial.pointer(),
            counters: state.product_counters.pointer(),
            ..Product::default()
        };
        let mut bytes = (input.tokens * first.columns * 4) as u64;
        for (i, &(matrix, out, bias)) in matrices.iter().enumerate() {
            assert!(matrix.dtype == first.dtype && matrix.columns == first.columns);
            (product.weight[i], product.out[i], product.bias[i]) = (matrix.pointer(), out, bias);
            product.rows[i] = matrix.rows as i32;
            bytes += matrix.bytes() + (input.tokens * matrix.rows * 4) as u64;
        }
        let family = Family::of(input);
        let kernel = self.kernels.get(&(family, first.dtype)).ok_or_else(|| {
            EngineError::Backend(format!("no kernel {} was prepared", family.kernel(first.dtype)))
        })?;
        let rows: Vec<usize> = matrices.iter().map(|(matrix, _, _)| matrix.rows).collect();
        let dims = family.dims(gpu.sms(), &rows, first.columns, input.tokens, mode);
        // SAFETY: the argument of the products' kernels; the geometry is theirs, and the buffers hold the step.
        unsafe { gpu.launch(kernel, dims, bytes, arguments![product]) }
    }
}
