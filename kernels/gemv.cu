// Batch 1: products of repacked matrices and one vector, y = W x, all modes of struct Product.
//
//   gemv_<type>(Product p)      p.tokens = 1; p.x and p.norm permuted
//
// With p.norm the input is RMSNorm(x) * norm: y = W (x * norm) / rms(x), the mean of squares taken while x is read.
//
// A warp takes a slice of 1024 columns of a row tile: it keeps that slice of x in registers, one group of columns a lane, and
// walks over row tiles, the next tile's loads under way while it works on one. Its four sums are reduced by shuffles and
// meet those of the other slices in shared memory, where the block finishes its rows after its walk.
//
// Launch: slices = ceil(columns / 1024); units = row tiles (ceil(rows / 4)) of all matrices, with GATED of one.
//   block (32, Y, Z), at most 16 warps: Y warps side by side take the slices, in several passes if Y < slices; Z row tiles at a
//       time. Y = ceil(slices / passes), passes = ceil(slices / 8); Z = max(1, 4 / Y), with GATED an even Z is best (gate
//       and up at once): max(2, 4 / Y) while Y <= 8.
//   grid: any is right; min(SMs * floor(16 / (Y * Z)), ceil(units / A)), which fills the card once at 128 registers.
//   dynamic shared memory: ceil(units / (grid * A)) * A * slices * 16 bytes, with GATED twice that, where A = Z, but Z / 2 with
//       GATED and an even Z. It must stay below 47 KB: a larger grid makes it smaller.
// No workspace. Reads x and norm within their columns, weights within their tiles.
#include "quant.cuh"

constexpr int MAX_WARPS = 16;
constexpr int MAX_SLICES = 64;

// Rows of x in registers while a tile is worked on: as many as 4 KB a warp in flight want.
template <int T>
constexpr int DEPTH = quant_bits(T) == 16 ? 2 : 4;

// A lane's part of a tile: quants of DEPTH rows, scales of four.
template <int T>
struct Tile {
    Quants<T> row[DEPTH<T>];
    Scales<T> scales;

    // Called once row `r` of the tile is used up: begins to load what comes next in its place. `own` is the lane's first 16
    // bytes in the slice: in all planes of quants it has 16 at a time, so that the distances from there are constants.
    __device__ __forceinline__ void load_row(const u8* own, int groups, int r) {
        row[r % DEPTH<T>].load_chunks(own, groups, 0, r);
        if constexpr (quant_bits(T) == 6) {
            if (r % 2 == 1) {
                uint4 v = __ldg((const uint4*)(own + (u32)(64 * groups + r / 2 * groups * 16)));
                row[r - 1].q[4] = v.x, row[r - 1].q[5] = v.y, row[r].q[4] = v.z, row[r].q[5] = v.w;
            }
        }
        if constexpr (quant_bits(T) == 5) {
            if (r == 3) {
                uint4 v = __ldg((const uint4*)(own + (u32)(64 * groups)));
                row[0].q[4] = v.x, row[1].q[4] = v.y, row[2].q[4] = v.z, row[3].q[4] = v.w;
            }
        }
    }

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane) {
#pragma unroll
        for (int r = 0; r < DEPTH<T>; r++) load_row(slice + (u32)(lane * 16), groups, r);
        scales.load(slice, groups, lane);
    }
};

// A lane's group of x, ready to meet the fields of quants.
template <int T>
struct Input {
    static constexpr int HALVES = group_scales(T);
    float x[32];
    float sum[HALVES];  // of x, in the unit of dot products; negative and times the offset for types that have one

    // Reads a slice and returns the lane's sum of squares. Lanes past the slice's groups get zeros.
    __device__ __forceinline__ float load(const float* input, const float* norms, int groups, int lane) {
        u32 clamped = min(lane, groups - 1);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float4 v = *((const float4*)input + j * groups + clamped);
            x[4 * j] = v.x, x[4 * j + 1] = v.y, x[4 * j + 2] = v.z, x[4 * j + 3] = v.w;
        }
        if (groups < SLICE / GROUP && lane >= groups) {
#pragma unroll
            for (int i = 0; i < 32; i++) x[i] = 0.0f;
        }
        float squares[4] = {};
        if (norms) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float4 n = __ldg((const float4*)norms + j * groups + clamped);
#pragma unroll
                for (int k = 0; k < 4; k++) squares[k] = fmaf(x[4 * j + k], x[4 * j + k], squares[k]);
                x[4 * j] *= n.x, x[4 * j + 1] *= n.y, x[4 * j + 2] *= n.z, x[4 * j + 3] *= n.w;
            }
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float total[4] = {};
#pragma unroll
            for (int i = 0; i < 32 / HALVES; i++) total[i % 4] += x[h * 16 + i];
            sum[h] = ((total[0] + total[1]) + (total[2] + total[3])) * Quants<T>::SUM_UNIT *
                     (has_min(T) ? 1.0f : -quant_offset(T));
        }
