// Products of repacked matrices and a few vectors, all modes of struct Product: the body of gemv.cu and small.cu.
//
// A warp takes a slice of 1024 columns of a row tile and some tokens: it keeps that slice of their x in registers, one group of
// columns a lane, and walks over row tiles, the next tile's loads under way while it works on one. Its sums, of four rows
// and every token, are reduced by shuffles and meet those of the other slices in shared memory, where the block finishes
// its rows after its walk. No barrier stands between the loads and the arithmetic, and a weight costs one AND, whatever
// its type, besides an FFMA a token.
//
// With p.norm the input is RMSNorm(x) * norm: y = W (x * norm) / rms(x), the mean of squares taken while x is read.
//
// Registers bound the tokens of a warp: five at 255. Where there are more, SPLIT warps side by side take TOKENS each and
// read the same weights, the second time from the cache.
//
// Launch, where a multiprocessor has W warps of the kernel (see gemv.cu and small.cu):
//   slices = ceil(columns / 1024); units = row tiles (ceil(rows / 4)) of all matrices, with GATED of one.
//   block (32, Y * SPLIT, Z), at most W warps: Y groups of warps side by side take the slices, in several passes if Y < slices;
//       Z row tiles at a time. With GATED an even Z has gate and up at once, an odd one in turn.
//   grid: any is right; as many blocks as are resident is fast.
//   dynamic shared memory: ceil(units / (grid * A)) * A * slices * 16 bytes a token, with GATED twice that, where A = Z, but
//       Z / 2 with GATED and an even Z. It must stay below 44 KB: a larger grid makes it smaller.
// No workspace. Reads x and norm within their columns, weights within their tiles.
#pragma once

#include "quant.cuh"

constexpr int MAX_SLICES = 64;

// Rows of quants in registers, one worked on and the others on their way: as many as 4 KB a warp in flight want, and as
// few beside five tokens as registers allow.
template <int T, int TOKENS>
constexpr int DEPTH = (quant_bits(T) == 16 ? 2 : 4) / (TOKENS > 4 ? 2 : 1);

// What lanes of a warp take of the tokens when it has reduced its sums: a power of two, TOKENS rounded up.
template <int TOKENS>
constexpr int TOKEN_LANES = TOKENS == 1 ? 1 : TOKENS == 2 ? 2 : TOKENS <= 4 ? 4 : 8;

// A lane's part of a tile: quants of DEPTH rows, what 5 and 6 bits have in planes of their own of all four, and scales.
template <int T, int TOKENS>
struct Tile {
    static constexpr int BITS = quant_bits(T);
    static constexpr int REST = BITS == 5 || BITS == 6 ? BITS - 4 : 1;
    Quants<T> row[DEPTH<T, TOKENS>];
    u32 rest[TILE_ROWS][REST];
    Scales<T> scales;

    // `own` is the lane's first 16 bytes in the slice: in all planes of quants it has 16 at a time, so that the distances from
    // there are constants.
    __device__ __forceinline__ void load_row(const u8* own, int groups, int r) {
        row[r % DEPTH<T, TOKENS>].load_chunks(own, groups, 0, r);
    }

    // Called once rows up to `r` of the tile before are used up.
    __device__ __forceinline__ void load_rest(const u8* own, int groups, int r) {
        if constexpr (BITS == 6) {
            if (r % 2 == 1) {
                uint4 v = __ldg((const uint4*)(own + (u32)(64 * groups + r / 2 * groups * 16)));
                rest[r - 1][0] = v.x, rest[r - 1][1 % REST] = v.y, rest[r][0] = v.z, rest[r][1 % REST] = v.w;
            }
        }
        if constexpr (BITS == 5) {
            if (r == 3) set_rest(__ldg((const uint4*)(own + (u32)(64 * groups))));
        }
    }

    __device__ __forceinline__ void set_rest(uint4 v) { rest[0][0] = v.x, rest[1][0] = v.y, rest[2][0] = v.z, rest[3][0] = v.w; }

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane) {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            if (r < DEPTH<T, TOKENS>) load_row(slice + (u32)(lane * 16), groups, r);
            load_rest(slice + (u32)(lane * 16), groups, r);
        }
        scales.load(slice, groups, lane);
    }

    __device__ __forceinline__ Quants<T> quants(int r) const {
        Quants<T> q = row[r % DEPTH<T, TOKENS>];
        if constexpr (BITS == 5 || BITS == 6) {
#pragma unroll
            for (int i = 0; i < REST; i++) q.q[4 + i] = rest[r][i];
        }
        return q;
    }
};

