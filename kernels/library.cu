// What surrounds a product that a library computes: cuBLAS stores or adds, and knows neither biases nor activations.
//
// spread_bias(const float* bias, float* out, int rows, int count)
//   out[i] = bias[i % rows], i < count = tokens * rows: what the library then adds its product to.
//
// silu_mul(float* out, const float* result, int count)
//   out[i] = silu(out[i]) * result[i], i < count
//
// grid: any, 16 blocks an SM or ceil(count / 256), whichever is less, is fast; block 256. No shared memory.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) spread_bias(const float* bias, float* out, int rows, int count) {
    for (int i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) out[i] = bias[i % rows];
}

extern "C" __global__ void __launch_bounds__(256) silu_mul(float* out, const float* result, int count) {
    for (int i = blockIdx.x * 256 + threadIdx.x; i < count; i += gridDim.x * 256) out[i] = silu(out[i]) * result[i];
}
