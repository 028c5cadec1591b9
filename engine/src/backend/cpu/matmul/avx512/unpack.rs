//! Every block format to vectors of unsigned bytes and of scales, 256 columns ("a chunk") at a time.
//!
//! The order within a chunk is that of [`super::super::activations::Chunk`].

use std::arch::x86_64::*;

use super::super::blocks::IQ4_VALUES;

/// A block format. Pointers are to the chunk's first block.
///
/// # Safety
/// `chunk` points to `valid` whole groups of 32 columns, 1 to 8 (8 for formats with blocks of 256), and
/// the CPU has the features of [`super::prepare`]. Nothing beyond these groups' blocks is read; what the
/// other groups yield is some finite copy.
pub(super) unsafe trait Format {
    /// Bytes of 256 columns.
    const CHUNK: usize;
    /// Taken away from the bytes to get the weights' integers.
    const OFFSET: i8;
    /// Scales are for 16 columns.
    const SUB_GROUPS: bool = false;
    /// Weights have minima.
    const MIN: bool = false;
    /// Sums of eight products of bytes with activations fit 16 bits (of four, with sub-groups).
    const SMALL: bool = true;

    /// `bytes` are those of `packed`, unpacked byte by byte.
    const PACKED: bool = false;

    /// Bytes of groups `4 half ..`: their first halves, then their second ones.
    unsafe fn bytes(chunk: *const u8, half: usize, valid: usize) -> [__m512i; 2];

    /// With `PACKED`, what [`Self::unpack`] makes `bytes` of.
    unsafe fn packed(_chunk: *const u8, _half: usize, _valid: usize) -> __m512i {
        unreachable!("the format is not packed")
    }

    /// See [`Self::packed`]. Bytes may come in any order.
    unsafe fn unpack(_packed: __m512i) -> [__m512i; 2] {
        unreachable!("the format is not packed")
    }

    /// At `4 i ..`: `[d_i, m_i, d_{4+i}, m_{4+i}]`; with sub-groups the two halves' scales in place of
    /// `d, m`.
    unsafe fn scales(chunk: *const u8, valid: usize) -> __m512;

    /// With sub-groups, their minima in the same places.
    unsafe fn sub_minima(_chunk: *const u8) -> __m512 {
        // SAFETY: a plain vector constant; the features are the trait's condition.
        unsafe { _mm512_setzero_ps() }
    }
}

/// The block of group `g`, or the last valid one.
#[inline(always)]
const fn at(g: usize, valid: usize, block: usize) -> usize {
    (if g < valid { g } else { valid - 1 }) * block
}

/// 16 bytes of each of four blocks of 32 columns, `skip` bytes in.
#[inline(always)]
unsafe fn four(chunk: *const u8, half: usize, valid: usize, block: usize, skip: usize) -> __m512i {
    // SAFETY: `at` stays within the valid blocks, and `skip + 16 <= block`.
    unsafe {
        let load = |i: usize| _mm_loadu_si128(chunk.add(at(4 * half + i, valid, block) + skip).cast());
        let v = _mm512_castsi128_si512(load(0));
        let v = _mm512_inserti32x4::<1>(v, load(1));
        let v = _mm512_inserti32x4::<2>(v, load(2));
        _mm512_inserti32x4::<3>(v, load(3))
    }
}

/// Low nibbles and high nibbles.
#[inline(always)]
unsafe fn nibbles(v: __m512i) -> [__m512i; 2] {
    // SAFETY: register operations.
    unsafe {
        let mask = _mm512_set1_epi8(15);
        [_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask)]
    }
}

/// The first four bytes of eight blocks as halves: `[h_i, h'_i, h_{4+i}, h'_{4+i}]`, with `h'` zeroed
/// unless `MIN`.
#[inline(always)]
unsafe fn block_scales<const MIN: bool>(chunk: *const u8, valid: usize, block: usize) -> __m512 {
    // SAFETY: `at` stays within the valid blocks, which are longer than four bytes.
    unsafe {
        let o = |g: usize| at(g, valid, block) as i32;
        let index = _mm256_setr_epi32(o(0), o(4), o(1), o(5), o(2), o(6), o(3), o(7));
        let halves = _mm256_i32gather_epi32::<1>(chunk.cast(), index);
        let halves = if MIN { halves } else { _mm256_and_si256(halves, _mm256_set1_epi32(0xFFFF)) };
        _mm512_cvtph_ps(halves)
    }
}

