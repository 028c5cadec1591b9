#include "stripes.cuh"
#ifndef W
#define W 4
#define MINB 3
#endif

#ifndef W32
#define W32 8
#define MINB32 1
#endif
#define SKINNY(NAME, TYPE, TOKENS, SPLIT, W, MINB) \
    extern "C" __global__ void __launch_bounds__(W*32, MINB) skinny_##NAME##_n##TOKENS(const Product p) { \
        typedef Stripes<TYPE, W, TOKENS, SPLIT, false> Body; \
        __shared__ typename Body::Shared shared; \
        Body(p, shared).run(); \
    }
#define SKINNY_TYPE(NAME, TYPE) SKINNY(NAME, TYPE, 16, 1, W, MINB) SKINNY(NAME, TYPE, 32, 2, W32, MINB32)
SKINNY_TYPE(f16, F16)
SKINNY_TYPE(q8_0, Q8_0)
SKINNY_TYPE(q4_k, Q4_K)
SKINNY_TYPE(q6_k, Q6_K)
#ifndef FEW
SKINNY_TYPE(bf16, BF16)
SKINNY_TYPE(q4_0, Q4_0)
SKINNY_TYPE(q4_1, Q4_1)
SKINNY_TYPE(q5_0, Q5_0)
SKINNY_TYPE(q5_1, Q5_1)
SKINNY_TYPE(q5_k, Q5_K)
#endif
