//! Kernels with AVX-512 VNNI.
//!
//! Few activation rows: native blocks are unpacked in registers, 256 columns at a time, and multiplied
//! with each row ([`native`]). More: 32 weight rows are unpacked into a panel in which a vector holds
//! four columns of 16 rows, so that sums need no shuffling ([`panel`]). Floats: [`float`].

mod float;
mod k_quants;
mod native;
mod panel;
mod unpack;

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_castps512_ps256, _mm512_extractf32x8_ps, _mm512_permute_ps,
};
use std::arch::x86_64::{
    _mm_add_ss, _mm_cvtss_f32, _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
};

use super::{
    Matrix, Tile,
    activations::{Activations, Line},
    blocks,
};
use crate::gguf::DType;
use k_quants::{Q2K, Q3K, Q4K, Q5K, Q6K};
use unpack::{Iq4Nl, Iq4Xs, Q4One, Q4Zero, Q5One, Q5Zero, Q8Zero};

/// Most activation rows for which native blocks are read once per call instead of unpacked to a panel.
pub(super) const NATIVE_COLS: usize = 4;

/// Calls a function generic over the block format.
macro_rules! with_format {
    ($dtype:expr, $name:ident => $call:expr) => {
        match $dtype {
            DType::Q4_0 => {
                type $name = Q4Zero;
                $call
            }
            DType::Q4_1 => {
                type $name = Q4One;
                $call
            }
            DType::Q5_0 => {
                type $name = Q5Zero;
                $call
            }
            DType::Q5_1 => {
                type $name = Q5One;
                $call
            }
            DType::Q8_0 => {
                type $name = Q8Zero;
                $call
            }
            DType::IQ4_NL => {
                type $name = Iq4Nl;
                $call
            }
            DType::IQ4_XS => {
                type $name = Iq4Xs;
                $call
            }
            DType::Q2_K => {
                type $name = Q2K;
                $call
            }
            DType::Q3_K => {
                type $name = Q3K;
                $call
            }
            DType::Q4_K => {
                type $name = Q4K;
                $call
            }
            DType::Q5_K => {
                type $name = Q5K;
                $call
            }
            DType::Q6_K => {
                type $name = Q6K;
                $call
            }
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats have no blocks"),
        }
    };
}

/// Unpacks `rows` rows from `row0` on into a panel, unless the type is a float.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn prepare(weight: &Matrix<'_>, row0: usize, rows: usize, panel: &mut [Line]) {
    if !blocks::is_float(weight.dtype) {
        with_format!(weight.dtype, F => panel::fill::<F>(weight, row0, rows, panel));
    }
}

/// Results to `out[c * TILE_ROWS + r]`.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn multiply(native: bool, t: &Tile<'_, '_>, panel: &[Line], x: &Activations, out: &mut [f32]) {
    match t.weight.dtype {
        DType::F32 => float::multiply::<float::Single>(t, x, out),
        DType::F16 => float::multiply::<float::Half>(t, x, out),
        DType::BF16 => float::multiply::<float::Brain>(t, x, out),
        _ if native => with_format!(t.weight.dtype, F => native::multiply::<F>(t, x, out)),
        _ => with_format!(t.weight.dtype, F => panel::multiply::<F>(t, panel, x, out)),
    }
}

/// The canonical sum of 16 lanes, as in the parent module.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn reduce(v: __m512) -> f32 {
    let v = _mm512_add_ps(v, _mm512_permute_ps::<0b10_11_00_01>(v));
    let v = _mm512_add_ps(v, _mm512_permute_ps::<0b01_00_11_10>(v));
    let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
    let v = (_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    _mm_cvtss_f32(_mm_add_ss(v.0, v.1))
}
