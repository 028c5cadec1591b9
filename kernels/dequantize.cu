// Repacked weights back to plain FP32, for products that a library computes.
//
//   dequantize_<type>(const u8* tiles, float* out, int rows, int columns, int first_row)
//       f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k q6_k
//
// tiles: the whole matrix (quant.cuh). out: [rows][columns], rows first_row .. first_row + rows - 1 of the matrix;
// first_row is a multiple of 4, out 16-byte aligned. Launch: 128 threads; any grid is right; 16 blocks an SM or
// ceil(rows / 4) * ceil(columns / 1024), whichever is less, is fast. No dynamic shared memory, no workspace.
#include "quant.cuh"

// A warp takes one row of a tile's slice, a lane one group of it. Lanes hold 128 consecutive bytes of out each, so they
// trade them through shared memory: 36 words a lane let both float4 accesses go without bank conflicts.
template <int T>
__device__ __forceinline__ void dequantize(const u8* tiles, float* out, int rows, int columns, int first_row) {
    constexpr int PITCH = GROUP + 4;
    __shared__ __align__(16) float shared[TILE_ROWS][32 * PITCH];
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    float* mine = shared[row];
    const int slices = (columns + SLICE - 1) / SLICE, tasks = (rows + TILE_ROWS - 1) / TILE_ROWS * slices;
    const u8* base = tiles + (size_t)(first_row / TILE_ROWS) * Layout<T>::row_tile_bytes(columns);
    for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
        const int tile = task / slices, slice = task - tile * slices, groups = min(32, columns / GROUP - slice * 32);
        if (lane < groups) {
            Group<T> group;
            group.load(base + (size_t)tile * Layout<T>::row_tile_bytes(columns) + slice * Layout<T>::slice_bytes, groups,
                       lane, row);
            float w[GROUP];
            group.unpack(w);
#pragma unroll
            for (int i = 0; i < GROUP; i += 4)
                *reinterpret_cast<float4*>(mine + lane * PITCH + i) = make_float4(w[i], w[i + 1], w[i + 2], w[i + 3]);
        }
        __syncwarp();
        if (tile * TILE_ROWS + row < rows) {
            float4* to = reinterpret_cast<float4*>(out + (size_t)(tile * TILE_ROWS + row) * columns + slice * SLICE);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const int quad = j * 32 + lane;
                if (quad < groups * 8) to[quad] = *reinterpret_cast<float4*>(mine + quad / 8 * PITCH + quad % 8 * 4);
            }
        }
        __syncwarp();
    }
}

#define DEQUANTIZE(name, type)                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) dequantize_##name(const u8* tiles, float* out, int rows,      \
                                                                        int columns, int first_row) {               \
        dequantize<type>(tiles, out, rows, columns, first_row);                                                      \
    }

DEQUANTIZE(f16, F16)
DEQUANTIZE(bf16, BF16)
DEQUANTIZE(q4_0, Q4_0)
DEQUANTIZE(q4_1, Q4_1)
DEQUANTIZE(q5_0, Q5_0)
DEQUANTIZE(q5_1, Q5_1)
DEQUANTIZE(q8_0, Q8_0)
DEQUANTIZE(q4_k, Q4_K)
DEQUANTIZE(q5_k, Q5_K)
DEQUANTIZE(q6_k, Q6_K)
