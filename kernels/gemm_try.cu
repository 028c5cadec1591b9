#include "gemm.cuh"
#ifndef MINB
#define MINB (512 / (BM * BN / 64))
#endif
#ifndef BM
#define BM 128
#endif
#ifndef BN
#define BN 128
#endif
extern "C" __global__ void __launch_bounds__(BM * BN / 64, MINB) gemm_f16(const Product p) { gemm<0, BM, BN>(p); }
