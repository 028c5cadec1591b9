//! Quantised blocks to one common form: signed bytes in column order, a scale and a minimum a group.
//!
//! Weight = `d * q + m`, with groups of 32 columns or, for `Q2_K`, `Q3_K` and `Q6_K`, of 16. Layouts: ggml's
//! ggml-common.h. Written plainly; it serves the portable and AVX2 kernels and is what the AVX-512
//! unpacking is tested against.

use crate::gguf::DType;

/// The non-linear 4-bit types' values.
pub(super) const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// True for types whose scale is shared by 16 columns instead of 32.
pub(super) const fn has_sub_groups(dtype: DType) -> bool {
    matches!(dtype, DType::Q2_K | DType::Q3_K | DType::Q6_K)
}

/// True for types whose weights stay floats.
pub(super) const fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// A half as f32. In place of `half`'s conversion, which asks for the CPU's features each time.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    let (exponent, mantissa) = (bits & 0x7C00, bits & 0x3FF);
    // The exponent's bias differs by 112, for infinities by as much again. Subnormals count 2^-24.
    let special = if exponent == 0x7C00 { 112 << 23 } else { 0 };
    let normal = ((bits & 0x7FFF) << 13) + (112 << 23) + special;
    let subnormal = (mantissa as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    f32::from_bits(if exponent == 0 { subnormal } else { normal } | (bits & 0x8000) << 16)
}

/// Unpacks one row. `q`: a byte per column; `d` and `m`: one per group of 32 or 16; `m` stays as it is
/// for types without a minimum.
#[inline(always)]
pub(super) fn unpack_row(dtype: DType, row: &[u8], q: &mut [i8], d: &mut [f32], m: &mut [f32]) {
    let len = dtype.block_len();
    let groups = if has_sub_groups(dtype) { 16 } else { len / 32 };
    let blocks = row.chunks_exact(dtype.block_bytes()).zip(q.chunks_exact_mut(len));
    for ((block, q), (d, m)) in blocks.zip(d.chunks_exact_mut(groups).zip(m.chunks_exact_mut(groups))) {
        match dtype {
            DType::Q4_0 => {
                d[0] = half_at(block, 0);
                four_bits(&block[2..18], q, 8);
            }
            DType::Q4_1 => {
                (d[0], m[0]) = (half_at(block, 0), half_at(block, 2));
                four_bits(&block[4..20], q, 0);
            }
            DType::Q5_0 => {
                d[0] = half_at(block, 0);
                five_bits(&block[2..6], &block[6..22], q, 16);
            }
            DType::Q5_1 => {
                (d[0], m[0]) = (half_at(block, 0), half_at(block, 2));
                five_bits(&block[4..8], &block[8..24], q, 0);
            }
            DType::Q8_0 => {
                d[0] = half_at(block, 0);
                if let (Some(q), Some(bytes)) = (q.first_chunk_mut::<32>(), block[2..].first_chunk::<32>()) {
                    *q = bytes.map(u8::cast_signed);
                }
            }
            DType::IQ4_NL => {
                d[0] = half_at(block, 0);
                looked_up(&block[2..18], q);
            }
            DType::IQ4_XS => iq4_xs(block, q, d),
            DType::Q2_K => q2_k(block, q, d, m),
            DType::Q3_K => q3_k(block, q, d),
            DType::Q4_K => q4_k(block, q, d, m),
            DType::Q5_K => q5_k(block, q, d, m),
            DType::Q6_K => q6_k(block, q, d),
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("floats have no blocks"),
        }
    }
}

/// The same byte 16 times.
const fn bytes_of(byte: u8) -> u128 {
    u128::from_ne_bytes([byte; 16])
}

/// Low and high nibbles of 16 bytes. Integers that hold 16 bytes are fast with vectors and without.
#[inline(always)]
fn split(bytes: [u8; 16]) -> [u128; 2] {
    let bytes = u128::from_le_bytes(bytes);
    [bytes & bytes_of(15), (bytes >> 4) & bytes_of(15)]
}

