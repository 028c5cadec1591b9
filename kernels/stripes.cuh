// Products of repacked weights and some columns of activations: the body of skinny.cu.
//
// A block owns stripes: ROWS rows of a matrix, all tokens. A thread holds 4 rows × up to 32 tokens of sums in registers and
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
// Rows whose squares are summed together.
constexpr int SQUARES_ROWS = 64;

// A lane's weights on their way from memory to registers: a group of four rows, or, of the wider types, the half or the
// quarter of it that 16 bytes a row hold.
//
// Quants become floats as denormals (see quant.cuh), but here by bit field extraction, which puts every quant at bit 0:
// then a group of a row has one factor, not one for each position, and registers are what these kernels lack. Extraction
// has half the rate of an AND, and plenty of FFMA to hide behind. 8-bit quants stay at the two places they have.
template <int T>
struct Weights {
    static constexpr int BITS = quant_bits(T);
    static constexpr int PARTS = BITS == 16 ? 4 : BITS == 8 ? 2 : 1;  // loads that a group takes
    static constexpr int WORDS = BITS < 8 ? BITS : 4;
    static constexpr bool SCALED = BITS < 16;
    // Weights come out times this.
    static constexpr float UNIT = SCALED ? 0x1p-64f : 1.0f;

    u32 q[TILE_ROWS][WORDS];

    __device__ __forceinline__ void load(const u8* slice, int groups, int lane, int part) {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++) {
            uint4 v = __ldg((const uint4*)(slice + lane * 16 + (r * PARTS + part) * groups * 16));
            q[r][0] = v.x, q[r][1] = v.y, q[r][2] = v.z, q[r][3] = v.w;
        }
        if constexpr (BITS == 5) {
            uint4 v = __ldg((const uint4*)(slice + lane * 16 + groups * 64));
            q[0][4] = v.x, q[1][4] = v.y, q[2][4] = v.z, q[3][4] = v.w;
        }
        if constexpr (BITS == 6) {
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r += 2) {
                uint4 v = __ldg((const uint4*)(slice + lane * 16 + groups * (64 + r * 8)));
                q[r][4] = v.x, q[r][5] = v.y, q[r + 1][4] = v.z, q[r + 1][5] = v.w;
            }
        }
    }

    // Brings the second half of a group to where the first was, which it is like in every type.
    __device__ __forceinline__ void advance() {
        if constexpr (BITS == 4 || BITS == 6) {
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++)
#pragma unroll
                for (int i = 0; i < WORDS / 2; i++) q[r][i] = q[r][i + WORDS / 2];
        }
        if constexpr (BITS == 5) {
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) q[r][0] = q[r][2], q[r][1] = q[r][3], q[r][4] >>= 16;
        }
    }

    // Quant i of the group as an integer: as a float, quant * 2^-149, or 2^(field_bit - 149) if 8-bit.
    __device__ __forceinline__ u32 quant(int r, int i) const {
        const u32* w = q[r];
        if constexpr (BITS == 8) {
            u32 v = w[i / 4 % 4];
            return (i % 4 < 2 ? v : __byte_perm(v, v, 0x1032)) & 255u << field_bit(8, i);
        } else {
            if (BITS == 5 && i % 16 == 15) {
                int first = i / 16 * 2;
                u32 last = i / 16 ? __byte_perm(w[4 % WORDS], w[4 % WORDS], 0x1032) : w[4 % WORDS];
                return (last & 0x1) | (w[first] & 0x6) | (w[first + 1] & 0x18);
            }
            if (BITS == 6 && i % 16 == 15) {
                int first = i / 16 * 3;
                return (w[first] & 0x3) | (w[first + 1] & 0xc) | (w[first + 2] & 0x30);
            }
            Position at = position(BITS, i);
            u32 v = w[at.word];
            if (at.bit + BITS <= 32) return field(v, at.bit);
            return field(__byte_perm(v, v, 0x1032), at.bit - 16);
        }
    }
    __device__ static __forceinline__ u32 field(u32 v, int bit) {
        u32 r;
        asm("bfe.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(v), "r"(bit), "r"(BITS));
        return r;
    }

    // Four neighbouring columns of the four rows, from column i of what was loaded on.
    template <class F>
    __device__ __forceinline__ void quad(const F& factors, int i, float (&out)[TILE_ROWS][4]) const {
#pragma unroll
        for (int r = 0; r < TILE_ROWS; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if constexpr (T == F16) {
                    out[r][c] = (c % 2 ? half_high : half_low)(q[r][(i + c) % 8 / 2]);
                } else if constexpr (T == BF16) {
                    u32 v = q[r][(i + c) % 8 / 2];
                    out[r][c] = __uint_as_float(c % 2 ? v & 0xffff0000u : v << 16);
                } else {
                    float factor = factors.factor[r];
                    if (BITS == 8) factor *= power_of_two(-field_bit(8, i + c));
                    out[r][c] = fmaf(__uint_as_float(quant(r, i + c)), factor, factors.base[r]);
                }
            }
    }
};

