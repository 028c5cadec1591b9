// Attention of one new token per sequence over its cached keys and values.
//
// attention_decode_<kv>_<head_dim>_<heads>(Attention a)   kv: f16 q8 f32; head_dim: 32 64 80 96 128; heads: 4 8
//   With group = heads / kv_heads, take heads = 4 for a group of at most 4, else 8, and tiles = ceil(group / heads).
//   grid: (splits, kv_heads * tiles, sequences that decode), block THREADS, no dynamic shared memory
//     THREADS: 256 for f16 and q8 with 4 heads and a head_dim that is a multiple of 32, else 128.
//     splits: any from 1 to 64; blocks that a sequence does not need exit at once, so a grid serves every context. As many
//     as are resident at once are best: for one sequence, and for several twice as many, since some end early.
//   a.partial: sequences * kv_heads * tiles * splits * heads * (head_dim + 2) floats (unused where splits is 1)
//   a.counters: sequences * kv_heads * tiles
//   reads: q, cache, sequences, members, tables, heads, kv_heads, least (64 is good), scale, fused, out_permuted;
//     if fused, also k, v, q_norm, k_norm, cos, sin, pairs, split_half, epsilon, and it stores the token's k and v;
//     else q is turned already, and rope_append has stored k and v.
//   writes: out, the rows of these sequences.
//
// A block takes one of a sequence's consecutive parts and one KV head, and reads keys and values once for all query heads
// of its tile. It goes through its part in chunks of 128 tokens: scores into shared memory, softmax, values; so every
// phase streams. The last block of a sequence and KV head to finish merges the parts, in their order.
#include "attention.cuh"

namespace {

constexpr int CHUNK = 128;
// Distance of two heads' scores; 8 mod 32, so that the four lanes of a token write to different banks.
constexpr int STRIDE = CHUNK + 8;
// Blocks looked up at a time.
constexpr int TABLE = 128;

// Blocks of 128 threads an SM must hold, which bounds the registers: with fewer, loads wait; with more, registers spill. F32
// and a head that is no multiple of 32 want more of them.
__host__ __device__ constexpr int resident(int kv, int head_dim, int heads) {
    return (heads == 4 ? 4 : 3) - (kv == KV_F32 || head_dim % 32 != 0);
}

// Where an SM holds four of them, two are one: half as many parts to merge.
__host__ __device__ constexpr int threads(int kv, int head_dim, int heads) {
    return resident(kv, head_dim, heads) == 4 ? 256 : 128;
}

template <int KV, int HEAD_DIM, int HEADS>
struct Decode {
    static constexpr int THREADS = threads(KV, HEAD_DIM, HEADS);
    static constexpr int WARPS = THREADS / 32;
    static constexpr int MOST_SPLITS = 64;
    static constexpr int EIGHTHS = HEAD_DIM / 8;
    // Scores: this many lanes share a key.
    static constexpr int LANES = EIGHTHS % 4 ? 2 : 4;
    static constexpr int PARTS = EIGHTHS / LANES;
    static constexpr int KEYS = WARPS * (32 / LANES);
    static constexpr int ROWS = LANES == 4 && KV != KV_F32 ? 2 : 1;
    // Values: a lane has eight columns, and this many groups of lanes have four tokens each.
    static constexpr int RUNS = THREADS / EIGHTHS;
    static constexpr int SCORES = HEADS * STRIDE;
    static constexpr int SUMS = 4 * RUNS * HEAD_DIM;
    static constexpr int SHARED = HEADS * HEAD_DIM + SCORES > SUMS ? HEADS * HEAD_DIM + SCORES : SUMS;

    struct Shared {
        float numbers[SHARED];  // queries [HEADS][HEAD_DIM] and scores [HEADS][STRIDE]; at last sums [4][RUNS][HEAD_DIM]
        u64 table[TABLE];       // where the KV head's keys of each block are in the cache, in bytes
        float factor[HEADS];    // by which older sums shrink
        float total[HEADS];     // Σ exp2(score - largest); here, with the largest, to spare registers
        float largest[HEADS];
        // What is needed again later.
        Sequence sequence;
        int kv_head, head, heads, splits;
        u32 last;
    };

