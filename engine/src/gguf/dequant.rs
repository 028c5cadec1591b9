//! Blocks to f32, one function a type: plain scalar code, the definition that faster kernels are held to.
//!
//! Source: ggml's block layouts (ggml-common.h). A weight is computed in f32 in the order that ggml and
//! gguf-py use (scale products first, then times the quant, then the minimum), so that all agree bit for bit.

use half::{bf16, f16};

use super::{DType, dequant_k as k};

/// Expands whole blocks: `bytes` holds `out.len() / block_len` blocks of `dtype`.
///
/// # Panics
/// When `out` is not whole blocks or `bytes` is not as long as `out` makes it.
pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % dtype.block_len(), 0, "whole blocks of {}", dtype.name());
    assert_eq!(bytes.len(), dtype.row_bytes(out.len()), "bytes of {} weights of {}", out.len(), dtype.name());
    match dtype {
        DType::F32 => blocks(bytes, out, |b: &[u8; 4], y| *y = [f32::from_le_bytes(*b)]),
        DType::F16 => blocks(bytes, out, |b: &[u8; 2], y| *y = [f16::from_le_bytes(*b).to_f32()]),
        DType::BF16 => blocks(bytes, out, |b: &[u8; 2], y| *y = [bf16::from_le_bytes(*b).to_f32()]),
        DType::Q4_0 => blocks(bytes, out, q4_0),
        DType::Q4_1 => blocks(bytes, out, q4_1),
        DType::Q5_0 => blocks(bytes, out, q5_0),
        DType::Q5_1 => blocks(bytes, out, q5_1),
        DType::Q8_0 => blocks(bytes, out, q8_0),
        DType::Q2_K => blocks(bytes, out, k::q2_k),
        DType::Q3_K => blocks(bytes, out, k::q3_k),
        DType::Q4_K => blocks(bytes, out, k::q4_k),
        DType::Q5_K => blocks(bytes, out, k::q5_k),
        DType::Q6_K => blocks(bytes, out, k::q6_k),
        DType::IQ4_NL => blocks(bytes, out, iq4_nl),
        DType::IQ4_XS => blocks(bytes, out, k::iq4_xs),
    }
}

/// Runs `expand` over blocks of `B` bytes and `N` weights.
fn blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    expand: impl Fn(&[u8; B], &mut [f32; N]),
) {
    let (bytes, _) = bytes.as_chunks::<B>();
    let (out, _) = out.as_chunks_mut::<N>();
    for (block, y) in bytes.iter().zip(out) {
        expand(block, y);
    }
}

/// The half-precision number at `at`.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d: f16, qs: [u8; 16]`; the low nibbles are weights 0 to 15, the high ones 16 to 31; `d (q − 8)`.
fn q4_0(block: &[u8; 18], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        y[i] = d * (f32::from(q & 15) - 8.0);
        y[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// `d: f16, m: f16, qs: [u8; 16]`, nibbles as in `Q4_0`; `d q + m`.
fn q4_1(block: &[u8; 20], y: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        y[i] = d * f32::from(q & 15) + m;
        y[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// The 32 five-bit quants of `Q5_0` and `Q5_1`: nibbles as in `Q4_0`, fifth bits in a word, weight 0 lowest.
fn five_bits(high: &[u8], nibbles: &[u8]) -> [f32; 32] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let fifth = |i: usize| ((high >> i) as u8 & 1) << 4;
    let mut q = [0.0; 32];
    for (i, &pair) in nibbles.iter().enumerate() {
        q[i] = f32::from(pair & 15 | fifth(i));
        q[i + 16] = f32::from(pair >> 4 | fifth(i + 16));
    }
    q
}

/// `d: f16, qh: u32, qs: [u8; 16]`; `d (q − 16)`.
fn q5_0(block: &[u8; 22], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    *y = five_bits(&block[2..6], &block[6..]).map(|q| d * (q - 16.0));
}

/// `d: f16, m: f16, qh: u32, qs: [u8; 16]`; `d q + m`.
fn q5_1(block: &[u8; 24], y: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    *y = five_bits(&block[4..8], &block[8..]).map(|q| d * q + m);
}

/// `d: f16, qs: [i8; 32]`; `d q`.
fn q8_0(block: &[u8; 34], y: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (y, &q) in y.iter_mut().zip(&block[2..]) {
        *y = d * f32::from(q as i8);
    }
}

/// The 16 levels of the non-linear 4-bit types.
pub(super) const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Layout of `Q4_0`; `d level[q]`.
fn iq4_nl(block: &[u8; 18], y: &mut [f32; 32]) {
    iq4(half_at(block, 0), &block[2..], y);
}

/// 32 weights of scale `d` out of 16 bytes, through [`IQ4_LEVELS`].
pub(super) fn iq4(d: f32, nibbles: &[u8], y: &mut [f32]) {
    for (i, &q) in nibbles.iter().enumerate() {
        y[i] = d * f32::from(IQ4_LEVELS[usize::from(q & 15)]);
        y[i + 16] = d * f32::from(IQ4_LEVELS[usize::from(q >> 4)]);
    }
}
