// Products of 2 to 10 tokens: a step of batched decode. Activations in permuted order, RMSNorm fused into reading them; see
// gemv.cuh.
//
//   small_<type>_b<B>(const Product p), B = 2, 3, 4, 5, 6, 8, 10: up to B tokens; types f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k
//       q6_k; modes STORE (+ bias), ADD, SILU_MUL, GATED (matrices 0 and 1, of equal rows); up to 3 matrices.
//
// Launch: as gemv.cuh says, with
//   b2: W = 12, SPLIT = 1; b3, b4, b5: W = 8, SPLIT = 1; b6, b8, b10: W = 8, SPLIT = 2.
// Y = ceil(slices / passes), passes = ceil(slices / most), where most = 8 / SPLIT, but for b2 4 where slices are at most 4, else
// 6. Z = max(1, 4 / (Y * SPLIT)), with GATED 2 where no warp loses its place by that.
#include "gemv.cuh"

#define SMALL(NAME, TYPE, TOKENS, SPLIT, WARPS)                                                                   \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) small_##NAME##_b##TOKENS(const Product p) { \
        gemv<TYPE, TOKENS / SPLIT, SPLIT>(p);                                                                 \
    }
#define SMALL_TYPE(NAME, TYPE)  \
    SMALL(NAME, TYPE, 2, 1, 12) \
    SMALL(NAME, TYPE, 3, 1, 8)  \
    SMALL(NAME, TYPE, 4, 1, 8)  \
    SMALL(NAME, TYPE, 5, 1, 8)  \
    SMALL(NAME, TYPE, 6, 2, 8)  \
    SMALL(NAME, TYPE, 8, 2, 8)  \
    SMALL(NAME, TYPE, 10, 2, 8)

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