/// One half at `p` in all lanes.
#[inline(always)]
unsafe fn half_at(p: *const u8) -> __m512 {
    // SAFETY: two bytes are there, the caller says.
    unsafe {
        _mm512_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(
            p.cast::<u16>().read_unaligned(),
        )))))
    }
}

/// 0x10 in each byte whose bit is set in the blocks' 32-bit masks, `skip` bytes in.
#[inline(always)]
unsafe fn fifth_bits(chunk: *const u8, half: usize, valid: usize, block: usize, skip: usize) -> [__m512i; 2] {
    // SAFETY: as in `four`, with four bytes.
    unsafe {
        let mask = |i: usize| {
            u64::from(chunk.add(at(4 * half + i, valid, block) + skip).cast::<u32>().read_unaligned())
        };
        let (m0, m1, m2, m3) = (mask(0), mask(1), mask(2), mask(3));
        let low = m0 & 0xFFFF | (m1 & 0xFFFF) << 16 | (m2 & 0xFFFF) << 32 | m3 << 48;
        let high = m0 >> 16 | (m1 >> 16) << 16 | (m2 >> 16) << 32 | (m3 >> 16) << 48;
        let bit = _mm512_set1_epi8(16);
        [_mm512_maskz_mov_epi8(low, bit), _mm512_maskz_mov_epi8(high, bit)]
    }
}

/// Formats with 32 columns a block and nibbles `SKIP` bytes in.
macro_rules! nibble_format {
    ($name:ident, $block:expr, $skip:expr, $offset:expr, $min:expr, $fifth:expr) => {
        pub(super) struct $name;

        // SAFETY: reads only through the helpers, within a block.
        unsafe impl Format for $name {
            const CHUNK: usize = 8 * $block;
            const OFFSET: i8 = $offset;
            const MIN: bool = $min;
            const PACKED: bool = {
                let fifth: Option<usize> = $fifth;
                fifth.is_none()
            };

            #[inline(always)]
            unsafe fn packed(chunk: *const u8, half: usize, valid: usize) -> __m512i {
                // SAFETY: the trait's conditions are the helper's.
                unsafe { four(chunk, half, valid, $block, $skip) }
            }

            #[inline(always)]
            unsafe fn unpack(packed: __m512i) -> [__m512i; 2] {
                // SAFETY: as above.
                unsafe { nibbles(packed) }
            }

            #[inline(always)]
            unsafe fn bytes(chunk: *const u8, half: usize, valid: usize) -> [__m512i; 2] {
                // SAFETY: the trait's conditions are the helpers'.
                unsafe {
                    let [a, b] = nibbles(four(chunk, half, valid, $block, $skip));
                    let fifth: Option<usize> = $fifth;
                    let Some(at) = fifth else { return [a, b] };
                    let [x, y] = fifth_bits(chunk, half, valid, $block, at);
                    [_mm512_or_si512(a, x), _mm512_or_si512(b, y)]
                }
            }

            #[inline(always)]
            unsafe fn scales(chunk: *const u8, valid: usize) -> __m512 {
                // SAFETY: as above.
                unsafe { block_scales::<$min>(chunk, valid, $block) }
            }
        }
    };
}

nibble_format!(Q4Zero, 18, 2, 8, false, None);
nibble_format!(Q4One, 20, 4, 0, true, None);
nibble_format!(Q5Zero, 22, 6, 16, false, Some(2));
nibble_format!(Q5One, 24, 8, 0, true, Some(4));

pub(super) struct Q8Zero;

// SAFETY: reads only through the helpers, within a block.
unsafe impl Format for Q8Zero {
    const CHUNK: usize = 8 * 34;
    const OFFSET: i8 = -128;
    const SMALL: bool = false;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, valid: usize) -> [__m512i; 2] {
        // SAFETY: the trait's conditions are the helpers'.
        unsafe {
            let flip = _mm512_set1_epi8(-128);
            let a = four(chunk, half, valid, 34, 2);
            let b = four(chunk, half, valid, 34, 18);
            [_mm512_xor_si512(a, flip), _mm512_xor_si512(b, flip)]
        }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, valid: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { block_scales::<false>(chunk, valid, 34) }
    }
}

