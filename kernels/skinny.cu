// Products of 11 to 32 tokens: wide batched decode. Activations in natural order; RMSNorm in two parts, see struct Product.
//
//   skinny_<type>_n<N>(const Product p), N = 12, 16, 20, 24, 28, 32: up to N tokens; types f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0
//       q4_k q5_k q6_k; modes STORE (+ bias), ADD, SILU_MUL, GATED (matrices 0 and 1, of equal rows); up to 3 matrices.
//
// No dynamic shared memory. Any grid is right; the number of blocks that are resident is fast:
//   n12, n16, n20: 128 threads, 2 blocks an SM, stripes of 64 rows (GATED: 32);
//   n24, n28, n32: 256 threads, 1 block an SM, stripes of 128 rows (GATED: 64), so that half as many pieces of x are on their way;
//   q6_k_n32: stripes of 64 rows, warps in pairs of half the tokens each, since what it keeps for 32 does not fit a thread.
// A launch costs what its N tokens do, however few there are.
// partial: 2 * grid * N * R floats, R being the rows of a stripe. counters: one for each stripe, zero: the sum over the
// matrices (GATED: of the first) of ceil(rows / rows of a stripe). squares: ceil(rows / 64) * tokens floats. x: 16-byte
// aligned, columns a multiple of 32.
#include "stripes.cuh"

#define SKINNY(NAME, TYPE, TOKENS, SPLIT, WARPS, BLOCKS)                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) skinny_##NAME##_n##TOKENS(const Product p) { \
        typedef Stripes<TYPE, WARPS, TOKENS, SPLIT> Body;                                                             \
        __shared__ typename Body::Shared shared;                                                                      \
        Body(p, shared).run();                                                                                        \
    }
#define SKINNY_TYPE(NAME, TYPE)     \
    SKINNY(NAME, TYPE, 12, 1, 4, 2) \
    SKINNY(NAME, TYPE, 16, 1, 4, 2) \
    SKINNY(NAME, TYPE, 20, 1, 4, 2) \
    SKINNY(NAME, TYPE, 24, 1, 8, 1) \
    SKINNY(NAME, TYPE, 28, 1, 8, 1) \
    SKINNY(NAME, TYPE, 32, (TYPE == Q6_K ? 2 : 1), 8, 1)

SKINNY_TYPE(f16, F16)
SKINNY_TYPE(q8_0, Q8_0)
SKINNY_TYPE(q4_k, Q4_K)
SKINNY_TYPE(q6_k, Q6_K)
SKINNY_TYPE(bf16, BF16)
SKINNY_TYPE(q4_0, Q4_0)
SKINNY_TYPE(q4_1, Q4_1)
SKINNY_TYPE(q5_0, Q5_0)
SKINNY_TYPE(q5_1, Q5_1)
SKINNY_TYPE(q5_k, Q5_K)
