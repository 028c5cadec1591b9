// Products of many tokens (prefill): the matrix product, tiled.
//
//   gemm_<type>(Product)      tiles of 128 rows x 128 tokens, 256 threads
//   gemm_<type>_64(Product)   tiles of 128 rows x 64 tokens, 128 threads
//       f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k q6_k
//
// x: natural order. out[m]: [token][rows[m]], natural order whatever `out_permuted` says. Modes STORE (with bias or
// without), ADD, SILU_MUL. Up to three matrices of one type, one after the other in the grid. norm and epsilon are not
// looked at. Sequences of any lengths are packed: a token is a row of x, nothing is padded.
//
// Any number of tokens, rows and groups of columns is right. Nothing beyond x's last token, out's last element and the
// matrix's last tile is read or written. x is 16-byte aligned, and so are out[m] and bias[m] where rows[m] % 4 == 0.
// tokens * columns < 2^30; a repacked matrix < 4 GiB.
//
// Launch: grid = SMs * BLOCKS, BLOCKS = 2 (gemm) or 3 (gemm_64); any grid is right as long as the workspace is for it:
//   partial   grid * 2 * 128 * (128 or 64) floats     counters   grid u32, zeros
// No dynamic shared memory. Results depend on the grid in the last bits, and on nothing else.
//
// Which of the two: the smaller tile costs about a twentieth more a token, but leaves less of itself empty and spreads
// over more blocks, so
//   gemm_64 if 21 * ceil(tokens / 64) < 40 * ceil(tokens / 128), or if there are fewer than SMs / 2 tiles of gemm's,
//   that is, (sum over m of ceil(rows[m] / 128)) * ceil(tokens / 128); else gemm
// The first takes it for 1..64, 129..192, 257..320 tokens and so on up to 1216, where half a tile is no longer worth it.
#include "gemm.cuh"

#define GEMM(name, type)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2) gemm_##name(const Product p) {                          \
        gemm<type, 128, 128>(p);                                                                                  \
    }                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 3) gemm_##name##_64(const Product p) {                     \
        gemm<type, 128, 64>(p);                                                                                   \
    }

GEMM(f16, F16)
GEMM(bf16, BF16)
GEMM(q4_0, Q4_0)
GEMM(q4_1, Q4_1)
GEMM(q5_0, Q5_0)
GEMM(q5_1, Q5_1)
GEMM(q8_0, Q8_0)
GEMM(q4_k, Q4_K)
GEMM(q5_k, Q5_K)
GEMM(q6_k, Q6_K)
