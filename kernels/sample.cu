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

constexpr int EACH = 32;        // logits of a thread
constexpr int SORTED = 2048;    // most candidates sorted at a time
constexpr int COLLECTED = 512;  // most that a segment's threshold may let through

// Orders floats as unsigned numbers; NaN is 0, below all.
__device__ __forceinline__ u32 key_of(float x) {
    const u32 bits = __float_as_uint(x);
    return x != x ? 0 : bits ^ (bits >> 31 ? NONE : 0x80000000u);
}

// A candidate is its key and, so that the lowest id is the largest, the id's complement. 0 is none.
__device__ __forceinline__ u64 candidate(u32 key, u32 id) { return (u64)key << 32 | ~id; }

// Sorts `count` numbers, a power of two, descending; all threads of the block call it.
__device__ __forceinline__ void sort(u64* numbers, int count) {
    for (int run = 2; run <= count; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < count / 2; i += THREADS) {
                const int low = (i & ~(distance - 1)) * 2 + (i & (distance - 1));
                const u64 a = numbers[low], b = numbers[low + distance];
                if ((a < b) == ((low & run) == 0)) numbers[low] = b, numbers[low + distance] = a;
            }
        }
    }
    __syncthreads();
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
    __shared__ u64 numbers[SORTED];
    __shared__ u32 counts[WARPS];
    __shared__ int collected;
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

    // The k-th largest of the threads' maxima: at least k keys are no less, and seldom many more.
    u32 threshold = 0;
    for (int bit = 31; bit >= 0; bit--) {
        const u32 higher = threshold | 1u << bit;
        if (__syncthreads_count(most >= higher) >= k) threshold = higher;
    }
    threshold = max(threshold, 1u);
    int bound = EACH * THREADS;
    int count = block_count(keys, counts, [=](u32 x, int) { return x >= threshold; });
    if (count > COLLECTED) {
        exact_bounds(keys, k, counts, &threshold, &bound);
        count = k;
    }
    int padded = 64;
    while (padded < count) padded *= 2;
    for (int i = threadIdx.x; i < padded; i += THREADS) numbers[i] = 0;
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
    sort(numbers, padded);
    u64* parts = (u64*)l.partial + blockIdx.y * (gridDim.x * k);
    if (threadIdx.x < k) parts[blockIdx.x * k + threadIdx.x] = numbers[threadIdx.x];

    if (!last_of_row(l.counters)) return;
    // The best k so far stay in front while the rest passes through.
    const int total = gridDim.x * k;
    int kept = 0;
    for (int next = 0; next < total;) {
        const int taken = min(SORTED - kept, total - next);
        padded = 64;
        while (padded < kept + taken) padded *= 2;
        for (int i = threadIdx.x; i < padded - kept; i += THREADS) {
            numbers[kept + i] = i < taken ? __ldcg(parts + next + i) : 0;
        }
        sort(numbers, padded);
        next += taken;
        kept = k;
    }
    if (threadIdx.x < k) {
        const u64 best = numbers[threadIdx.x];
        const u32 key = (u32)(best >> 32);
        l.ids[blockIdx.y * k + threadIdx.x] = ~(u32)best;
        const u32 bits = key ^ (key >> 31 ? 0x80000000u : NONE);
        l.values[blockIdx.y * k + threadIdx.x] = best ? __uint_as_float(bits) : minus_infinity();
    }
}
