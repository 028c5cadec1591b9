// The product of many tokens, tiled: what gemm.cu instantiates for each type.
//
// A block takes a tile of ROWS rows by TOKENS tokens, a thread 8 x 8 of it, a warp 64 rows by 32 tokens. Columns go in
// pairs of groups, a pair in four steps: a step is an octet of columns of either group, 16 columns, so that loads of the
// repacked layout are whole sectors and a type's scales are read once in four steps. A step's weights are expanded on
// their way to shared memory, and step n + 1 is stored while step n is multiplied.
//
// What decides is the main loop's register budget. At 128 registers ptxas stops assigning registers to banks, and each
// FFMA that reads two operands of one bank costs an M40 a second cycle. Hence what looks odd below: a tile's place is
// kept in shared memory, threadIdx is read again instead of kept, addresses are packed in halves of a register, one load
// is in flight at a time, and the sums leave as single floats.
#pragma once

#include "quant.cuh"

// Columns of a step, steps of a pair of groups, and the fewest pairs for which it pays to split a tile's columns.
constexpr int STEP = 16;
constexpr int PAIR_STEPS = 4;
constexpr int FEWEST_PAIRS = 4;

// Read each time it is needed: a kept copy costs a register throughout the main loop.
__device__ __forceinline__ int thread_index() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

// An array among the kernel's arguments at an index known only at run time, without a copy in local memory.
template <typename V>
__device__ __forceinline__ V pick(const V (&a)[3], int m) {
    V v = a[0];
    if (m == 1) v = a[1];
    if (m == 2) v = a[2];
    return v;
}

// Where a thread takes weights from: N rows of which it reads the same columns, one octet of a group after the other.
// The rows have the same number in their tiles of four.
template <int T, int N>
struct Source {
    static constexpr int BITS = quant_bits(T);
    static constexpr bool K = T == Q4_K || T == Q5_K;
    static constexpr bool SHARED_WORDS = BITS == 5 || BITS == 6;  // octets share words: the group stays in registers
    static constexpr int WORDS = SHARED_WORDS ? BITS : BITS / 4;
    static constexpr int SCALES = group_scales(T);
    static constexpr float UNIT = BITS == 16 ? 1.0f : 0x1p-64f;  // what expanded weights are multiplied with

    const u8* base;  // tile of the first row
    u32 far[N];      // from there to the other rows' tiles
    u32 at, stride;  // the next octet; from one 16-byte chunk of a group to the next
    bool valid;
    u32 raw[N][WORDS], raw_scale[N][3];
    float scale[N][SCALES], offset[N];

    template <typename V>
    __device__ __forceinline__ V read(int n, u32 place) const {
        return __ldg(reinterpret_cast<const V*>(base + (n == 0 ? place : place + far[n])));
    }

    __device__ __forceinline__ void tiles(const u8* weight, const int (&tile)[N], int columns) {
        const u32 bytes = Layout<T>::row_tile_bytes(columns);
        base = weight + tile[0] * bytes;
#pragma unroll
        for (int n = 0; n < N; n++) far[n] = (tile[n] - tile[0]) * bytes;
    }