/// Looks nibbles up among the non-linear values, plus 128.
#[inline(always)]
unsafe fn iq4(v: __m512i) -> [__m512i; 2] {
    // SAFETY: the table is 16 bytes; else register operations.
    unsafe {
        let table = _mm_loadu_si128(IQ4_VALUES.as_ptr().cast());
        let table = _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128)));
        let [a, b] = nibbles(v);
        [_mm512_shuffle_epi8(table, a), _mm512_shuffle_epi8(table, b)]
    }
}

pub(super) struct Iq4Nl;

// SAFETY: reads only through the helpers, within a block.
unsafe impl Format for Iq4Nl {
    const CHUNK: usize = 8 * 18;
    const OFFSET: i8 = -128;
    const SMALL: bool = false;

    const PACKED: bool = true;

    #[inline(always)]
    unsafe fn packed(chunk: *const u8, half: usize, valid: usize) -> __m512i {
        // SAFETY: the trait's conditions are the helper's.
        unsafe { four(chunk, half, valid, 18, 2) }
    }

    #[inline(always)]
    unsafe fn unpack(packed: __m512i) -> [__m512i; 2] {
        // SAFETY: as above.
        unsafe { iq4(packed) }
    }

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, valid: usize) -> [__m512i; 2] {
        // SAFETY: the trait's conditions are the helpers'.
        unsafe { iq4(four(chunk, half, valid, 18, 2)) }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, valid: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { block_scales::<false>(chunk, valid, 18) }
    }
}

/// Eight scales with every second place zero, in the chunk's order.
#[inline(always)]
unsafe fn spread_eight(values: [f32; 8]) -> __m512 {
    let [a, b, c, d, e, f, g, h] = values;
    // SAFETY: register operations.
    unsafe { _mm512_setr_ps(a, 0.0, e, 0.0, b, 0.0, f, 0.0, c, 0.0, g, 0.0, d, 0.0, h, 0.0) }
}

pub(super) struct Iq4Xs;

// SAFETY: reads within the 136 bytes of a block.
unsafe impl Format for Iq4Xs {
    const CHUNK: usize = 136;
    const OFFSET: i8 = -128;
    const SMALL: bool = false;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, _valid: usize) -> [__m512i; 2] {
        // SAFETY: 128 bytes of nibbles begin at 8.
        unsafe { iq4(_mm512_loadu_si512(chunk.add(8 + 64 * half).cast())) }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, _valid: usize) -> __m512 {
        // SAFETY: within the block's first eight bytes.
        unsafe {
            let high = chunk.add(2).cast::<u16>().read_unaligned();
            let low = chunk.add(4).cast::<u32>().read_unaligned();
            let scale =
                |g: usize| ((low >> (4 * g) & 15 | u32::from(high >> (2 * g) & 3) << 4) as i32 - 32) as f32;
            _mm512_mul_ps(half_at(chunk), spread_eight(std::array::from_fn(scale)))
        }
    }
}

/// The 6-bit scales and minima of `Q4_K` and `Q5_K`.
#[inline(always)]
unsafe fn six_bit_scales(chunk: *const u8) -> __m512 {
    // SAFETY: within the block's first 16 bytes.
    unsafe {
        let word = |i: usize| chunk.add(4 + 4 * i).cast::<u32>().read_unaligned();
        let (a, b, c) = (word(0), word(1), word(2));
        let d_low = a & 0x3F3F_3F3F;
        let m_low = b & 0x3F3F_3F3F;
        let d_high = c & 0x0F0F_0F0F | (a >> 2) & 0x3030_3030;
        let m_high = (c >> 4) & 0x0F0F_0F0F | (b >> 2) & 0x3030_3030;
        let all = _mm_setr_epi32(d_low as i32, m_low as i32, d_high as i32, m_high as i32);
        // From [d0-3, m0-3, d4-7, m4-7] to [d0, m0, d4, m4, d1, ...].
        let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let values = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(all, order)));
        let both = _mm_set1_epi32(chunk.cast::<i32>().read_unaligned());
        let factors =
            _mm512_broadcast_f32x4(_mm_xor_ps(_mm_cvtph_ps(both), _mm_setr_ps(0.0, -0.0, 0.0, -0.0)));
        _mm512_mul_ps(factors, values)
    }
}

