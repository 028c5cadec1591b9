// Embedding: rows of the repacked table become activations.
//
//   embed_<type>(const u8* table, const u32* tokens, float* x, int columns, int tokens_count, int out_permuted)
//
// x[t] = row tokens[t] of the table, t < tokens_count, in permuted order if out_permuted, else natural. Tokens must be rows of
// the table. Launch: 128 threads; any grid is right; ceil(tokens_count * ceil(columns / 1024) / 4) blocks suffice.
// No dynamic shared memory, no workspace.
#include "quant.cuh"

// A warp takes a slice of a row, a lane a group.
template <int T>
__device__ __forceinline__ void embed(const u8* table, const u32* tokens, float* x, int columns, int count, int out_permuted) {
    int lane = threadIdx.x % 32;
    int slices = (columns + SLICE - 1) / SLICE;
    for (int unit = blockIdx.x * 4 + threadIdx.x / 32; unit < count * slices; unit += gridDim.x * 4) {
        int token = unit / slices, s = unit % slices;
        int groups = min(SLICE, columns - s * SLICE) / GROUP;
        if (lane >= groups) continue;
        u32 row = tokens[token];
        const u8* slice = table + (u64)(row / TILE_ROWS) * Layout<T>::row_tile_bytes(columns) + s * Layout<T>::slice_bytes;
        Group<T> group;
        group.load(slice, groups, lane, row % TILE_ROWS);
        float w[32];
        group.unpack(w);
        float4* to = (float4*)(x + (u64)token * columns + s * SLICE);
#pragma unroll
        for (int j = 0; j < 8; j++)
            to[out_permuted ? j * groups + lane : lane * 8 + j] = make_float4(w[4 * j], w[4 * j + 1], w[4 * j + 2], w[4 * j + 3]);
    }
}

#define EMBED(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) embed_##name(const u8* __restrict__ table,                    \
                                                                   const u32* __restrict__ tokens, float* __restrict__ x, \
                                                                   int columns, int tokens_count, int out_permuted) { \
        embed<T>(table, tokens, x, columns, tokens_count, out_permuted);                                            \
    }

EMBED(f16, F16)
EMBED(bf16, BF16)
EMBED(q4_0, Q4_0)
EMBED(q4_1, Q4_1)
EMBED(q5_0, Q5_0)
EMBED(q5_1, Q5_1)
EMBED(q8_0, Q8_0)
EMBED(q4_k, Q4_K)
EMBED(q5_k, Q5_K)
EMBED(q6_k, Q6_K)
