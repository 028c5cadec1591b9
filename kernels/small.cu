#include "stripes.cuh"
#ifndef MINB
#define MINB 2
#endif
#ifndef W
#define W 8
#endif
#define SMALL(NAME, TYPE, TOKENS) \
    extern "C" __global__ void __launch_bounds__(W * 32, MINB) small_##NAME##_b##TOKENS(const Product p) { \
        typedef Stripes<TYPE, W, TOKENS, 1, true> Body; \
        __shared__ typename Body::Shared shared; \
        Body(p, shared).run(); \
    }
#define SMALL_TYPE(NAME, TYPE) SMALL(NAME, TYPE, 2) SMALL(NAME, TYPE, 4) SMALL(NAME, TYPE, 8)
SMALL_TYPE(f16, F16)
SMALL_TYPE(q8_0, Q8_0)
SMALL_TYPE(q4_k, Q4_K)
SMALL_TYPE(q6_k, Q6_K)
#ifndef FEW
SMALL_TYPE(bf16, BF16)
SMALL_TYPE(q4_0, Q4_0)
SMALL_TYPE(q4_1, Q4_1)
SMALL_TYPE(q5_0, Q5_0)
SMALL_TYPE(q5_1, Q5_1)
SMALL_TYPE(q5_k, Q5_K)
#endif
