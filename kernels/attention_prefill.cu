// Attention of prompts: many tokens per sequence over its cached keys and values, causal.
//
// attention_prefill_<kv>_<head_dim>(Attention a)   kv: f16 q8 f32; head_dim: 32 64 80 96 128
//   grid: (tiles, kv_heads), block 128, no dynamic shared memory
//   a.tiles: for each sequence to be filled, ceil(length * group / 64) tiles, first = 0, 64, 128 ..., group = heads /
//     kv_heads. Put those with the longest context + first / group first: they take longest.
//   reads: q (turned), cache (with the step's own tokens: rope_append came before), sequences, tables, tiles, heads,
//     kv_heads, scale, out_permuted; writes: out, the rows of these sequences.
//
// A block has 64 rows, each a query of one head of the group, so that all heads share what is read of keys and values.
// 64 keys at a time: scores = rows · keys in slices of the head through shared memory, like any product; softmax in
// registers; probabilities into shared memory; sums += probabilities · values in slices of 8 keys. A thread has 8 rows
// of both, and 16 threads a row's 64 scores and all of its sums, so nothing else is exchanged. While one slice is worked
// on, the next is put into the other half of shared memory and the one after that is read.
#include "attention.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int ROWS = 64;
constexpr int KEYS = 64;
constexpr int VALUES = 8;  // keys of a slice of values

template <int N>
struct Vector;
template <>
struct Vector<1> { typedef float Type; };
template <>
struct Vector<2> { typedef float2 Type; };
template <>
struct Vector<4> { typedef float4 Type; };

template <int KV, int HEAD_DIM>
struct Prefill {
    static constexpr int EIGHTHS = HEAD_DIM / 8;
    static constexpr int SLICE_DIMS = 16;  // within one q8 group
    static constexpr int SLICES = HEAD_DIM / SLICE_DIMS;
    // What one thread reads of a slice of queries and of keys: half a row.
    static constexpr int QUARTS = SLICE_DIMS / 8;
    static constexpr int EACH = SLICE_DIMS / 16;
    // What one thread reads of a slice of values.
    static constexpr int PIECES = VALUES * EIGHTHS;
    static constexpr int TURNS = (PIECES + THREADS - 1) / THREADS;
    // A thread's columns of the sums: SPAN of them, WIDTH at a time.
    static constexpr int SPAN = HEAD_DIM / 16;
    static constexpr int WIDTH = SPAN % 4 == 0 ? 4 : SPAN % 2 == 0 ? 2 : 1;

    struct Slice {
        float queries[SLICE_DIMS][ROWS];
        float keys[SLICE_DIMS][KEYS];
    };
    struct Shared {
        union {
            Slice slices[2];
            float weights[KEYS][ROWS];  // probabilities; eights of rows swapped as `eight` says
        };
        float values[2][VALUES][HEAD_DIM];
        int last[ROWS];          // the last key that a row sees
        int out[ROWS];           // where its result goes; -1 past the last
        float largest[ROWS];     // its largest score so far
        float totals[8][THREADS];  // each thread's part of its rows' totals. Both are here to spare registers.
    };

    // What the thread has read of the next slice.
    struct Ahead {
        float4 query[QUARTS];
        Eight<KV, HEAD_DIM> key[EACH];
    };

