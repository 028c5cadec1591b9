//! Matrix products over GGUF blocks: `out[t, r] = weight[r, :] · x[t, :]`.
//!
//! Weights stay in their file's blocks. For quantised types activations are taken in 8 bits per group of
//! 32 (see [`Activations`]), a group's dot product is an exact integer, and only scales are floats; for
//! F32, F16 and BF16 everything is f32.
//!
//! # Canonical order
//! For a given [`Isa`] a result's bits depend on its weight row and its activation row alone: not on how
//! many rows are in the call, on threads, or on which kernel ran. Every kernel adds in this order:
//! - Group `g` belongs to lane `g mod 8`. Lane sums are `acc = fma(dot, d * dx, acc)` over its groups in
//!   order; minima likewise, apart, `acc_m = fma(m, dx * sum, acc_m)`, and a lane is `e = acc + acc_m`.
//!   Types with scales per 16 columns keep a sum for each half group, and `e` adds the two.
//! - The result is `((e0 + e4) + (e2 + e6)) + ((e1 + e5) + (e3 + e7))`.
//! - Float types: 16 lanes, column `k` in lane `k mod 16`, and a fixed tree.
//!
//! | module | holds |
//! | --- | --- |
//! | `activations` | the 8-bit form of activations |
//! | `blocks` | every block type unpacked in plain Rust |
//! | `portable`, `avx2` | kernels in plain Rust, and the same compiled for AVX2 |
//! | `avx512` | kernels with AVX-512 VNNI: native blocks times few columns, panels times many |

#![allow(clippy::inline_always, reason = "helpers must take on the features of the kernel that calls them")]
#![allow(clippy::wildcard_imports, reason = "std::arch's names are prefixed, and a kernel needs dozens")]

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod portable;

use std::{
    marker::PhantomData,
    sync::{Mutex, PoisonError},
};

pub use activations::Activations;
use activations::{CHUNK, Form, Line};

use super::pool::{Pool, SharedMut};
use crate::gguf::DType;

/// Weight rows that a kernel works on at a time.
pub(super) const TILE_ROWS: usize = 32;
/// Activation rows that a kernel works on at a time.
const TILE_COLS: usize = 6;

/// A kernel family. Results are reproducible within one, and equal within rounding between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
}

impl Isa {
    /// The best this machine has.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }

    /// All that this machine has, worst first.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512Vnni].into_iter().filter(|isa| isa.is_available()).collect()
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Self::Portable
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
        };
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
        };
        match self {
            Self::Portable => true,
            Self::Avx2 => avx2(),
            Self::Avx512Vnni => avx2() && avx512(),
        }
    }

    /// For logs: `portable`, `avx2`, `avx512-vnni`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512Vnni => "avx512-vnni",
        }
    }
}

/// A weight matrix `[rows, cols]` in its file's blocks, row after row.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    dtype: DType,
    bytes: &'a [u8],
    rows: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// Wraps `rows * dtype.row_bytes(cols)` bytes.
    ///
    /// # Panics
    /// When `cols` is no whole number of blocks, or `bytes` has another length.
    pub fn new(dtype: DType, bytes: &'a [u8], rows: usize, cols: usize) -> Self {
        assert!(cols.is_multiple_of(dtype.block_len()), "{cols} columns of {}", dtype.name());
        assert_eq!(
            bytes.len(),
            rows * dtype.row_bytes(cols),
            "bytes of a {rows}x{cols} {} matrix",
            dtype.name()
        );
        Self { dtype, bytes, rows, cols }
    }

    /// Output width.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    fn row(&self, row: usize) -> &'a [u8] {
        let len = self.dtype.row_bytes(self.cols);
        &self.bytes[row * len..(row + 1) * len]
    }
}

/// What happens with the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `out = result`.
    Store,
    /// `out += result`.
    Add,
}

