// What the kernels around attention share: their arguments, the layout of the KV cache, and a head's last steps.
//
// The cache of one layer is [block][kv_head][keys, values], each of these halves with the 32 tokens of a block:
//   f16, f32: [slot][head_dim]
//   q8:       [slot][head_dim] signed bytes, then [slot][ceil(head_dim / 32)] f16 scales, one for each 32 numbers of a
//             token (the last group may be narrower)
// so that a half has half_bytes(), a block of all KV heads kv_heads * 2 * half_bytes(), and the token at `position` of a
// sequence is slot position % 32 of the block tables[sequence.table + position / 32]. The cache begins at a multiple of
// 16 bytes; whatever it holds where no token was stored is never used.
#pragma once

#include "common.cuh"

// A sequence's part of the step. With length 0 it is padding, and every kernel passes over it.
struct Sequence {
    int start;    // first of its tokens in the packed batch
    int length;   // its tokens in the batch
    int context;  // its tokens in the cache before the step: the position of the first token here
    int table;    // first of its entries in `tables`
};

// One block's queries in prefill. With a group of G query heads a KV head, a sequence has length * G rows, row r being
// query r / G of head r % G of the group; a tile has the 64 rows from `first` on, a multiple of 64.
struct Tile {
    int sequence;  // index into `sequences`
    int first;
};

// The arguments of all kernels here; a kernel reads the fields that its own comment names.
struct Attention {
    float* q;              // [tokens][heads * head_dim]
    const float* k;        // [tokens][kv_heads * head_dim]
    const float* v;        // [tokens][kv_heads * head_dim]
    const float* q_norm;   // [head_dim], or null for models without QK norm
    const float* k_norm;   // [head_dim], or null
    const float* cos;      // [tokens][pairs], from rope_angles
    const float* sin;      // [tokens][pairs]
    u8* cache;             // of this layer
    const Sequence* sequences;
    const u32* members;    // decode: which of `sequences`; null for 0, 1, 2 ...
    const u32* tables;     // block ids
    const u32* slots;      // [tokens]: block * 32 + position % 32
    const Tile* tiles;     // prefill
    float* out;            // [tokens][heads * head_dim]
    float* partial;        // workspace of split sequences
    u32* counters;         // zeroed once at start; kernels leave them zero
    int tokens;
    int heads;
    int kv_heads;          // divides heads
    int head_dim;
    int pairs;             // half the rotated width; 2 * pairs <= head_dim
    int split_half;        // RoPE pairs (i, i + pairs) instead of (2i, 2i + 1)
    int fused;             // decode: q, k, v are raw; turn q and k, store k and v
    int out_permuted;      // order of out
    int least;             // fewest tokens worth a block of their own, a multiple of 32
    float epsilon;         // of the QK norm
    float scale;           // of scores: 1 / sqrt(head_dim)
};
static_assert(sizeof(Sequence) == 16 && sizeof(Tile) == 8 && sizeof(Attention) == 176, "the launcher mirrors these");

// How keys and values are stored.
enum Kv { KV_F16, KV_Q8, KV_F32 };

// Numbers of a token that share a scale in q8.
constexpr int KV_GROUP = 32;

__host__ __device__ __forceinline__ constexpr int half_bytes(int kv, int head_dim) {
    return BLOCK_TOKENS * (kv == KV_F16   ? 2 * head_dim
                           : kv == KV_F32 ? 4 * head_dim
                                          : head_dim + 2 * ((head_dim + KV_GROUP - 1) / KV_GROUP));
}

// Where the keys of a KV head in a block begin, in bytes; its values follow after half_bytes().
__device__ __forceinline__ u64 place_of(const Attention& a, int kv, int head_dim, u32 block, int kv_head) {
    return (u64)(block * (u32)a.kv_heads + kv_head) * (2 * half_bytes(kv, head_dim));
}

// Eight neighbouring numbers of a token as stored, and then as floats. `half` is the keys or values of a block, `group`
// is eighth / 4, which callers often know without dividing.
template <int KV, int HEAD_DIM>
struct Eight;

template <int HEAD_DIM>
struct Eight<KV_F16, HEAD_DIM> {
    uint4 raw;

    __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }
    __device__ __forceinline__ void load(const u8* half, int slot, int eighth, int group) {
        raw = *reinterpret_cast<const uint4*>(half + (slot * HEAD_DIM + eighth * 8) * 2);
    }
    __device__ __forceinline__ void unpack(float (&w)[8]) const {
        const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[2 * i] = __half2float(__ushort_as_half((u16)(words[i] & 0xffffu)));
            w[2 * i + 1] = __half2float(__ushort_as_half((u16)(words[i] >> 16)));
        }
    }
};

template <int HEAD_DIM>
struct Eight<KV_Q8, HEAD_DIM> {
    uint2 raw;
    u16 scale;

