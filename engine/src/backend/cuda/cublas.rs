//! Products of many tokens by cuBLAS, on request: the matrix is expanded to FP32 and SGEMM does the rest. Slower than
//! the kernels of `gemm.cu`, which expand on the way in; it is there so that both can be timed.

use std::{collections::HashMap, ffi::c_void, sync::Arc};

use cudarc::driver::{CudaContext, sys::CUstream};
use libloading::Library;

use super::{
    arguments::Mode,
    gpu::{Buffer, Dims, Gpu, Kernel, arguments},
    products::Input,
    weights::{Matrix, suffix},
};
use crate::{
    backend::{Capacity, Shape},
    error::EngineError,
    gguf::DType,
};

/// Files that are tried, in this order. CUDA 12's comes first: 13 knows no card older than compute capability 7.5.
const NAMES: [&str; 3] = ["libcublas.so.12", "libcublas.so.13", "libcublas.so"];
/// Most bytes that rows of a matrix take at a time in FP32; larger matrices go by parts.
const EXPANDED: usize = 256 << 20;
/// Rows of a part are a multiple of this: of tiles, and of what SGEMM's own tiles like.
const PART_ROWS: usize = 128;
/// Blocks a multiprocessor of the kernels around the library.
const BLOCKS: usize = 16;
/// Fewest tokens of a product that goes to the library; below, expanding costs more than it brings.
pub(super) const LEAST_TOKENS: usize = 33;

/// `cublasHandle_t`
type Handle = *mut c_void;
/// `cublasStatus_t`
type Status = i32;

/// `CUBLAS_OP_N`
const AS_IT_IS: i32 = 0;
/// `CUBLAS_OP_T`
const TRANSPOSED: i32 = 1;
/// `CUBLAS_DEFAULT_MATH`, in which an SGEMM never takes TF32.
const DEFAULT_MATH: i32 = 0;

/// `cublasSgemm_v2`: handle, operations, m, n, k, alpha, A and its pitch, B and its pitch, beta, C and its pitch.
type Sgemm = unsafe extern "C" fn(
    Handle,
    i32,
    i32,
    i32,
    i32,
    i32,
    *const f32,
    u64,
    i32,
    u64,
    i32,
    *const f32,
    u64,
    i32,
) -> Status;

/// The library with a handle on a stream.
pub(super) struct Cublas {
    handle: Handle,
    sgemm: Sgemm,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    context: Arc<CudaContext>,
    /// What the functions belong to.
    _library: Library,
}

// SAFETY: a handle may be used by any thread, one at a time, in whose context it was made; `Gpu::bind` sees to that.
unsafe impl Send for Cublas {}

impl Cublas {
    /// Loads the library; an error names what was looked for.
    pub(super) fn open(gpu: &Gpu) -> Result<Self, EngineError> {
        gpu.bind()?;
        let library = load(&NAMES)?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: the signatures are those of cuBLAS 11 to 13; `open` keeps the library as long as its functions.
        unsafe {
            let create = symbol::<unsafe extern "C" fn(*mut Handle) -> Status>(&library, "cublasCreate_v2")?;
            let destroy = symbol(&library, "cublasDestroy_v2")?;
            let sgemm = symbol(&library, "cublasSgemm_v2")?;
            let set_stream =
                symbol::<unsafe extern "C" fn(Handle, CUstream) -> Status>(&library, "cublasSetStream_v2")?;
            let set_math =
                symbol::<unsafe extern "C" fn(Handle, i32) -> Status>(&library, "cublasSetMathMode")?;
            checked(create(&raw mut handle), "cublasCreate")?;
            let context = Arc::clone(gpu.context());
            let open = Self { handle, sgemm, destroy, context, _library: library };
            checked(set_stream(handle, gpu.stream().cu_stream()), "cublasSetStream")?;
            checked(set_math(handle, DEFAULT_MATH), "cublasSetMathMode")?;
            Ok(open)
        }
    }