#pragma unroll
        for (int i = 0; i < 32; i++) x[i] *= Quants<T>::x_factor(i);
        return (squares[0] + squares[1]) + (squares[2] + squares[3]);
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

// One tile: products of four rows, while the loads of the next begin if there is one.
template <int T, bool MORE>
__device__ __forceinline__ float work(Tile<T>& tile, const Input<T>& in, const u8* at, u32 stride, int groups, int lane) {
    float y[TILE_ROWS], scale[TILE_ROWS][group_scales(T)], min[TILE_ROWS];
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) tile.scales.get(r, scale[r], min[r]);
    if (MORE) tile.scales.load(at + stride, groups, lane);
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        y[r] = dot<T>(tile.row[r % DEPTH<T>], scale[r], min[r], in);
        if (r + DEPTH<T> < TILE_ROWS) {
            tile.load_row(at + (u32)(lane * 16), groups, r + DEPTH<T>);
        } else if (MORE) {
            tile.load_row(at + stride + (u32)(lane * 16), groups, r + DEPTH<T> - TILE_ROWS);
        }
    }
    return reduce_rows(y, threadIdx.x);
}

// A warp's walk over the tiles t, t + step .. below `tiles` of one matrix and slice: `at` is the first, its sums go to `to` and
// on from there, to_step apart, row r's `slices` * r further. The first tile's loads begin before `input` reads x.
template <int T, class F>
__device__ __forceinline__ void walk(const u8* at, int t, int tiles, int step, u32 stride, float* to, int to_step, int slices,
                                     int groups, Input<T>& in, F input) {
    int lane = groups == SLICE / GROUP ? (int)threadIdx.x : min((int)threadIdx.x, groups - 1);
    Tile<T> tile;
    tile.load(at, groups, lane);
    input(groups);
    to += threadIdx.x / 8 * slices;
    bool writes = threadIdx.x % 8 == 0;
    for (; t + step < tiles; t += step) {
        float y = work<T, true>(tile, in, at, stride, groups, lane);
        if (writes) *to = y;
        to += to_step;
        at += stride;
    }
    float y = work<T, false>(tile, in, at, stride, groups, lane);
    if (writes) *to = y;
}

// How a launch is dealt out. A unit is a row tile of one of the matrices, numbered through, or for GATED a tile of gate
// and the same of up. All blocks go over the units together: in round k the warps of block b with threadIdx.z = r have unit
// (k * gridDim.x + b) * abreast + r.
//
// `zero` is 0, read from shared memory so that the compiler cannot know it: every use of the geometry computes it anew
// instead of keeping it in registers through the main loop, which needs them all.
struct Geometry {
    int columns, slices, gated, units;
    int tiles[3];
    int split;    // GATED with an even blockDim.z: even z have gate, odd z up; else a warp has both in turn
    int abreast;  // units a round and block
    int first, step;  // first unit of the block, and units a round

    __device__ __forceinline__ Geometry(const Product& p, int zero) {
        columns = p.columns + zero;
        slices = (columns + SLICE - 1) / SLICE;
        gated = p.mode + zero == GATED;
#pragma unroll
        for (int m = 0; m < 3; m++) tiles[m] = m < p.matrices ? (p.rows[m] + zero + TILE_ROWS - 1) / TILE_ROWS : 0;
        units = gated ? tiles[0] : tiles[0] + tiles[1] + tiles[2];
        int z = blockDim.z + zero;
        split = gated & ~z & 1;
        abreast = z >> split;
        first = (blockIdx.x + zero) * abreast;
        step = (gridDim.x + zero) * abreast;
    }
};

