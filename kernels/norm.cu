// RMSNorm (Zhang and Sennrich 2019) of rows that no product normalises as it reads them: large batches, and the rows
// whose logits are wanted.
//
// rmsnorm(Norm n)
//   grid: (rows), block 256. out[i] = x[row i] / sqrt(mean(x²) + epsilon) * weight, row i being rows[i], or i without rows.
//   columns: a multiple of 4 (of 32 where an order is permuted). x and out may be the same where rows is null and the
//   orders are equal.
#include "common.cuh"

struct Norm {
    const float* x;       // [..][columns]
    const u32* rows;      // which rows of x; null: 0, 1, 2 ...
    const float* weight;  // [columns]
    float* out;           // [grid.x][columns]
    int columns;
    float epsilon;
    int in_permuted;      // orders of x, of weight and of out
    int weight_permuted;
    int out_permuted;
};
static_assert(sizeof(Norm) == 56, "the launcher mirrors this");

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ int place(int column, int columns, int in_order) {
    return in_order ? permuted(column, columns) : column;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) rmsnorm(const Norm n) {
    __shared__ float squares[THREADS / 32];
    const int row = n.rows ? n.rows[blockIdx.x] : blockIdx.x;
    const float* x = n.x + (u64)row * n.columns;
    float* out = n.out + (u64)blockIdx.x * n.columns;

    // The sum does not depend on the order.
    float sum = 0.0f;
    for (int c = threadIdx.x * 4; c < n.columns; c += THREADS * 4) {
        const float4 v = *reinterpret_cast<const float4*>(x + place(c, n.columns, n.in_permuted));
        sum += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < THREADS / 32; i++) sum += squares[i];
    const float scale = 1.0f / sqrtf(sum / (float)n.columns + n.epsilon);

    for (int c = threadIdx.x * 4; c < n.columns; c += THREADS * 4) {
        const float4 v = *reinterpret_cast<const float4*>(x + place(c, n.columns, n.in_permuted));
        const float4 w = *reinterpret_cast<const float4*>(n.weight + place(c, n.columns, n.weight_permuted));
        *reinterpret_cast<float4*>(out + place(c, n.columns, n.out_permuted)) =
            make_float4(v.x * scale * w.x, v.y * scale * w.y, v.z * scale * w.z, v.w * scale * w.w);
    }
}