    /// `out[t][r] = Σ_c weights[r][c] · x[t][c]`, all in FP32, or added to it; `pitch` is the distance of two tokens in `out`.
    ///
    /// # Safety
    /// The addresses are on the handle's device, as large as this says, until the stream has come past the call.
    pub(super) unsafe fn multiply(
        &self,
        gpu: &mut Gpu,
        size: Size,
        weights: u64,
        x: u64,
        out: u64,
        adds: bool,
    ) -> Result<(), EngineError> {
        let Size { rows, columns, tokens, pitch } = size;
        let bytes = 4 * (rows * columns + tokens * columns + rows * tokens) as u64;
        let (m, n, k) = (rows as i32, tokens as i32, columns as i32);
        let (alpha, beta) = (1.0f32, f32::from(u8::from(adds)));
        let (alpha, beta) = (&raw const alpha, &raw const beta);
        let (handle, sgemm) = (self.handle, self.sgemm);
        gpu.foreign("cublasSgemm", bytes, || {
            // The library's matrices go by columns: `out` is rows × tokens there, `weights` its own transpose.
            // SAFETY: promised by the caller; alpha and beta are read before the call returns.
            unsafe {
                sgemm(handle, TRANSPOSED, AS_IT_IS, m, n, k, alpha, weights, k, x, k, beta, out, pitch as i32)
            }
        })
        .and_then(|status| {
            let failed = checked(status, "cublasSgemm");
            // A fault of the device says so at the next call; then that is the reason.
            failed.or_else(|error| gpu.synchronize().and(Err(error)))
        })
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // A lost device refuses; what the handle had there is gone with it.
        let _ = self.context.bind_to_thread();
        // SAFETY: made by `cublasCreate`, destroyed here only.
        let _ = unsafe { (self.destroy)(self.handle) };
    }
}

/// The first of the files that there is.
fn load(names: &[&str]) -> Result<Library, EngineError> {
    let mut last = None;
    for name in names {
        // SAFETY: loading NVIDIA's library runs its initialisers, which have no preconditions.
        match unsafe { Library::new(*name) } {
            Ok(library) => return Ok(library),
            Err(e) => last = Some(e),
        }
    }
    let why = last.map_or_else(String::new, |e| format!(" ({})", e.to_string().replace('\n', " ")));
    Err(EngineError::Backend(format!(
        "--enable-cublas: none of {} can be loaded{why}: install cuBLAS of CUDA 12, put its folder into \
         LD_LIBRARY_PATH, or leave --enable-cublas out",
        names.join(", ")
    )))
}

/// # Safety
/// `T` is the function's type, and is not called after the library is gone.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, EngineError> {
    // SAFETY: promised by the caller.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map(|function| *function).map_err(|e| {
        EngineError::Backend(format!(
            "--enable-cublas: the library lacks {name} ({e}): install cuBLAS of CUDA 12"
        ))
    })
}

fn checked(status: Status, call: &str) -> Result<(), EngineError> {
    let (name, remedy) = match status {
        0 => return Ok(()),
        1 => (
            "CUBLAS_STATUS_NOT_INITIALIZED",
            "the driver may be too old for this cuBLAS: install that of CUDA 12",
        ),
        3 => ("CUBLAS_STATUS_ALLOC_FAILED", "the device's memory is full: lower --ctx-size or --max-batch"),
        8 => ("CUBLAS_STATUS_ARCH_MISMATCH", "this cuBLAS does not know the card: install that of CUDA 12"),
        13 => ("CUBLAS_STATUS_EXECUTION_FAILED", "see nvidia-smi, and dmesg for lines with Xid; start again"),
        _ => ("cublasStatus_t", "leave --enable-cublas out, and please report it with this line"),
    };
    Err(EngineError::Backend(format!("{call}: {name} ({status}): {remedy}")))
}

/// A product's dimensions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) tokens: usize,
    pub(super) pitch: usize,
}

/// Rows that are expanded at a time.
fn part_rows(rows: usize, columns: usize) -> usize {
    let most = EXPANDED / 4 / columns;
    // A matrix of very long rows goes by single tiles.
    if most >= rows { rows } else { (most / PART_ROWS * PART_ROWS).max(super::weights::TILE_ROWS) }
}

/// Bytes of the buffers, for the largest matrix of a model.
struct Sizes {
    expanded: usize,
    result: usize,
}

impl Sizes {
    fn new(shape: &Shape, capacity: &Capacity) -> Self {
        let attention = shape.heads * shape.head_dim;
        let matrices = [
            (shape.ffn_dim, shape.dim),
            (shape.dim, shape.ffn_dim),
            (attention, shape.dim),
            (shape.dim, attention),
            (shape.vocab, shape.dim),
        ];
        let expanded = matrices.into_iter().map(|(rows, columns)| part_rows(rows, columns) * columns * 4);
        Self { expanded: expanded.max().unwrap_or(0), result: capacity.tokens * shape.ffn_dim * 4 }
    }
}

/// The library's products with what they need beside it.
pub(super) struct LibraryProducts {
    cublas: Cublas,
    dequantize: HashMap<DType, Kernel>,
    spread_bias: Kernel,
    silu_mul: Kernel,
    /// Rows of a matrix in FP32.
    expanded: Buffer,
    /// A result that something else becomes of, `[T, ffn_dim]`.
    result: Buffer,
}

impl LibraryProducts {
    /// Bytes that it takes on the device beside the library's own.
    pub(super) fn bytes(shape: &Shape, capacity: &Capacity) -> usize {
        let sizes = Sizes::new(shape, capacity);
        sizes.expanded + sizes.result
    }

