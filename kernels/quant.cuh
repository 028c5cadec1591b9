// Repacked weights: where every bit of the ten types lies, and the device functions that read them.
//
// A matrix is a row of row tiles, a row tile is a row of slices, a slice belongs to 4 rows x up to 1024 columns:
//   row tile t (rows 4t .. 4t+3)   at  t * Layout<T>::row_tile_bytes(columns)
//   slice s (columns 1024s ..)     at  s * Layout<T>::slice_bytes, g = min(32, columns/32 - 32s) groups of 32 columns
// Lane l of a warp takes group l of a slice. Inside a slice come planes, one after the other, g-dependent in size:
//
//   plane          types               bytes     index
//   quants         all                 16 B each [row 4][chunk C][g]   C = 1 (4, 5, 6 bit), 2 (8 bit), 4 (f16, bf16)
//   word 4         q5_0 q5_1 q5_k      4 B each  [g][row 4]            the fifth word of each row's five
//   words 4, 5     q6_k                8 B each  [row / 2][g][row % 2] the last two of each row's six
//   scales         q4_0 q5_0 q8_0      2 B each  [g][row 4]            f16 d
//                  q4_1 q5_1           4 B each  [g][row 4]            f16 d, f16 m
//                  q4_k q5_k           4 B each  [g / 8][row 4]        f16 d, f16 dmin
//                                      4 B each  [g]                   6-bit scales and mins of 4 rows: low word
//                                      2 B each  [g]                   ... and high word (see KScales)
//                  q6_k                1 B each  [g][row 4][half 2]    scale + 128 of 16 columns
//                                      2 B each  [g / 8][row 4]        f16 d
//
// Nothing grows: a row tile has the size of its four rows of ggml blocks, rounded up to 16 bytes. The order of columns is
// natural everywhere; only bits inside a group move.
//
// Quants as denormal floats. A group's 32 quants of n bits (unsigned, offset added) fill n words. A quant that lies in
// bits p .. p+n-1 of a word, all below bit 23, is a float after one AND: q * 2^(p-149), a denormal, exact and without a
// bias that would cost digits in a sum. FFMA takes denormals at full speed, so no conversion is left. The power of two
// is paid elsewhere: gemv multiplies x by x_factor(i) once, unpack() folds it into the scale. Each word also holds
// quants that are in place only after a rotation by 16 (one PRMT for all of them). position() says which lies where:
//   4 bit: column i in word i/8, bit 4(i%8).
//   5 bit: columns 0..11 six to a word in words 0, 1, from bits 3 and 5 on, cyclically; 12..14 in the low half of word 4,
//          from bit 1 on; what is left makes column 15: bit 0 of word 4, bits 1,2 of word 0, bits 3,4 of word 1. Columns
//          16..31 likewise in words 2, 3 and the high half of word 4.
//   6 bit: columns 0..14 five to a word in words 0..2, from bit 2w+2 on, cyclically; bits 2w, 2w+1 of the three make
//          column 15. Columns 16..31 likewise in words 3..5.
//   8 bit: column i in word i/4, bit 7 + 8(i%4), cyclically.
#pragma once

#include "common.cuh"