    static __device__ __forceinline__ void read(
        const float* query, const u8* keys, int slot, bool valid, int slice, Ahead& ahead) {
        const int half = threadIdx.x / ROWS;
        const float4* q = reinterpret_cast<const float4*>(query + slice * SLICE_DIMS + half * (SLICE_DIMS / 2));
#pragma unroll
        for (int i = 0; i < QUARTS; i++) ahead.query[i] = __ldg(q + i);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int eighth = slice * (SLICE_DIMS / 8) + half * EACH + i;
            if (valid) ahead.key[i].load(keys, slot, eighth, slice * SLICE_DIMS / KV_GROUP);
            else ahead.key[i].clear();
        }
    }

    static __device__ __forceinline__ void put(const Ahead& ahead, Slice& to) {
        const int row = threadIdx.x % ROWS, first = threadIdx.x / ROWS * (SLICE_DIMS / 2);
#pragma unroll
        for (int i = 0; i < QUARTS; i++) {
            to.queries[first + 4 * i][row] = ahead.query[i].x;
            to.queries[first + 4 * i + 1][row] = ahead.query[i].y;
            to.queries[first + 4 * i + 2][row] = ahead.query[i].z;
            to.queries[first + 4 * i + 3][row] = ahead.query[i].w;
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float k[8];
            ahead.key[i].unpack(k);
#pragma unroll
            for (int j = 0; j < 8; j++) to.keys[first + 8 * i + j][row] = k[j];
        }
    }

    static __device__ __forceinline__ void read_values(
        const Attention& a, const u32* table, int kv_head, int first, int keys, Eight<KV, HEAD_DIM> (&ahead)[TURNS]) {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const int piece = threadIdx.x + i * THREADS;
            const int t = first + piece / EIGHTHS;
            if (piece < PIECES && t < keys) {
                const u8* half = a.cache + place_of(a, KV, HEAD_DIM, table[t / BLOCK_TOKENS], kv_head);
                half += half_bytes(KV, HEAD_DIM);
                ahead[i].load(half, t % BLOCK_TOKENS, piece % EIGHTHS, piece % EIGHTHS / 4);
            } else {
                ahead[i].clear();
            }
        }
    }

    static __device__ __forceinline__ void put_values(
        const Eight<KV, HEAD_DIM> (&ahead)[TURNS], float (&values)[VALUES][HEAD_DIM]) {
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const int piece = threadIdx.x + i * THREADS;
            float v[8];
            ahead[i].unpack(v);
            if (piece >= PIECES) break;
            float4* to = reinterpret_cast<float4*>(&values[0][0] + piece * 8);
            to[0] = make_float4(v[0], v[1], v[2], v[3]);
            to[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
    }

    // Where eight rows stand within a key's row of weights: so that a warp which writes four keys a thread does not
    // always meet the same banks.
    static __device__ __forceinline__ int eight(int rows, int key) { return (rows ^ (key / 4 % 8)) * 8; }

    // scores[i][j] += queries i · keys j, over the slice
    static __device__ __forceinline__ void score(
        const Slice& slice, int rows, int column, float (&scores)[8][4]) {
#pragma unroll 8
        for (int d = 0; d < SLICE_DIMS; d++) {
            const float4 a = *reinterpret_cast<const float4*>(&slice.queries[d][rows * 8]);
            const float4 b = *reinterpret_cast<const float4*>(&slice.queries[d][rows * 8 + 4]);
            const float4 k = *reinterpret_cast<const float4*>(&slice.keys[d][column * 4]);
            const float q[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                scores[i][0] = fmaf(q[i], k.x, scores[i][0]), scores[i][1] = fmaf(q[i], k.y, scores[i][1]);
                scores[i][2] = fmaf(q[i], k.z, scores[i][2]), scores[i][3] = fmaf(q[i], k.w, scores[i][3]);
            }
        }
    }

    // scores become exp2(score - largest so far); what there is of totals and sums shrinks accordingly.
    static __device__ __forceinline__ void soften(
        float factor, int rows, int column, float (&scores)[8][4], float (&sums)[8][SPAN], Shared& shared) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float most = fmaxf(fmaxf(scores[i][0], scores[i][1]), fmaxf(scores[i][2], scores[i][3]));
#pragma unroll
            for (int mask = 8; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
            const float before = shared.largest[rows * 8 + i];
            most = fmaxf(before, most * factor);
            const float shrink = exp2_fast(before - most);
            __syncwarp();
            if (column == 0) shared.largest[rows * 8 + i] = most;
#pragma unroll
            for (int j = 0; j < 4; j++) scores[i][j] = exp2_fast(fmaf(scores[i][j], factor, -most));
            float& total = shared.totals[i][threadIdx.x];
            total = fmaf(total, shrink, (scores[i][0] + scores[i][1]) + (scores[i][2] + scores[i][3]));
#pragma unroll
            for (int j = 0; j < SPAN; j++) sums[i][j] *= shrink;
        }
    }

    static __device__ __forceinline__ void put_weights(
        const float (&scores)[8][4], int rows, int column, Shared& shared) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int key = column * 4 + j;
            float4* to = reinterpret_cast<float4*>(&shared.weights[key][eight(rows, key)]);
            to[0] = make_float4(scores[0][j], scores[1][j], scores[2][j], scores[3][j]);
            to[1] = make_float4(scores[4][j], scores[5][j], scores[6][j], scores[7][j]);
        }
    }

    // sums += weights · values, over a slice of values whose first key is `first` of the 64
    static __device__ __forceinline__ void add_values(
        const Shared& shared, int first, int rows, int column, float (&sums)[8][SPAN]) {
        typedef typename Vector<WIDTH>::Type V;
#pragma unroll 8
        for (int t = 0; t < VALUES; t++) {
            const float4* p = reinterpret_cast<const float4*>(&shared.weights[first + t][eight(rows, first + t)]);
            const float4 a = p[0], b = p[1];
            const float w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            float v[SPAN];
#pragma unroll
            for (int j = 0; j < SPAN / WIDTH; j++) {
                *reinterpret_cast<V*>(v + j * WIDTH) =
                    *reinterpret_cast<const V*>(&shared.values[first / VALUES % 2][t][(j * 16 + column) * WIDTH]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
#pragma unroll
                for (int j = 0; j < SPAN; j++) sums[i][j] = fmaf(w[i], v[j], sums[i][j]);
            }
        }
    }

    static __device__ __forceinline__ void run(const Attention& a) {
        __shared__ __align__(16) Shared shared;
        const Tile tile = a.tiles[blockIdx.x];
        const Sequence s = a.sequences[tile.sequence];
        const int group = a.heads / a.kv_heads;
        const int count = min(ROWS, s.length * group - tile.first);
        const int kv_head = blockIdx.y;
        const u32* table = a.tables + s.table;
        if (count <= 0) return;

        // The row that this thread reads; past the end it repeats the last one, which is dropped in the end.
        const int row = tile.first + min((int)threadIdx.x % ROWS, count - 1);
        const int at = ((s.start + row / group) * a.heads + kv_head * group + row % group) * HEAD_DIM;
        const float* query = a.q + at;
        if (threadIdx.x < ROWS) {
            shared.last[threadIdx.x] = s.context + row / group;
            shared.out[threadIdx.x] = threadIdx.x < count ? at : -1;
        }
        // Keys that any row sees, and those that all do.
        const int keys = s.context + (tile.first + count - 1) / group + 1;
        const int common = s.context + tile.first / group + 1;

        const int rows = threadIdx.x / 16, column = threadIdx.x % 16;
        float sums[8][SPAN] = {};
        if (threadIdx.x < ROWS) shared.largest[threadIdx.x] = minus_infinity();
#pragma unroll
        for (int i = 0; i < 8; i++) shared.totals[i][threadIdx.x] = 0.0f;

        int t = threadIdx.x % KEYS;
        const u8* half = a.cache + place_of(a, KV, HEAD_DIM, t < keys ? table[t / BLOCK_TOKENS] : 0, kv_head);
        Ahead ahead;
        read(query, half, t % BLOCK_TOKENS, t < keys, 0, ahead);
#pragma unroll 1
        for (int first = 0; first < keys; first += KEYS) {
            float scores[8][4] = {};
            __syncthreads();
            put(ahead, shared.slices[0]);
            if (SLICES > 1) read(query, half, t % BLOCK_TOKENS, t < keys, 1, ahead);
            __syncthreads();
#pragma unroll 1
            for (int slice = 0; slice < SLICES; slice++) {
                if (slice + 1 < SLICES) put(ahead, shared.slices[(slice + 1) % 2]);
                if (slice + 2 < SLICES) read(query, half, t % BLOCK_TOKENS, t < keys, slice + 2, ahead);
                score(shared.slices[slice % 2], rows, column, scores);
                __syncthreads();
            }
            Eight<KV, HEAD_DIM> values[TURNS];
            read_values(a, table, kv_head, first, keys, values);
            if (first + KEYS > common) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const int last = shared.last[rows * 8 + i] - first - column * 4;
#pragma unroll
                    for (int j = 0; j < 4; j++) scores[i][j] = j <= last ? scores[i][j] : minus_infinity();
                }
            }
            soften(a.scale * LOG2_E, rows, column, scores, sums, shared);
            put_weights(scores, rows, column, shared);
            put_values(values, shared.values[0]);
            read_values(a, table, kv_head, first + VALUES, keys, values);
            t += KEYS;
            half = a.cache + place_of(a, KV, HEAD_DIM, t < keys ? table[t / BLOCK_TOKENS] : 0, kv_head);
            __syncthreads();
#pragma unroll 1
            for (int at = 0; at < KEYS; at += VALUES) {
                if (at > 0) __syncthreads();
                if (at + VALUES < KEYS) put_values(values, shared.values[(at / VALUES + 1) % 2]);
                if (at + 2 * VALUES < KEYS) read_values(a, table, kv_head, first + at + 2 * VALUES, keys, values);
                else if (at + VALUES == KEYS) read(query, half, t % BLOCK_TOKENS, t < keys, 0, ahead);
                add_values(shared, at, rows, column, sums);
            }
        }

        typedef typename Vector<WIDTH>::Type V;
        const int width = a.heads * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float all = shared.totals[i][threadIdx.x];