/// Where results go: `[x.rows(), weight.rows()]`, `stride` apart.
#[derive(Debug)]
pub struct Output<'o> {
    data: SharedMut<f32>,
    len: usize,
    stride: usize,
    mode: Mode,
    borrow: PhantomData<&'o mut [f32]>,
}

impl<'o> Output<'o> {
    /// `data[t * stride + r]` takes the result of activation row `t` and weight row `r`.
    pub fn new(data: &'o mut [f32], stride: usize, mode: Mode) -> Self {
        Self { len: data.len(), data: SharedMut::new(data), stride, mode, borrow: PhantomData }
    }
}

/// One product of a [`matmuls`] call.
#[derive(Debug)]
pub enum Job<'w, 'o> {
    /// `out = weight · x`.
    Plain {
        /// The matrix.
        weight: Matrix<'w>,
        /// Its results.
        out: Output<'o>,
    },
    /// `out = silu(gate · x) * (up · x)`, the inside of a gated feed-forward.
    Gated {
        /// The matrix under the `silu`.
        gate: Matrix<'w>,
        /// The other factor, of the same rows.
        up: Matrix<'w>,
        /// Their combined results.
        out: Output<'o>,
    },
}

impl<'w, 'o> Job<'w, 'o> {
    /// The matrices: one, or gate and up.
    fn weights(&self) -> [Option<&Matrix<'w>>; 2] {
        match self {
            Self::Plain { weight, .. } => [Some(weight), None],
            Self::Gated { gate, up, .. } => [Some(gate), Some(up)],
        }
    }

    fn out(&self) -> &Output<'o> {
        match self {
            Self::Plain { out, .. } | Self::Gated { out, .. } => out,
        }
    }

    fn rows(&self) -> usize {
        self.weights()[0].map_or(0, Matrix::rows)
    }
}

/// Unpacked weights, one set a thread, taken once.
#[derive(Debug)]
pub struct Scratch {
    threads: Vec<Mutex<ThreadScratch>>,
    max_cols: usize,
}

#[derive(Debug)]
struct ThreadScratch {
    panels: [Vec<Line>; 2],
    tiles: [[f32; TILE_COLS * TILE_ROWS]; 2],
}

impl Scratch {
    /// For `threads` threads and matrices of up to `max_cols` columns.
    pub fn new(threads: usize, max_cols: usize) -> Self {
        let lines = max_cols.div_ceil(CHUNK) * CHUNK * portable::PANEL_BYTES_PER_COL / size_of::<Line>() + 4;
        let thread = || ThreadScratch {
            panels: [vec![Line::ZERO; lines], vec![Line::ZERO; lines]],
            tiles: [[0.0; TILE_COLS * TILE_ROWS]; 2],
        };
        Self { threads: (0..threads).map(|_| Mutex::new(thread())).collect(), max_cols }
    }
}

/// `out[t, r] = weight[r, :] · x[t, :]`, or added to it.
///
/// # Panics
/// As [`matmuls`].
pub fn matmul(
    isa: Isa,
    pool: &Pool,
    weight: Matrix<'_>,
    x: &mut Activations,
    out: Output<'_>,
    scratch: &mut Scratch,
) {
    matmuls(isa, pool, &mut [Job::Plain { weight, out }], x, scratch);
}

