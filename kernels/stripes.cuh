// Products of repacked weights and a few columns of activations: the body of small.cu and skinny.cu.
//
// A block owns stripes: ROWS rows of a matrix, all tokens. A thread holds 4 rows × up to 16 tokens of sums in registers and
// walks K, so every weight is read once, unpacked once (scale and minimum folded in) and used for all of a thread's tokens.
// The lanes of a warp are 8 along K (a lane takes a group of 32 columns) by 4 along rows (a lane takes a row tile), so the
// lanes of different rows read the same activations from shared memory: a broadcast, a quarter of the traffic that 32
// lanes along K would cause. Eight lanes along K also keep the final reduction short.
//
// Work is cut into units: a chunk of 256 columns of a stripe. Blocks take equal, contiguous runs of units whatever stripe they
// begin or end in. A block that has only some chunks of a stripe leaves its sums in `partial`; the last one to come adds
// them up, in the order of the blocks, so a result depends on the size of the grid but never on timing.
#pragma once

#include "common.cuh"
#include "quant.cuh"

constexpr int K_LANES = 8;
constexpr int ROW_LANES = 32 / K_LANES;
constexpr int CHUNK = K_LANES * GROUP;
// Activations are staged by half groups: 4 quads of 8 lanes. A quad's stride of 10 float4 keeps stores of natural order
// free of bank conflicts.
constexpr int HALF_QUADS = 4;
constexpr int QUAD_STRIDE = K_LANES + 2;
constexpr int HALF_STRIDE = HALF_QUADS * QUAD_STRIDE;

// An element of one of the arrays of Product; indexing by a variable would copy the arguments to local memory.
template <class V>
__device__ __forceinline__ V pick(const V (&of)[3], int matrix) {
    return matrix == 0 ? of[0] : matrix == 1 ? of[1] : of[2];
}

// WARPS, TOKENS: of the block. SPLIT: warps that share rows and split the tokens. PERMUTED: order of x.
template <int TYPE, int WARPS, int TOKENS, int SPLIT, bool PERMUTED>
struct Stripes {
    static constexpr int THREADS = WARPS * 32;
    static constexpr int OWN = TOKENS / SPLIT;  // tokens of a thread
    static constexpr int ROWS = WARPS / SPLIT * ROW_LANES * TILE_ROWS;
    static constexpr int STAGED = (TOKENS + WARPS - 1) / WARPS;  // float4 that a thread stages of half a chunk
    static constexpr int LOADS = Reader<TYPE>::LOADS;            // parts in which the weights of a chunk come
    static constexpr int BUFFERS = OWN > 8 ? 1 : (LOADS > 2 ? 2 : LOADS);
    static constexpr int SLOT = TOKENS * ROWS + TOKENS;  // floats of a partial result: sums, sums of squares

    union Shared {
        float4 x[2][TOKENS][HALF_STRIDE];
        struct {
            float tile[TOKENS][ROWS];
            float squares[TOKENS];
            bool last;
        } result;
    };

    const Product& p;
    Shared& shared;
    float squares[STAGED];
    float sum[OWN][TILE_ROWS];
    Reader<TYPE> weights[BUFFERS];

    __device__ __forceinline__ Stripes(const Product& p, Shared& shared) : p(p), shared(shared) {}

    static __device__ __forceinline__ int lane() { return threadIdx.x & 31; }
    static __device__ __forceinline__ int warp() { return threadIdx.x >> 5; }
    // Lanes 0 and 1, and 0 and 16, share k_lane: the pairing which a 128-bit shared load serves in half the passes.
    static __device__ __forceinline__ int k_lane() { return lane() >> 1 & 7; }
    static __device__ __forceinline__ int row_lane() { return (lane() & 1) | lane() >> 4 << 1; }
    // A thread's first row within the stripe.
    static __device__ __forceinline__ int own_row() { return (warp() / SPLIT * ROW_LANES + row_lane()) * TILE_ROWS; }

