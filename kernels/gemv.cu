// Batch 1: products of repacked matrices and one vector, y = W x, all modes of struct Product; see gemv.cuh.
//
//   gemv_<type>(Product p)      p.tokens = 1; p.x and p.norm permuted
//
// Launch: as gemv.cuh says, W = 16. Y = ceil(slices / passes), passes = ceil(slices / 8); Z = max(1, 4 / Y), with GATED an
// even Z is best (gate and up at once): max(2, 4 / Y) while Y <= 8. grid = min(SMs * floor(16 / (Y * Z)), ceil(units / A)),
// which fills the card once at 128 registers.
#include "gemv.cuh"

#define GEMV(NAME, TYPE) \
    extern "C" __global__ void __launch_bounds__(16 * 32, 1) gemv_##NAME(const Product p) { gemv<TYPE, 1, 1>(p); }

GEMV(f16, F16)
GEMV(bf16, BF16)
GEMV(q4_0, Q4_0)
GEMV(q4_1, Q4_1)
GEMV(q5_0, Q5_0)
GEMV(q5_1, Q5_1)
GEMV(q8_0, Q8_0)
GEMV(q4_k, Q4_K)
GEMV(q5_k, Q5_K)
GEMV(q6_k, Q6_K)
