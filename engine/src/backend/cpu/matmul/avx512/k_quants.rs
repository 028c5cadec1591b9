//! The block formats with 256 columns and scales of scales, as [`super::unpack`] has the others.

use std::arch::x86_64::*;

use super::unpack::{Format, half_at};

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