    __device__ __forceinline__ void clear() { raw = make_uint2(0, 0), scale = 0; }
    __device__ __forceinline__ void load(const u8* half, int slot, int eighth, int group) {
        constexpr int GROUPS = (HEAD_DIM + KV_GROUP - 1) / KV_GROUP;
        raw = *reinterpret_cast<const uint2*>(half + slot * HEAD_DIM + eighth * 8);
        const u16* scales = reinterpret_cast<const u16*>(half + BLOCK_TOKENS * HEAD_DIM);
        scale = scales[slot * GROUPS + group];
    }
    // A byte with its sign bit turned is the number + 128. In the second byte of 32768.0 it makes 32768 + 128 + number,
    // and since (32768 + 128) * scale is exact in f32, one FFMA gives number * scale, exactly as well.
    __device__ __forceinline__ void unpack(float (&w)[8]) const {
        const float s = __half2float(__ushort_as_half(scale));
        const float bias = -32896.0f * s;
        const u32 words[2] = {raw.x ^ 0x80808080u, raw.y ^ 0x80808080u};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 bits = __byte_perm(words[i / 4], 0x47000000u, 0x7404 + ((i % 4) << 4));
            w[i] = fmaf(__uint_as_float(bits), s, bias);
        }
    }
};

template <int HEAD_DIM>
struct Eight<KV_F32, HEAD_DIM> {
    float4 raw[2];

    __device__ __forceinline__ void clear() { raw[0] = raw[1] = make_float4(0, 0, 0, 0); }
    __device__ __forceinline__ void load(const u8* half, int slot, int eighth, int group) {
        const float4* row = reinterpret_cast<const float4*>(half + (slot * HEAD_DIM + eighth * 8) * 4);
        raw[0] = row[0], raw[1] = row[1];
    }
    __device__ __forceinline__ void unpack(float (&w)[8]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            w[4 * i] = raw[i].x, w[4 * i + 1] = raw[i].y, w[4 * i + 2] = raw[i].z, w[4 * i + 3] = raw[i].w;
        }
    }
};

// One warp stores one token's key or value, with the rounding of the CPU's cache. `numbers` may be in shared memory.
template <int KV>
__device__ __forceinline__ void store_token(u8* half, int slot, int head_dim, const float* numbers) {
    const int lane = threadIdx.x & 31;
    const int groups = (head_dim + KV_GROUP - 1) / KV_GROUP;
    for (int g = 0; g < groups; g++) {
        const int d = g * KV_GROUP + lane;
        const bool within = d < head_dim;
        const float n = within ? numbers[d] : 0.0f;
        const int at = slot * head_dim + d;
        if (KV == KV_F32) {
            if (within) reinterpret_cast<float*>(half)[at] = n;
        } else if (KV == KV_F16) {
            // Saturates: an infinite key or value would poison what is multiplied by zero.
            if (within) reinterpret_cast<__half*>(half)[at] = __float2half_rn(fminf(fmaxf(n, -65504.0f), 65504.0f));
        } else {
            const float largest = fminf(warp_max(fabsf(n)), 65504.0f * 127.0f);
            const __half scale = __float2half_rn(largest / 127.0f);
            const float stored = __half2float(scale);
            const float inverse = stored == 0.0f ? 0.0f : 1.0f / stored;
            const float rounded = fminf(fmaxf(roundf(n * inverse), -127.0f), 127.0f);
            if (within) reinterpret_cast<i8*>(half)[at] = (i8)(int)rounded;
            __half* scales = reinterpret_cast<__half*>(half + BLOCK_TOKENS * head_dim);
            if (lane == 0) scales[slot * groups + g] = scale;
        }
    }
}

// One warp normalises (given a norm), rotates (given pairs) and scales a head `x` into `head`, in shared memory. A lane has
// MOST pairs of numbers, 64 * MOST >= head_dim: first those that rotate, then the rest. All is read before it is needed.
template <int MOST>
__device__ __forceinline__ void turn_head(const Attention& a, int head_dim, const float* x, const float* norm, int token,
    int pairs, float factor, float* head) {
    const int lane = threadIdx.x & 31;
    float x0[MOST], x1[MOST], cos[MOST], sin[MOST];
    int first[MOST], second[MOST];
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < MOST; p++) {
        const int i = p * 32 + lane;
        const bool adjacent = !a.split_half || i >= pairs;
        first[p] = adjacent ? 2 * i : i, second[p] = adjacent ? 2 * i + 1 : i + pairs;
        x0[p] = x1[p] = 0.0f;
        if (2 * i < head_dim) x0[p] = x[first[p]], x1[p] = x[second[p]];
        if (i < pairs) cos[p] = a.cos[token * pairs + i], sin[p] = a.sin[token * pairs + i];
        squares = fmaf(x0[p], x0[p], fmaf(x1[p], x1[p], squares));
    }
    const float scale = norm ? 1.0f / sqrtf(warp_sum(squares) / (float)head_dim + a.epsilon) : 1.0f;
#pragma unroll
    for (int p = 0; p < MOST; p++) {
        const int i = p * 32 + lane;
        if (2 * i >= head_dim) continue;
        if (norm) x0[p] = x0[p] * scale * norm[first[p]], x1[p] = x1[p] * scale * norm[second[p]];
        float y0 = x0[p], y1 = x1[p];
        if (i < pairs) {
            // Not contracted to FMA: so it is the CPU's result to the bit.
            y0 = __fsub_rn(__fmul_rn(x0[p], cos[p]), __fmul_rn(x1[p], sin[p]));
            y1 = __fadd_rn(__fmul_rn(x0[p], sin[p]), __fmul_rn(x1[p], cos[p]));
        }
        head[first[p]] = y0 * factor, head[second[p]] = y1 * factor;
    }
    __syncwarp();
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
