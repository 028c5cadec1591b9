// Batch 1: products of repacked matrices and one vector, y = W x, all modes of struct Product but SILU_MUL.
//
//   gemv_<type>(Product p)      p.tokens = 1; p.x and p.norm permuted
//
// With p.norm the input is RMSNorm(x) * norm: y = W (x * norm) / rms(x), the mean of squares taken while x is read.
//
// A block is S x R warps: S slices of 1024 columns, R row tiles at a time (block (32, S * R)), or fewer warps than slices
// (R = 1), each of which then takes several slices in turn. A warp keeps its slice of x in registers, one group of columns
// a lane, and walks over the row tiles of the block, the next tile's loads under way while it works on one. Its four sums
// are reduced by shuffles and meet those of the other slices in shared memory. Row tiles are dealt out evenly to blocks.
#include "quant.cuh"

constexpr int MAX_WARPS = 14;
// Partial sums in shared memory, [slice][row of the chunk].
constexpr int PARTIALS = 4096;
constexpr int MAX_SLICES = 64;

// Rows of x in registers while a tile is worked on: as many as 4 KB a warp in flight want.
template <int T>
constexpr int DEPTH = quant_bits(T) == 16 ? 2 : 4;

// A lane's part of a tile: quants of DEPTH rows, scales of four.
template <int T>
struct Tile {
    Quants<T> row[DEPTH<T>];
    Scales<T> scales;

    // Called once row `r` of the tile is used up: begins to load what comes next in its place.
    __device__ __forceinline__ void load_row(const u8* slice, int groups, int lane, int r) {
        row[r % DEPTH<T>].load_chunks(slice, groups, lane, r);
        if constexpr (quant_bits(T) == 6) {
            if (r % 2 == 1) {
                uint4 v = __ldg((const uint4*)(slice + 64 * groups + (r / 2 * groups + lane) * 16));
                row[r - 1].q[4] = v.x, row[r - 1].q[5] = v.y, row[r].q[4] = v.z, row[r].q[5] = v.w;
            }
        }
        if constexpr (quant_bits(T) == 5) {
            if (r == 3) {
                uint4 v = __ldg((const uint4*)(slice + 64 * groups + lane * 16));
                row[0].q[4] = v.x, row[1].q[4] = v.y, row[2].q[4] = v.z, row[3].q[4] = v.w;
            }
        }
    }

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane) {
#pragma unroll
        for (int r = 0; r < DEPTH<T>; r++) load_row(slice, groups, lane, r);
        scales.load(slice, groups, lane);
    }
};

// A lane's group of x, ready to meet the fields of quants.
template <int T>
struct Input {
    static constexpr int HALVES = group_scales(T);
    float x[32];
    float sum[HALVES];  // of x, in the unit of dot products; negative and times the offset for types that have one

    // Reads slice s and returns the lane's sum of squares. Lanes past the slice's groups get zeros.
    __device__ __forceinline__ float load(const Product& p, int s, int groups, int lane) {
        const float4* from = (const float4*)(p.x + s * SLICE);
        const float4* norm = (const float4*)(p.norm + s * SLICE);
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (lane < groups) v = from[j * groups + lane];
            x[4 * j] = v.x, x[4 * j + 1] = v.y, x[4 * j + 2] = v.z, x[4 * j + 3] = v.w;
        }
        if (p.norm) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float4 n = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (lane < groups) n = __ldg(norm + j * groups + lane);
#pragma unroll
                for (int k = 0; k < 4; k++) squares = fmaf(x[4 * j + k], x[4 * j + k], squares);
                x[4 * j] *= n.x, x[4 * j + 1] *= n.y, x[4 * j + 2] *= n.z, x[4 * j + 3] *= n.w;
            }
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < 32 / HALVES; i++) total += x[h * 16 + i];
            sum[h] = total * Quants<T>::SUM_UNIT * (has_min(T) ? 1.0f : -quant_offset(T));
        }
#pragma unroll
        for (int i = 0; i < 32; i++) x[i] *= Quants<T>::x_factor(i);
        return squares;
    }
};