/// 64 bytes `A A' B B'` to nibbles: first halves of the four groups (A low, A high, B low, B high), then
/// their second halves.
#[inline(always)]
unsafe fn nibble_pairs(v: __m512i) -> [__m512i; 2] {
    // SAFETY: register operations.
    unsafe {
        let shift = _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4);
        let mask = _mm512_set1_epi8(15);
        let part = |v| _mm512_and_si512(_mm512_srlv_epi64(v, shift), mask);
        [part(_mm512_shuffle_i32x4::<0b10_10_00_00>(v, v)), part(_mm512_shuffle_i32x4::<0b11_11_01_01>(v, v))]
    }
}

pub(super) struct Q4K;

// SAFETY: reads within the 144 bytes of a block.
unsafe impl Format for Q4K {
    const CHUNK: usize = 144;
    const OFFSET: i8 = 0;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, _valid: usize) -> [__m512i; 2] {
        // SAFETY: 128 bytes of nibbles begin at 16.
        unsafe { nibble_pairs(_mm512_loadu_si512(chunk.add(16 + 64 * half).cast())) }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, _valid: usize) -> __m512 {
        // SAFETY: the trait's conditions are the helper's.
        unsafe { six_bit_scales(chunk) }
    }
}

pub(super) struct Q5K;

// SAFETY: reads within the 176 bytes of a block.
unsafe impl Format for Q5K {
    const CHUNK: usize = 176;
    const OFFSET: i8 = 0;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, _valid: usize) -> [__m512i; 2] {
        // SAFETY: 32 bytes of high bits begin at 16, 128 bytes of nibbles at 48.
        unsafe {
            let [a, b] = nibble_pairs(_mm512_loadu_si512(chunk.add(48 + 64 * half).cast()));
            // Group g has its fifth bit in bit g; rotate it to bit 4.
            let first = 4 * half as i64;
            let turn = |g: i64| (g + first - 4) & 63;
            let turns =
                _mm512_setr_epi64(turn(0), turn(0), turn(1), turn(1), turn(2), turn(2), turn(3), turn(3));
            let bit = _mm512_set1_epi8(16);
            let high = |skip: usize| {
                let v = _mm512_broadcast_i32x4(_mm_loadu_si128(chunk.add(skip).cast()));
                _mm512_and_si512(_mm512_rorv_epi64(v, turns), bit)
            };
            [_mm512_or_si512(a, high(16)), _mm512_or_si512(b, high(32))]
        }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, _valid: usize) -> __m512 {
        // SAFETY: the trait's conditions are the helper's.
        unsafe { six_bit_scales(chunk) }
    }
}

/// 16 bytes four times, each 128 bits rotated right by its number (within 64 bits).
#[inline(always)]
unsafe fn rotated(p: *const u8, turns: [i64; 4]) -> __m512i {
    // SAFETY: 16 bytes are there, the caller says.
    unsafe {
        let [a, b, c, d] = turns.map(|t| t & 63);
        let v = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
        _mm512_rorv_epi64(v, _mm512_setr_epi64(a, a, b, b, c, c, d, d))
    }
}

/// 16 signed bytes in group order to floats in the chunk's order.
#[inline(always)]
unsafe fn sixteen_scales(bytes: __m128i) -> __m512 {
    // SAFETY: register operations.
    unsafe {
        // Group i's halves are bytes 2i and 2i + 1.
        let order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_shuffle_epi8(bytes, order)))
    }
}

pub(super) struct Q6K;

