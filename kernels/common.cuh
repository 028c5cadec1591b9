// What all kernels share: the geometry of repacked weights, the order of activations, and the arguments of products.
//
// Maxwell's rules: no dp4a, no FP16 arithmetic, no tensor cores; everything is FFMA on FP32. Compiled for compute_52.
#pragma once

#include <cuda_fp16.h>

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Columns that one lane takes of a row: a group. Every type's block is one group or a multiple of it (F16: by choice).
constexpr int GROUP = 32;
// Columns that one warp takes: a slice of 32 groups. The last slice of a row has what is left, at least one group.
constexpr int SLICE = 1024;
// Rows of a tile of repacked weights; the rows of the last tile that the matrix lacks are zeros.
constexpr int TILE_ROWS = 4;
// Tokens of a KV block.
constexpr int BLOCK_TOKENS = 32;
// Most tokens of the kernels for small batches, which want activations in permuted order.
constexpr int SMALL_BATCH = 10;

// Activations have one of two orders. Natural: [token][column]. Permuted: within each slice of g groups, the quad (four
// columns) j of every group's eight comes together, so that a lane which works on group `lane` reads float4 j at
// [j][lane], coalesced. A step of at most SMALL_BATCH tokens is permuted, a larger one is natural.
__device__ __forceinline__ int permuted(int column, int columns) {
    int start = column & ~(SLICE - 1);
    int groups = min(SLICE, columns - start) / GROUP;
    int group = (column & (SLICE - 1)) / GROUP;
    int quad = (column & (GROUP - 1)) / 4;
    return start + (quad * groups + group) * 4 + (column & 3);
}

// What becomes of a product's result.
enum Mode {
    STORE = 0,     // out = result + bias (if any)
    ADD = 1,       // out += result: the residual stream
    GATED = 2,     // up to 32 tokens: matrices 0 and 1 are gate and up; out[0] = silu(gate) * up
    SILU_MUL = 3,  // out holds the gate's result; out = silu(out) * result
};

// Up to three products of one input: q, k, v, or gate and up, or one alone. All matrices of a launch have one type.
// x: [tokens][columns], out[m]: [tokens][rows[m]].
struct Product {
    const u8* weight[3];  // repacked
    float* out[3];
    const float* bias[3];  // [rows[m]] or null; STORE only
    int rows[3];
    int matrices;
    int columns;
    int tokens;
    int mode;          // enum Mode
    int out_permuted;  // order of out
    float epsilon;     // of the RMSNorm
    const float* x;    // order: permuted for small batches, else natural
    const float* norm;  // small batches: RMSNorm weights [columns] in permuted order, fused into reading x; else null
    float* partial;     // workspace for split-K (skinny, gemm); size: what the launcher computes
    u32* counters;      // zeroed once at start; kernels leave them zero
    // 11 to 32 tokens: RMSNorm in two parts. ADD with `next`, the norm's weights [rows[0]], also leaves hidden = out * next,
    // and in squares[part][token] the sum of out² over each 64 rows. What then reads hidden as its x divides by the root of
    // their mean: `parts` is how many there are, else 0.
    const float* next;
    float* hidden;
    float* squares;
    int parts;
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
