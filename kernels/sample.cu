// What sampling wants of rows of logits, so that not all of them need to travel.
//
// argmax_rows(Logits l)
//   grid: (ceil(vocab / 4096), rows), block 256
//   ids[row]: the largest logit's, the lowest of equals; NaN never wins; u32::MAX where no logit is above -infinity
//   values[row]: that logit (-infinity where there is none)
//   sums[row], f64: Σ exp(logit - value), value 0 where there is none; the log of the row's normaliser is value + ln(sum)
//   l.partial: rows * ceil(vocab / 4096) * 16 bytes, l.counters: rows
//
// top_k_rows(Logits l)
//   grid: (ceil(vocab / 8192), rows), block 256
//   ids[row][k], values[row][k]: the k largest, best first, equal ones by id. Rows with fewer numbers (NaN is none)
//   end with id u32::MAX and -infinity. sums is not used.
//   l.partial: rows * ceil(vocab / 8192) * k * 8 bytes, l.counters: rows
//
// Both are exact and deterministic. A block takes a segment of a row, once, into registers; the last of a row to finish
// merges.
#include "common.cuh"

struct Logits {
    const float* logits;  // [rows][vocab]
    u32* ids;
    float* values;
    double* sums;
    void* partial;
    u32* counters;        // zeroed once at start; kernels leave them zero
    int vocab;
    int k;                // top_k_rows: 1 to 64
};
static_assert(sizeof(Logits) == 56, "the launcher mirrors this");

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr u32 NONE = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// Whether this block is the last of its row's to come here; then it sees what all of them wrote.
__device__ __forceinline__ bool last_of_row(u32* counters) {
    __shared__ u32 last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc(counters + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
    __syncthreads();
    __threadfence();
    return last;
}

struct Best {
    double sum;
    float value;
    u32 id;
};

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// exp(logit - value), where a value of -infinity counts as 0.
__device__ __forceinline__ float weight(float logit, float value) {
    return expf(logit - (value > minus_infinity() ? value : 0.0f));
}

// The best of all lanes, and the sum of their sums, each of which is relative to its lane's value.
__device__ __forceinline__ Best warp_best(const Best& mine) {
    Best best = mine;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Best other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, offset);
        other.id = __shfl_xor_sync(0xffffffffu, best.id, offset);
        best = better(best, other);
    }
    best.sum = mine.sum * (double)(mine.value > minus_infinity() ? weight(mine.value, best.value) : 1.0f);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) best.sum += __shfl_xor_sync(0xffffffffu, best.sum, offset);
    return best;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) argmax_rows(const Logits l) {
    constexpr int EACH = 16;
    __shared__ float values[WARPS];
    __shared__ u32 ids[WARPS];
    __shared__ double sums[WARPS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* row = l.logits + (u64)blockIdx.y * l.vocab;
    const int first = blockIdx.x * (EACH * THREADS) + threadIdx.x;

    float x[EACH];
    float value = minus_infinity();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        x[i] = first + i * THREADS < l.vocab ? row[first + i * THREADS] : minus_infinity();
    }
    // fmaxf passes over NaN.
#pragma unroll
    for (int i = 0; i < EACH; i++) value = fmaxf(value, x[i]);
    value = warp_max(value);
    if (lane == 0) values[warp] = value;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) value = fmaxf(value, values[i]);

    u32 id = NONE;
    float sum = 0.0f;
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) {
        if (x[i] == value && value > minus_infinity()) id = first + i * THREADS;
        sum += weight(x[i], value);
    }
    double total = sum;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        id = min(id, __shfl_xor_sync(0xffffffffu, id, offset));
        total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if (lane == 0) ids[warp] = id, sums[warp] = total;
    __syncthreads();
    Best* parts = (Best*)l.partial + blockIdx.y * gridDim.x;
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) id = min(id, ids[i]), total += sums[i];
        parts[blockIdx.x] = Best{total, value, id};
    }

    if (!last_of_row(l.counters) || warp > 0) return;
    Best best{0.0, minus_infinity(), NONE};
    for (int i = lane; i < gridDim.x; i += 32) {
        const Best part{__ldcg(&parts[i].sum), __ldcg(&parts[i].value), __ldcg(&parts[i].id)};
        const Best both = better(best, part);
        const float mine = best.value > minus_infinity() ? weight(best.value, both.value) : 1.0f;
        const float its = part.value > minus_infinity() ? weight(part.value, both.value) : 1.0f;
        best = Best{best.sum * (double)mine + part.sum * (double)its, both.value, both.id};
    }
    best = warp_best(best);
    if (lane == 0) {
        l.ids[blockIdx.y] = best.id;
        l.values[blockIdx.y] = best.value;
        l.sums[blockIdx.y] = best.sum;
    }
}