enum Type { F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

// Bits of a quant; also the words that 32 of them fill.
__host__ __device__ constexpr int quant_bits(int type) {
    return type == F16 || type == BF16 ? 16
           : type == Q8_0              ? 8
           : type == Q6_K              ? 6
           : type == Q5_0 || type == Q5_1 || type == Q5_K ? 5 : 4;
}

// Bytes that a group of columns takes in the scale planes, all four rows.
__host__ __device__ constexpr int scale_bytes(int type) {
    return type == F16 || type == BF16 ? 0 : type == Q4_1 || type == Q5_1 ? 16 : type == Q6_K ? 9 : 8;
}

// What quants have in them that the weight has not: weight = scale * (quant - offset) + min.
__host__ __device__ constexpr float quant_offset(int type) {
    return type == Q4_0 ? 8.0f : type == Q5_0 ? 16.0f : type == Q8_0 ? 128.0f : type == Q6_K ? 32.0f : 0.0f;
}

// Whether weights have a min (q4_1, q5_1, q4_k, q5_k), and how many scales a group has.
__host__ __device__ constexpr bool has_min(int type) {
    return type == Q4_1 || type == Q5_1 || type == Q4_K || type == Q5_K;
}
__host__ __device__ constexpr int group_scales(int type) { return type == Q6_K ? 2 : 1; }

template <int T>
struct Layout {
    static constexpr int BITS = quant_bits(T);
    // Bytes of one group of columns of four rows.
    static constexpr int TILE_GROUP = 16 * BITS + scale_bytes(T);
    static constexpr int slice_bytes = 32 * TILE_GROUP;
    __host__ __device__ static constexpr int row_bytes(int columns) { return columns / GROUP * TILE_GROUP / 4; }
    __host__ __device__ static constexpr int row_tile_bytes(int columns) {
        return (columns / GROUP * TILE_GROUP + 15) & ~15;
    }
    // Where the scale planes of a slice of g groups begin.
    __host__ __device__ static constexpr int scales(int g) { return 16 * BITS * g; }
};

// The float 2^n; folds to a constant.
__device__ __forceinline__ float power_of_two(int n) { return __int_as_float((127 + n) << 23); }

// Where quant i of a group lies: word, and first bit in it, cyclically (a quant may wrap around). The leftover quants
// that are put together of several words have no single place: see leftover().
struct Position {
    int word, bit;
};
__host__ __device__ constexpr Position position(int bits, int i) {
    return bits == 4   ? Position{i / 8, i % 8 * 4}
           : bits == 5 ? i % 16 < 12 ? Position{i / 16 * 2 + i % 16 / 6, (i % 16 / 6 * 2 + 3 + i % 16 % 6 * 5) % 32}
                                     : Position{4, i / 16 * 16 + 1 + (i % 16 - 12) * 5}
           : bits == 6 ? Position{i / 16 * 3 + i % 16 / 5, (i % 16 / 5 * 2 + 2 + i % 16 % 5 * 6) % 32}
                       : Position{i / 4, (7 + i % 4 * 8) % 32};
}
__host__ __device__ constexpr bool leftover(int bits, int i) {
    return (bits == 5 || bits == 6) && i % 16 == 15;
}
// Whether quant i is in place (all below bit 23) only in its word rotated by 16 bits.
__host__ __device__ constexpr bool rotated(int bits, int i) {
    return !leftover(bits, i) && position(bits, i).bit + bits > 23;
}
// The bit p of field(i) = q * 2^(p-149).
__host__ __device__ constexpr int field_bit(int bits, int i) {
    return leftover(bits, i) ? 0 : (position(bits, i).bit + (rotated(bits, i) ? 16 : 0)) % 32;
}

__device__ __forceinline__ float half_low(u32 w) { return __half2float(__ushort_as_half((u16)(w & 0xffff))); }
__device__ __forceinline__ float half_high(u32 w) { return __half2float(__ushort_as_half((u16)(w >> 16))); }

// One lane's group of one row: 32 quants as they lie.
template <int T>
struct Quants {
    static constexpr int BITS = quant_bits(T);
    u32 q[BITS];

    __device__ __forceinline__ void chunk(const u8* slice, int index, int to) {
        uint4 v = __ldg((const uint4*)(slice + (u32)(index * 16)));
        q[to] = v.x, q[to + 1] = v.y, q[to + 2] = v.z, q[to + 3] = v.w;
    }

    // The words of the quants plane only, at most 16; words 4, 5 of 5 and 6 bit are load_rest's.
    __device__ __forceinline__ void load_chunks(const u8* slice, int groups, int lane, int row) {
        constexpr int CHUNKS = BITS < 8 ? 1 : BITS / 4;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) chunk(slice, (row * CHUNKS + c) * groups + lane, 4 * c);
    }

    __device__ __forceinline__ void load_rest(const u8* slice, int groups, int lane, int row) {
        if constexpr (BITS == 5) q[4] = __ldg((const u32*)(slice + (u32)(64 * groups + lane * 16 + row * 4)));
        if constexpr (BITS == 6) {
            uint2 v = __ldg((const uint2*)(slice + (u32)(64 * groups + (row / 2 * groups + lane) * 16 + row % 2 * 8)));
            q[4] = v.x, q[5] = v.y;
        }
    }

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane, int row) {
        load_chunks(slice, groups, lane, row);
        load_rest(slice, groups, lane, row);
    }

    // Factor of field(i): field(i) * x_factor(i) = quant * 2^-49. For f16 and bf16, whose fields are the weights, 1.
    __device__ static __forceinline__ float x_factor(int i) {
        return BITS == 16 ? 1.0f : power_of_two(100 - field_bit(BITS, i));
    }
    static constexpr float SUM_UNIT = BITS == 16 ? 1.0f : 0x1p-49f;

    // Quant i as a float: quant * 2^(field_bit - 149), or the weight itself for f16 and bf16. i is a constant.
    __device__ __forceinline__ float field(int i) const {
        if constexpr (T == F16) return i % 2 ? half_high(q[i / 2]) : half_low(q[i / 2]);
        if constexpr (T == BF16) return __uint_as_float(i % 2 ? q[i / 2] & 0xffff0000u : __byte_perm(q[i / 2], 0, 0x1044));
        if constexpr (BITS < 16) {
            if (BITS == 5 && i % 16 == 15) {
                int w = i / 16 * 2;
                u32 last = i / 16 ? __byte_perm(q[4 % BITS], q[4 % BITS], 0x1032) : q[4 % BITS];
                return __uint_as_float((last & 0x1) | (q[w] & 0x6) | (q[w + 1] & 0x18));
            }
            if (BITS == 6 && i % 16 == 15) {
                int w = i / 16 * 3;
                return __uint_as_float((q[w] & 0x3) | (q[w + 1] & 0xc) | (q[w + 2] & 0x30));
            }
            u32 w = q[position(BITS, i).word];
            if (rotated(BITS, i)) w = __byte_perm(w, w, 0x1032);
            return __uint_as_float(w & (((1u << BITS) - 1) << field_bit(BITS, i)));
        }
    }
};