    // Queries of the group, turned and scaled; where the newest token is in the block's part, it is stored. One warp
    // takes a head at a time: queries, the key, the value.
    static __device__ __forceinline__ void prepare(
        const Attention& a, const Sequence& s, int kv_head, int first, int heads, bool newest, Shared& shared) {
        static_assert(SCORES >= 2 * HEAD_DIM, "the newest key and value fit where scores come later");
        const int items = a.fused && newest ? HEADS + 2 : HEADS;
#pragma unroll 1
        for (int h = threadIdx.x / 32; h < items; h += WARPS) {
            float* head = shared.numbers + h * HEAD_DIM;
            const int row = s.start * a.kv_heads + kv_head;
            const float* x = h == HEADS ? a.k + row * HEAD_DIM : a.v + row * HEAD_DIM;
            const float* norm = a.k_norm;
            int pairs = a.fused && h <= HEADS ? a.pairs : 0;
            if (h < HEADS) {
                // Heads past the group repeat its last, and are dropped in the end.
                x = a.q + (row * (a.heads / a.kv_heads) + first + min(h, heads - 1)) * HEAD_DIM;
                norm = a.q_norm;
            }
            if (pairs == 0) norm = nullptr;
            const float factor = h < HEADS ? a.scale * LOG2_E : 1.0f;
            turn_head<(HEAD_DIM + 63) / 64>(a, HEAD_DIM, x, norm, s.start, pairs, factor, head);
            if (h < HEADS) continue;
            const u32 block = a.tables[s.table + s.context / BLOCK_TOKENS];
            u8* half = a.cache + place_of(a, KV, HEAD_DIM, block, kv_head);
            if (h > HEADS) half += half_bytes(KV, HEAD_DIM);
            store_token<KV>(half, s.context % BLOCK_TOKENS, HEAD_DIM, head);
        }
    }

    // Keys as stored, ROWS of them a lane: the chunk's `first` and following.
    struct Keys {
        Eight<KV, HEAD_DIM> raw[ROWS][PARTS];

        // Reads the keys from `from` on, which is past all of them or 0.
        __device__ __forceinline__ void load(const Attention& a, const u64* table, int first, int count, int from) {
            const int part = threadIdx.x % LANES, key = threadIdx.x / LANES;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int t = first + r * KEYS + key;
                if (t < from) continue;
                const u8* keys = a.cache + table[t < count ? t / BLOCK_TOKENS : 0];
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    if (t < count) raw[r][p].load(keys, t % BLOCK_TOKENS, p * LANES + part, p * LANES / 4);
                    else raw[r][p].clear();
                }
            }
        }
    };

    // scores[h][t] = query h · key t, for the chunk's `count` tokens. `keys` has its first ones.
    static __device__ __forceinline__ void score(
        const Attention& a, const u64* table, int count, Keys& keys, Shared& shared) {
        const int lane = threadIdx.x & 31;
        const int part = threadIdx.x % LANES, key = threadIdx.x / LANES;
        const float4* queries = reinterpret_cast<const float4*>(shared.numbers);
        float* scores = shared.numbers + HEADS * HEAD_DIM;
#pragma unroll 1
        for (int first = 0; first < count; first += KEYS * ROWS) {
            float sums[ROWS][HEADS] = {};
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                float k[ROWS][8];
#pragma unroll
                for (int r = 0; r < ROWS; r++) keys.raw[r][p].unpack(k[r]);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float4 x = queries[(h * EIGHTHS + p * LANES + part) * 2];
                    const float4 y = queries[(h * EIGHTHS + p * LANES + part) * 2 + 1];
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        float sum = sums[r][h];
                        sum = fmaf(x.x, k[r][0], sum), sum = fmaf(x.y, k[r][1], sum);
                        sum = fmaf(x.z, k[r][2], sum), sum = fmaf(x.w, k[r][3], sum);
                        sum = fmaf(y.x, k[r][4], sum), sum = fmaf(y.y, k[r][5], sum);
                        sum = fmaf(y.z, k[r][6], sum), sum = fmaf(y.w, k[r][7], sum);
                        sums[r][h] = sum;
                    }
                }
            }
            // Adds over the key's lanes and deals the heads out to them.
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                int width = HEADS;
#pragma unroll
                for (int mask = LANES / 2; mask > 0; mask /= 2) {
                    width /= 2;
                    const bool upper = lane & mask;
#pragma unroll
                    for (int h = 0; h < width; h++) {
                        const float give = upper ? sums[r][h] : sums[r][h + width];
                        const float keep = upper ? sums[r][h + width] : sums[r][h];
                        sums[r][h] = keep + __shfl_xor_sync(0xffffffffu, give, mask);
                    }
                }
                const int t = first + r * KEYS + key;