// A lane's group of x of the tokens, ready to meet the fields of quants.
template <int T, int TOKENS>
struct Input {
    static constexpr int HALVES = group_scales(T);
    float x[TOKENS][32];
    float sum[TOKENS][HALVES];  // of x, in the unit of dot products; negative and times the offset for types that have one

    // Reads a slice of the tokens, step apart and none past the last, and leaves the lane's sums of squares. Lanes past the
    // slice's groups get zeros.
    __device__ __forceinline__ void load(const float* input, int step, int last, const float* norms, int groups, int lane,
                                         float squares[TOKENS]) {
        u32 clamped = min(lane, groups - 1);
        bool outside = groups < SLICE / GROUP && lane >= groups;
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            const float4* from = (const float4*)(input + min(n, last) * step) + clamped;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float4 v = from[j * groups];
                x[n][4 * j] = v.x, x[n][4 * j + 1] = v.y, x[n][4 * j + 2] = v.z, x[n][4 * j + 3] = v.w;
            }
            if (outside) {
#pragma unroll
                for (int i = 0; i < 32; i++) x[n][i] = 0.0f;
            }
            squares[n] = 0.0f;
        }
        if (norms) {
            float parts[TOKENS][PARTS] = {};
#pragma unroll
            for (int j = 0; j < 8; j++) {
                float4 v = __ldg((const float4*)norms + j * groups + clamped);
                const float norm[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int n = 0; n < TOKENS; n++)
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        parts[n][k % PARTS] = fmaf(x[n][4 * j + k], x[n][4 * j + k], parts[n][k % PARTS]);
                        x[n][4 * j + k] *= norm[k];
                    }
            }
#pragma unroll
            for (int n = 0; n < TOKENS; n++) squares[n] = total(parts[n]);
        }
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                float parts[PARTS] = {};
#pragma unroll
                for (int i = 0; i < 32 / HALVES; i++) parts[i % PARTS] += x[n][h * 16 + i];
                sum[n][h] = total(parts) * Quants<T>::SUM_UNIT * (has_min(T) ? 1.0f : -quant_offset(T));
            }
#pragma unroll
            for (int i = 0; i < 32; i++) x[n][i] *= Quants<T>::x_factor(i);
        }
    }

    // Sums are taken in so many parts, so that additions wait less for each other; those of other tokens fill the time as well.
    static constexpr int PARTS = TOKENS <= 2 ? 4 : 1;
    static __device__ __forceinline__ float total(const float (&parts)[PARTS]) {
        return PARTS == 1 ? parts[0] : (parts[0] + parts[1 % PARTS]) + (parts[2 % PARTS] + parts[3 % PARTS]);
    }
};

// The products of a lane's group of one row and its x, in units of SUM_UNIT * Scales::UNIT.
template <int T, int TOKENS>
__device__ __forceinline__ void dot(const Quants<T>& quants, const float scale[], float min, const Input<T, TOKENS>& in,
                                    float result[TOKENS]) {
    constexpr int HALVES = group_scales(T);
    constexpr bool OFFSET = quant_offset(T) != 0.0f;
#pragma unroll
    for (int n = 0; n < TOKENS; n++) result[n] = has_min(T) ? min * in.sum[n][0] : 0.0f;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float sum[TOKENS];
#pragma unroll
        for (int n = 0; n < TOKENS; n++) sum[n] = OFFSET ? in.sum[n][h] : 0.0f;
#pragma unroll
        for (int i = h * 16; i < h * 16 + 32 / HALVES; i++) {
            float q = quants.field(i);
#pragma unroll
            for (int n = 0; n < TOKENS; n++) sum[n] = !OFFSET && i == 0 ? q * in.x[n][i] : fmaf(q, in.x[n][i], sum[n]);
        }
#pragma unroll
        for (int n = 0; n < TOKENS; n++) {
            if (quant_bits(T) == 16) result[n] = sum[n];
            else result[n] = h == 0 && !has_min(T) ? scale[h] * sum[n] : fmaf(scale[h], sum[n], result[n]);
        }
    }
}

// The sum of `low` over two lanes that differ in bit `mask`, in the lower one; that of `high` in the upper one.
__device__ __forceinline__ float exchange(float low, float high, int mask, int lane) {
    bool upper = lane & mask;
    float keep = upper ? high : low, send = upper ? low : high;
    return keep + __shfl_xor_sync(0xffffffffu, send, mask);
}