// The product of a lane's group of one row and its x, in units of SUM_UNIT * Scales::UNIT.
template <int T>
__device__ __forceinline__ float dot(const Quants<T>& quants, const float scale[], float min, const Input<T>& in) {
    constexpr int HALVES = group_scales(T);
    float result = has_min(T) ? min * in.sum[0] : 0.0f;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float sum = quant_offset(T) != 0.0f ? in.sum[h] : 0.0f;
#pragma unroll
        for (int i = h * 16; i < h * 16 + 32 / HALVES; i++) {
            sum = quant_offset(T) == 0.0f && i == 0 ? quants.field(i) * in.x[i] : fmaf(quants.field(i), in.x[i], sum);
        }
        if (quant_bits(T) == 16) return sum;
        result = h == 0 && !has_min(T) ? scale[h] * sum : fmaf(scale[h], sum, result);
    }
    return result;
}

// Four sums over the warp in six shuffles. Lane l gets the sum of row (l / 16) * 2 + l / 8 % 2.
__device__ __forceinline__ float reduce_rows(const float y[4], int lane) {
    bool upper = lane & 16, odd = lane & 8;
    float a = upper ? y[2] : y[0], b = upper ? y[3] : y[1];
    a += __shfl_xor_sync(0xffffffffu, upper ? y[0] : y[2], 16);
    b += __shfl_xor_sync(0xffffffffu, upper ? y[1] : y[3], 16);
    float c = odd ? b : a;
    c += __shfl_xor_sync(0xffffffffu, odd ? a : b, 8);
    c += __shfl_xor_sync(0xffffffffu, c, 4);
    c += __shfl_xor_sync(0xffffffffu, c, 2);
    return c + __shfl_xor_sync(0xffffffffu, c, 1);
}

// Row tiles of all matrices of a launch, numbered through: one matrix after the other, or gate and up in turn.
struct Tiles {
    int count[3];
    bool gated;
    __device__ __forceinline__ explicit Tiles(const Product& p) {
        gated = p.mode == GATED;
#pragma unroll
        for (int m = 0; m < 3; m++) count[m] = m < p.matrices ? (p.rows[m] + TILE_ROWS - 1) / TILE_ROWS : 0;
    }
    __device__ __forceinline__ int total() const { return count[0] + count[1] + count[2]; }
    // Matrix of tile v; v becomes the tile's number within it.
    __device__ __forceinline__ int matrix(int& v) const {
        if (gated) {
            int m = v & 1;
            v >>= 1;
            return m;
        }
        if (v < count[0]) return 0;
        v -= count[0];
        if (v < count[1]) return 1;
        v -= count[1];
        return 2;
    }
};

template <int T>
__device__ __forceinline__ const u8* tile_at(const Product& p, const Tiles& tiles, int v) {
    int m = tiles.matrix(v);
    const u8* base = m == 0 ? p.weight[0] : m == 1 ? p.weight[1] : p.weight[2];
    return base + (u64)v * Layout<T>::row_tile_bytes(p.columns);
}

// One tile: products of four rows, while the loads of the next begin if there is one.
template <int T, bool MORE>
__device__ __forceinline__ float work(Tile<T>& tile, const Input<T>& in, const u8* at, const u8* next, int groups, int clamped,
                                      int lane) {
    float y[TILE_ROWS], scale[TILE_ROWS][group_scales(T)], min[TILE_ROWS];
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) tile.scales.get(r, scale[r], min[r]);
    if (MORE) tile.scales.load(next, groups, clamped);
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        y[r] = dot<T>(tile.row[r % DEPTH<T>], scale[r], min[r], in);
        if (r + DEPTH<T> < TILE_ROWS) {
            tile.load_row(at, groups, clamped, r + DEPTH<T>);
        } else if (MORE) {
            tile.load_row(next, groups, clamped, r + DEPTH<T> - TILE_ROWS);
        }
    }
    return reduce_rows(y, lane);
}