/// Several products over the same activations in one dispatch.
///
/// # Panics
/// When a matrix's columns are not those of `x`, an output is too short, the gate's rows are not the
/// up matrix's, or `scratch` was made for fewer threads or columns.
pub fn matmuls(isa: Isa, pool: &Pool, jobs: &mut [Job<'_, '_>], x: &mut Activations, scratch: &mut Scratch) {
    assert!(isa.is_available(), "this machine has no {}", isa.name());
    check(pool, jobs, x, scratch);
    if x.rows() == 0 {
        return;
    }
    let native = is_native(isa, x.rows());
    if jobs.iter().any(|job| job.weights().into_iter().flatten().any(|w| !blocks::is_float(w.dtype))) {
        x.quantize(form(isa, native), pool);
    }
    let (jobs, x, scratch) = (&*jobs, &*x, &*scratch);
    let tiles: usize = jobs.iter().map(|job| job.rows().div_ceil(TILE_ROWS)).sum();
    // Few enough items that handing them out costs nothing, enough that threads end together.
    let per_item = if native { (tiles / (pool.threads() * 8)).max(1) } else { 1 };
    pool.for_each(tiles.div_ceil(per_item), |item, thread| {
        let mut scratch = scratch.threads[thread].lock().unwrap_or_else(PoisonError::into_inner);
        for tile in item * per_item..((item + 1) * per_item).min(tiles) {
            let (job, row0) = locate(jobs, tile);
            run_tile(isa, native, job, row0, x, &mut scratch);
        }
    });
}

fn check(pool: &Pool, jobs: &[Job<'_, '_>], x: &Activations, scratch: &Scratch) {
    assert!(scratch.threads.len() >= pool.threads(), "scratch for fewer threads than the pool's");
    assert!(scratch.max_cols >= x.cols(), "scratch for {} columns, not {}", scratch.max_cols, x.cols());
    for job in jobs {
        let (out, rows) = (job.out(), job.rows());
        for weight in job.weights().into_iter().flatten() {
            assert_eq!(weight.cols, x.cols(), "the matrix's columns are not the activations'");
            assert_eq!(weight.rows, rows, "gate and up differ in rows");
        }
        let needed = x.rows().saturating_sub(1) * out.stride + rows;
        assert!(x.rows() <= 1 || out.stride >= rows, "rows of the output overlap");
        assert!(x.rows() == 0 || out.len >= needed, "output of {} floats, {needed} needed", out.len);
    }
}

/// True when kernels read the blocks themselves for so few activation rows.
fn is_native(isa: Isa, rows: usize) -> bool {
    match isa {
        Isa::Portable | Isa::Avx2 => false,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => rows <= avx512::NATIVE_COLS,
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx512Vnni => false,
    }
}

fn form(isa: Isa, native: bool) -> Form {
    match isa {
        Isa::Portable | Isa::Avx2 => Form::Signed,
        Isa::Avx512Vnni if native => Form::Chunks,
        Isa::Avx512Vnni => Form::Unsigned,
    }
}

/// The job and first row of a tile counted over all jobs.
fn locate<'j, 'w, 'o>(jobs: &'j [Job<'w, 'o>], mut tile: usize) -> (&'j Job<'w, 'o>, usize) {
    for job in jobs {
        let tiles = job.rows().div_ceil(TILE_ROWS);
        if tile < tiles {
            return (job, tile * TILE_ROWS);
        }
        tile -= tiles;
    }
    unreachable!("a tile beyond the last job")
}

/// All activation rows times one tile of weight rows.
fn run_tile(
    isa: Isa,
    native: bool,
    job: &Job<'_, '_>,
    row0: usize,
    x: &Activations,
    scratch: &mut ThreadScratch,
) {
    let rows = (job.rows() - row0).min(TILE_ROWS);
    let ThreadScratch { panels, tiles } = scratch;
    if !native {
        for (weight, panel) in job.weights().into_iter().flatten().zip(panels.iter_mut()) {
            prepare(isa, weight, row0, rows, panel);
        }
    }
    for col in (0..x.rows()).step_by(TILE_COLS) {
        let cols = (x.rows() - col).min(TILE_COLS);
        let parts = panels.iter_mut().zip(tiles.iter_mut());
        for (weight, (panel, tile)) in job.weights().into_iter().flatten().zip(parts) {
            multiply(isa, native, &Tile { weight, row0, rows, col, cols }, panel, x, tile);
        }
        let out = job.out();
        for (c, at) in (col..col + cols).zip((0..).step_by(TILE_ROWS)) {
            // SAFETY: `check` found room for all rows; a tile's rows are this item's alone, and the
            // output is borrowed uniquely for as long as the job lives.
            let out_row = unsafe { out.data.part(c * out.stride + row0, rows) };
            let result = &tiles[0][at..at + rows];
            let up = matches!(job, Job::Gated { .. }).then(|| &tiles[1][at..at + rows]);
            finish(isa, out.mode, result, up, out_row);
        }
    }
}