// Sums over all slices, and what becomes of them. partial: [place][row 4][slice], where the places of round k begin at
// k * abreast, twice that with GATED: gate, up, gate, up ...
__device__ __forceinline__ void finish(const Product& p, const Geometry& g, const float* partial, float factor) {
    int threads = 32 * blockDim.y * blockDim.z;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * 32 + threadIdx.x;
    for (int i = thread;; i += threads) {
        int round = (u32)i / (u32)(g.abreast * TILE_ROWS);
        int unit = g.first + round * g.step;
        if (unit >= g.units) break;
        unit += i / TILE_ROWS - round * g.abreast;
        if (unit >= g.units) continue;
        const float* from = partial + ((i / TILE_ROWS << g.gated) * TILE_ROWS + i % TILE_ROWS) * g.slices;
        float sum = 0.0f, up = 0.0f;
        for (int s = 0; s < g.slices; s++) sum += from[s];
        if (g.gated) {
            for (int s = 0; s < g.slices; s++) up += from[TILE_ROWS * g.slices + s];
        }
        sum *= factor;
        int m = 0;
        if (!g.gated && unit >= g.tiles[0]) unit -= g.tiles[0], m = 1;
        if (m == 1 && unit >= g.tiles[1]) unit -= g.tiles[1], m = 2;
        int row = unit * TILE_ROWS + i % TILE_ROWS;
        int rows = m == 0 ? p.rows[0] : m == 1 ? p.rows[1] : p.rows[2];
        if (row >= rows) continue;
        float* out = m == 0 ? p.out[0] : m == 1 ? p.out[1] : p.out[2];
        int to = p.out_permuted ? permuted(row, rows) : row;
        if (p.mode == STORE) {
            const float* bias = m == 0 ? p.bias[0] : m == 1 ? p.bias[1] : p.bias[2];
            out[to] = bias ? sum + bias[row] : sum;
        } else if (p.mode == ADD) {
            out[to] += sum;
        } else if (p.mode == SILU_MUL) {
            out[to] = silu(out[to]) * sum;
        } else {
            out[to] = silu(sum) * (up * factor);
        }
    }
}

template <int T>
__device__ __forceinline__ void gemv(const Product& p) {
    extern __shared__ float partial[];
    __shared__ float squares[MAX_SLICES];
    __shared__ volatile int zero;
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) zero = 0;
    __syncthreads();
    Input<T> in;
    int held = -1;  // slice that `in` holds
    for (int s = threadIdx.y, m = 0; s * SLICE < p.columns; ) {
        Geometry g(p, zero);
        int groups = min(SLICE, g.columns - s * SLICE) / GROUP;
        auto input = [&](int groups) {
            if (held == s) return;
            float own = in.load(p.x + s * SLICE, p.norm ? p.norm + s * SLICE : nullptr, groups, threadIdx.x);
            if (p.norm && threadIdx.z == 0) {
                own = warp_sum(own);
                if (threadIdx.x == 0) squares[s] = own;
            }
            held = s;
        };
        int group = threadIdx.z >> g.split;
        int t = g.first + group, round = 0;
        int start = g.gated || m == 0 ? 0 : m == 1 ? g.tiles[0] : g.tiles[0] + g.tiles[1];  // first unit of the matrix
        if (start > 0) {  // to the first unit in it that is this warp's
            round = (u32)max(start - t + g.step - 1, 0) / (u32)g.step;
            t += round * g.step - start;
        }
        int tiles = m == 0 ? g.tiles[0] : m == 1 ? g.tiles[1] : g.tiles[2];
        if (t < tiles && !(g.split && threadIdx.z % 2 != m)) {
            u32 tile_bytes = Layout<T>::row_tile_bytes(g.columns);
            const u8* at = m == 0 ? p.weight[0] : m == 1 ? p.weight[1] : p.weight[2];
            at += (u64)((u32)t) * tile_bytes + (u32)(s * Layout<T>::slice_bytes);
            int place = (round * g.abreast + group) << g.gated | (g.gated & m);
            float* to = partial + place * TILE_ROWS * g.slices + s;
            int to_step = (g.abreast << g.gated) * TILE_ROWS * g.slices;
            if (groups == SLICE / GROUP) {
                walk<T>(at, t, tiles, g.step, g.step * tile_bytes, to, to_step, g.slices, SLICE / GROUP, in, input);
            } else {
                walk<T>(at, t, tiles, g.step, g.step * tile_bytes, to, to_step, g.slices, groups, in, input);
            }
        }
        if (++m == p.matrices) {
            if (held != s) input(groups);  // of a warp without tiles: its squares may count
            m = 0;
            s += blockDim.y;
        }
    }
    __syncthreads();
    Geometry g(p, zero);
    float factor = 1.0f / (Quants<T>::SUM_UNIT * Scales<T>::UNIT);
    if (p.norm) {
        float total = 0.0f;
        for (int s = 0; s < g.slices; s++) total += squares[s];
        factor *= 1.0f / sqrtf(total / (float)g.columns + p.epsilon);
    }
    finish(p, g, partial, factor);
}

#ifndef BOUNDS
#define BOUNDS MAX_WARPS * 32, 1
#endif
#define GEMV(name, T) \
    extern "C" __global__ void __launch_bounds__(BOUNDS) gemv_##name(const Product p) { gemv<T>(p); }

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
