//! Which kernel multiplies, and how it is launched: the one place that knows the geometry of `gemv.cuh`,
//! `skinny.cu` and `gemm.cu`.

use std::collections::HashMap;

use super::{
    arguments::{Mode, Product},
    cublas::{LEAST_TOKENS, LibraryProducts},
    gpu::{Dims, Gpu, Kernel, arguments},
    state::State,
    weights::{Matrix, suffix},
};
use crate::{error::EngineError, gguf::DType};

/// Most tokens of a small step.
pub(super) const SMALL_BATCH: usize = 10;
/// Most tokens of a product that has gate and up at once, or that takes part in a norm.
pub(super) const FUSED_BATCH: usize = 32;

/// What is multiplied.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    /// `[tokens, columns]`, in permuted order for a small batch.
    pub(super) x: u64,
    /// The norm to be fused into reading x, in permuted order; 0: none. Small batches only.
    pub(super) norm: u64,
    /// The kernels for small batches, and permuted order.
    pub(super) small: bool,
    /// x is what a product in `Mode::AddNormed` left, still to be divided by its root mean square.
    pub(super) divided: bool,
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
    /// `gemm.cu`, tiles of 64 tokens.
    Tiled64,
    /// `gemm.cu`, tiles of 128 tokens.
    Tiled,
}

impl Family {
    const ALL: [Self; 16] = [
        Self::One,
        Self::Small(2),
        Self::Small(3),
        Self::Small(4),
        Self::Small(5),
        Self::Small(6),
        Self::Small(8),
        Self::Small(10),
        Self::Skinny(12),
        Self::Skinny(16),
        Self::Skinny(20),
        Self::Skinny(24),
        Self::Skinny(28),
        Self::Skinny(32),
        Self::Tiled64,
        Self::Tiled,
    ];

    /// One more token must not cost much more, so the kernels are close together where a token costs most.
    fn of(input: &Input) -> Self {
        match (input.small, input.tokens) {
            (true, 1) => Self::One,
            (true, tokens @ ..=6) => Self::Small(tokens),
            (true, tokens) => Self::Small(tokens.next_multiple_of(2)),
            (false, ..=12) => Self::Skinny(12),
            (false, tokens @ ..=32) => Self::Skinny(tokens.next_multiple_of(4)),
            // The smaller tile costs a twentieth more a token, and wastes less where it does not fill.
            (false, tokens) if 21 * tokens.div_ceil(64) < 40 * tokens.div_ceil(128) => Self::Tiled64,
            (false, _) => Self::Tiled,
        }
    }

    /// The launch for matrices of so many rows.
    fn dims(self, sms: usize, rows: &[usize], columns: usize, mode: Mode) -> Dims {
        let gated = mode == Mode::Gated;
        match self {
            Self::One => Walk::ONE.dims(sms, rows, columns, gated),
            Self::Small(tokens) => Walk::small(tokens).dims(sms, rows, columns, gated),
            Self::Tiled => Dims::new(sms * 2, 256),
            Self::Skinny(..=20) => Dims::new(sms * 2, 128),
            Self::Skinny(_) => Dims::new(sms, 256),
            Self::Tiled64 => Dims::new(sms * 3, 128),
        }
    }

    fn kernel(self, dtype: DType) -> String {
        let suffix = suffix(dtype);
        match self {
            Self::One => format!("gemv_{suffix}"),
            Self::Small(n) => format!("small_{suffix}_b{n}"),
            Self::Skinny(n) => format!("skinny_{suffix}_n{n}"),
            Self::Tiled64 => format!("gemm_{suffix}_64"),
            Self::Tiled => format!("gemm_{suffix}"),
        }
    }
}

/// The kernel for many tokens and its launch.
pub(super) fn tiled(gpu: &Gpu, dtype: DType) -> Result<(Kernel, Dims), EngineError> {
    Ok((gpu.kernel(&Family::Tiled.kernel(dtype))?, Family::Tiled.dims(gpu.sms(), &[], 0, Mode::Store)))
}

/// The launch of `gemv.cuh`. Warps of a block lie along the slices of the columns (y), several side by side where they split
/// the tokens, and along row tiles (z); units are the row tiles of all matrices, or of one where a gate and its up go together.
#[derive(Debug, Clone, Copy)]
struct Walk {
    tokens: usize,
    /// Warps that share rows and split the tokens.
    split: usize,
    /// Warps of a multiprocessor, as registers allow.
    warps: usize,
}

impl Walk {
    const ONE: Self = Self { tokens: 1, split: 1, warps: 16 };

    fn small(tokens: usize) -> Self {
        Self { tokens, split: if tokens > 5 { 2 } else { 1 }, warps: if tokens == 2 { 12 } else { 8 } }
    }