namespace {

constexpr int EACH = 32;                // logits of a thread
constexpr int LIST = 64;                // most wanted, and the length of a warp's sorted list
constexpr int COLLECTED = WARPS * LIST;  // most that a segment's threshold may let through

// Orders floats as unsigned numbers; NaN is 0, below all.
__device__ __forceinline__ u32 key_of(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? 0 : bits ^ (bits >> 31 ? NONE : 0x80000000u);
}

// A candidate is its key and, so that the lowest id is the largest, the id's complement. 0 is none.
__device__ __forceinline__ u64 candidate(u32 key, u32 id) { return (u64)key << 32 | ~id; }

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }
__device__ __forceinline__ u64 smaller(u64 a, u64 b) { return a > b ? b : a; }

// A warp's list of 64 candidates: number `lane` in low, number 32 + `lane` in high.
struct List {
    u64 low, high;

    // Sorts a bitonic list, descending: Batcher 1968.
    __device__ __forceinline__ void settle() {
        const u64 a = larger(low, high), b = smaller(low, high);
        low = a, high = b;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) exchange(distance, false, false);
    }

    // Compares with the lane at `distance`; the larger goes to the lower lane, or to the higher one where so told.
    __device__ __forceinline__ void exchange(int distance, bool low_ascends, bool high_ascends) {
        const bool upper = threadIdx.x & distance;
        const u64 a = __shfl_xor_sync(NONE, low, distance), b = __shfl_xor_sync(NONE, high, distance);
        low = upper != low_ascends ? smaller(low, a) : larger(low, a);
        high = upper != high_ascends ? smaller(high, b) : larger(high, b);
    }

    __device__ __forceinline__ void sort() {
        // Runs of 2, 4 ... 32, every second one ascending, so that two together are bitonic; high's number is 32 + lane.
#pragma unroll
        for (int run = 2; run <= 32; run *= 2) {
#pragma unroll
            for (int distance = run / 2; distance > 0; distance /= 2) {
                const bool ascends = threadIdx.x & run & 31;
                exchange(distance, ascends, run == 32 || ascends);
            }
        }
        settle();
    }

    // Keeps the 64 largest of two descending lists, of the other one given its numbers 63 - lane and 31 - lane.
    __device__ __forceinline__ void merge(u64 last, u64 middle) {
        low = larger(low, last);
        high = larger(high, middle);
        settle();
    }

    __device__ __forceinline__ void store(u64* to, int length) const {
        const int lane = threadIdx.x % 32;
        if (lane < length) to[lane] = low;
        if (lane + 32 < length) to[lane + 32] = high;
    }
};

// Merges all warps' lists into the first warp's.
__device__ __forceinline__ void merge_warps(List& list, u64 (*lists)[LIST]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int half = WARPS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (warp >= half && warp < 2 * half) list.store(lists[warp], LIST);
        __syncthreads();
        if (warp < half) list.merge(lists[warp + half][LIST - 1 - lane], lists[warp + half][LIST / 2 - 1 - lane]);
    }
}