    // The geometry of rows.
    __device__ __forceinline__ int full_slices() const { return p.columns / SLICE; }
    __device__ __forceinline__ int tail_groups() const { return p.columns % SLICE / GROUP; }
    __device__ __forceinline__ int chunks() const {
        return full_slices() * (SLICE / CHUNK) + (tail_groups() + K_LANES - 1) / K_LANES;
    }
    __device__ __forceinline__ int groups_of(int chunk) const {
        return chunk / (SLICE / CHUNK) < full_slices() ? SLICE / GROUP : tail_groups();
    }

    // The geometry of stripes. Of a gated pair, half of a stripe is the gate's and half the same rows of up.
    __device__ __forceinline__ int stripe_rows() const { return p.mode == GATED ? ROWS / 2 : ROWS; }
    __device__ __forceinline__ int stripes_of(int m) const { return (pick(p.rows, m) + stripe_rows() - 1) / stripe_rows(); }
    __device__ __forceinline__ int stripes() const {
        int n = stripes_of(0);
        if (p.mode != GATED)
            for (int m = 1; m < p.matrices; m++) n += stripes_of(m);
        return n;
    }
    // The matrix of a stripe; leaves in `row` its first row.
    __device__ __forceinline__ int locate(int stripe, int& row) const {
        int m = 0;
        if (p.mode != GATED)
            while (m + 1 < p.matrices && stripe >= stripes_of(m)) stripe -= stripes_of(m++);
        row = stripe * stripe_rows();
        return m;
    }
    // This thread's row tile of a stripe; past the end of the matrix its last one, whose results are dropped.
    __device__ __forceinline__ const u8* tile_of(int stripe) const {
        int row, m = locate(stripe, row), own = own_row();
        if (p.mode == GATED && own >= ROWS / 2) {
            m = 1;
            own -= ROWS / 2;
        }
        u32 tile = min(row + own, pick(p.rows, m) - 1) / TILE_ROWS;
        return pick(p.weight, m) + tile * Layout<TYPE>::row_tile_bytes(p.columns);
    }

    // Loads a part of a chunk's weights. Lanes past the end of a row take its last group: their activations are zeros.
    __device__ __forceinline__ void load(const u8* tile, int chunk, int part) {
        int groups = groups_of(chunk), group = min(chunk % 4 * K_LANES + k_lane(), groups - 1);
        weights[part % BUFFERS].load(tile + chunk / 4 * Layout<TYPE>::slice_bytes(), groups, group, part);
    }

    // A float4 of half a chunk of x and its way through registers into shared memory. A warp stages whole tokens, lanes
    // in the order of memory.
    struct Staging {
        float4 x, norm;
    };
    __device__ __forceinline__ Staging fetch(int i, int chunk, int half, bool wanted) const {
        Staging s;
        int quad = PERMUTED ? lane() / 8 : lane() % 4, group = chunk % 4 * K_LANES + (PERMUTED ? lane() % 8 : lane() / 4);
        int groups = groups_of(chunk), token = i * WARPS + warp();
        int at = chunk / 4 * SLICE + (PERMUTED ? ((half * HALF_QUADS + quad) * groups + group) * 4
                                               : group * GROUP + (half * HALF_QUADS + quad) * 4);
        wanted = wanted && token < p.tokens && group < groups;
        s.x = s.norm = make_float4(0, 0, 0, 0);
        if (wanted) s.x = *(const float4*)(p.x + token * p.columns + at);
        if (PERMUTED && wanted && p.norm) s.norm = *(const float4*)(p.norm + at);
        return s;
    }
    __device__ __forceinline__ void stage(int i, int half, Staging s) {
        int quad = PERMUTED ? lane() / 8 : lane() % 4, group = PERMUTED ? lane() % 8 : lane() / 4;
        int token = i * WARPS + warp();
        if (PERMUTED && p.norm) {
            squares[i] += s.x.x * s.x.x + s.x.y * s.x.y + s.x.z * s.x.z + s.x.w * s.x.w;
            s.x.x *= s.norm.x, s.x.y *= s.norm.y, s.x.z *= s.norm.z, s.x.w *= s.norm.w;
        }
        if (TOKENS % WARPS == 0 || token < TOKENS) shared.x[half][token][quad * QUAD_STRIDE + group] = s.x;
    }