    // Turns to group g. A pair's second group may be beyond the last: then the last one is read, and counts as zeros.
    __device__ __forceinline__ void turn(int row, int g, int groups) {
        valid = g < groups;
        g = min(g, groups - 1);
        const int slice = g & ~31, lane = g & 31, lanes = min(32, groups - slice);
        const u32 begin = slice * Layout<T>::TILE_GROUP;
        constexpr int CHUNKS = BITS < 8 ? 1 : BITS / 4;
        stride = lanes * 16;
        at = begin + (row * CHUNKS * lanes + lane) * 16;
#pragma unroll
        for (int n = 0; n < N; n++) {
            if constexpr (SHARED_WORDS) {
                const uint4 v = read<uint4>(n, at);
                raw[n][0] = v.x, raw[n][1] = v.y, raw[n][2] = v.z, raw[n][3] = v.w;
                const u32 rest = begin + 64 * lanes;
                if constexpr (BITS == 5) raw[n][4] = read<u32>(n, rest + lane * 16 + row * 4);
                if constexpr (BITS == 6) {
                    const uint2 u = read<uint2>(n, rest + (row / 2 * lanes + lane) * 16 + row % 2 * 8);
                    raw[n][4] = u.x, raw[n][5] = u.y;
                }
            }
            const u32 scales = begin + Layout<T>::scales(lanes);
            if constexpr (K) {
                raw_scale[n][0] = read<u32>(n, scales + lane / 8 * 16 + row * 4);
                raw_scale[n][1] = read<u32>(n, scales + 2 * lanes + lane * 4);
                raw_scale[n][2] = read<u16>(n, scales + 6 * lanes + lane * 2);
            } else if constexpr (has_min(T)) {
                raw_scale[n][0] = read<u32>(n, scales + lane * 16 + row * 4);
            } else if constexpr (BITS < 16) {
                raw_scale[n][0] = read<u16>(n, scales + lane * 8 + row * 2);
                if constexpr (T == Q6_K) raw_scale[n][1] = read<u16>(n, scales + 8 * lanes + lane / 8 * 8 + row * 2);
            }
        }
    }

    // Loads the words of row n's octet `part`; where octets share words they are there since turn().
    __device__ __forceinline__ void fetch(int n, int part) {
        if constexpr (BITS == 16) {
            const uint4 v = read<uint4>(n, at);
            raw[n][0] = v.x, raw[n][1] = v.y, raw[n][2] = v.z, raw[n][3] = v.w;
            if (n == N - 1) at += stride;
        } else if constexpr (BITS == 8) {
            const uint2 v = read<uint2>(n, at);
            raw[n][0] = v.x, raw[n][1] = v.y;
            if (n == N - 1) at += part & 1 ? stride - 8 : 8;
        } else if constexpr (BITS == 4) {
            raw[n][0] = read<u32>(n, at);
            if (n == N - 1) at += 4;
        }
    }

    // Scale and offset of row n's group from what turn() read.
    __device__ __forceinline__ void decode(int n, int row) {
        const u32(&r)[3] = raw_scale[n];
        if constexpr (K) {
            scale[n][0] = (float)KScales::scale(r[1], row) * half_low(r[0]);
            offset[n] = (float)KScales::min(r[1], r[2], row) * half_high(r[0]) * -UNIT;
        } else if constexpr (has_min(T)) {
            scale[n][0] = half_low(r[0]);
            offset[n] = half_high(r[0]) * UNIT;
        } else if constexpr (T == Q6_K) {
            const float d = half_low(r[1]);
            scale[n][0] = ((float)(r[0] & 0xff) - 128.0f) * d;
            scale[n][1] = ((float)(r[0] >> 8) - 128.0f) * d;
        } else {
            scale[n][0] = half_low(r[0]);
            offset[n] = scale[n][0] * (-quant_offset(T) * UNIT);
        }
        if constexpr (!K && T != Q6_K) {  // these have an even number of groups
            if (!valid) scale[n][0] = offset[n] = 0.0f;
        }
    }