// 6-bit scales and mins of four rows' groups in 48 bits, so that each is a denormal after one PRMT for all and one or
// two ANDs: low word: scale of row r at bit 2 + 6r, min of row 0 at bit 28 (wrapping to bits 0, 1), the two low bits of
// row 3's min at bit 26. High word: mins of rows 1, 2 at bits 0, 6, the four high bits of row 3's min at bit 12.
struct KScales {
    __device__ static __forceinline__ void pack(const int scale[4], const int min[4], u32& low, u16& high) {
        low = (scale[0] << 2) | (scale[1] << 8) | (scale[2] << 14) | (scale[3] << 20) | ((u32)min[0] << 28) | (min[0] >> 4) |
              ((min[3] & 3) << 26);
        high = (u16)(min[1] | (min[2] << 6) | (min[3] >> 2 << 12));
    }
    // As integers, for a row known only at run time.
    __device__ static __forceinline__ int scale(u32 low, int row) { return (low >> (2 + 6 * row)) & 63; }
    __device__ static __forceinline__ int min(u32 low, u32 high, int row) {
        u32 mins = __funnelshift_r(low, low, 28) & 63;
        mins |= (high & 0xfff) << 6 | (low >> 26 & 3) << 18 | high >> 12 << 20;
        return (mins >> (6 * row)) & 63;
    }
    // As floats times 2^-22, for a constant row.
    __device__ static __forceinline__ float scale_float(u32 low, int row) {
        u32 w = row == 3 ? __byte_perm(low, low, 0x1032) : low;
        int bit = row == 3 ? 4 : 2 + 6 * row;
        return __uint_as_float(w & (63u << bit)) * power_of_two(127 - bit);
    }
    __device__ static __forceinline__ float min_float(u32 low, u32 high, int row) {
        u32 turned = __byte_perm(low, low, 0x1032);
        u32 field = row == 0   ? turned & (63u << 12)
                    : row == 1 ? high & 63
                    : row == 2 ? high & (63u << 6)
                               : (turned & (3u << 10)) | (high & (15u << 12));
        int bit = row == 0 ? 12 : row == 1 ? 0 : row == 2 ? 6 : 10;
        return __uint_as_float(field) * power_of_two(127 - bit);
    }
};

