//! Native blocks times one to four activation rows: what decoding spends its time in.

use std::arch::x86_64::*;

use super::{
    super::{
        TILE_ROWS, Tile,
        activations::{Activations, CHUNK, Chunk, GROUP, LANES},
    },
    reduce,
    unpack::Format,
};

/// Weight rows worked on together by activation rows; hides the latency of a row's chain of sums.
const fn rows_together(cols: usize) -> usize {
    if cols <= 2 { 4 } else { 2 }
}

/// Results to `out[c * TILE_ROWS + r]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn multiply<F: Format>(t: &Tile<'_, '_>, x: &Activations, out: &mut [f32]) {
    match t.cols {
        1 => rows::<F, 4, 1>(t, x, out),
        2 => rows::<F, { rows_together(2) }, 2>(t, x, out),
        3 => rows::<F, { rows_together(3) }, 3>(t, x, out),
        _ => rows::<F, { rows_together(4) }, 4>(t, x, out),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn rows<F: Format, const R: usize, const N: usize>(t: &Tile<'_, '_>, x: &Activations, out: &mut [f32]) {
    assert!(t.cols == N && out.len() >= N * TILE_ROWS && t.rows <= TILE_ROWS);
    let x = x.quantized();
    let chunks: [*const Chunk; N] = std::array::from_fn(|n| x.q[(t.col + n) * x.q_stride..].as_ptr().cast());
    let mut r = 0;
    while r + R <= t.rows {
        let weights: [&[u8]; R] = std::array::from_fn(|i| t.weight.row(t.row0 + r + i));
        // SAFETY: features as ours; each pointer has the row's chunks, made by `Activations::quantize`.
        let sums = unsafe { few_rows::<F, R, N>(weights, chunks, t.weight.cols) };
        for (i, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                out[n * TILE_ROWS + r + i] = reduce(*sum);
            }
        }
        r += R;
    }
    while r < t.rows {
        // SAFETY: as above.
        let sums = unsafe { few_rows::<F, 1, N>([t.weight.row(t.row0 + r)], chunks, t.weight.cols) };
        for (n, sum) in sums[0].iter().enumerate() {
            out[n * TILE_ROWS + r] = reduce(*sum);
        }
        r += 1;
    }
}

/// The 16 lane sums of `R` weight rows with `N` activation rows.
///
/// # Safety
/// Each of `x` points to `cols / 256` chunks, rounded up; `weights` are rows of `cols` columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn few_rows<F: Format, const R: usize, const N: usize>(
    weights: [&[u8]; R],
    x: [*const Chunk; N],
    cols: usize,
) -> [[__m512; N]; R] {
    let mut acc = [[_mm512_setzero_ps(); N]; R];
    let mut minima = [[_mm512_setzero_ps(); N]; R];
    let full = cols / CHUNK;
    for c in 0..full {
        // SAFETY: chunk `c` is whole in each row and in `x`.
        unsafe {
            let w = weights.map(|row| row.as_ptr().add(c * F::CHUNK));
            let x = x.map(|x| x.add(c));
            for w in w {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + 64).cast());
                if F::CHUNK > 128 {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + 128).cast());
                }
                if F::CHUNK > 192 {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(AHEAD + 192).cast());
                }
            }
            step::<F, R, N, 2>(w, x, LANES, &mut acc, &mut minima);
        }
    }
    let rest = cols % CHUNK / GROUP;
    if rest > 0 {
        // SAFETY: `rest` groups are left in each row; `x` has a whole chunk, padded with zeros.
        unsafe {
            let w = weights.map(|row| row.as_ptr().add(full * F::CHUNK));
            let x = x.map(|x| x.add(full));
            match rest {
                1 => step::<F, R, N, 1>(w, x, 1, &mut acc, &mut minima),
                2 => step::<F, R, N, 1>(w, x, 2, &mut acc, &mut minima),
                3 | 4 => step::<F, R, N, 1>(w, x, rest, &mut acc, &mut minima),
                _ => step::<F, R, N, 2>(w, x, rest, &mut acc, &mut minima),
            }
        }
    }
    if F::SUB_GROUPS && F::MIN {
        for (acc, minima) in acc.iter_mut().zip(minima) {
            for (acc, minima) in acc.iter_mut().zip(minima) {
                *acc = _mm512_add_ps(*acc, minima);
            }
        }
    }
    acc
}

/// Bytes that weights are fetched ahead of their use.
const AHEAD: usize = 2048;

