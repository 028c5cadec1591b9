#include "gemm.cuh"
#ifndef BM
#define BM 128
#endif
#ifndef BN
#define BN 128
#endif
#ifndef MINB
#define MINB 2
#endif
#define KERNEL(name, type) extern "C" __global__ void __launch_bounds__(BM * BN / 64, MINB) gemm_##name(const Product p) { gemm<type, BM, BN, ORD>(p); }
#ifdef F
KERNEL(f16, F16)
KERNEL(q4_k, Q4_K)
KERNEL(q8_0, Q8_0)
KERNEL(q6_k, Q6_K)
#else
KERNEL(f16, F16)
KERNEL(bf16, BF16)
KERNEL(q4_0, Q4_0)
KERNEL(q4_1, Q4_1)
KERNEL(q5_0, Q5_0)
KERNEL(q5_1, Q5_1)
KERNEL(q8_0, Q8_0)
KERNEL(q4_k, Q4_K)
KERNEL(q5_k, Q5_K)
KERNEL(q6_k, Q6_K)
#endif