// Scales of a lane's group in four rows, ready for use: weight * UNIT = quant * factor + base.
template <int T>
struct Factors {
    float factor[TILE_ROWS], base[TILE_ROWS];

    // of: as loaded; half: of the group, which only q6_k has two scales for.
    __device__ __forceinline__ void set(const Scales<T>& of, int half) {
        if constexpr (Weights<T>::SCALED) {
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) {
                float scale[group_scales(T)], min;
                of.get(r, scale, min);
                float s = group_scales(T) == 2 && half ? scale[group_scales(T) - 1] : scale[0];
                constexpr float unit = Weights<T>::UNIT / Scales<T>::UNIT;
                factor[r] = s * (unit * 0x1p75f * 0x1p74f);
                base[r] = (min - s * quant_offset(T)) * unit;
            }
        }
    }
};

// An element of one of the arrays of Product; indexing by a variable would copy the arguments to local memory.
template <class V>
__device__ __forceinline__ V pick(const V (&of)[3], int matrix) {
    return matrix == 0 ? of[0] : matrix == 1 ? of[1] : of[2];
}

// WARPS, TOKENS: of the block. SPLIT: warps that share rows and split the tokens.
template <int TYPE, int WARPS, int TOKENS, int SPLIT>
struct Stripes {
    static constexpr int THREADS = WARPS * 32;
    static constexpr int OWN = TOKENS / SPLIT;  // tokens of a thread
    static constexpr int ROWS = WARPS / SPLIT * ROW_LANES * TILE_ROWS;
    static constexpr int STAGED = (TOKENS + WARPS - 1) / WARPS;  // float4 that a thread stages of half a chunk
    static constexpr int PIECES = (STAGED + HALF_QUADS - 1) / HALF_QUADS;  // of them while a quad is worked on
    static constexpr int PARTS = Weights<TYPE>::PARTS;
    // Registers are short: weights wait in one buffer, and the loop's body is half a chunk. Where there are some to spare,
    // ptxas also finds better banks if they are taken.
    static constexpr int BUFFERS = PARTS == 4 && OWN == 12 ? 2 : 1;
    // A whole group is loaded while another is worked on, where that does not spill.
    static constexpr bool AHEAD = OWN == 16 && (TYPE == Q4_0 || TYPE == Q4_1);
    static constexpr int SLOT = TOKENS * ROWS;  // floats of a partial result

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
    float sum[OWN][TILE_ROWS];
    Weights<TYPE> weights[BUFFERS], coming;
    Scales<TYPE> scales;
    Factors<TYPE> factors;

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

    // Where a chunk's weights lie, and the lane's group of the slice. Lanes past the end of a row take its last group:
    // their activations are zeros.
    __device__ __forceinline__ const u8* slice_of(const u8* tile, int chunk) const {
        return tile + chunk / (SLICE / CHUNK) * Layout<TYPE>::slice_bytes;
    }
    __device__ __forceinline__ int group_of(int chunk) const {
        return min(chunk % (SLICE / CHUNK) * K_LANES + k_lane(), groups_of(chunk) - 1);
    }
    __device__ __forceinline__ void load(Weights<TYPE>& to, const u8* tile, int chunk, int part) const {
        const u8* slice = slice_of(tile, chunk);
        int groups = groups_of(chunk), group = group_of(chunk);
        to.load(slice, groups, group, part);
    }
    __device__ __forceinline__ void load_scales(const u8* tile, int chunk) {
        const u8* slice = slice_of(tile, chunk);
        int groups = groups_of(chunk), group = group_of(chunk);
        if (!Weights<TYPE>::SCALED) return;
        scales.load(slice, groups, group);
    }