    template <int PART>
    __device__ __forceinline__ void expand_part(int n, float (&w)[8]) const {
        Quants<T> quants;
#pragma unroll
        for (int i = 0; i < BITS; i++) quants.q[i] = raw[n][i % WORDS];
        const float s = scale[n][SCALES == 2 ? PART / 2 : 0];
        const float base = SCALES == 2 ? s * (-quant_offset(T) * UNIT) : offset[n];
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int i = PART * 8 + e;
            w[e] = BITS == 16 ? quants.field(i) : fmaf(quants.field(i), s * power_of_two(85 - field_bit(BITS, i)), base);
        }
    }

    // The eight weights of row n's octet `part`, times UNIT, scale and min folded in.
    __device__ __forceinline__ void expand(int n, int part, int row, float (&w)[8]) {
        if constexpr (BITS == 16) {
            if (!valid) raw[n][0] = raw[n][1] = raw[n][2] = raw[n][3] = 0;
        } else {
            if (part == 0) decode(n, row);
        }
        if constexpr (!SHARED_WORDS) {
            expand_part<0>(n, w);
        } else {
            if (part == 0) expand_part<0>(n, w);
            else if (part == 1) expand_part<1>(n, w);
            else if (part == 2) expand_part<2>(n, w);
            else expand_part<3>(n, w);
        }
    }
};

// The tile that a block works on, or its part of one, and what comes after it. Kept in shared memory.
struct Work {
    const u8* weight;
    int m, rows, row, token;  // matrix, its rows; the tile's first row and token
    int begin, end;           // steps; end 0: nothing is left
    // Whole tiles are dealt out in turn. What is left when they no longer fill the grid is one range of pairs of groups,
    // tile after tile, cut into one share for each block.
    int whole, next;            // how many are whole tiles; this block's next one
    int share, unit, unit_end;  // pairs in a share; this block's, from the next one on
    int rest, slot;             // number of the tile among the shared ones; where in `partial` this block's sums go
};

template <int ROWS, int TOKENS>
struct Schedule {
    const Product& p;

    __device__ __forceinline__ int pairs() const { return (p.columns / GROUP + 1) / 2; }
    __device__ __forceinline__ int token_tiles() const { return (p.tokens + TOKENS - 1) / TOKENS; }
    __device__ __forceinline__ int row_tiles(int m) const { return (pick(p.rows, m) + ROWS - 1) / ROWS; }

    __device__ __forceinline__ void begin(Work& work) const {
        int tiles = 0;
        for (int m = 0; m < p.matrices; m++) tiles += row_tiles(m) * token_tiles();
        const int grid = gridDim.x, left = tiles % grid;
        work.whole = left * 10 >= grid * 9 ? tiles : tiles - left;  // sharing would cost more than it saves
        const int units = (tiles - work.whole) * pairs();
        work.share = max((units + grid - 1) / grid, FEWEST_PAIRS);
        work.next = blockIdx.x;
        work.unit = blockIdx.x * work.share;
        work.unit_end = min(work.unit + work.share, units);
    }

    // Which of its two places in `partial` block b uses for shared tile `rest`: the second if its share began before it.
    __device__ __forceinline__ int slot(const Work& work, int b, int rest) const {
        return 2 * b + (b * work.share < rest * pairs());
    }

    __device__ __forceinline__ void next(Work& work) const {
        int tile, begin = 0, end = pairs();
        if (work.next < work.whole) {
            tile = work.next;
            work.next += gridDim.x;
        } else if (work.unit < work.unit_end) {
            work.rest = work.unit / pairs();
            work.slot = slot(work, blockIdx.x, work.rest);
            begin = work.unit - work.rest * pairs();
            end = min(end, begin + work.unit_end - work.unit);
            work.unit += end - begin;
            tile = work.whole + work.rest;
        } else {
            work.end = 0;
            return;
        }
        work.begin = begin * PAIR_STEPS;
        work.end = end * PAIR_STEPS;
        int m = 0, row = tile / token_tiles();
        work.token = (tile - row * token_tiles()) * TOKENS;
        for (; m < p.matrices - 1 && row >= row_tiles(m); m++) row -= row_tiles(m);
        work.m = m;
        work.row = row * ROWS;
        work.rows = pick(p.rows, m);
        work.weight = pick(p.weight, m);
    }
};

// Which of x's eight products with w comes n-th. It changes no result but the bank conflicts: w[j] and x[i] lie in banks
// j % 4 and i % 4, and where these are equal x has to come from the operand cache, that is, from the product before. Of
// all orders tried this one leaves the fewest that do not, 4 to 6 % of the products.
__device__ __forceinline__ constexpr int ordered(int i, int n) { return (n & 4) | ((n + i + 2) & 3); }