    // Half a chunk: 16 columns of 4 rows, all tokens of the thread; meanwhile the next half of x is staged. As soon as
    // a part's last weights are unpacked its registers take the part that comes BUFFERS later.
    __device__ __forceinline__ void half_chunk(const u8* tile, int chunk, int half, int last) {
        const float4* x = &shared.x[half][warp() % SPLIT * OWN][k_lane()];
        int next = min(chunk + 1, last - 1);
        Staging staging;
#pragma unroll
        for (int quad = 0; quad < HALF_QUADS; quad++) {
            // STAGED pieces, spread over the quads.
            constexpr int SPAN = STAGED >= HALF_QUADS ? 1 : HALF_QUADS / STAGED;
            if (quad % SPAN == 0 && quad / SPAN < STAGED)
                staging = fetch(quad / SPAN, half ? next : chunk, half ^ 1, !half || chunk + 1 < last);
            float w[TILE_ROWS][4];
            int part = LOADS == 1 ? 0 : LOADS == 2 ? half : half * 2 + quad / 2;
            int buffer = BUFFERS == 1 ? 0 : part % BUFFERS;
            weights[buffer].quad(half, quad, w);
            if (LOADS == 1 ? half == 1 && quad == 3 : LOADS == 2 ? quad == 3 : quad % 2 == 1) {
                int later = part + BUFFERS;
                load(tile, later < LOADS ? chunk : next, later % LOADS);
            }
#pragma unroll
            for (int t = 0; t < OWN; t++) {
                float4 v = x[t * HALF_STRIDE + quad * QUAD_STRIDE];
#pragma unroll
                for (int r = 0; r < TILE_ROWS; r++) sum[t][r] = fmaf(w[r][0], v.x, sum[t][r]);
#pragma unroll
                for (int r = 0; r < TILE_ROWS; r++) sum[t][r] = fmaf(w[r][1], v.y, sum[t][r]);
#pragma unroll
                for (int r = 0; r < TILE_ROWS; r++) sum[t][r] = fmaf(w[r][2], v.z, sum[t][r]);
#pragma unroll
                for (int r = 0; r < TILE_ROWS; r++) sum[t][r] = fmaf(w[r][3], v.w, sum[t][r]);
            }
            if (quad % SPAN == SPAN - 1 && quad / SPAN < STAGED) stage(quad / SPAN, half ^ 1, staging);
        }
        static_assert(STAGED == 1 || STAGED == 2 || STAGED == 4, "pieces of x must divide the quads");
        __syncthreads();
    }

    // The sums of chunks first..last of a stripe.
    __device__ __forceinline__ void accumulate(int stripe, int first, int last) {
#pragma unroll
        for (int t = 0; t < OWN; t++)
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) sum[t][r] = 0;
#pragma unroll
        for (int i = 0; i < STAGED; i++) squares[i] = 0;
        const u8* tile = tile_of(stripe);
#pragma unroll
        for (int part = 0; part < BUFFERS; part++) load(tile, first, part);
#pragma unroll
        for (int i = 0; i < STAGED; i++) stage(i, 0, fetch(i, first, 0, true));
        __syncthreads();
        for (int chunk = first; chunk < last; chunk++)
#pragma unroll(OWN > 8 ? 1 : 2)
            for (int half = 0; half < 2; half++) half_chunk(tile, chunk, half, last);
    }

    __device__ __forceinline__ void run() {
        u32 units = stripes() * chunks();
        u32 blocks = min(gridDim.x, units);
        if (blockIdx.x >= blocks) return;
        u32 unit = blockIdx.x * units / blocks, end = (blockIdx.x + 1) * units / blocks;
        while (unit < end) {
            u32 stripe = unit / chunks(), first = unit % chunks(), last = min(first + end - unit, (u32)chunks());
            accumulate(stripe, first, last);
            finish(stripe, first, last, units, blocks);
            unit += last - first;
        }
    }

    // Sums over the 8 lanes along K, each stage halving what a lane holds; then a lane has OWN / 2 neighbours of the
    // thread's [token][row]. Leaves the stripe in shared memory.
    __device__ __forceinline__ void collect() {
        constexpr int COUNT = OWN * TILE_ROWS;
        float* v = &sum[0][0];
#pragma unroll
        for (int stage = 0; stage < 3; stage++) {
            int count = COUNT >> stage, bit = 4 >> stage;
            bool upper = k_lane() & bit;
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) {
                if (i >= count / 2) break;
                float keep = upper ? v[i + count / 2] : v[i], send = upper ? v[i] : v[i + count / 2];
                v[i] = keep + __shfl_xor_sync(0xffffffffu, send, bit * 2);
            }
        }
