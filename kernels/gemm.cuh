#pragma once
#include "quant.cuh"

#ifndef ORDER
#define ORDER 0
#endif

#ifndef SIMPLE
#define SIMPLE 0
#endif
#ifndef UNROLL
#define UNROLL 16
#endif
constexpr int STEP = 16;

__device__ __forceinline__ float4 load4(const u8* base, u32 offset) {
    return __ldg(reinterpret_cast<const float4*>(base + offset));
}

__device__ __forceinline__ u32 tid() {
    u32 t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

// Where one thread takes weights from: a row, of which it reads one group after the other, in four octets of columns.
template <int T>
struct Source {
    static constexpr int BITS = quant_bits(T);
    static constexpr bool K = T == Q4_K || T == Q5_K;
    static constexpr bool WHOLE = BITS == 5 || BITS == 6;  // octets share words: the group stays in registers
    static constexpr int WORDS = WHOLE ? BITS : BITS / 4;
    static constexpr int HALVES = group_scales(T);
    const u8* base;  // the row tile
    u32 at, stride;  // of the next octet; between chunks
    u32 raw[WORDS];
    u32 raw_scale[3];
    float scale[HALVES], offset;
    bool valid;

    __device__ __forceinline__ void tile(const u8* weight, int tile, int columns) {
        base = weight + (u32)(tile * Layout<T>::row_tile_bytes(columns));
    }

    // Turns to group g; beyond the last one weights are zeros.
    __device__ __forceinline__ void group(int row, int g, int groups) {
        valid = g < groups;
        g = min(g, groups - 1);
        const int slice = g & ~31, lane = g & 31, lanes = min(32, groups - slice);
        const u32 begin = slice * Layout<T>::TILE_GROUP;
        stride = lanes * 16;
        constexpr int CHUNKS = BITS < 8 ? 1 : BITS / 4;
        at = begin + (row * CHUNKS * lanes + lane) * 16;
        if constexpr (WHOLE) {
            const uint4 v = __ldg((const uint4*)(base + at));
            raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
            if constexpr (BITS == 5) raw[4] = __ldg((const u32*)(base + (begin + 64 * lanes + lane * 16 + row * 4)));
            if constexpr (BITS == 6) {
                const uint2 u = __ldg((const uint2*)(base + (begin + 64 * lanes + (row / 2 * lanes + lane) * 16 + row % 2 * 8)));
                raw[WORDS - 2] = u.x, raw[WORDS - 1] = u.y;
            }
        }
        const u32 scales = begin + Layout<T>::scales(lanes);
        if constexpr (K) {
            raw_scale[0] = __ldg((const u32*)(base + (scales + lane / 8 * 16 + row * 4)));
            raw_scale[1] = __ldg((const u32*)(base + (scales + 2 * lanes + lane * 4)));
            raw_scale[2] = __ldg((const u16*)(base + (scales + 6 * lanes + lane * 2)));
        } else if constexpr (has_min(T)) {
            raw_scale[0] = __ldg((const u32*)(base + (scales + lane * 16 + row * 4)));
        } else if constexpr (T == Q6_K) {
            raw_scale[0] = __ldg((const u16*)(base + (scales + lane * 8 + row * 2)));
            raw_scale[1] = __ldg((const u16*)(base + (scales + 8 * lanes + lane / 8 * 8 + row * 2)));
        } else if constexpr (BITS < 16) {
            raw_scale[0] = __ldg((const u16*)(base + (scales + lane * 8 + row * 2)));
        }
    }

    __device__ __forceinline__ void fetch(int part) {
        if constexpr (BITS == 16) {
            const uint4 v = __ldg((const uint4*)(base + at));
            raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
            at += stride;
        } else if constexpr (BITS == 8) {
            const uint2 v = __ldg((const uint2*)(base + at));
            raw[0] = v.x, raw[1] = v.y;
            at += part & 1 ? stride - 8 : 8;
        } else if constexpr (BITS == 4) {
            raw[0] = __ldg((const u32*)(base + at));
            at += 4;
        }
    }

    __device__ __forceinline__ void decode() {
        offset = 0.0f;
        if constexpr (K) {
            const int row = tid() >> 1 & 3;
            scale[0] = (float)KScales::scale(raw_scale[1], row) * half_low(raw_scale[0]);
            offset = -((float)KScales::min(raw_scale[1], raw_scale[2], row) * half_high(raw_scale[0]));
        } else if constexpr (has_min(T)) {
            scale[0] = half_low(raw_scale[0]);
            offset = half_high(raw_scale[0]);
        } else if constexpr (T == Q6_K) {
            const float d = half_low(raw_scale[1]);
            scale[0] = ((float)(raw_scale[0] & 0xff) - 128.0f) * d;
            scale[HALVES - 1] = ((float)(raw_scale[0] >> 8) - 128.0f) * d;
        } else {
            scale[0] = half_low(raw_scale[0]);
        }
        if constexpr (!has_min(T) && HALVES == 1) offset = scale[0] * -quant_offset(T);
        offset *= UNIT;
        if constexpr (!K && T != Q6_K) {
            if (!valid) scale[0] = offset = 0.0f;
        }
    }

    static constexpr float UNIT = BITS == 16 ? 1.0f : 0x1p-64f;

    template <int PART>
    __device__ __forceinline__ void octet_of(float (&w)[8]) const {
        Quants<T> quants;
#pragma unroll
        for (int i = 0; i < BITS; i++) quants.q[i] = raw[i % WORDS];
        const float s = scale[HALVES == 2 ? PART / 2 : 0];
        const float base = HALVES == 2 ? s * (-quant_offset(T) * UNIT) : offset;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const int i = PART * 8 + e;
            w[e] = BITS == 16 ? quants.field(i) : fmaf(quants.field(i), s * power_of_two(85 - field_bit(BITS, i)), base);
        }
    }

    // Eight weights times UNIT.
    __device__ __forceinline__ void octet(int part, float (&w)[8]) {
        if constexpr (BITS == 16) {
            if (!valid) raw[0] = raw[1] = raw[2] = raw[3] = 0;
            octet_of<0>(w);
        } else {
            if (part == 0) decode();
            if constexpr (WHOLE) {
                if (part == 0) octet_of<0>(w);
                else if (part == 1) octet_of<1>(w);
                else if (part == 2) octet_of<2>(w);
                else octet_of<3>(w);
            } else {
                octet_of<0>(w);
            }
        }
    }
};

