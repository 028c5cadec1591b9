// Products of 2 to 8 tokens: a step of batched decode. Activations in permuted order, RMSNorm fused into reading them.
//
//   small_<type>_b<B>(const Product p), B = 2, 4, 8: up to B tokens; types f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k q6_k
//       modes STORE (+ bias), ADD, SILU_MUL, GATED (matrices 0 and 1, of equal rows); up to 3 matrices.
//
// Launch: 256 threads, no dynamic shared memory. Any grid is right; SMs is fast, as one block of b4 or b8 is resident and two
// of b2 are (2 * SMs). At two blocks, and so 128 registers, ptxas spills sums and gives up assigning registers to banks.
// partial: 2 * grid * (B * 128 + B) floats. counters: one for each stripe, zero: with R = 128 rows (GATED: 64),
// the sum over the matrices (GATED: of the first) of ceil(rows / R). x, norm: 16-byte aligned, columns a multiple of 32.
#include "stripes.cuh"

#define SMALL(NAME, TYPE, TOKENS, BLOCKS)                                                                         \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) small_##NAME##_b##TOKENS(const Product p) { \
        typedef Stripes<TYPE, 8, TOKENS, 1, true> Body;                                                   \
        __shared__ typename Body::Shared shared;                                                          \
        Body(p, shared).run();                                                                            \
    }
#define SMALL_TYPE(NAME, TYPE) SMALL(NAME, TYPE, 2, 2) SMALL(NAME, TYPE, 4, 1) SMALL(NAME, TYPE, 8, 1)

SMALL_TYPE(f16, F16)
SMALL_TYPE(q8_0, Q8_0)
SMALL_TYPE(q4_k, Q4_K)
SMALL_TYPE(q6_k, Q6_K)
SMALL_TYPE(bf16, BF16)
SMALL_TYPE(q4_0, Q4_0)
SMALL_TYPE(q4_1, Q4_1)
SMALL_TYPE(q5_0, Q5_0)
SMALL_TYPE(q5_1, Q5_1)
SMALL_TYPE(q5_k, Q5_K)