// How many of the block's keys `which` accepts.
template <typename Which>
__device__ __forceinline__ int block_count(const u32 (&keys)[EACH], u32* counts, Which which) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) count += which(keys[i], i * THREADS + (int)threadIdx.x);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) count += __shfl_xor_sync(0xffffffffu, count, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = count;
    __syncthreads();
    count = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) count += counts[i];
    return count;
}

// Where too many are equal to tell them by their keys: exactly the k-th key, and the bound below which ids with it go in.
__device__ __forceinline__ void exact_bounds(const u32 (&keys)[EACH], int k, u32* counts, u32* key, int* bound) {
    u32 least = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const u32 higher = least | 1u << bit;
        if (block_count(keys, counts, [=](u32 x, int) { return x >= higher; }) >= k) least = higher;
    }
    const int above = block_count(keys, counts, [=](u32 x, int) { return x > least; });
    // The largest bound with at most k - above ids below it.
    int ids = 0;
    for (int step = EACH * THREADS; step > 0; step /= 2) {
        const int higher = ids + step;
        const int below = block_count(keys, counts, [=](u32 x, int at) { return x == least && at < higher; });
        if (higher <= EACH * THREADS && below <= k - above) ids = higher;
    }
    *key = least, *bound = ids;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) top_k_rows(const Logits l) {
    __shared__ u64 lists[WARPS][LIST];
    __shared__ u32 counts[WARPS];
    __shared__ int collected;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* row = l.logits + (u64)blockIdx.y * l.vocab;
    const int first = blockIdx.x * (EACH * THREADS);
    const int k = l.k;

    u32 keys[EACH];
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = first + i * THREADS + threadIdx.x;
        keys[i] = at < l.vocab ? key_of(row[at]) : 0;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) most = max(most, keys[i]);

    // Just below the k-th largest of the threads' maxima: at least k keys are no less, and seldom many more.
    u32 threshold = 0;
    for (int bit = 31; bit >= 12; bit--) {
        const u32 higher = threshold | 1u << bit;
        if (__syncthreads_count(most >= higher) >= k) threshold = higher;
    }
    threshold = max(threshold, 1u);
    int bound = EACH * THREADS;
    if (block_count(keys, counts, [=](u32 x, int) { return x >= threshold; }) > COLLECTED) {
        exact_bounds(keys, k, counts, &threshold, &bound);
    }
    u64* numbers = lists[0];
    for (int i = threadIdx.x; i < COLLECTED; i += THREADS) numbers[i] = 0;
    if (threadIdx.x == 0) collected = 0;
    __syncthreads();
    // In any order: sorting follows.
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i * THREADS + threadIdx.x;
        if (keys[i] > threshold || (keys[i] == threshold && at < bound)) {
            numbers[atomicAdd(&collected, 1)] = candidate(keys[i], first + at);
        }
    }
    __syncthreads();
    List list{lists[warp][lane], lists[warp][lane + 32]};
    list.sort();
    merge_warps(list, lists);
    u64* parts = (u64*)l.partial + blockIdx.y * (gridDim.x * k);
    if (warp == 0) list.store(parts + blockIdx.x * k, k);

    if (!last_of_row(l.counters)) return;
    list = List{0, 0};
    for (int i = warp; i < gridDim.x; i += WARPS) {
        const int last = LIST - 1 - lane, middle = LIST / 2 - 1 - lane;
        list.merge(last < k ? __ldcg(parts + i * k + last) : 0, middle < k ? __ldcg(parts + i * k + middle) : 0);
    }
    merge_warps(list, lists);
    if (warp > 0) return;
#pragma unroll
    for (int i = lane; i < LIST; i += 32) {
        if (i >= k) continue;
        const u64 best = i < 32 ? list.low : list.high;
        const u32 key = (u32)(best >> 32);
        const u32 bits = key ^ (key >> 31 ? 0x80000000u : NONE);
        l.ids[blockIdx.y * k + i] = ~(u32)best;
        l.values[blockIdx.y * k + i] = best ? __uint_as_float(bits) : minus_infinity();
    }
}