    /// For the matrices of a model.
    pub(super) fn new(
        gpu: &Gpu,
        cublas: Cublas,
        types: &[DType],
        shape: &Shape,
        capacity: &Capacity,
    ) -> Result<Self, EngineError> {
        let name = |dtype: DType| format!("dequantize_{}", suffix(dtype));
        gpu.load_kernels(&types.iter().map(|&t| name(t)).collect::<Vec<_>>())?;
        let dequantize = types.iter().map(|&t| Ok((t, gpu.kernel(&name(t))?)));
        let sizes = Sizes::new(shape, capacity);
        Ok(Self {
            cublas,
            dequantize: dequantize.collect::<Result<_, EngineError>>()?,
            spread_bias: gpu.kernel("spread_bias")?,
            silu_mul: gpu.kernel("silu_mul")?,
            expanded: Buffer::new(gpu.context(), sizes.expanded, "expanded weights for cuBLAS")?,
            result: Buffer::new(gpu.context(), sizes.result, "a result of cuBLAS")?,
        })
    }

    /// As `Products::run`, of one matrix, in natural order.
    pub(super) fn run(
        &self,
        gpu: &mut Gpu,
        input: &Input,
        mode: Mode,
        (matrix, out, bias): (&Matrix, u64, u64),
    ) -> Result<(), EngineError> {
        let &Matrix { rows, columns, dtype, .. } = matrix;
        let kernel = self.dequantize.get(&dtype).ok_or_else(|| {
            EngineError::Backend(format!("no kernel dequantize_{} was prepared", suffix(dtype)))
        })?;
        let count = input.tokens * rows;
        let most = gpu.sms() * BLOCKS;
        let grid = Dims::new(count.div_ceil(256).min(most), 256);
        let (rows_i32, columns_i32, count_i32) = (rows as i32, columns as i32, count as i32);
        if bias != 0 {
            // SAFETY: the arguments of spread_bias; `out` holds the step.
            unsafe {
                gpu.launch(
                    &self.spread_bias,
                    grid,
                    4 * count as u64,
                    arguments![bias, out, rows_i32, count_i32],
                )
            }?;
        }
        let adds = mode == Mode::Add || bias != 0;
        let to = if mode == Mode::SiluMul { self.result.pointer() } else { out };
        let part = part_rows(rows, columns);
        for first in (0..rows).step_by(part) {
            let here = part.min(rows - first);
            let (tiles, expanded) = (matrix.pointer(), self.expanded.pointer());
            let (here_i32, first_i32) = (here as i32, first as i32);
            let tasks = here.div_ceil(4) * columns.div_ceil(1024);
            let bytes = (here * dtype.row_bytes(columns) + 4 * here * columns) as u64;
            let arguments = arguments![tiles, expanded, here_i32, columns_i32, first_i32];
            // SAFETY: the arguments of dequantize.cu; `expanded` holds the largest part of any matrix.
            unsafe { gpu.launch(kernel, Dims::new(tasks.min(most), 128), bytes, arguments) }?;
            let size = Size { rows: here, columns, tokens: input.tokens, pitch: rows };
            // SAFETY: `expanded` holds the rows, `x` and `to` the step.
            unsafe { self.cublas.multiply(gpu, size, expanded, input.x, to + 4 * first as u64, adds) }?;
        }
        if mode == Mode::SiluMul {
            // SAFETY: the arguments of silu_mul; both hold the step.
            unsafe { gpu.launch(&self.silu_mul, grid, 12 * count as u64, arguments![out, to, count_i32]) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_told_by_what_was_looked_for() {
        let error =
            load(&["libcublas-none.so.1", "libcublas-none.so"]).expect_err("no such file").to_string();
        for part in ["libcublas-none.so.1, libcublas-none.so", "LD_LIBRARY_PATH", "--enable-cublas"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(error.lines().count(), 1, "{error}");
    }

    #[test]
    fn parts_are_whole_tiles_and_fit() {
        for (rows, columns) in
            [(14336, 4096), (4096, 14336), (128_256, 4096), (5, 32), (28672, 8192), (32000, 1 << 24)]
        {
            let part = part_rows(rows, columns);
            assert!(part == rows || part.is_multiple_of(4), "{rows}×{columns}: {part}");
            assert!(
                part >= 4.min(rows) && (part <= 4 || part * columns * 4 <= EXPANDED),
                "{rows}×{columns}: {part}"
            );
        }
    }

    #[test]
    fn a_status_is_named_with_a_remedy() {
        assert!(checked(0, "cublasSgemm").is_ok());
        let error = checked(8, "cublasCreate").expect_err("failed").to_string();
        assert!(error.starts_with("cublasCreate: CUBLAS_STATUS_ARCH_MISMATCH (8): "), "{error}");
    }
}