template <typename V> __device__ __forceinline__ V pick(const V (&a)[3], int m) {
    V v = a[0];
    if (m == 1) v = a[1];
    if (m == 2) v = a[2];
    return v;
}

__device__ __forceinline__ float finish(float result, float before, int mode) {
    return mode == ADD ? before + result : __fdividef(before, 1.0f + __expf(-before)) * result;
}

// What a block works on, kept in shared memory: the main loop has no registers to spare.
struct Work {
    const u8* weight;
    int m, rows, row, token;  // first row and token of the tile
    int begin, end;           // steps
    int rest;                 // number of the tile among the shared ones
    int slot;                 // where this block's part goes
    int share;                // pairs a block takes of the shared tiles
    int next, unit, unit_end, whole;
};

template <int ROWS, int TOKENS>
__device__ __forceinline__ void plan(const Product& p, Work& work) {
    const int token_tiles = (p.tokens + TOKENS - 1) / TOKENS, pairs = (p.columns / GROUP + 1) / 2, grid = gridDim.x;
    int row_tiles = 0;
    for (int m = 0; m < p.matrices; m++) row_tiles += (pick(p.rows, m) + ROWS - 1) / ROWS;
    const int tiles = row_tiles * token_tiles;
    int whole = tiles / grid * grid;
    if ((tiles - whole) * 10 >= grid * 9) whole = tiles;
    const int rest = (tiles - whole) * pairs;
    work.share = max((rest + grid - 1) / grid, 4);
    work.unit = blockIdx.x * work.share;
    work.unit_end = min(work.unit + work.share, rest);
    work.whole = whole;
    work.next = blockIdx.x;
}