// The sums of a chunk's rows over all slices, and what becomes of them.
template <int T>
__device__ __forceinline__ void finish(const Product& p, const Tiles& tiles, const float* partial, int stride, float factor,
                                       int slices, int first, int count, int thread, int threads) {
    int rows = count * TILE_ROWS;
    if (p.mode == GATED) rows /= 2;
    for (int i = thread; i < rows; i += threads) {
        int at = p.mode == GATED ? i / TILE_ROWS * 2 * TILE_ROWS + i % TILE_ROWS : i;
        float sum = 0.0f, up = 0.0f;
        for (int s = 0; s < slices; s++) {
            sum += partial[s * stride + at];
            if (p.mode == GATED) up += partial[s * stride + at + TILE_ROWS];
        }
        int tile = first + at / TILE_ROWS;
        int m = tiles.matrix(tile);
        int row = tile * TILE_ROWS + at % TILE_ROWS;
        int matrix_rows = m == 0 ? p.rows[0] : m == 1 ? p.rows[1] : p.rows[2];
        if (row >= matrix_rows) continue;
        float* out = m == 0 ? p.out[0] : m == 1 ? p.out[1] : p.out[2];
        sum *= factor;
        if (p.mode == STORE) {
            const float* bias = m == 0 ? p.bias[0] : m == 1 ? p.bias[1] : p.bias[2];
            out[row] = bias ? sum + bias[row] : sum;
            continue;
        }
        int to = p.out_permuted ? permuted(row, matrix_rows) : row;
        if (p.mode == ADD) {
            out[to] += sum;
        } else {
            out[to] = silu(sum) * (up * factor);
        }
    }
}

template <int T>
__device__ __forceinline__ void gemv(const Product& p) {
    __shared__ float partial[PARTIALS];
    __shared__ float squares[MAX_SLICES];
    constexpr float RESULT = 1.0f / (Quants<T>::SUM_UNIT * Scales<T>::UNIT);
    int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
    int slices = (p.columns + SLICE - 1) / SLICE;
    int abreast = max(warps / slices, 1);  // row tiles that the block works on at a time
    int my_slice = warp % slices, my_tile = warp / slices;
    if (warps < slices) my_slice = warp, my_tile = 0;
    Tiles tiles(p);
    int unit = tiles.gated ? 2 : 1, units = tiles.total() / unit;
    int begin = (int)((u64)units * blockIdx.x / gridDim.x) * unit, end = (int)((u64)units * (blockIdx.x + 1) / gridDim.x) * unit;
    int stride = PARTIALS / slices / (2 * TILE_ROWS) * (2 * TILE_ROWS);
    int chunk = stride / TILE_ROWS;

    Input<T> in;
    int held = -1;  // slice that `in` holds
    for (int first = begin; first < end; first += chunk) {
        int last = min(first + chunk, end);
        if (my_tile < abreast) {
            for (int s = my_slice; s < slices; s += warps) {
                int groups = min(SLICE, p.columns - s * SLICE) / GROUP;
                int clamped = min(lane, groups - 1);
                int offset = s * Layout<T>::slice_bytes;
                int v = first + my_tile;
                Tile<T> tile;
                const u8* at = nullptr;
                if (v < last) {
                    at = tile_at<T>(p, tiles, v) + offset;
                    tile.load(at, groups, clamped);
                }
                if (held != s) {
                    float own = in.load(p, s, groups, lane);
                    if (p.norm && held < s && my_tile == 0) {
                        own = warp_sum(own);
                        if (lane == 0) squares[s] = own;
                    }
                    held = s;
                }
                if (v >= last) continue;
                float* to = partial + s * stride + my_tile * TILE_ROWS + lane / 8;
                for (; v + abreast < last; v += abreast) {
                    const u8* next = tile_at<T>(p, tiles, v + abreast) + offset;
                    float y = work<T, true>(tile, in, at, next, groups, clamped, lane);
                    if (lane % 8 == 0) *to = y;
                    to += abreast * TILE_ROWS;
                    at = next;
                }
                float y = work<T, false>(tile, in, at, at, groups, clamped, lane);
                if (lane % 8 == 0) *to = y;
            }
        }
        __syncthreads();
        float factor = RESULT;
        if (p.norm) {
            float total = 0.0f;
            for (int s = 0; s < slices; s++) total += squares[s];
            factor *= 1.0f / sqrtf(total / (float)p.columns + p.epsilon);
        }
        finish<T>(p, tiles, partial, stride, factor, slices, first, last - first, warp * 32 + lane, warps * 32);
        __syncthreads();
    }
}

#define GEMV(name, T) \
    extern "C" __global__ void __launch_bounds__(BOUNDS) gemv_##name(const Product p) { gemv<T>(p); }

#ifdef ONLY
GEMV(only, ONLY)
#else
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
#endif
