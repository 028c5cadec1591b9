// Rotary embedding (Su et al. 2021): the step's angles, and the last steps of queries, keys and values in large batches.
//
// rope_angles(const u32* positions, const float* inverse_frequencies, float magnitude, int pairs, int tokens,
//     float* cos, float* sin)
//   grid: any, ceil(tokens * pairs / 128) is good, block 128; writes cos and sin, [tokens][pairs], once a step.
//
// rope_append_<kv>(Attention a)   kv: f16 q8 f32; any head_dim up to 256
//   grid: any, ceil(tokens * (heads + 2 * kv_heads) / 4) is good, block 128
//   reads: q, k, v, q_norm, k_norm, cos, sin, slots, tokens, heads, kv_heads, head_dim, pairs, split_half, epsilon
//   writes: q (normalised and rotated in place), and keys and values into the cache.
#include "attention.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int WIDEST = 256;

// Sine and cosine in f64, for |x| below 2^22; the library's take local memory for larger arguments. π/2 in two parts
// leaves |r| <= π/4, where the first terms left out of Taylor's series are below 1e-16.
__device__ __forceinline__ void sin_cos(double x, float* sin, float* cos) {
    const double turns = rint(x * 0.63661977236758134308);
    const double r = fma(-turns, 6.123233995736766e-17, fma(-turns, 1.5707963267948966, x));
    const double z = r * r;
    double s = -1.0 / 1307674368000.0;
    s = fma(s, z, 1.0 / 6227020800.0), s = fma(s, z, -1.0 / 39916800.0), s = fma(s, z, 1.0 / 362880.0);
    s = fma(s, z, -1.0 / 5040.0), s = fma(s, z, 1.0 / 120.0), s = fma(s, z, -1.0 / 6.0);
    s = fma(s * z, r, r);
    double c = 1.0 / 20922789888000.0;
    c = fma(c, z, -1.0 / 87178291200.0), c = fma(c, z, 1.0 / 479001600.0), c = fma(c, z, -1.0 / 3628800.0);
    c = fma(c, z, 1.0 / 40320.0), c = fma(c, z, -1.0 / 720.0), c = fma(c, z, 1.0 / 24.0), c = fma(c, z, -0.5);
    c = fma(c, z, 1.0);
    const int quadrant = (int)turns & 3;
    const float sine = (float)(quadrant & 1 ? c : s), cosine = (float)(quadrant & 1 ? s : c);
    *sin = quadrant & 2 ? -sine : sine;
    *cos = (quadrant + 1) & 2 ? -cosine : cosine;
}

// A warp takes one head of one token at a time, of queries, keys or values.
template <int KV>
__device__ __forceinline__ void append(const Attention& a) {
    __shared__ float rows[WARPS][WIDEST];
    float* row = rows[threadIdx.x / 32];
    const int lane = threadIdx.x & 31;
    const int items = a.heads + 2 * a.kv_heads;
    const int half = half_bytes(KV, a.head_dim);
#pragma unroll 1
    for (int i = blockIdx.x * WARPS + threadIdx.x / 32; i < a.tokens * items; i += gridDim.x * WARPS) {
        const int token = i / items, item = i % items;
        const bool query = item < a.heads, value = item >= a.heads + a.kv_heads;
        const int kv_head = item - a.heads - (value ? a.kv_heads : 0);
        const int at = (token * a.kv_heads + kv_head) * a.head_dim;
        float* q = a.q + (token * a.heads + item) * a.head_dim;
        const float* x = query ? q : (value ? a.v : a.k) + at;
        const float* norm = value ? nullptr : query ? a.q_norm : a.k_norm;
        turn_head<WIDEST / 64>(a, a.head_dim, x, norm, token, value ? 0 : a.pairs, 1.0f, row);
        if (query) {
            for (int d = lane; d < a.head_dim; d += 32) q[d] = row[d];
        } else {
            const u32 slot = a.slots[token];
            u8* keys = a.cache + place_of(a, KV, a.head_dim, slot / BLOCK_TOKENS, kv_head);
            store_token<KV>(value ? keys + half : keys, slot % BLOCK_TOKENS, a.head_dim, row);
        }
        __syncwarp();
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) rope_angles(const u32* positions, const float* inverse_frequencies,
    float magnitude, int pairs, int tokens, float* cos, float* sin) {
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < tokens * pairs; i += gridDim.x * THREADS) {
        // In f64: at position 100,000 an f32 angle is off by 0.004 radians.
        float s, c;
        sin_cos((double)positions[i / pairs] * (double)inverse_frequencies[i % pairs], &s, &c);
        cos[i] = c * magnitude, sin[i] = s * magnitude;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) rope_append_f16(const Attention a) { append<KV_F16>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) rope_append_q8(const Attention a) { append<KV_Q8>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) rope_append_f32(const Attention a) { append<KV_F32>(a); }
