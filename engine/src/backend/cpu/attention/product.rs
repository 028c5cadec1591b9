//! Small matrix products in registers, the inner loops of attention.

#![allow(
    clippy::inline_always,
    reason = "vector code must unfold into the function compiled for its instruction set"
)]

use half::f16;

use super::super::simd::Simd;

/// A number that loads as f32.
pub(super) trait Element: Copy {
    /// # Safety
    /// `S::LANES` numbers at `p` are readable.
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { s.load_half(p) }
    }
}

/// `c[r, j] += Σ_i a[r, i] · b[i, j]` for `rows`, `depth` and `width`; each sum runs in the order of `i`
/// and starts from what is in `c`.
#[derive(Clone, Copy)]
pub(super) struct Product<E> {
    pub(super) rows: usize,
    pub(super) depth: usize,
    /// A multiple of the vector.
    pub(super) width: usize,
    pub(super) a: *const f32,
    pub(super) a_stride: usize,
    pub(super) b: *const E,
    pub(super) b_stride: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
}

impl<E: Element> Product<E> {
    /// `ODD` allows a width that is an odd number of vectors.
    ///
    /// # Safety
    /// The three matrices are readable, `c` writable too and apart from the others.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd, const ODD: bool>(self, s: S) {
        let pairs = self.width - self.width % (2 * S::LANES);
        for column in (0..pairs).step_by(2 * S::LANES) {
            // SAFETY: as for this function; the columns are within the width.
            unsafe { self.columns::<S, 2>(s, column) };
        }
        if ODD && pairs < self.width {
            // SAFETY: as above.
            unsafe { self.columns::<S, 1>(s, pairs) };
        }
    }

    /// All rows of `C` vectors of columns. The tile heights are those of common head groups; each is code.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn columns<S: Simd, const C: usize>(&self, s: S, column: usize) {
        let mut row = 0;
        while row < self.rows {
            // SAFETY: as for `run`; the tile's rows are left.
            row += unsafe {
                match (self.rows - row).min(S::ROWS) {
                    1 => self.tile::<S, 1, C>(s, row, column),
                    2 => self.tile::<S, 2, C>(s, row, column),
                    3 => self.tile::<S, 3, C>(s, row, column),
                    4..7 => self.tile::<S, 4, C>(s, row, column),
                    7 => self.tile::<S, 7, C>(s, row, column),
                    _ => self.tile::<S, 8, C>(s, row, column),
                }
            };
        }
    }

    /// `R` rows by `C` vectors in registers; returns `R`.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, s: S, row: usize, column: usize) -> usize {
        // SAFETY: as for `run`; all offsets are within the matrices.
        unsafe {
            let c = self.c.add(row * self.c_stride + column);
            let mut sums = [[s.splat(0.0); C]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = s.load(c.add(r * self.c_stride + j * S::LANES));
                }
            }
            let a = self.a.add(row * self.a_stride);
            let mut b = self.b.add(column);
            for i in 0..self.depth {
                let mut vectors = [s.splat(0.0); C];
                for (j, vector) in vectors.iter_mut().enumerate() {
                    *vector = E::load(s, b.add(j * S::LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = s.splat(*a.add(r * self.a_stride + i));
                    for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                        *sum = s.fma(x, vector, *sum);
                    }
                }
                b = b.wrapping_add(self.b_stride);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    s.store(c.add(r * self.c_stride + j * S::LANES), sum);
                }
            }
        }
        R
    }
}