/// Writes 16 numbers below 32, less `offset` (at most 32) each.
#[inline(always)]
fn put(numbers: u128, offset: u8, q: &mut [i8; 16]) {
    // The top bits keep each byte from borrowing of the next one.
    let top = bytes_of(128);
    *q = (((numbers | top) - bytes_of(offset)) ^ top).to_le_bytes().map(u8::cast_signed);
}

/// A group of 32 split in its halves, and the 16 bytes of nibbles that it is made of.
#[inline(always)]
fn parts<'q>(bytes: &[u8], q: &'q mut [i8]) -> ([u8; 16], [&'q mut [i8; 16]; 2]) {
    let (low, high) = q.split_at_mut(16);
    let parts = (bytes.first_chunk(), low.first_chunk_mut(), high.first_chunk_mut());
    let (Some(bytes), Some(low), Some(high)) = parts else { unreachable!("blocks and groups are whole") };
    (*bytes, [low, high])
}

/// 16 bytes: low nibbles first, then high ones.
#[inline(always)]
fn four_bits(bytes: &[u8], q: &mut [i8], offset: u8) {
    let (bytes, [low, high]) = parts(bytes, q);
    let [a, b] = split(bytes);
    put(a, offset, low);
    put(b, offset, high);
}

/// The same with 32 fifth bits before them.
#[inline(always)]
fn five_bits(fifth: &[u8], bytes: &[u8], q: &mut [i8], offset: u8) {
    let (bytes, [low, high]) = parts(bytes, q);
    let [a, b] = split(bytes);
    put(a | spread(fifth[0], fifth[1]), offset, low);
    put(b | spread(fifth[2], fifth[3]), offset, high);
}

/// 16 bits to 16 bytes of 0 or 16.
#[inline(always)]
fn spread(low: u8, high: u8) -> u128 {
    let eight = |bits: u8| {
        let own = (u64::from(bits) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
        // A byte that is not zero carries into its top bit.
        (own + 0x7F7F_7F7F_7F7F_7F7F) >> 3 & 0x1010_1010_1010_1010
    };
    u128::from(eight(low)) | u128::from(eight(high)) << 64
}

/// As [`four_bits`], looked up.
#[inline(always)]
fn looked_up(bytes: &[u8], q: &mut [i8]) {
    let (bytes, [low, high]) = parts(bytes, q);
    *low = bytes.map(|b| IQ4_VALUES[usize::from(b & 15)]);
    *high = bytes.map(|b| IQ4_VALUES[usize::from(b >> 4)]);
}

#[inline(always)]
fn iq4_xs(block: &[u8], q: &mut [i8], d: &mut [f32]) {
    let all = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (g, q) in q.chunks_exact_mut(32).enumerate() {
        let low = block[4 + g / 2] >> (4 * (g % 2)) & 15;
        let scale = i32::from(low) | i32::from(high >> (2 * g) & 3) << 4;
        d[g] = all * (scale - 32) as f32;
        looked_up(&block[8 + 16 * g..24 + 16 * g], q);
    }
}

#[inline(always)]
fn q2_k(block: &[u8], q: &mut [i8], d: &mut [f32], m: &mut [f32]) {
    let (all, min) = (half_at(block, 80), half_at(block, 82));
    for g in 0..16 {
        d[g] = all * f32::from(block[g] & 15);
        m[g] = -min * f32::from(block[g] >> 4);
    }
    for (i, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, group) = (i / 4, i % 4);
        let Some(low) = block[16 + 32 * half..].first_chunk::<32>() else { return };
        for (q, low) in q.iter_mut().zip(low) {
            *q = (low >> (2 * group) & 3) as i8;
        }
    }
}

#[inline(always)]
fn q3_k(block: &[u8], q: &mut [i8], d: &mut [f32]) {
    let all = half_at(block, 108);
    let scales = &block[96..108];
    for g in 0..16 {
        let low = scales[g % 8] >> (4 * (g / 8)) & 15;
        let high = scales[8 + g % 4] >> (2 * (g / 4)) & 3;
        d[g] = all * (i32::from(low | high << 4) - 32) as f32;
    }
    let Some(high) = block.first_chunk::<32>() else { return };
    for (i, q) in q.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, group) = (i / 4, i % 4);
        let Some(low) = block[32 + 32 * half..].first_chunk::<32>() else { return };
        for (q, (low, high)) in q.iter_mut().zip(low.iter().zip(high)) {
            *q = (low >> (2 * group) & 3 | (high >> i & 1) << 2) as i8 - 4;
        }
    }
}

