//! The portable kernels' panels, with dot products in AVX2 and FMA.

use std::arch::x86_64::*;

use super::{
    Matrix, Mode,
    activations::{Activations, GROUP, LANES, Line},
    portable::{self, Dot, Row, tree, tree_of_columns},
};

/// See [`portable::prepare`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn prepare(weight: &Matrix<'_>, row0: usize, rows: usize, panel: &mut [Line]) {
    portable::prepare(weight, row0, rows, panel);
}

/// See [`super::finish_any`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn finish(mode: Mode, result: &[f32], up: Option<&[f32]>, out: &mut [f32]) {
    super::finish_any(mode, result, up, out);
}

/// See [`portable::column`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn column(
    weight: &Matrix<'_>,
    rows: usize,
    panel: &mut [Line],
    x: &Activations,
    col: usize,
    out: &mut [f32],
) {
    portable::column::<Fused>(weight, rows, panel, x, col, out);
}

/// Only used in [`column`], whose features its methods need.
struct Fused;

impl Dot for Fused {
    #[inline(always)]
    fn floats(w: &[f32], x: &[f32]) -> f32 {
        let mut acc = [0f32; 16];
        let (w_parts, w_rest) = w.as_chunks::<16>();
        let (x_parts, x_rest) = x.as_chunks::<16>();
        for (w, x) in w_parts.iter().zip(x_parts) {
            for l in 0..16 {
                acc[l] = w[l].mul_add(x[l], acc[l]);
            }
        }
        for (acc, (w, x)) in acc.iter_mut().zip(w_rest.iter().zip(x_rest)) {
            *acc = w.mul_add(*x, *acc);
        }
        tree_of_columns(&acc)
    }

    #[inline(always)]
    fn groups(w: Row<'_>, x: &[u8], dx: &[f32], sums: &[f32]) -> f32 {
        // SAFETY: the caller has the features; loads are of references to arrays of their size.
        unsafe {
            let (mut acc, mut minima) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            let chunks = Chunks::new(w, x, dx, sums);
            for c in 0..chunks.full {
                let [a, b] = eight_dots(chunks.q(c), chunks.x(c));
                let dots = _mm256_add_epi32(
                    _mm256_permute2x128_si256::<0x20>(a, b),
                    _mm256_permute2x128_si256::<0x31>(a, b),
                );
                let at = |v: &[f32]| _mm256_loadu_ps(v[c * LANES..][..LANES].as_ptr());
                acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), _mm256_mul_ps(at(w.d), at(dx)), acc);
                minima = _mm256_fmadd_ps(at(w.m), at(sums), minima);
            }
            let (mut acc, mut minima) = (lanes(acc), lanes(minima));
            for g in chunks.full * LANES..w.q.len() / GROUP {
                let lane = g % LANES;
                let [a, b] = halves(chunks.q_group(g), chunks.x_group(g));
                acc[lane] = ((a + b) as f32).mul_add(w.d[g] * dx[g], acc[lane]);
                minima[lane] = w.m[g].mul_add(sums[g], minima[lane]);
            }
            tree(std::array::from_fn(|l| acc[l] + minima[l]))
        }
    }

    #[inline(always)]
    fn sub_groups(w: Row<'_>, x: &[u8], dx: &[f32], sub_sums: &[f32]) -> f32 {
        // SAFETY: as in `groups`.
        unsafe {
            let zero = _mm256_setzero_ps();
            let mut acc = [zero; 2];
            let mut minima = [zero; 2];
            let chunks = Chunks::new(w, x, dx, dx);
            // Types with sub-groups have blocks of 256 columns, so chunks are whole.
            for c in 0..chunks.full {
                let [a, b] = eight_dots(chunks.q(c), chunks.x(c));
                let dots = [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)];
                let dx = _mm256_loadu_ps(dx[c * LANES..][..LANES].as_ptr());
                let (d, m, s) = (by_half(w.d, c), by_half(w.m, c), by_half(sub_sums, c));
                for h in 0..2 {
                    acc[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[h]), _mm256_mul_ps(d[h], dx), acc[h]);
                    minima[h] = _mm256_fmadd_ps(m[h], s[h], minima[h]);
                }
            }
            let e = |h: usize| lanes(_mm256_add_ps(acc[h], minima[h]));
            let (a, b) = (e(0), e(1));
            tree(std::array::from_fn(|l| a[l] + b[l]))
        }
    }
}