template <int T, int ROWS, int TOKENS>
struct Tile {
    static constexpr int THREADS = ROWS * TOKENS / 64;
    static constexpr int ROW_WARPS = ROWS / 64;
    // Loads of a thread and step: eight weights, and four of x.
    static constexpr int W_LOADS = ROWS * 2 / THREADS, X_LOADS = TOKENS * 4 / THREADS, LOADS = W_LOADS + X_LOADS;
    // Shared memory: w [2][STEP][ROWS], x [2][STEP][TOKENS]; in bytes:
    static constexpr u32 W_BYTES = STEP * ROWS * 4, X_BYTES = STEP * TOKENS * 4, BYTES = 2 * (W_BYTES + X_BYTES);
    static constexpr u32 FLIP = W_BYTES | X_BYTES << 16;  // to the other buffer
    static_assert(2 * W_BYTES % (2 * X_BYTES) == 0, "FLIP is a xor");

    const Product& p;
    const Work& work;
    u8* shared;

    // First of the eight rows and tokens of a thread: rows +0..3 and +32..35, tokens +0..3 and +16..19. The lanes are so
    // arranged that a warp reads 128 consecutive bytes of w, and x by broadcast.
    __device__ __forceinline__ static int row() {
        return (thread_index() >> 5) % ROW_WARPS * 64 + (thread_index() >> 1 & 7) * 4;
    }
    __device__ __forceinline__ static int token() {
        return (thread_index() >> 5) / ROW_WARPS * 32 + (thread_index() & 1) * 4 + (thread_index() >> 4 & 1) * 8;
    }