#pragma unroll
                for (int h = 0; h < HEADS / LANES; h++) {
                    if (t < count) scores[(part * (HEADS / LANES) + h) * STRIDE + t] = sums[r][h];
                }
            }
            if (first + KEYS * ROWS < count) keys.load(a, table, first + KEYS * ROWS, count, 0);
        }
    }

    // scores become exp2(score - largest so far), zero past `count`; factor[h] is what older sums shrink by.
    static __device__ __forceinline__ void soften(int count, Shared& shared) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll
        for (int h = warp; h < HEADS; h += WARPS) {
            float4* row = reinterpret_cast<float4*>(shared.numbers + HEADS * HEAD_DIM + h * STRIDE) + lane;
            float4 x = *row;
            const int t = lane * 4;
            if (t >= count) x.x = minus_infinity();
            if (t + 1 >= count) x.y = minus_infinity();
            if (t + 2 >= count) x.z = minus_infinity();
            if (t + 3 >= count) x.w = minus_infinity();
            const float before = shared.largest[h];
            const float most = fmaxf(before, warp_max(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w))));
            const float factor = exp2_fast(before - most);
            x.x = exp2_fast(x.x - most), x.y = exp2_fast(x.y - most);
            x.z = exp2_fast(x.z - most), x.w = exp2_fast(x.w - most);
            *row = x;
            const float sum = warp_sum((x.x + x.y) + (x.z + x.w));
            __syncwarp();  // all lanes have read the largest so far
            if (lane == 0) {
                shared.factor[h] = factor;
                shared.total[h] = shared.total[h] * factor + sum;
                shared.largest[h] = most;
            }
        }
    }

    // Four tokens' values as stored, from t on.
    struct Values {
        Eight<KV, HEAD_DIM> raw[4];

        __device__ __forceinline__ void load(const Attention& a, const u64* table, int t, int count) {
            const int eighth = threadIdx.x % EIGHTHS;
            const u8* values = a.cache + table[t < count ? t / BLOCK_TOKENS : 0] + half_bytes(KV, HEAD_DIM);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (t + i < count) raw[i].load(values, t % BLOCK_TOKENS + i, eighth, eighth / 4);
                else raw[i].clear();
            }
        }
    };

    // sums[h][·] += Σ_t scores[h][t] · value t. `values` has the first of the thread's run.
    static __device__ __forceinline__ void add_values(const Attention& a, const u64* table, int count, Values& values,
        float (&sums)[HEADS][8], const Shared& shared) {
        const int run = threadIdx.x / EIGHTHS;
        const float* scores = shared.numbers + HEADS * HEAD_DIM;
        if (run >= RUNS) return;
#pragma unroll 1
        for (int t = run * 4; t < count; t += RUNS * 4) {
            if (t > run * 4) values.load(a, table, t, count);
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float v[2][8];
                values.raw[i].unpack(v[0]), values.raw[i + 1].unpack(v[1]);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float2 p = *reinterpret_cast<const float2*>(scores + h * STRIDE + t + i);
#pragma unroll
                    for (int j = 0; j < 8; j++) sums[h][j] = fmaf(p.y, v[1][j], fmaf(p.x, v[0][j], sums[h][j]));
                }
            }
        }
    }

    // Adds the sums of all runs, four heads at a time, and hands each to `put(head, column, sum)`.
    template <typename Put>
    static __device__ __forceinline__ void gather(const float (&sums)[HEADS][8], Shared& shared, Put put) {
        const int eighth = threadIdx.x % EIGHTHS, run = threadIdx.x / EIGHTHS;
#pragma unroll
        for (int h = 0; h < HEADS; h += 4) {
            __syncthreads();
            if (run < RUNS) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float4* to = reinterpret_cast<float4*>(shared.numbers + (i * RUNS + run) * HEAD_DIM + eighth * 8);
                    to[0] = make_float4(sums[h + i][0], sums[h + i][1], sums[h + i][2], sums[h + i][3]);
                    to[1] = make_float4(sums[h + i][4], sums[h + i][5], sums[h + i][6], sums[h + i][7]);
                }
            }
            __syncthreads();
            for (int o = threadIdx.x; o < 4 * HEAD_DIM; o += THREADS) {
                const int i = o / HEAD_DIM, d = o % HEAD_DIM;
                float sum = 0.0f;
#pragma unroll
                for (int r = 0; r < RUNS; r++) sum += shared.numbers[(i * RUNS + r) * HEAD_DIM + d];
                put(h + i, d, sum);
            }
        }
    }

    static __device__ __forceinline__ void write(
        const Attention& a, const Sequence& s, int head, int column, float number) {
        const int width = a.heads * HEAD_DIM;
        const int at = head * HEAD_DIM + column;
        a.out[s.start * width + (a.out_permuted ? permuted(at, width) : at)] = number;
    }

    // The last block adds the parts of all `splits`: sums [HEADS][HEAD_DIM], totals and largest scores [HEADS] each.
    static __device__ __forceinline__ void merge(
        const Attention& a, const Sequence& s, const float* parts, int splits, int head, int heads, Shared& shared) {
        constexpr int PART = HEADS * (HEAD_DIM + 2);
        // A thread adds four columns of every GROUPS-th part.
        constexpr int FOURS = HEADS * HEAD_DIM / 4;
        constexpr int GROUPS = THREADS > FOURS ? THREADS / FOURS : 1;
        constexpr int ROUNDS = (FOURS + THREADS - 1) / THREADS;
        constexpr int MANY = 16;
        const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
        const int group = GROUPS == 1 ? 0 : threadIdx.x / FOURS;
        const int four = GROUPS == 1 ? threadIdx.x : threadIdx.x % FOURS;
        float* weights = shared.numbers;  // [HEADS][MOST_SPLITS]
        float4* sums = reinterpret_cast<float4*>(shared.numbers + HEADS * MOST_SPLITS);  // [GROUPS][FOURS]
        static_assert(HEADS * MOST_SPLITS + GROUPS * FOURS * 4 <= SHARED, "weights and sums fit into the shared numbers");
        // The first parts are on their way while their weights are made.
        float4 first[MANY];
        auto load = [&](int from, int at) {
#pragma unroll
            for (int j = 0; j < MANY; j++) {
                const int i = from + j * GROUPS;
                if (i < splits) first[j] = __ldcg(reinterpret_cast<const float4*>(parts + i * PART) + at);
            }
        };
        if (group < GROUPS && four < FOURS) load(group, four);
        for (int h = warp; h < heads; h += WARPS) {
            const float* of_head = parts + HEADS * HEAD_DIM + h;
            float totals[MOST_SPLITS / 32], largest[MOST_SPLITS / 32], most = minus_infinity(), total = 0.0f;
#pragma unroll
            for (int j = 0; j < MOST_SPLITS / 32; j++) {
                const int i = j * 32 + lane;
                totals[j] = 0.0f, largest[j] = minus_infinity();
                if (i < splits) totals[j] = __ldcg(of_head + i * PART), largest[j] = __ldcg(of_head + i * PART + HEADS);
                most = fmaxf(most, largest[j]);
            }
            most = warp_max(most);
#pragma unroll
            for (int j = 0; j < MOST_SPLITS / 32; j++) {
                const float weight = exp2_fast(largest[j] - most);
                weights[h * MOST_SPLITS + j * 32 + lane] = weight;
                total = fmaf(weight, totals[j], total);
            }
            total = warp_sum(total);
            if (lane == 0) shared.total[h] = total;
        }
        __syncthreads();
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            const int at = round * THREADS + four;
            const int h = at / (HEAD_DIM / 4);
            float4 sum = make_float4(0, 0, 0, 0);
            if (group < GROUPS && at < FOURS && h < heads) {
                for (int from = group; from < splits; from += MANY * GROUPS) {
                    if (round > 0 || from > group) load(from, at);
#pragma unroll
                    for (int j = 0; j < MANY; j++) {
                        const int i = from + j * GROUPS;
                        if (i >= splits) break;
                        const float weight = weights[h * MOST_SPLITS + i];
                        sum.x = fmaf(weight, first[j].x, sum.x), sum.y = fmaf(weight, first[j].y, sum.y);
                        sum.z = fmaf(weight, first[j].z, sum.z), sum.w = fmaf(weight, first[j].w, sum.w);
                    }
                }
            }
            if (GROUPS > 1) {
                if (group < GROUPS) sums[group * FOURS + four] = sum;
                __syncthreads();
                if (group > 0) return;
#pragma unroll
                for (int g = 1; g < GROUPS; g++) {
                    const float4 other = sums[g * FOURS + four];
                    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                }
            }
            if (at >= FOURS || h >= heads) continue;
            const float inverse = 1.0f / shared.total[h];
            const int d = at % (HEAD_DIM / 4) * 4;
            write(a, s, head + h, d, sum.x * inverse), write(a, s, head + h, d + 1, sum.y * inverse);
            write(a, s, head + h, d + 2, sum.z * inverse), write(a, s, head + h, d + 3, sum.w * inverse);
        }
    }

    // Where the blocks are from token `at` on, as many as the table holds.
    static __device__ __forceinline__ void look_up(
        const Attention& a, const Sequence& s, int kv_head, int at, int end, Shared& shared) {
        if (threadIdx.x < min((end - at + BLOCK_TOKENS - 1) / BLOCK_TOKENS, TABLE)) {
            const u32 block = a.tables[s.table + at / BLOCK_TOKENS + threadIdx.x];
            shared.table[threadIdx.x] = place_of(a, KV, HEAD_DIM, block, kv_head);
        }
    }

    static __device__ __forceinline__ void run(const Attention& a) {
        __shared__ __align__(16) Shared shared;
        const Sequence s = a.sequences[a.members ? a.members[blockIdx.z] : blockIdx.z];
        if (s.length == 0) return;
        const int tokens = s.context + 1;
        const int blocks = (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
        // How many parts there are, which the grid does not know, and the blocks of each; the first `more` have one more.
        const int least = a.least / BLOCK_TOKENS;
        const int splits = min(min((int)gridDim.x, MOST_SPLITS), (blocks + least - 1) / least);
        if (blockIdx.x >= splits) return;
        const int each = blocks / splits, more = blocks - splits * each;

        const int group = a.heads / a.kv_heads;
        const int tiles = (group + HEADS - 1) / HEADS;
        const int kv_head = blockIdx.y / tiles;
        const int first = blockIdx.y % tiles * HEADS;
        const int heads = min(HEADS, group - first);
        const int part = blockIdx.x;
        const int begin = (part * each + min(part, more)) * BLOCK_TOKENS;
        const int end = min(tokens, begin + (part < more ? each + 1 : each) * BLOCK_TOKENS);
        if (threadIdx.x < HEADS) shared.largest[threadIdx.x] = minus_infinity(), shared.total[threadIdx.x] = 0.0f;
        if (threadIdx.x == 0) {
            shared.sequence = s, shared.splits = splits;
            shared.kv_head = kv_head, shared.head = kv_head * group + first, shared.heads = heads;
        }
        look_up(a, s, kv_head, begin, end, shared);
        __syncthreads();
        Keys keys;
        keys.load(a, shared.table, 0, min(CHUNK, end - begin), 0);
        prepare(a, s, kv_head, first, heads, end == tokens, shared);
        float sums[HEADS][8] = {};
        for (int at = begin; at < end; at += CHUNK) {
            const int count = min(CHUNK, end - at);
            const u64* table = shared.table + (at - begin) / BLOCK_TOKENS % TABLE;
            // After this the queries and the newest token are there, and the last chunk's scores are done with.
            __syncthreads();
            if (at == begin && end == tokens && a.fused) keys.load(a, table, 0, count, count - 1);
            score(a, table, count, keys, shared);
            // These are on their way while the softmax is taken.
            Values values;
            values.load(a, table, threadIdx.x / EIGHTHS * 4, count);
            __syncthreads();
            soften(count, shared);
            __syncthreads();
            if (at > begin) {
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float factor = shared.factor[h];
#pragma unroll
                    for (int j = 0; j < 8; j++) sums[h][j] *= factor;
                }
            }
            add_values(a, table, count, values, sums, shared);
            const int next = at + CHUNK;
            if (next >= end) break;
            if ((next - begin) / BLOCK_TOKENS % TABLE == 0) {
                __syncthreads();
                look_up(a, shared.sequence, shared.kv_head, next, end, shared);
                __syncthreads();
            }
            keys.load(a, shared.table + (next - begin) / BLOCK_TOKENS % TABLE, 0, min(CHUNK, end - next), 0);
        }
        finish(a, sums, shared);
    }

    // Out of a sequence that was not split; else the part into the workspace, and the merge where it is the last.
    static __device__ __forceinline__ void finish(const Attention& a, const float (&sums)[HEADS][8], Shared& shared) {
        constexpr int PART = HEADS * (HEAD_DIM + 2);
        const Sequence s = shared.sequence;
        const int splits = shared.splits, head = shared.head, heads = shared.heads;
        const int row = blockIdx.z * gridDim.y + blockIdx.y;
        float* parts = a.partial + (u64)row * gridDim.x * PART;
        float* part = parts + blockIdx.x * PART;
        if (splits > 1 && threadIdx.x < HEADS) {
            part[HEADS * HEAD_DIM + threadIdx.x] = shared.total[threadIdx.x];
            part[HEADS * HEAD_DIM + HEADS + threadIdx.x] = shared.largest[threadIdx.x];
        }
        gather(sums, shared, [&](int h, int d, float sum) {
            if (splits > 1) part[h * HEAD_DIM + d] = sum;
            else if (h < heads) write(a, s, head + h, d, sum / shared.total[h]);
        });
        if (splits == 1) return;
        __syncthreads();
        if (threadIdx.x == 0) {
            // One thread's fences order what the barriers put before and after them.
            __threadfence();
            shared.last = atomicInc(a.counters + row, splits - 1) == splits - 1;
            __threadfence();
        }
        __syncthreads();
        if (!shared.last) return;
        merge(a, s, parts, splits, head, heads, shared);
    }
};

}  // namespace

#define DECODE(NAME, KV, HEAD_DIM, HEADS)                                                                    \
    extern "C" __global__ void __launch_bounds__(                                                            \
        threads(KV, HEAD_DIM, HEADS), resident(KV, HEAD_DIM, HEADS) * 128 / threads(KV, HEAD_DIM, HEADS))    \
        attention_decode_##NAME##_##HEAD_DIM##_##HEADS(const Attention a) {                                  \
        Decode<KV, HEAD_DIM, HEADS>::run(a);                                                                 \
    }
#define DECODE_HEADS(NAME, KV, HEAD_DIM) DECODE(NAME, KV, HEAD_DIM, 4) DECODE(NAME, KV, HEAD_DIM, 8)
#define DECODE_WIDTHS(NAME, KV) \
    DECODE_HEADS(NAME, KV, 32)  \
    DECODE_HEADS(NAME, KV, 64)  \
    DECODE_HEADS(NAME, KV, 80)  \
    DECODE_HEADS(NAME, KV, 96)  \
    DECODE_HEADS(NAME, KV, 128)

DECODE_WIDTHS(f16, KV_F16)
DECODE_WIDTHS(q8, KV_Q8)
DECODE_WIDTHS(f32, KV_F32)