/// A row and its activations in groups of 32.
struct Chunks<'a> {
    q: &'a [[i8; GROUP]],
    x: &'a [[u8; GROUP]],
    /// Chunks of eight groups.
    full: usize,
}

impl<'a> Chunks<'a> {
    #[inline(always)]
    fn new(w: Row<'a>, x: &'a [u8], dx: &[f32], sums: &[f32]) -> Self {
        let (q, x) = (w.q.as_chunks().0, x.as_chunks().0);
        let full = [q.len(), x.len(), dx.len(), sums.len()].into_iter().min().unwrap_or(0) / LANES;
        Self { q, x, full }
    }

    #[inline(always)]
    fn q(&self, chunk: usize) -> &[[i8; GROUP]] {
        &self.q[chunk * LANES..(chunk + 1) * LANES]
    }

    #[inline(always)]
    fn x(&self, chunk: usize) -> &[[u8; GROUP]] {
        &self.x[chunk * LANES..(chunk + 1) * LANES]
    }

    #[inline(always)]
    fn q_group(&self, g: usize) -> &[i8; GROUP] {
        &self.q[g]
    }

    #[inline(always)]
    fn x_group(&self, g: usize) -> &[u8; GROUP] {
        &self.x[g]
    }
}

/// Eight partial sums of a group: low 128 bits its first half's, high ones its second half's.
///
/// |w| <= 128 and |x| <= 127, so a pair of products is within 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn partial(q: &[i8; GROUP], x: &[u8; GROUP]) -> __m256i {
    // SAFETY: loads of 32 bytes from arrays of 32.
    let (q, x) = unsafe { (_mm256_loadu_si256(q.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().cast())) };
    let products = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
    _mm256_madd_epi16(products, _mm256_set1_epi16(1))
}

/// Sums of the half groups of eight groups: groups 0-3 and 4-7, first halves in the low 128 bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn eight_dots(q: &[[i8; GROUP]], x: &[[u8; GROUP]]) -> [__m256i; 2] {
    let pair = |g: usize| _mm256_hadd_epi32(partial(&q[g], &x[g]), partial(&q[g + 1], &x[g + 1]));
    [_mm256_hadd_epi32(pair(0), pair(2)), _mm256_hadd_epi32(pair(4), pair(6))]
}

/// The two half sums of one group.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn halves(q: &[i8; GROUP], x: &[u8; GROUP]) -> [i32; 2] {
    let v = partial(q, x);
    let v = _mm256_hadd_epi32(v, v);
    let v = _mm256_hadd_epi32(v, v);
    [_mm256_extract_epi32::<0>(v), _mm256_extract_epi32::<4>(v)]
}

/// Values of chunk `c`, two a group, as those of first halves and of second ones.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn by_half(values: &[f32], c: usize) -> [__m256; 2] {
    let values = &values[2 * LANES * c..2 * LANES * (c + 1)];
    // SAFETY: 16 floats are there.
    let (low, high) =
        unsafe { (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values[LANES..].as_ptr())) };
    let a = _mm256_shuffle_ps::<0b10_00_10_00>(low, high);
    let b = _mm256_shuffle_ps::<0b11_01_11_01>(low, high);
    let sort = |v| _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(v)));
    [sort(a), sort(b)]
}

#[inline(always)]
fn lanes(v: __m256) -> [f32; LANES] {
    // SAFETY: 256 bits either way.
    unsafe { std::mem::transmute(v) }
}