    // Multiplies the steps work.begin .. work.end - 1.
    //
    // Column k of a step is line k of shared memory. Threads load weights in pairs, lines 0..7 and 8..15 of a row, and x
    // in fours, lines 4q..4q+3 of a token. So that either stores without bank conflicts, rows are exchanged (xor 16) in
    // lines 8..15, and tokens (xor 8q) in lines 4q..4q+3.
    __device__ __forceinline__ void multiply(float (&acc)[8][8]) const {
        const int groups = p.columns / GROUP;
        Source<T, W_LOADS> source;
        u32 x_row[X_LOADS], x_column;
        // where the thread reads (and stores) w, low half, and x, high half
        u32 reads = row() * 4 | (2 * W_BYTES + token() * 4) << 16, stores;
        {
            const int t = thread_index();
            stores = (t & 1) * (8 * ROWS * 4) + ((t >> 1) ^ (t & 1) * 16) * 4;
            stores |= (2 * W_BYTES + (t & 3) * (4 * TOKENS * 4) + ((t >> 2) ^ (t & 3) * 8) * 4) << 16;
            int tile[W_LOADS];
#pragma unroll
            for (int n = 0; n < W_LOADS; n++)
                tile[n] = min(work.row / TILE_ROWS + (t >> 3) + n * THREADS / 8, (work.rows - 1) / TILE_ROWS);
            source.tiles(work.weight, tile, p.columns);
#pragma unroll
            for (int n = 0; n < X_LOADS; n++)
                x_row[n] = min(work.token + (t >> 2) + n * THREADS / 4, p.tokens - 1) * p.columns * 4u;
        }
        float4 x_raw;
        auto turn = [&](int step) {
            if (step % PAIR_STEPS != 0) return;
            const int t = thread_index(), g = step / 2;
            source.turn(t >> 1 & 3, g + (t & 1), groups);
            x_column = min(g + (t >> 1 & 1), groups - 1) * (GROUP * 4) + (t & 1) * 16;
        };
        auto fetch = [&](int step, int n) {
            if (n < X_LOADS)
                x_raw = __ldg(reinterpret_cast<const float4*>(reinterpret_cast<const u8*>(p.x) + (x_row[n] + x_column)));
            else
                source.fetch(n - X_LOADS, step % PAIR_STEPS);
            if (n == LOADS - 1) x_column += 32;
        };
        auto store = [&](int step, int n) {
            if (n < X_LOADS) {
                float* to = reinterpret_cast<float*>(shared + (stores >> 16)) + n * THREADS / 4;
                to[0 * TOKENS] = x_raw.x, to[1 * TOKENS] = x_raw.y, to[2 * TOKENS] = x_raw.z, to[3 * TOKENS] = x_raw.w;
            } else {
                float* to = reinterpret_cast<float*>(shared + (stores & 0xffff)) + (n - X_LOADS) * THREADS / 2;
                float w[8];
                source.expand(n - X_LOADS, step % PAIR_STEPS, thread_index() >> 1 & 3, w);
#pragma unroll
                for (int e = 0; e < 8; e++) to[e * ROWS] = w[e];
            }
        };

        int step = work.begin;
        turn(step);
#pragma unroll
        for (int n = 0; n < LOADS; n++) fetch(step, n), store(step, n);
        __syncthreads();
#pragma unroll 1
        do {
            u32 w_read = reads & 0xffff, x_read = reads >> 16;
            reads ^= FLIP;
            stores ^= FLIP;
            turn(++step);  // beyond work.end what it reads is not used
#pragma unroll
            for (int k = 0; k < STEP; k++) {
                constexpr int EVERY = STEP / LOADS;
                if (k % EVERY == 0 && k / EVERY < LOADS) {
                    if (k > 0) store(step, k / EVERY - 1);
                    fetch(step, k / EVERY);
                }
                if (k == 8) w_read ^= 64;
                if (k == 4 || k == 8 || k == 12) x_read ^= 32;
                const u8 *wp = shared + w_read + k * (ROWS * 4), *xp = shared + x_read + k * (TOKENS * 4);
                const float4 w0 = *reinterpret_cast<const float4*>(wp);
                const float4 w1 = *reinterpret_cast<const float4*>(wp + 128);
                const float4 x0 = *reinterpret_cast<const float4*>(xp + (k & 8 ? 64 : 0));
                const float4 x1 = *reinterpret_cast<const float4*>(xp + (k & 8 ? 0 : 64));
                const float w[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
                const float x[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
#pragma unroll
                for (int i = 0; i < 8; i++)
#pragma unroll
                    for (int n = 0; n < 8; n++) {
                        const int j = ordered(i, n);
                        acc[i][j] = fmaf(w[j], x[i], acc[i][j]);
                    }
            }
            store(step, LOADS - 1);
            __syncthreads();
        } while (step < work.end);
    }

    // A thread's own words of shared memory, 32 floats, through which sums pass on their way out. As single floats:
    // vectors would bind the registers of acc to the banks of w's.
    __device__ __forceinline__ float& own(int i) const {
        return reinterpret_cast<float*>(shared)[i * THREADS + thread_index()];
    }
    __device__ __forceinline__ float4 own4(int i) const {
        return make_float4(own(4 * i), own(4 * i + 1), own(4 * i + 2), own(4 * i + 3));
    }

    // Writes four rows of a token: number e of a thread's 16 such. `sum` is in units of Source::UNIT.
    __device__ __forceinline__ void emit(int e, float4 sum) const {
        const int r = work.row + row() + (e & 1) * 32, t = work.token + token() + (e >> 1 & 3) + (e >> 3) * 16;
        const int rows = work.rows;
        if (t >= p.tokens || r >= rows) return;
        float* out = pick(p.out, work.m) + (size_t)t * rows + r;
        const float* bias = p.mode == STORE ? pick(p.bias, work.m) : nullptr;
        float v[4] = {sum.x, sum.y, sum.z, sum.w};
        const auto finish = [&](int j, float before) {
            v[j] *= 1.0f / Source<T, 1>::UNIT;
            v[j] = p.mode == SILU_MUL ? v[j] * silu(before) : v[j] + before;
        };
        const float* before = p.mode == STORE ? (bias ? bias + r : nullptr) : out;
        if (rows % 4 == 0) {
            const float4 b = before ? *reinterpret_cast<const float4*>(before) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            finish(0, b.x), finish(1, b.y), finish(2, b.z), finish(3, b.w);
            *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (r + j < rows) {
                    finish(j, before ? before[j] : 0.0f);
                    out[j] = v[j];
                }
        }
    }

    __device__ __forceinline__ float4* partial(int slot) const {
        return reinterpret_cast<float4*>(p.partial) + slot * (ROWS * TOKENS / 4) + thread_index();
    }

    // Hands the sums on: to `out`, or, of a part of the columns, to the workspace.
    __device__ __forceinline__ void leave(const float (&acc)[8][8], bool whole) const {
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) own(i * 8 + j) = half ? acc[i + 4][j] : acc[i][j];
#pragma unroll 1
            for (int e = 0; e < 8; e++) {
                if (whole) emit(half * 8 + e, own4(e));
                else __stcg(partial(work.slot) + (half * 8 + e) * THREADS, own4(e));
            }
        }
    }