// Sums over the warp, each stage halving what a lane holds. Lane l gets that of row (l / 16) * 2 + l / 8 % 2 and of token
// l % 8 / (8 / TOKEN_LANES).
template <int TOKENS>
__device__ __forceinline__ float reduce(const float y[TOKENS][TILE_ROWS], int lane) {
    constexpr int LANES = TOKEN_LANES<TOKENS>;
    float v[LANES] = {};
#pragma unroll
    for (int n = 0; n < TOKENS; n++) {
        float even = exchange(y[n][0], y[n][2], 16, lane);
        float odd = exchange(y[n][1], y[n][3], 16, lane);
        v[n] = exchange(even, odd, 8, lane);
    }
#pragma unroll
    for (int mask = 4, count = LANES / 2; mask > 0; mask /= 2, count /= 2) {
#pragma unroll
        for (int i = 0; i < LANES / 2; i++)
            if (i < count) v[i] = exchange(v[i], v[i + count], mask, lane);
        if (count == 0) v[0] += __shfl_xor_sync(0xffffffffu, v[0], mask);
    }
    return v[0];
}

// One tile: products of four rows, while the loads of the next begin if there is one.
template <int T, int TOKENS, bool MORE>
__device__ __forceinline__ float work(Tile<T, TOKENS>& tile, const Input<T, TOKENS>& in, const u8* at, u32 stride, int groups,
                                      int lane) {
    constexpr int ROWS = DEPTH<T, TOKENS>;
    // Registers that hold scales in both forms, and fifth words twice, are there beside up to four tokens, or beside two and more.
    constexpr bool EARLY_SCALES = TOKENS <= 4, EARLY_REST = quant_bits(T) == 5 && TOKENS > 1;
    float y[TOKENS][TILE_ROWS], scale[TILE_ROWS][group_scales(T)], min[TILE_ROWS];
    uint4 rest;
    if (EARLY_SCALES) {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) tile.scales.get(r, scale[r], min[r]);
        if (MORE) tile.scales.load(at + stride, groups, lane);
    }
    if (EARLY_REST && MORE) rest = __ldg((const uint4*)(at + stride + (u32)(lane * 16) + (u32)(64 * groups)));
#pragma unroll
    for (int r = 0; r < TILE_ROWS; r++) {
        if (!EARLY_SCALES) {
            tile.scales.get(r, scale[r], min[r]);
            if (MORE && r == TILE_ROWS - 1) tile.scales.load(at + stride, groups, lane);
        }
        float result[TOKENS];
        dot<T, TOKENS>(tile.quants(r), scale[r], min[r], in, result);
#pragma unroll
        for (int n = 0; n < TOKENS; n++) y[n][r] = result[n];
        if (r + ROWS < TILE_ROWS) tile.load_row(at + (u32)(lane * 16), groups, r + ROWS);
        else if (MORE) tile.load_row(at + stride + (u32)(lane * 16), groups, r + ROWS - TILE_ROWS);
        if (MORE && !EARLY_REST) tile.load_rest(at + stride + (u32)(lane * 16), groups, r);
    }
    if (EARLY_REST && MORE) tile.set_rest(rest);
    return reduce<TOKENS>(y, threadIdx.x);
}

