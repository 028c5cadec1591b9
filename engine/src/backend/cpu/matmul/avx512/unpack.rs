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
    #[inline(always)]
    unsafe fn bytes(chunk: *const u8, half: usize, valid: usize) -> [__m512i; 2] {
        // SAFETY: the caller's conditions.
        unsafe { Self::unpack(Self::packed(chunk, half, valid)) }
    }

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
pub(super) unsafe fn half_at(p: *const u8) -> __m512 {
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