// SAFETY: reads within the 210 bytes of a block.
unsafe impl Format for Q6K {
    const CHUNK: usize = 210;
    const OFFSET: i8 = 32;
    const SUB_GROUPS: bool = true;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, _valid: usize) -> [__m512i; 2] {
        // SAFETY: 128 bytes of nibbles at 0, 64 bytes of high bits at 128.
        unsafe {
            let v = _mm512_loadu_si512(chunk.add(64 * half).cast());
            let shift = _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4);
            let (low, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(48));
            let part = |v: __m512i, skip: usize| {
                let bits = rotated(chunk.add(128 + 32 * half + skip), [-4, -2, 0, 2]);
                let nibbles = _mm512_and_si512(_mm512_srlv_epi64(v, shift), low);
                _mm512_or_si512(nibbles, _mm512_and_si512(bits, high))
            };
            let first = _mm512_shuffle_i32x4::<0b10_00_10_00>(v, v);
            let second = _mm512_shuffle_i32x4::<0b11_01_11_01>(v, v);
            [part(first, 0), part(second, 16)]
        }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, _valid: usize) -> __m512 {
        // SAFETY: 16 bytes of scales at 192, a half at 208.
        unsafe {
            _mm512_mul_ps(half_at(chunk.add(208)), sixteen_scales(_mm_loadu_si128(chunk.add(192).cast())))
        }
    }
}

pub(super) struct Q2K;

// SAFETY: reads within the 84 bytes of a block.
unsafe impl Format for Q2K {
    const CHUNK: usize = 84;
    const OFFSET: i8 = 0;
    const SUB_GROUPS: bool = true;
    const MIN: bool = true;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, _valid: usize) -> [__m512i; 2] {
        // SAFETY: 64 bytes of weights at 16.
        unsafe {
            let mask = _mm512_set1_epi8(3);
            let part =
                |skip: usize| _mm512_and_si512(rotated(chunk.add(16 + 32 * half + skip), [0, 2, 4, 6]), mask);
            [part(0), part(16)]
        }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, _valid: usize) -> __m512 {
        // SAFETY: 16 bytes of scales and minima at 0, halves at 80 and 82.
        unsafe {
            let scales = _mm_and_si128(_mm_loadu_si128(chunk.cast()), _mm_set1_epi8(15));
            _mm512_mul_ps(half_at(chunk.add(80)), sixteen_scales(scales))
        }
    }

    #[inline(always)]
    unsafe fn sub_minima(chunk: *const u8) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let minima = _mm_and_si128(_mm_srli_epi16::<4>(_mm_loadu_si128(chunk.cast())), _mm_set1_epi8(15));
            let minus = _mm512_xor_ps(half_at(chunk.add(82)), _mm512_set1_ps(-0.0));
            _mm512_mul_ps(minus, sixteen_scales(minima))
        }
    }
}

pub(super) struct Q3K;

// SAFETY: reads within the 110 bytes of a block.
unsafe impl Format for Q3K {
    const CHUNK: usize = 110;
    const OFFSET: i8 = 4;
    const SUB_GROUPS: bool = true;

    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, _valid: usize) -> [__m512i; 2] {
        // SAFETY: 32 bytes of high bits at 0, 64 bytes of low bits at 32.
        unsafe {
            let (low, high) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4));
            // Group g of this half has its high bit in bit 4 half + g; turn it to bit 2.
            let first = 4 * half as i64 - 2;
            let part = |skip: usize| {
                let bits = rotated(chunk.add(skip), [first, first + 1, first + 2, first + 3]);
                let q = rotated(chunk.add(32 + 32 * half + skip), [0, 2, 4, 6]);
                _mm512_or_si512(_mm512_and_si512(q, low), _mm512_and_si512(bits, high))
            };
            [part(0), part(16)]
        }
    }

    #[inline(always)]
    unsafe fn scales(chunk: *const u8, _valid: usize) -> __m512 {
        // SAFETY: 12 bytes of scales at 96, a half at 108.
        unsafe {
            let word = |i: usize| chunk.add(96 + 4 * i).cast::<u32>().read_unaligned();
            let (a, b, c) = (word(0), word(1), word(2));
            let scale = |low: u32, turn: u32| (low & 0x0F0F_0F0F | (c >> turn & 0x0303_0303) << 4) as i32;
            let all = _mm_setr_epi32(scale(a, 0), scale(b, 2), scale(a >> 4, 4), scale(b >> 4, 6));
            let all = _mm_sub_epi8(all, _mm_set1_epi8(32));
            _mm512_mul_ps(half_at(chunk.add(108)), sixteen_scales(all))
        }
    }
}