// A warp's walk over the tiles t, t + step .. below `tiles` of one matrix and slice: `at` is the first, its sums go to `to` and
// on from there, to_step apart, row r's `slices` * r further, a token's four rows on. The first tile's loads begin before
// `input` reads x.
template <int T, int TOKENS, class F>
__device__ __forceinline__ void walk(const u8* at, int t, int tiles, int step, u32 stride, float* to, int to_step, int slices,
                                     int groups, Input<T, TOKENS>& in, F input) {
    constexpr int SAME = 8 / TOKEN_LANES<TOKENS>;  // lanes that get the same sum
    int lane = groups == SLICE / GROUP ? (int)threadIdx.x : min((int)threadIdx.x, groups - 1);
    Tile<T, TOKENS> tile;
    tile.load(at, groups, lane);
    input(groups);
    int token = threadIdx.x % 8 / SAME;
    to += (threadIdx.x / 8 + token * TILE_ROWS) * slices;
    bool writes = threadIdx.x % SAME == 0 && token < TOKENS;
    for (; t + step < tiles; t += step) {
        float y = work<T, TOKENS, true>(tile, in, at, stride, groups, lane);
        if (writes) *to = y;
        to += to_step;
        at += stride;
    }
    float y = work<T, TOKENS, false>(tile, in, at, stride, groups, lane);
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

// Sums over all slices, and what becomes of them. partial: [place][token][row 4][slice], where the places of round k begin at
// k * abreast, twice that with GATED: gate, up, gate, up ...
template <int TOKENS>
__device__ __forceinline__ void finish(const Product& p, const Geometry& g, const float* partial, const float* factors) {
    constexpr int VALUES = TILE_ROWS * TOKENS;
    int threads = 32 * blockDim.y * blockDim.z;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * 32 + threadIdx.x;
    for (int i = thread;; i += threads) {
        int place = i / VALUES, round = (u32)place / (u32)g.abreast;
        int unit = g.first + round * g.step;
        if (unit >= g.units) break;
        unit += place - round * g.abreast;
        int token = i / TILE_ROWS % TOKENS;
        if (unit >= g.units || token >= p.tokens) continue;
        const float* from = partial + ((place << g.gated) * VALUES + i % VALUES) * g.slices;
        float sum = 0.0f, up = 0.0f;
        for (int s = 0; s < g.slices; s++) sum += from[s];
        if (g.gated) {
            for (int s = 0; s < g.slices; s++) up += from[VALUES * g.slices + s];
        }
        float factor = factors[token];
        sum *= factor;
        int m = 0;
        if (!g.gated && unit >= g.tiles[0]) unit -= g.tiles[0], m = 1;
        if (m == 1 && unit >= g.tiles[1]) unit -= g.tiles[1], m = 2;
        int row = unit * TILE_ROWS + i % TILE_ROWS;
        int rows = m == 0 ? p.rows[0] : m == 1 ? p.rows[1] : p.rows[2];
        if (row >= rows) continue;
        float* out = (m == 0 ? p.out[0] : m == 1 ? p.out[1] : p.out[2]) + token * rows;
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

// What y is times, of a token whose sums of squares are given.
template <int T>
__device__ __forceinline__ float factor_of(const Product& p, const Geometry& g, const float* squares) {
    float factor = 1.0f / (Quants<T>::SUM_UNIT * Scales<T>::UNIT);
    if (!p.norm) return factor;
    float total = 0.0f;
    for (int s = 0; s < g.slices; s++) total += squares[s];
    return factor * (1.0f / sqrtf(total / (float)g.columns + p.epsilon));
}

// OWN: tokens of a warp.
template <int T, int OWN, int SPLIT>
__device__ __forceinline__ void gemv(const Product& p) {
    constexpr int TOKENS = OWN * SPLIT;
    extern __shared__ float partial[];
    __shared__ float squares[TOKENS][MAX_SLICES];
    __shared__ float factors[TOKENS];
    __shared__ volatile int zero;
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) zero = 0;
    __syncthreads();
    Input<T, OWN> in;
    int held = -1;  // slice that `in` holds
    int own = threadIdx.y % SPLIT * OWN;  // first token of the warp
    for (int s = threadIdx.y / SPLIT, m = 0; s * SLICE < p.columns; ) {
        Geometry g(p, zero);
        int groups = min(SLICE, g.columns - s * SLICE) / GROUP;
        auto input = [&](int groups) {
            if (held == s) return;
            // Where a launch has fewer tokens, its last one stands for the others.
            int last = TOKENS == 1 ? 0 : p.tokens - 1, first = min(own, last);
            float sums[OWN];
            in.load(p.x + first * g.columns + s * SLICE, g.columns, last - first, p.norm ? p.norm + s * SLICE : nullptr, groups,
                    threadIdx.x, sums);
            if (p.norm && threadIdx.z == 0) {
#pragma unroll
                for (int n = 0; n < OWN; n++) {
                    sums[n] = warp_sum(sums[n]);
                    if (threadIdx.x == 0) squares[own + n][s] = sums[n];
                }
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
            float* to = partial + (place * TOKENS + own) * TILE_ROWS * g.slices + s;
            int to_step = (g.abreast << g.gated) * TOKENS * TILE_ROWS * g.slices;
            if (groups == SLICE / GROUP) {
                walk<T, OWN>(at, t, tiles, g.step, g.step * tile_bytes, to, to_step, g.slices, SLICE / GROUP, in, input);
            } else {
                walk<T, OWN>(at, t, tiles, g.step, g.step * tile_bytes, to, to_step, g.slices, groups, in, input);
            }
        }
        if (++m == p.matrices) {
            if (held != s) input(groups);  // of a warp without tiles: its squares may count
            m = 0;
            s += blockDim.y / SPLIT;
        }
    }
    __syncthreads();
    Geometry g(p, zero);
    if (TOKENS == 1) {
        float factor = factor_of<T>(p, g, squares[0]);
        finish<1>(p, g, partial, &factor);
    } else {
        if (threadIdx.y + threadIdx.z == 0 && threadIdx.x < TOKENS) factors[threadIdx.x] = factor_of<T>(p, g, squares[threadIdx.x]);
        __syncthreads();
        finish<TOKENS>(p, g, partial, factors);
    }
}