    // A float4 of half a chunk of x and its way through registers into shared memory. A warp stages whole tokens, lanes
    // in the order of memory.
    __device__ __forceinline__ float4 fetch(int i, int chunk, int half, bool wanted) const {
        int quad = lane() % 4, group = chunk % 4 * K_LANES + lane() / 4;
        int groups = groups_of(chunk), token = i * WARPS + warp();
        int at = chunk / 4 * SLICE + group * GROUP + (half * HALF_QUADS + quad) * 4;
        wanted = wanted && token < p.tokens && group < groups;
        float4 x = make_float4(0, 0, 0, 0);
        if (wanted) x = *(const float4*)(p.x + token * p.columns + at);
        return x;
    }
    __device__ __forceinline__ void stage(int i, int half, float4 x) {
        int quad = lane() % 4, group = lane() / 4, token = i * WARPS + warp();
        if (TOKENS % WARPS == 0 || token < TOKENS) shared.x[half][token][quad * QUAD_STRIDE + group] = x;
    }

    // Half a chunk: 16 columns of 4 rows, all tokens of the thread; meanwhile the next half of x is staged.
    __device__ __forceinline__ void half_chunk(const u8* tile, int chunk, int half, int last) {
        int next = min(chunk + 1, last - 1);
        if (half == 0 || TYPE == Q6_K) factors.set(scales, half);
        if (AHEAD && half == 0) load(coming, tile, next, 0);
        float4 staging[PIECES];
        // With 28 tokens and more the 16-bit types spill, unless ptxas sees but two quads at once.
        if constexpr (PARTS == 4) {
#pragma unroll (OWN < 28 ? HALF_QUADS : 2)
            for (int quad = 0; quad < HALF_QUADS; quad++) four_columns(tile, chunk, half, quad, next, last, staging);
        } else {
#pragma unroll
            for (int quad = 0; quad < HALF_QUADS; quad++) four_columns(tile, chunk, half, quad, next, last, staging);
        }
        __syncthreads();
    }

    // A quad of the half. As soon as a part's last weights are unpacked its registers take the part that comes BUFFERS later.
    __device__ __forceinline__ void four_columns(const u8* tile, int chunk, int half, int quad, int next, int last,
                                                 float4 (&staging)[PIECES]) {
        static_assert(whole(), "a product is missing");
        // STAGED pieces, spread over the quads.
        constexpr int SPAN = STAGED >= HALF_QUADS ? 1 : HALF_QUADS / STAGED;
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            if (quad % SPAN == 0 && quad / SPAN * PIECES + i < STAGED)
                staging[i] = fetch(quad / SPAN * PIECES + i, half ? next : chunk, half ^ 1, !half || chunk + 1 < last);
        float w[TILE_ROWS][4];
        int part = PARTS == 1 ? 0 : PARTS == 2 ? half : half * 2 + quad / 2;
        Weights<TYPE>& own = weights[BUFFERS == 1 ? 0 : part % BUFFERS];
        own.quad(factors, quad * 4, w);
        bool done = PARTS == 1 ? half == 1 && quad == 3 : PARTS == 2 ? quad == 3 : quad % 2 == 1;
        if (done && AHEAD) own = coming;
        else if (done) load(own, tile, part + BUFFERS < PARTS ? chunk : next, (part + BUFFERS) % PARTS);
        else if (PARTS == 1 && quad == 3) own.advance();
        if (half == 1 && quad == 3) load_scales(tile, next);
        const float4* x = &shared.x[half][warp() % SPLIT * OWN][k_lane()] + quad * QUAD_STRIDE;
#pragma unroll
        for (int t = 0; t < OWN; t++) {
            float4 v = x[t * HALF_STRIDE];
            const float column[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 16; i++) {
                int c = column_of(t, i), r = row_of(t, i);
                sum[t][r] = fmaf(w[r][c], column[c], sum[t][r]);
            }
        }
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            if (quad % SPAN == SPAN - 1 && quad / SPAN * PIECES + i < STAGED)
                stage(quad / SPAN * PIECES + i, half ^ 1, staging[i]);
    }