    // Adds up the parts of a tile that the blocks first .. last left, in this order whoever comes last.
    __device__ __forceinline__ void merge(int first, int last) const {
        const Schedule<ROWS, TOKENS> schedule{p};
#pragma unroll 1
        for (int half = 0; half < 2; half++) {
            float4 sum[8];
#pragma unroll
            for (int e = 0; e < 8; e++) sum[e] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
            for (int b = first; b <= last; b++) {
                const float4* part = partial(schedule.slot(work, b, work.rest)) + half * 8 * THREADS;
                float4 v[8];
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = __ldcg(part + e * THREADS);
#pragma unroll
                for (int e = 0; e < 8; e++)
                    sum[e].x += v[e].x, sum[e].y += v[e].y, sum[e].z += v[e].z, sum[e].w += v[e].w;
            }
#pragma unroll
            for (int e = 0; e < 8; e++) {
                own(4 * e) = sum[e].x, own(4 * e + 1) = sum[e].y;
                own(4 * e + 2) = sum[e].z, own(4 * e + 3) = sum[e].w;
            }
#pragma unroll 1
            for (int e = 0; e < 8; e++) emit(half * 8 + e, own4(e));
        }
    }
};

template <int T, int ROWS, int TOKENS>
__device__ __forceinline__ void gemm(const Product& p) {
    using Block = Tile<T, ROWS, TOKENS>;
    __shared__ __align__(16) u8 shared[Block::BYTES];
    __shared__ Work work;
    __shared__ int arrived;
    const Schedule<ROWS, TOKENS> schedule{p};
    const Block block{p, work, shared};

    if (thread_index() == 0) schedule.begin(work);
    for (;;) {
        __syncthreads();
        if (thread_index() == 0) schedule.next(work);
        __syncthreads();
        if (work.end == 0) return;
        const bool whole = work.end - work.begin == schedule.pairs() * PAIR_STEPS;
        {
            float acc[8][8];
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) acc[i][j] = 0.0f;
            block.multiply(acc);
            block.leave(acc, whole);
        }
        if (whole) continue;
        const int first = work.rest * schedule.pairs() / work.share;
        const int last = ((work.rest + 1) * schedule.pairs() - 1) / work.share;
        __threadfence();
        __syncthreads();
        if (thread_index() == 0) {
            arrived = atomicAdd(p.counters + work.rest, 1u);
            if (arrived == last - first) p.counters[work.rest] = 0;
        }
        __syncthreads();
        if (arrived != last - first) continue;
        __threadfence();
        block.merge(first, last);
    }
}