template <int ROWS, int TOKENS>
__device__ __forceinline__ void next_work(const Product& p, Work& work) {
    const int token_tiles = (p.tokens + TOKENS - 1) / TOKENS, pairs = (p.columns / GROUP + 1) / 2;
    int tile, begin = 0, end = 0;
    if (work.next < work.whole) {
        tile = work.next;
        work.next = tile + gridDim.x;
        end = pairs;
    } else if (work.unit < work.unit_end) {
        tile = work.unit / pairs;
        begin = work.unit - tile * pairs;
        end = min(pairs, begin + work.unit_end - work.unit);
        work.unit += end - begin;
        work.rest = tile;
        work.slot = 2 * blockIdx.x + (blockIdx.x * work.share < tile * pairs);
        tile += work.whole;
    }
    work.begin = begin * 4;
    work.end = end * 4;
    if (end == 0) return;
    int m = 0, row = tile / token_tiles;
    work.token = (tile - row * token_tiles) * TOKENS;
    row *= ROWS;
    for (; m < p.matrices - 1; m++) {
        int span = (pick(p.rows, m) + ROWS - 1) / ROWS * ROWS;
        if (row < span) break;
        row -= span;
    }
    work.m = m;
    work.row = row;
    work.rows = pick(p.rows, m);
    work.weight = pick(p.weight, m);
}

// Writes rows and tokens number `e` of a thread's 16 groups of four rows.
template <int ROWS, int TOKENS>
__device__ __forceinline__ void emit(const Product& p, const Work& work, int e, float4 value, float unit) {
    const int t = tid(), warp = t >> 5, wr = warp % (ROWS / 64), wt = warp / (ROWS / 64);
    const int row = work.row + wr * 64 + (t >> 1 & 7) * 4 + (e & 1) * 32, rows = work.rows;
    const int token = work.token + wt * 32 + ((t & 1) | (t >> 4 & 1) << 1) * 4 + (e >> 1 & 3) + (e >> 3) * 16;
    if (token >= p.tokens || row >= rows) return;
    float* out = pick(p.out, work.m) + (size_t)token * rows + row;
    float v[4] = {value.x * unit, value.y * unit, value.z * unit, value.w * unit};
    const float* bias = p.mode == STORE ? pick(p.bias, work.m) : nullptr;
    if (bias) {
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (row + j < rows) v[j] += bias[row + j];
    }
    if (rows % 4 == 0) {
        float4* to = reinterpret_cast<float4*>(out);
        if (p.mode != STORE) {
            float4 o = *to;
            v[0] = finish(v[0], o.x, p.mode);
            v[1] = finish(v[1], o.y, p.mode);
            v[2] = finish(v[2], o.z, p.mode);
            v[3] = finish(v[3], o.w, p.mode);
        }
        *to = make_float4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (row + j < rows) out[j] = p.mode == STORE ? v[j] : finish(v[j], out[j], p.mode);
    }
}

