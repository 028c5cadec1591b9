// Reading and writing device memory as fast as it goes: the copy speed that `bench` holds the other kernels against,
// and the pattern with which tests poison buffers.
#include "common.cuh"

// to[i] = from[i], i < quads. Persistent grid; four loads in flight a thread, or latency bounds the speed.
extern "C" __global__ void __launch_bounds__(256) copy_quads(const uint4* __restrict__ from, uint4* __restrict__ to, u64 quads) {
    u64 stride = (u64)gridDim.x * blockDim.x;
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * stride < quads; i += 4 * stride) {
        uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
        to[i] = a;
        to[i + stride] = b;
        to[i + 2 * stride] = c;
        to[i + 3 * stride] = d;
    }
    for (; i < quads; i += stride) to[i] = from[i];
}

// words[i] = hash(seed, i), i < count: bits that no two places share, for random weights and for poison.
extern "C" __global__ void __launch_bounds__(256) fill_random(u32* __restrict__ words, u64 count, u32 seed) {
    u64 stride = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
        u32 x = (u32)i * 0x9e3779b9u ^ (u32)(i >> 32) ^ seed;
        x = (x ^ (x >> 16)) * 0x85ebca6bu;
        x = (x ^ (x >> 13)) * 0xc2b2ae35u;
        words[i] = x ^ (x >> 16);
    }
}