/// One chunk of each row, or its first `HALVES` halves.
///
/// # Safety
/// As [`Format`]; the chunks of `x` are there.
#[inline(always)]
unsafe fn step<F: Format, const R: usize, const N: usize, const HALVES: usize>(
    w: [*const u8; R],
    x: [*const Chunk; N],
    valid: usize,
    acc: &mut [[__m512; N]; R],
    minima: &mut [[__m512; N]; R],
) {
    // SAFETY: promised by the caller.
    unsafe {
        let zero = _mm512_setzero_si512();
        let offset = _mm512_set1_epi8(F::OFFSET);
        let mut start = [[zero; 4]; N];
        let load = |n: usize, i: usize| _mm512_load_si512(x[n].cast::<__m512i>().add(i));
        if F::OFFSET != 0 {
            for (n, start) in start.iter_mut().enumerate() {
                for i in 0..2 * HALVES {
                    // An offset of -128 is the byte 128 as an unsigned one.
                    start[i] = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, offset, load(n, i)));
                    if !F::SUB_GROUPS && i % 2 == 1 {
                        start[i - 1] = _mm512_add_epi32(start[i - 1], start[i]);
                    }
                }
            }
        }
        for r in 0..R {
            let mut dots = [[zero; 4]; N];
            for half in 0..HALVES {
                let bytes = F::bytes(w[r], half, valid);
                for n in 0..N {
                    let (a, b) = (2 * half, 2 * half + 1);
                    let first = _mm512_dpbusd_epi32(start[n][a], bytes[0], load(n, a));
                    if F::SUB_GROUPS {
                        dots[n][a] = first;
                        dots[n][b] = _mm512_dpbusd_epi32(start[n][b], bytes[1], load(n, b));
                    } else {
                        dots[n][half] = _mm512_dpbusd_epi32(first, bytes[1], load(n, b));
                    }
                }
            }
            let scales = F::scales(w[r], valid);
            for n in 0..N {
                let pairs = (&raw const (*x[n]).scale).cast::<f32>();
                let pairs = _mm512_load_ps(pairs);
                if F::SUB_GROUPS {
                    let dots = _mm512_cvtepi32_ps(sixteen::<F>(dots[n]));
                    acc[r][n] =
                        _mm512_fmadd_ps(dots, _mm512_mul_ps(scales, _mm512_moveldup_ps(pairs)), acc[r][n]);
                    if F::MIN {
                        let sums = _mm512_load_ps((&raw const (*x[n]).sub_sum).cast::<f32>());
                        minima[r][n] = _mm512_fmadd_ps(F::sub_minima(w[r]), sums, minima[r][n]);
                    }
                } else {
                    // Even places: dot * (d * dx). Odd ones: sum * (m * 1).
                    const EVEN: __mmask16 = 0x5555;
                    let dots = _mm512_mask_cvtepi32_ps(pairs, EVEN, eight::<F>(dots[n]));
                    let factors = _mm512_mask_mul_ps(scales, EVEN, scales, pairs);
                    acc[r][n] = _mm512_fmadd_ps(dots, factors, acc[r][n]);
                }
            }
        }
    }
}

/// Neighbours added: 128-bit lane i has `[a01, a23, b01, b23]`.
#[inline(always)]
unsafe fn pairs<F: Format>(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: register operations.
    unsafe {
        if F::SMALL {
            return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
        }
        let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
        let even = _mm512_castps_si512(_mm512_shuffle_ps::<0b10_00_10_00>(a, b));
        let odd = _mm512_castps_si512(_mm512_shuffle_ps::<0b11_01_11_01>(a, b));
        _mm512_add_epi32(even, odd)
    }
}

/// Group sums from two vectors of four groups each: lane i has `[g_i, g_i, g_{4+i}, g_{4+i}]`.
#[inline(always)]
unsafe fn eight<F: Format>(dots: [__m512i; 4]) -> __m512i {
    // SAFETY: register operations.
    unsafe {
        let v = pairs::<F>(dots[0], dots[1]);
        _mm512_add_epi32(v, _mm512_shuffle_epi32::<0b10_11_00_01>(v))
    }
}

/// Half-group sums from four vectors of four halves each: lane i has `[a_i, b_i, a_{4+i}, b_{4+i}]`.
#[inline(always)]
unsafe fn sixteen<F: Format>(dots: [__m512i; 4]) -> __m512i {
    // SAFETY: register operations.
    unsafe {
        let low = _mm512_castsi512_ps(pairs::<F>(dots[0], dots[1]));
        let high = _mm512_castsi512_ps(pairs::<F>(dots[2], dots[3]));
        let even = _mm512_castps_si512(_mm512_shuffle_ps::<0b10_00_10_00>(low, high));
        let odd = _mm512_castps_si512(_mm512_shuffle_ps::<0b11_01_11_01>(low, high));
        _mm512_add_epi32(even, odd)
    }
}