template <int T, int ROWS, int TOKENS>
__device__ __forceinline__ void gemm(const Product& p) {
    constexpr int THREADS = ROWS * TOKENS / 64;
    constexpr int WR = ROWS / 64;              // warps along rows
    constexpr int X_LOADS = TOKENS * 4 / THREADS;  // float4 loads of x a thread and step
    constexpr int W_LOADS = ROWS * 2 / THREADS;
    constexpr u32 FLIP = ROWS * STEP * 4 | TOKENS * STEP * 4 << 16;  // to the other buffer
    // w [2][STEP][ROWS], x [2][STEP][TOKENS]
    __shared__ __align__(16) float shared[2 * (ROWS + TOKENS) * STEP];
    __shared__ Work work;
    __shared__ u32 arrived;

    if (tid() == 0) plan<ROWS, TOKENS>(p, work);
    for (;;) {
        __syncthreads();
        if (tid() == 0) next_work<ROWS, TOKENS>(p, work);
        __syncthreads();
        if (work.end == 0) break;
        {
            float acc[8][8];
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) acc[i][j] = 0.0f;

            const int groups = p.columns / GROUP;
            Source<T> source[W_LOADS];
            u32 x_at[X_LOADS];
            {
                const int t = tid();
#pragma unroll
                for (int i = 0; i < W_LOADS; i++)
                    source[i].tile(work.weight, min((work.row + i * THREADS / 2) / 4 + (t >> 3), (work.rows - 1) / 4), p.columns);
#pragma unroll
                for (int i = 0; i < X_LOADS; i++)
                    x_at[i] = min(work.token + (t >> 2) + i * THREADS / 4, p.tokens - 1) * p.columns * 4u;
            }
            // where in shared memory the thread reads w (low half) and x (high half), and where it stores them
            u32 reads, place;
            {
                const int t = tid();
                reads = (t >> 5) % WR * 256 + (t >> 1 & 7) * 16;
                reads |= (ROWS * STEP * 8 + (t >> 5) / WR * 128 + ((t & 1) | (t >> 4 & 1) << 1) * 16) << 16;
                place = (t & 1) * 8 * ROWS * 4 + ((t >> 1) ^ ((t & 1) * 16)) * 4;
                place |= (ROWS * STEP * 8 + (t & 3) * 4 * TOKENS * 4 + ((t >> 2) ^ ((t & 3) * 8)) * 4) << 16;
            }
            u8* bytes = reinterpret_cast<u8*>(shared);
            u32 x_column = 0;
            float4 x_raw;

            auto turn = [&](int step) {
                if ((step & 3) == 0) {
                    const int t = tid();
                    const int g = step / 2;
#pragma unroll
                    for (int i = 0; i < W_LOADS; i++) source[i].group(t >> 1 & 3, g + (t & 1), groups);
                    x_column = min(g + (t >> 1 & 1), groups - 1) * (GROUP * 4u) + (t & 1) * 16u;
                }
            };
            auto fetch_x = [&](int i) { x_raw = load4(reinterpret_cast<const u8*>(p.x), x_at[i] + x_column); };
            auto store_x = [&](int i) {
                float* to = reinterpret_cast<float*>(bytes + (place >> 16));
                to[0 * TOKENS + i * THREADS / 4] = x_raw.x;
                to[1 * TOKENS + i * THREADS / 4] = x_raw.y;
                to[2 * TOKENS + i * THREADS / 4] = x_raw.z;
                to[3 * TOKENS + i * THREADS / 4] = x_raw.w;
            };
            auto store_w = [&](int step, int i) {
                float* to = reinterpret_cast<float*>(bytes + (place & 0xffff));
                float w[8];
                source[i].octet(step & 3, w);
#pragma unroll
                for (int e = 0; e < 8; e++) to[e * ROWS + i * THREADS / 2] = w[e];
            };
            int step = work.begin;
            turn(step);
#pragma unroll
            for (int i = 0; i < X_LOADS; i++) {
                fetch_x(i);
                store_x(i);
            }
#pragma unroll
            for (int i = 0; i < W_LOADS; i++) {
                source[i].fetch(0);
                store_w(0, i);
            }
            x_column += 32;
            __syncthreads();
#pragma unroll 1
            do {
                place ^= FLIP;
                u32 w_read = reads & 0xffff, x_read = reads >> 16;
                step++;
                turn(step);
#pragma unroll
                for (int k = 0; k < STEP; k++) {
                    // the loads of the next step, one in flight at a time
                    constexpr int LOADS = X_LOADS + W_LOADS, EVERY = STEP / LOADS;
                    if (SIMPLE == 0 && k % EVERY == 0) {
                        const int i = k / EVERY;
                        if (i > 0 && i <= X_LOADS) store_x(i - 1);
                        if (i > X_LOADS && i < LOADS) store_w(step, i - 1 - X_LOADS);
                        if (i < X_LOADS) fetch_x(i);
                        else if (i < LOADS) source[i - X_LOADS].fetch(step & 3);
                    }
                    if (k == 8) w_read ^= 64;
                    if (k == 4 || k == 8 || k == 12) x_read ^= 32;
                    const u8* wp = bytes + w_read + k * ROWS * 4;
                    const u8* xp = bytes + x_read + k * TOKENS * 4;
                    float4 w0 = *reinterpret_cast<const float4*>(wp);
                    float4 w1 = *reinterpret_cast<const float4*>(wp + 128);
                    float4 x0 = *reinterpret_cast<const float4*>(xp + ((k & 8) ? 64 : 0));
                    float4 x1 = *reinterpret_cast<const float4*>(xp + ((k & 8) ? 0 : 64));
                    const float w[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
                    const float xs[8] = {x0.x, x0.y, x0.z, x0.w, x1.x, x1.y, x1.z, x1.w};
#pragma unroll
                    for (int i = 0; i < 8; i++)
#pragma unroll
                        for (int jj = 0; jj < 8; jj++) {
#if ORDER == 0
                            const int j = jj;
#elif ORDER == 1
                            const int j = (i & 1) ? 7 - jj : jj;
#elif ORDER == 2
                            const int j = jj ^ 2;
#elif ORDER == 3
                            const int j = (i & 1) ? 7 - (jj ^ 2) : jj ^ 2;
#elif ORDER == 4
                            const int j = jj ^ 1;
#elif ORDER == 5
                            const int j = (jj & 4) | ((jj + 1 + i) & 3);
#endif
                            acc[i][j] = fmaf(w[j], xs[i], acc[i][j]);
                        }
                }
                store_w(step, W_LOADS - 1);
                x_column += 32;
                __syncthreads();
                reads ^= FLIP;
            } while (step < work.end);

            // acc leaves by shared memory, each thread's own words of it, as single floats: vectors would bind the registers
            // of acc to the banks of w's.
            const int pairs = (groups + 1) / 2;
            const bool partial = work.end - work.begin < pairs * 4;
            float* own = shared + tid();
#pragma unroll 1
            for (int half = 0; half < 2; half++) {
                if (half == 0) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 8; j++) own[(i * 8 + j) * THREADS] = acc[i][j];
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int j = 0; j < 8; j++) own[(i * 8 + j) * THREADS] = acc[i + 4][j];
                }
                if (partial) {
                    float4* slot = reinterpret_cast<float4*>(p.partial) + work.slot * (ROWS * TOKENS / 4) + tid();
#pragma unroll 1
                    for (int e = 0; e < 8; e++)
                        __stcg(slot + (half * 8 + e) * THREADS,
                               make_float4(own[(e * 4) * THREADS], own[(e * 4 + 1) * THREADS], own[(e * 4 + 2) * THREADS], own[(e * 4 + 3) * THREADS]));
                } else {
#pragma unroll 1
                    for (int e = 0; e < 8; e++)
                        emit<ROWS, TOKENS>(p, work, half * 8 + e, make_float4(own[(e * 4) * THREADS], own[(e * 4 + 1) * THREADS], own[(e * 4 + 2) * THREADS], own[(e * 4 + 3) * THREADS]), 1.0f / Source<T>::UNIT);
                }
            }
            if (!partial) continue;
        }
        const int pairs = (p.columns / GROUP + 1) / 2;
        const int first = work.rest * pairs / work.share, last = ((work.rest + 1) * pairs - 1) / work.share;
        __threadfence();
        __syncthreads();
        if (tid() == 0) {
            arrived = atomicAdd(p.counters + work.rest, 1u);
            if (arrived == last - first) p.counters[work.rest] = 0;
        }
        __syncthreads();
        if (arrived != last - first) continue;
        __threadfence();
        const float4* slots = reinterpret_cast<const float4*>(p.partial) + tid();
#pragma unroll 1
        for (int e = 0; e < 16; e++) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int b = first; b <= last; b++) {
                float4 v = __ldcg(slots + (2 * b + (b * work.share < work.rest * pairs)) * (ROWS * TOKENS / 4) + e * THREADS);
                sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
            }
            emit<ROWS, TOKENS>(p, work, e, sum, 1.0f / Source<T>::UNIT);
        }
    }
}