// The scales of one lane's group in all four rows, as they lie: one load (q4_k, q5_k: three, q6_k: two).
// get(): weight * UNIT = scale[h] * (quant - offset) + min, where h = column / 16 for q6_k and else 0.
template <int T>
struct Scales {
    static constexpr bool K = T == Q4_K || T == Q5_K;
    static constexpr int WORDS = T == F16 || T == BF16 ? 1 : K ? 6 : has_min(T) || T == Q6_K ? 4 : 2;
    static constexpr float UNIT = K ? 0x1p-22f : 1.0f;
    u32 s[WORDS];

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane) {
        const u8* at = slice + (u32)Layout<T>::scales(groups);
        if constexpr (K) {
            uint4 v = __ldg((const uint4*)(at + (u32)(lane / 8 * 16)));
            s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
            s[4] = __ldg((const u32*)(at + (u32)(2 * groups + lane * 4)));
            s[5] = __ldg((const u16*)(at + (u32)(6 * groups + lane * 2)));
        } else if constexpr (has_min(T)) {
            uint4 v = __ldg((const uint4*)(at + (u32)(lane * 16)));
            s[0] = v.x, s[1] = v.y, s[2] = v.z, s[3] = v.w;
        } else if constexpr (scale_bytes(T) > 0) {
            uint2 v = __ldg((const uint2*)(at + (u32)(lane * 8)));
            s[0] = v.x, s[1] = v.y;
            if constexpr (T == Q6_K) {
                v = __ldg((const uint2*)(at + (u32)(8 * groups + lane / 8 * 8)));
                s[2] = v.x, s[3] = v.y;
            }
        }
    }

    // row is a constant.
    __device__ __forceinline__ void get(int row, float scale[group_scales(T)], float& min) const {
        min = 0.0f;
        if constexpr (K) {
            scale[0] = KScales::scale_float(s[4], row) * half_low(s[row]);
            min = -(KScales::min_float(s[4], s[5], row) * half_high(s[row]));
        } else if constexpr (has_min(T)) {
            scale[0] = half_low(s[row]);
            min = half_high(s[row]);
        } else if constexpr (T == Q6_K) {
            float d = row % 2 ? half_high(s[2 + row / 2]) : half_low(s[2 + row / 2]);
            float offset = -128.0f * d;
#pragma unroll
            for (int h = 0; h < 2; h++) scale[h] = fmaf((float)(s[row / 2] >> (row % 2 * 16 + h * 8) & 0xff), d, offset);
        } else if constexpr (scale_bytes(T) > 0) {
            scale[0] = row % 2 ? half_high(s[row / 2]) : half_low(s[row / 2]);
        } else {
            scale[0] = 1.0f;
        }
    }
};

// One lane's group of one row, quants and scales, where the row may be known only at run time: what kernels read that
// share a weight among many tokens. Consecutive lanes of one row read consecutive 16 bytes.
template <int T>
struct Group : Quants<T> {
    float scale[group_scales(T)];
    float min;

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane, int row) {
        Quants<T>::load(slice, groups, lane, row);
        const u8* at = slice + (u32)Layout<T>::scales(groups);
        min = 0.0f;
        if constexpr (Scales<T>::K) {
            u32 d = __ldg((const u32*)(at + (u32)(lane / 8 * 16 + row * 4)));
            u32 low = __ldg((const u32*)(at + (u32)(2 * groups + lane * 4)));
            u32 high = __ldg((const u16*)(at + (u32)(6 * groups + lane * 2)));
            scale[0] = (float)KScales::scale(low, row) * half_low(d);
            min = -((float)KScales::min(low, high, row) * half_high(d));
        } else if constexpr (has_min(T)) {
            u32 d = __ldg((const u32*)(at + (u32)(lane * 16 + row * 4)));
            scale[0] = half_low(d);
            min = half_high(d);
        } else if constexpr (T == Q6_K) {
            u32 u = __ldg((const u16*)(at + (u32)(lane * 8 + row * 2)));
            float d = half_low(__ldg((const u16*)(at + (u32)(8 * groups + lane / 8 * 8 + row * 2))));
            scale[0] = ((float)(u & 0xff) - 128.0f) * d;
            scale[1] = ((float)(u >> 8) - 128.0f) * d;
        } else if constexpr (scale_bytes(T) > 0) {
            scale[0] = half_low(__ldg((const u16*)(at + (u32)(lane * 8 + row * 2))));
        }
    }

    // The weights times WEIGHT_UNIT, in column order, scale and min folded in, rounded once; one FFMA each besides the
    // field. Whoever sums products with them multiplies the sum by 1 / WEIGHT_UNIT (exact: a power of two).
    static constexpr float WEIGHT_UNIT = Quants<T>::BITS == 16 ? 1.0f : 0x1p-64f;
    __device__ __forceinline__ void unpack_scaled(float w[32]) const {
        if constexpr (Quants<T>::BITS == 16) {
#pragma unroll
            for (int i = 0; i < 32; i++) w[i] = this->field(i);
        } else {
            float base[group_scales(T)];
#pragma unroll
            for (int h = 0; h < group_scales(T); h++) base[h] = (min - scale[h] * quant_offset(T)) * WEIGHT_UNIT;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                int h = group_scales(T) == 2 ? i / 16 : 0;
                float factor = scale[h] * power_of_two(85 - field_bit(Quants<T>::BITS, i));
                w[i] = fmaf(this->field(i), factor, base[h]);
            }
        }
    }

    // The weights themselves; one FMUL more each.
    __device__ __forceinline__ void unpack(float w[32]) const {
        unpack_scaled(w);
        if constexpr (Quants<T>::BITS < 16) {
#pragma unroll
            for (int i = 0; i < 32; i++) w[i] *= 1.0f / WEIGHT_UNIT;
        }
    }
};