    fn dims(self, sms: usize, rows: &[usize], columns: usize, gated: bool) -> Dims {
        let slices = columns.div_ceil(1024);
        // Of twelve warps three blocks of four or two of six.
        let most = match self.warps {
            12 if slices <= 4 => 4,
            12 => 6,
            _ => 8 / self.split,
        };
        let y = slices.div_ceil(slices.div_ceil(most)) * self.split;
        let z = (4 / y).max(if gated { 2 } else { 1 }).min(self.warps / y);
        // Gate and up at once, but in turn where warps would have no place for that: four of twelve with two blocks of four.
        let placed = |z: usize| self.warps / (y * z) * (y * z);
        let z = if placed(z) < placed(1) { 1 } else { z };
        let abreast = if gated && z % 2 == 0 { z / 2 } else { z };
        let tiles = rows.iter().take(if gated { 1 } else { rows.len() }).map(|rows| rows.div_ceil(4));
        let units: usize = tiles.sum();
        // Partial sums of a block must fit its shared memory, and those of all resident blocks the multiprocessor's.
        let resident = self.warps / (y * z);
        let sum_bytes = slices * 16 * self.tokens * if gated { 2 } else { 1 };
        let shared = if self.tokens == 1 { SHARED } else { SHARED.min(SM_SHARED / resident) };
        let most = (shared / sum_bytes / abreast).max(1) * abreast;
        let grid = units.div_ceil(abreast).min(sms * resident);
        // More blocks than run at once cost the last ones a turn of their own: then all turns are to be full.
        let turns = units.div_ceil(most).div_ceil(grid);
        let grid = if turns > 1 { turns * sms * resident } else { grid };
        let shared = units.div_ceil(grid * abreast) * abreast * sum_bytes;
        Dims { grid: [grid as u32, 1, 1], block: [32, y as u32, z as u32], shared: shared as u32 }
    }
}

/// Bytes of shared memory that a block of `gemv.cuh` may take for partial sums, beside what it has of its own, and what all
/// that are on a multiprocessor may.
const SHARED: usize = 44 << 10;
const SM_SHARED: usize = 88 << 10;

/// Rows whose squares are summed together: `SQUARES_ROWS` of `stripes.cuh`.
const SQUARES_ROWS: usize = 64;

/// Bytes of the sums of squares of rows of so many numbers.
pub(super) fn squares_bytes(columns: usize) -> usize {
    columns.div_ceil(SQUARES_ROWS) * FUSED_BATCH * 4
}

/// Bytes of workspace that products take: two tiles of 128 by 128 sums for each block of `gemm.cu`, which is the most.
pub(super) fn partial_bytes(sms: usize) -> usize {
    sms * 2 * 2 * 128 * 128 * 4
}

/// The kernels of the types that a model has.
pub(super) struct Products {
    kernels: HashMap<(Family, DType), Kernel>,
    /// Takes over where tokens are many.
    library: Option<LibraryProducts>,
}

impl Products {
    /// The names of the kernels of some types.
    pub(super) fn names(types: &[DType]) -> impl Iterator<Item = String> {
        types.iter().flat_map(|&dtype| Family::ALL.map(|family| family.kernel(dtype)))
    }

    pub(super) fn find(
        gpu: &Gpu,
        types: &[DType],
        library: Option<LibraryProducts>,
    ) -> Result<Self, EngineError> {
        let mut kernels = HashMap::new();
        for &dtype in types {
            for family in Family::ALL {
                kernels.insert((family, dtype), gpu.kernel(&family.kernel(dtype))?);
            }
        }
        Ok(Self { kernels, library })
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
        if let Some(library) = self.library.as_ref().filter(|_| !input.small && input.tokens >= LEAST_TOKENS)
        {
            return matrices.iter().try_for_each(|&one| library.run(gpu, input, mode, one));
        }
        let family = Family::of(input);
        let mut product = Product {
            matrices: matrices.len() as i32,
            columns: first.columns as i32,
            tokens: input.tokens as i32,
            mode: mode.kernels(),
            out_permuted: i32::from(input.small && mode != Mode::Store),
            epsilon: state.shape.norm_epsilon,
            x: input.x,
            norm: input.norm,
            partial: state.product_partial.pointer(),
            counters: state.product_counters.pointer(),
            hidden: state.hidden.pointer(),
            squares: state.squares.pointer(),
            next: if let Mode::AddNormed(weights) = mode { weights } else { 0 },
            parts: if input.divided { first.columns.div_ceil(SQUARES_ROWS) as i32 } else { 0 },
            ..Product::default()
        };
        let mut bytes = (input.tokens * first.columns * 4) as u64;
        for (i, &(matrix, out, bias)) in matrices.iter().enumerate() {
            assert!(matrix.dtype == first.dtype && matrix.columns == first.columns);
            (product.weight[i], product.out[i], product.bias[i]) = (matrix.pointer(), out, bias);
            product.rows[i] = matrix.rows as i32;
            bytes += matrix.bytes() + (input.tokens * matrix.rows * 4) as u64;
        }
        let kernel = self.kernels.get(&(family, first.dtype)).ok_or_else(|| {
            EngineError::Backend(format!("no kernel {} was prepared", family.kernel(first.dtype)))
        })?;
        let rows: Vec<usize> = matrices.iter().map(|(matrix, _, _)| matrix.rows).collect();
        let dims = family.dims(gpu.sms(), &rows, first.columns, mode);
        // SAFETY: the argument of the products' kernels; the geometry is theirs, and the buffers hold the step.
        unsafe { gpu.launch(kernel, dims, bytes, arguments![product]) }
    }
}