/// Puts a column of results where it belongs.
#[inline(always)]
fn finish_any(mode: Mode, result: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    let mut gated = [0f32; TILE_ROWS];
    let result = if let Some(up) = up {
        for (to, (&g, &u)) in gated.iter_mut().zip(result.iter().zip(up)) {
            *to = g / (1.0 + exp(-g)) * u;
        }
        &gated[..result.len()]
    } else {
        result
    };
    match mode {
        Mode::Store => out.copy_from_slice(result),
        Mode::Add => out.iter_mut().zip(result).for_each(|(out, r)| *out += r),
    }
}

/// `e^x` to two units in the last place, in operations that vectorise; saturates beyond ±87.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // 2^23 * 1.5 and the exponent's bias: adding it rounds to an integer, kept in the low bits.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    // ln 2 in two parts, the first with few enough bits that its product with the integer is exact.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2[0]) - n * LN2[1];
    // Taylor's series; |r| <= 0.35, so the first term left out is below 2e-8.
    let series = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let power = series.into_iter().fold(0.0, |sum, c| sum * r + c);
    power * f32::from_bits(shifted.to_bits() << 23)
}

fn finish(isa: Isa, mode: Mode, result: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        // SAFETY: `matmuls` found the features.
        return unsafe { avx2::finish(mode, result, up, out) };
    }
    let _ = isa;
    finish_any(mode, result, up, out);
}

/// Some weight rows times some activation rows.
#[derive(Debug, Clone, Copy)]
struct Tile<'t, 'w> {
    weight: &'t Matrix<'w>,
    row0: usize,
    /// At most [`TILE_ROWS`].
    rows: usize,
    col: usize,
    /// At most [`TILE_COLS`].
    cols: usize,
}

/// Unpacks weight rows into a panel.
fn prepare(isa: Isa, weight: &Matrix<'_>, row0: usize, rows: usize, panel: &mut [Line]) {
    match isa {
        Isa::Portable => portable::prepare(weight, row0, rows, panel),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `matmuls` found the features.
        Isa::Avx2 => unsafe { avx2::prepare(weight, row0, rows, panel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { avx512::prepare(weight, row0, rows, panel) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => unreachable!("not on this architecture"),
    }
}

/// Results to `out[c * TILE_ROWS + r]`.
fn multiply(isa: Isa, native: bool, t: &Tile<'_, '_>, panel: &mut [Line], x: &Activations, out: &mut [f32]) {
    match isa {
        Isa::Portable => {
            for c in 0..t.cols {
                portable::column::<portable::Plain>(
                    t.weight,
                    t.rows,
                    panel,
                    x,
                    t.col + c,
                    &mut out[c * TILE_ROWS..],
                );
            }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            for c in 0..t.cols {
                // SAFETY: `matmuls` found the features.
                unsafe { avx2::column(t.weight, t.rows, panel, x, t.col + c, &mut out[c * TILE_ROWS..]) };
            }
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512Vnni => unsafe { avx512::multiply(native, t, panel, x, out) },
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 | Isa::Avx512Vnni => unreachable!("not on this architecture"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_close_everywhere() {
        for i in -87_000..=87_000 {
            let x = i as f32 / 1000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(super::exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}): off by {error:e}");
        }
        assert!(
            super::exp(f32::MAX).is_finite() && super::exp(f32::MIN) < 1e-37 && super::exp(f32::NAN).is_nan()
        );
    }
}