#pragma unroll
        for (int i = 0; i < COUNT / 8; i++) {
            int at = k_lane() * (COUNT / 8) + i;
            shared.result.tile[warp() % SPLIT * OWN + at / 4][own_row() + at % 4] = v[i];
        }
        if (PERMUTED && p.norm)
#pragma unroll
            for (int i = 0; i < STAGED; i++) {
                float total = warp_sum(squares[i]);
                int token = i * WARPS + warp();
                if (token < TOKENS && lane() == 0) shared.result.squares[token] = total;
            }
        __syncthreads();
    }

    // The block that has a unit: the inverse of the cut in run().
    static __device__ __forceinline__ u32 block_of(u32 unit, u32 units, u32 blocks) {
        return ((unit + 1) * blocks - 1) / units;
    }

    // Chunks first..last of a stripe are summed: if that is all of them, the result is ready; else it is once every block
    // that had a share has left it in `partial`.
    __device__ __forceinline__ void finish(u32 stripe, u32 first, u32 last, u32 units, u32 blocks) {
        collect();
        if ((first == 0 && last == chunks()) || merge(stripe, first, units, blocks)) emit(stripe);
        __syncthreads();
    }

    // Leaves this block's share; the last to do so gets the sum of all, in the order of the blocks, and true.
    __device__ __forceinline__ bool merge(u32 stripe, u32 first, u32 units, u32 blocks) {
        float* tile = &shared.result.tile[0][0];
        float* mine = p.partial + (2 * blockIdx.x + (first == 0)) * SLOT;
        for (int i = threadIdx.x; i < SLOT; i += THREADS) mine[i] = tile[i];
        __threadfence();
        __syncthreads();
        u32 from = block_of(stripe * chunks(), units, blocks), to = block_of(stripe * chunks() + chunks() - 1, units, blocks);
        if (threadIdx.x == 0) {
            bool last = atomicAdd(p.counters + stripe, 1) == to - from;
            if (last) p.counters[stripe] = 0;
            shared.result.last = last;
        }
        __syncthreads();
        if (!shared.result.last) return false;
        __threadfence();
        for (int i = threadIdx.x; i < SLOT; i += THREADS) {
            float total = __ldcg(p.partial + (2 * from + 1) * SLOT + i);
            for (u32 b = from + 1; b <= to; b++) total += __ldcg(p.partial + 2 * b * SLOT + i);
            tile[i] = total;
        }
        __syncthreads();
        return true;
    }

    __device__ __forceinline__ void emit(int stripe) {
        int start, m = locate(stripe, start), rows = pick(p.rows, m), width = stripe_rows();
        float* out = pick(p.out, m);
        const float* bias = pick(p.bias, m);
        for (int i = threadIdx.x; i < p.tokens * width; i += THREADS) {
            int token = i / width, row = start + i % width;
            if (row >= rows) continue;
            float scale = PERMUTED && p.norm ? 1.0f / sqrtf(shared.result.squares[token] / p.columns + p.epsilon) : 1.0f;
            float v = shared.result.tile[token][i % width] * scale;
            float* to = out + token * rows + (p.mode != STORE && p.out_permuted ? permuted(row, rows) : row);
            if (p.mode == STORE) *to = bias ? v + bias[row] : v;
            else if (p.mode == ADD) *to += v;
            else if (p.mode == GATED) *to = silu(v) * (shared.result.tile[token][i % width + width] * scale);
            else *to = silu(*to) * v;
        }
    }
};