    // The order of a token's products of four columns and rows decides which registers ptxas finds for them, and how often two
    // of an FFMA are in one bank: column by column (or row by row), tokens beginning with different ones, and rows forwards
    // and backwards in turn. Which tokens begin where is what loses least, of some thirty orders that were tried.
    static constexpr bool BY_ROWS = OWN == 32 && (TYPE == Q4_1 || TYPE == Q4_K || TYPE == Q5_K);
    static constexpr __host__ __device__ int first_of(int t) {
        return OWN == 12 && (TYPE == Q4_0 || TYPE == Q4_1)   ? 0
               : OWN < 28 || PARTS == 4                      ? t % 4
               : OWN == 28                                   ? t & 2
               : TYPE == Q8_0                                ? t % 2 * 3
               : TYPE == Q4_1 || TYPE == Q5_K                ? t % 4
                                                             : t % 2;
    }
    // Of token t's product i.
    static constexpr __host__ __device__ int column_of(int t, int i) { return BY_ROWS ? inner(t, i) : outer(t, i); }
    static constexpr __host__ __device__ int row_of(int t, int i) { return BY_ROWS ? outer(t, i) : inner(t, i); }
    static constexpr __host__ __device__ int outer(int t, int i) { return i / 4 ^ first_of(t); }
    static constexpr __host__ __device__ int inner(int t, int i) { return outer(t, i) % 2 ? 3 - i % 4 : i % 4; }
    // Every product is among them.
    static constexpr __host__ __device__ bool whole() {
        for (int t = 0; t < OWN; t++) {
            int seen = 0;
            for (int i = 0; i < 16; i++) seen |= 1 << (column_of(t, i) * 4 + row_of(t, i));
            if (seen != 0xffff) return false;
        }
        return true;
    }

    // The sums of chunks first..last of a stripe.
    __device__ __forceinline__ void accumulate(int stripe, int first, int last) {
#pragma unroll
        for (int t = 0; t < OWN; t++)
#pragma unroll
            for (int r = 0; r < TILE_ROWS; r++) sum[t][r] = 0;
        const u8* tile = tile_of(stripe);
#pragma unroll
        for (int part = 0; part < BUFFERS; part++) load(weights[part], tile, first, part);
        load_scales(tile, first);
#pragma unroll
        for (int i = 0; i < STAGED; i++) stage(i, 0, fetch(i, first, 0, true));
        __syncthreads();
        for (int chunk = first; chunk < last; chunk++)
#pragma unroll 1
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
            shared.result.tile[warp() % SPLIT * OWN + at / 4][own_row() + at % 4] = v[i] / Weights<TYPE>::UNIT;
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

    // Σ x² of each token, from the parts that the product before left.
    __device__ __forceinline__ void add_squares() {
        for (int token = warp(); token < p.tokens; token += WARPS) {
            float total = 0.0f;
            for (int i = lane(); i < p.parts; i += 32) total += p.squares[i * p.tokens + token];
            total = warp_sum(total);
            if (lane() == 0) shared.result.squares[token] = total;
        }
        __syncthreads();
    }

    // Σ out² of each token over every SQUARES_ROWS of the stripe's rows; `tile` holds out.
    __device__ __forceinline__ void leave_squares(int stripe) {
        constexpr int STRIPE_PARTS = ROWS / SQUARES_ROWS;
        __syncthreads();
        for (int i = warp(); i < p.tokens * STRIPE_PARTS; i += WARPS) {
            int token = i / STRIPE_PARTS, part = stripe * STRIPE_PARTS + i % STRIPE_PARTS;
            if (part * SQUARES_ROWS >= p.rows[0]) continue;
            float total = 0.0f;
            for (int row = lane(); row < SQUARES_ROWS; row += 32) {
                float v = shared.result.tile[token][i % STRIPE_PARTS * SQUARES_ROWS + row];
                total += v * v;
            }
            total = warp_sum(total);
            if (lane() == 0) p.squares[part * p.tokens + token] = total;
        }
    }

    __device__ __forceinline__ void emit(int stripe) {
        if (p.parts > 0) add_squares();
        int start, m = locate(stripe, start), rows = pick(p.rows, m), width = stripe_rows();
        float* out = pick(p.out, m);
        const float* bias = pick(p.bias, m);
        for (int i = threadIdx.x; i < p.tokens * width; i += THREADS) {
            int token = i / width, row = start + i % width;
            if (row >= rows) shared.result.tile[token][i % width] = 0.0f;
            if (row >= rows) continue;
            float scale = p.parts > 0 ? 1.0f / sqrtf(shared.result.squares[token] / p.columns + p.epsilon) : 1.0f;
            float v = shared.result.tile[token][i % width] * scale;
            float* to = out + token * rows + (p.out_permuted ? permuted(row, rows) : row);
            if (p.mode == STORE) *to = bias ? v + bias[row] : v;
            else if (p.mode == ADD && p.next) {
                *to = v += *to;
                shared.result.tile[token][i % width] = v;
                p.hidden[token * rows + row] = v * p.next[row];
            } else if (p.mode == ADD) *to += v;
            else if (p.mode == GATED) *to = silu(v) * (shared.result.tile[token][i % width + width] * scale);
            else *to = silu(*to) * v;
        }
        if (p.mode == ADD && p.next) leave_squares(stripe);
    }
};
