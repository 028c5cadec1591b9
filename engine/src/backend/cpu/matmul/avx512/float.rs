//! Weights that are floats: f32 activations, lanes along the columns.

use std::arch::x86_64::*;

use super::{
    super::{TILE_ROWS, Tile, activations::Activations},
    reduce,
};

/// A float format.
///
/// # Safety
/// `p` points to 16 elements, or to those that `mask` selects.
pub(super) unsafe trait Float {
    /// Bytes of an element.
    const BYTES: usize;
    /// 16 elements.
    unsafe fn load(p: *const u8) -> __m512;
    /// Those under the mask, the others zero.
    unsafe fn load_some(p: *const u8, mask: __mmask16) -> __m512;
}

pub(super) struct Single;
pub(super) struct Half;
pub(super) struct Brain;

// SAFETY: reads what the trait says.
unsafe impl Float for Single {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the trait's.
        unsafe { _mm512_loadu_ps(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_some(p: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: the trait's.
        unsafe { _mm512_maskz_loadu_ps(mask, p.cast()) }
    }
}

// SAFETY: reads what the trait says.
unsafe impl Float for Half {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the trait's.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_some(p: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: the trait's.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }
}

// SAFETY: reads what the trait says.
unsafe impl Float for Brain {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the trait's.
        unsafe { widen(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_some(p: *const u8, mask: __mmask16) -> __m512 {
        // SAFETY: the trait's.
        unsafe { widen(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }
}

#[inline(always)]
unsafe fn widen(v: __m256i) -> __m512 {
    // SAFETY: register operations.
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(v))) }
}

/// Results to `out[c * TILE_ROWS + r]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn multiply<F: Float>(t: &Tile<'_, '_>, x: &Activations, out: &mut [f32]) {
    match t.cols {
        1 => rows::<F, 8, 1>(t, x, out),
        2 => rows::<F, 4, 2>(t, x, out),
        3 => rows::<F, 4, 3>(t, x, out),
        4 => rows::<F, 4, 4>(t, x, out),
        5 => rows::<F, 4, 5>(t, x, out),
        _ => rows::<F, 4, 6>(t, x, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn rows<F: Float, const R: usize, const N: usize>(t: &Tile<'_, '_>, x: &Activations, out: &mut [f32]) {
    assert!(t.cols == N && out.len() >= N * TILE_ROWS && t.rows <= TILE_ROWS);
    let cols = t.weight.cols;
    let x: [&[f32]; N] = std::array::from_fn(|n| &x.f32()[(t.col + n) * cols..][..cols]);
    let mut r = 0;
    while r + R <= t.rows {
        let weights: [&[u8]; R] = std::array::from_fn(|i| t.weight.row(t.row0 + r + i));
        // SAFETY: features as ours; rows have `cols` elements.
        let sums = unsafe { block::<F, R, N>(weights, x, cols) };
        for (i, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                out[n * TILE_ROWS + r + i] = reduce(*sum);
            }
        }
        r += R;
    }
    while r < t.rows {
        // SAFETY: as above.
        let sums = unsafe { block::<F, 1, N>([t.weight.row(t.row0 + r)], x, cols) };
        for (n, sum) in sums[0].iter().enumerate() {
            out[n * TILE_ROWS + r] = reduce(*sum);
        }
        r += 1;
    }
}

/// Lane sums of `R` weight rows with `N` activation rows.
///
/// # Safety
/// All rows have `cols` elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<F: Float, const R: usize, const N: usize>(
    w: [&[u8]; R],
    x: [&[f32]; N],
    cols: usize,
) -> [[__m512; N]; R] {
    let mut acc = [[_mm512_setzero_ps(); N]; R];
    let (w, x) = (w.map(<[u8]>::as_ptr), x.map(<[f32]>::as_ptr));
    for k in (0..cols / 16 * 16).step_by(16) {
        // SAFETY: 16 elements from `k` on are within the rows.
        unsafe {
            let x = x.map(|x| _mm512_loadu_ps(x.add(k)));
            for r in 0..R {
                let p = w[r].add(k * F::BYTES);
                if N == 1 {
                    _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(1024).cast());
                }
                let w = F::load(p);
                for n in 0..N {
                    acc[r][n] = _mm512_fmadd_ps(w, x[n], acc[r][n]);
                }
            }
        }
    }
    let rest = cols % 16;
    if rest > 0 {
        let k = cols - rest;
        let mask = (1u16 << rest) - 1;
        // SAFETY: the mask selects the `rest` elements that are left.
        unsafe {
            let x = x.map(|x| _mm512_maskz_loadu_ps(mask, x.add(k)));
            for r in 0..R {
                let w = F::load_some(w[r].add(k * F::BYTES), mask);
                for n in 0..N {
                    acc[r][n] = _mm512_fmadd_ps(w, x[n], acc[r][n]);
                }
            }
        }
    }
    acc
}