#pragma unroll
            for (int mask = 8; mask > 0; mask /= 2) all += __shfl_xor_sync(0xffffffffu, all, mask);
            const float inverse = 1.0f / all;
            const int to = shared.out[rows * 8 + i];
            if (to < 0) continue;
            const int start = to / width * width;
#pragma unroll
            for (int j = 0; j < SPAN; j += WIDTH) {
                float result[WIDTH];
#pragma unroll
                for (int v = 0; v < WIDTH; v++) result[v] = sums[i][j + v] * inverse;
                const int at = to - start + (j * 16 + column * WIDTH);
                float* out = a.out + start + (a.out_permuted ? permuted(at, width) : at);
                *reinterpret_cast<V*>(out) = *reinterpret_cast<const V*>(result);
            }
        }
    }
};

}  // namespace

#define PREFILL(NAME, KV, HEAD_DIM)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_prefill_##NAME##_##HEAD_DIM(const Attention a) { \
        Prefill<KV, HEAD_DIM>::run(a);                                                                                 \
    }
#define PREFILL_WIDTHS(NAME, KV) \
    PREFILL(NAME, KV, 32) PREFILL(NAME, KV, 64) PREFILL(NAME, KV, 80) PREFILL(NAME, KV, 96) PREFILL(NAME, KV, 128)

PREFILL_WIDTHS(f16, KV_F16)
PREFILL_WIDTHS(q8, KV_Q8)
PREFILL_WIDTHS(f32, KV_F32)