/// The eight 6-bit scales and minima of `Q4_K` and `Q5_K`.
#[inline(always)]
fn six_bit_scales(block: &[u8], d: &mut [f32], m: &mut [f32]) {
    let (all, min) = (half_at(block, 0), half_at(block, 2));
    let s = &block[4..16];
    for g in 0..4 {
        d[g] = all * f32::from(s[g] & 63);
        m[g] = -min * f32::from(s[4 + g] & 63);
        d[4 + g] = all * f32::from(s[8 + g] & 15 | s[g] >> 6 << 4);
        m[4 + g] = -min * f32::from(s[8 + g] >> 4 | s[4 + g] >> 6 << 4);
    }
}

#[inline(always)]
fn q4_k(block: &[u8], q: &mut [i8], d: &mut [f32], m: &mut [f32]) {
    six_bit_scales(block, d, m);
    for (pair, q) in q.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        for (half, bytes) in block[16 + 32 * pair..48 + 32 * pair].as_chunks::<16>().0.iter().enumerate() {
            let [a, b] = split(*bytes);
            let (low, high) = q.split_at_mut(32);
            put(a, 0, &mut low.as_chunks_mut().0[half]);
            put(b, 0, &mut high.as_chunks_mut().0[half]);
        }
    }
}

#[inline(always)]
fn q5_k(block: &[u8], q: &mut [i8], d: &mut [f32], m: &mut [f32]) {
    six_bit_scales(block, d, m);
    let Some(high) = block[16..].first_chunk::<32>() else { return };
    for (pair, q) in q.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let Some(low) = block[48 + 32 * pair..].first_chunk::<32>() else { return };
        for i in 0..32 {
            let (low, high) = (low[i], high[i] >> (2 * pair));
            q[i] = (low & 15 | (high & 1) << 4) as i8;
            q[32 + i] = (low >> 4 | (high & 2) << 3) as i8;
        }
    }
}

#[inline(always)]
fn q6_k(block: &[u8], q: &mut [i8], d: &mut [f32]) {
    let all = half_at(block, 208);
    for g in 0..16 {
        d[g] = all * f32::from(block[192 + g].cast_signed());
    }
    for (half, q) in q.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (Some(low), Some(high)) =
            (block[64 * half..].first_chunk::<64>(), block[128 + 32 * half..].first_chunk::<32>())
        else {
            return;
        };
        for i in 0..32 {
            let (a, b, high) = (low[i], low[32 + i], high[i]);
            q[i] = (a & 15 | (high & 3) << 4) as i8 - 32;
            q[32 + i] = (b & 15 | (high >> 2 & 3) << 4) as i8 - 32;
            q[64 + i] = (a >> 4 | (high >> 4 & 3) << 4) as i8 - 32;
            q[96 + i] = (b >> 4 | high >> 6 << 4) as i8 - 32;
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn halves_convert_exactly() {
        for bits in 0..=u16::MAX {
            let (ours, exact) = (super::half_at(&bits.to_le_bytes(), 0), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == exact.to_bits() || ours.is_nan() && exact.is_nan(), "{bits:#x}");
        }
    }
}
