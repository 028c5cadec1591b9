// Weights on their way in: rows of ggml blocks, as they lie in the file, become row tiles (quant.cuh).
//
//   repack_<type>(const u8* blocks, u8* tiles, int rows, int columns, int first_row)
//       f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q4_k q5_k q6_k: bits only move.
//   convert_<type>(same)
//       q3_k -> q6_k exactly; iq4_nl -> q8_0 exactly; iq4_xs -> q8_0 with scales rounded to f16; q2_k, f32 -> f16.
//   random_<type>(u8* tiles, int rows, int columns, u32 seed)
//       the ten types: weights of mean 0 and deviation about 0.02, for benchmarks without a model.
//
// blocks: `rows` whole rows, from row first_row of the matrix on (a multiple of 4); 2-byte aligned. tiles: the whole
// matrix. rows is a multiple of 4 except in the matrix's last chunk, where the rows that the last tile lacks become
// zeros. Launch: 128 threads; any grid is right; 16 blocks an SM or (rows / 4) * ceil(columns / 1024), whichever is
// less, is fast. No dynamic shared memory, no workspace.
#include "quant.cuh"

// Types that are only sources.
enum Source { Q3_K = 100, Q2_K, IQ4_NL, IQ4_XS, F32 };

__host__ __device__ constexpr int block_columns(int source) {
    return source == Q4_K || source == Q5_K || source == Q6_K || source == Q3_K || source == Q2_K || source == IQ4_XS ? 256
                                                                                                                      : 32;
}
__host__ __device__ constexpr int block_bytes(int source) {
    return source == F32                      ? 128
           : source == F16 || source == BF16  ? 64
           : source == Q4_0 || source == IQ4_NL ? 18
           : source == Q4_1                   ? 20
           : source == Q5_0                   ? 22
           : source == Q5_1                   ? 24
           : source == Q8_0                   ? 34
           : source == Q4_K                   ? 144
           : source == Q5_K                   ? 176
           : source == Q6_K                   ? 210
           : source == Q3_K                   ? 110
           : source == Q2_K                   ? 84
                                              : 136;
}

// The type that a source has on the card.
__host__ __device__ constexpr int stored_as(int source) {
    return source == Q3_K                        ? Q6_K
           : source == IQ4_NL || source == IQ4_XS ? Q8_0
           : source == Q2_K || source == F32      ? F16
                                                  : source;
}

// A group of 32 columns of one row between source and tile.
struct Decoded {
    u32 quant[32];  // with the offset; f16, bf16: the bits
    u32 d;          // f16 d | f16 m or dmin << 16
    int scale[2];   // q4_k, q5_k: [0]; q6_k: two, signed
    int min;        // q4_k, q5_k
};

__device__ __forceinline__ u32 load16(const u8* p) { return *(const u16*)p; }

__device__ __forceinline__ float to_float(u32 half) { return __half2float(__ushort_as_half((u16)half)); }
__device__ __forceinline__ u32 to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

__constant__ i8 IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Nibbles of 16 bytes: low ones are columns 0..15.
__device__ __forceinline__ u32 nibble(const u8* bytes, int i) { return bytes[i & 15] >> (i & 16 ? 4 : 0) & 15; }

// Scale and min of group j of a block of q4_k or q5_k.
__device__ __forceinline__ void k_scales(const u8* packed, int j, int& scale, int& min) {
    if (j < 4) {
        scale = packed[j] & 63;
        min = packed[j + 4] & 63;
    } else {
        scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
        min = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    }
}

// Scale s of the sixteen of a block of q3_k.
__device__ __forceinline__ int q3_scale(const u8* packed, int s) {
    int low = s < 8 ? packed[s] & 15 : packed[s - 8] >> 4;
    int high = packed[8 + s % 4] >> (s / 4 * 2) & 3;
    return (low | high << 4) - 32;
}

// Group `group` of a row segment that begins at a block.
template <int S>
__device__ __forceinline__ void decode(const u8* row, int group, Decoded& out) {
    constexpr int PER_BLOCK = block_columns(S) / GROUP;
    const u8* block = row + group / PER_BLOCK * block_bytes(S);
    int j = group % PER_BLOCK;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        u32& q = out.quant[i];
        if constexpr (S == F16 || S == BF16) q = load16(block + 2 * i);
        if constexpr (S == F32) q = to_half(*(const float*)(block + 4 * i));
        if constexpr (S == Q4_0) q = nibble(block + 2, i);
        if constexpr (S == Q4_1) q = nibble(block + 4, i);
        if constexpr (S == Q5_0) q = nibble(block + 6, i) | (block[2 + i / 8] >> i % 8 & 1) << 4;
        if constexpr (S == Q5_1) q = nibble(block + 8, i) | (block[4 + i / 8] >> i % 8 & 1) << 4;
        if constexpr (S == Q8_0) q = block[2 + i] ^ 0x80;
        if constexpr (S == Q4_K) q = block[16 + j / 2 * 32 + i] >> (j % 2 * 4) & 15;
        if constexpr (S == Q5_K) q = (block[48 + j / 2 * 32 + i] >> (j % 2 * 4) & 15) | (block[16 + i] >> j & 1) << 4;
        if constexpr (S == Q6_K)
            q = (block[j / 4 * 64 + j % 2 * 32 + i] >> (j % 4 / 2 * 4) & 15) |
                (block[128 + j / 4 * 32 + i] >> (j % 4 * 2) & 3) << 4;
        if constexpr (S == Q3_K)  // -4 unless the mask's bit is set; 32 is q6_k's offset
            q = (block[32 + j / 4 * 32 + i] >> (j % 4 * 2) & 3) + (block[i] >> j & 1 ? 32 : 28);
        if constexpr (S == IQ4_NL) q = IQ4_VALUES[nibble(block + 2, i)] + 128;
        if constexpr (S == IQ4_XS) q = IQ4_VALUES[nibble(block + 8 + j * 16, i)] + 128;
        if constexpr (S == Q2_K) {
            float d = to_float(load16(block + 80)), min = to_float(load16(block + 82));
            u32 scale = block[j * 2 + i / 16];
            float quant = (float)(block[16 + j / 4 * 32 + i] >> (j % 4 * 2) & 3);
            q = to_half(d * (float)(scale & 15) * quant - min * (float)(scale >> 4));
        }
    }
    if constexpr (S == Q4_0 || S == Q5_0 || S == Q8_0 || S == IQ4_NL) out.d = load16(block);
    if constexpr (S == Q4_1 || S == Q5_1 || S == Q4_K || S == Q5_K) out.d = load16(block) | load16(block + 2) << 16;
    if constexpr (S == Q4_K || S == Q5_K) k_scales(block + 4, j, out.scale[0], out.min);
    if constexpr (S == Q6_K) {
        out.d = load16(block + 208);
        out.scale[0] = (i8)block[192 + j * 2], out.scale[1] = (i8)block[193 + j * 2];
    }
    if constexpr (S == Q3_K) {
        out.d = load16(block + 108);
        out.scale[0] = q3_scale(block + 96, j * 2), out.scale[1] = q3_scale(block + 96, j * 2 + 1);
    }
    if constexpr (S == IQ4_XS) {
        int scale = (block[4 + j / 2] >> (j % 2 * 4) & 15) | (load16(block + 2) >> (2 * j) & 3) << 4;
        out.d = to_half(to_float(load16(block)) * (float)(scale - 32));
    }
}

// The words of a group's quants as quant.cuh lays them.
template <int T>
__device__ __forceinline__ void pack(const Decoded& in, u32 words[quant_bits(T)]) {
    constexpr int BITS = quant_bits(T);
#pragma unroll
    for (int w = 0; w < BITS; w++) words[w] = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        u32 q = in.quant[i];
        if (BITS == 16) {
            words[i / 2] |= q << (i % 2 * 16);
        } else if (BITS == 5 && i % 16 == 15) {
            int w = i / 16 * 2;
            words[4 % BITS] |= (q & 0x1) << i / 16 * 16, words[w] |= q & 0x6, words[w + 1] |= q & 0x18;
        } else if (BITS == 6 && i % 16 == 15) {
            int w = i / 16 * 3;
            words[w] |= q & 0x3, words[(w + 1) % BITS] |= q & 0xc, words[(w + 2) % BITS] |= q & 0x30;
        } else {
            int bit = position(BITS, i).bit;
            words[position(BITS, i).word] |= __funnelshift_l(q, q, bit);
        }
    }
}

// Scales and mins of a slice of q4_k or q5_k on their way from (row, lane) to lane.
struct SliceScales {
    u8 scale[TILE_ROWS][32], min[TILE_ROWS][32];
};

// Writes one row's group of a slice; all 128 threads of the block call it, those with active false only to wait.
template <int T>
__device__ __forceinline__ void write(const Decoded& in, u8* slice, int groups, int lane, int row, bool active,
                                      SliceScales& shared) {
    constexpr int BITS = quant_bits(T);
    u8* at = slice + Layout<T>::scales(groups);
    if (active) {
        u32 words[BITS];
        pack<T>(in, words);
        constexpr int CHUNKS = BITS < 8 ? 1 : BITS / 4;
        uint4* quants = (uint4*)slice;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
            quants[(row * CHUNKS + c) * groups + lane] =
                make_uint4(words[4 * c], words[4 * c + 1], words[4 * c + 2], words[4 * c + 3]);
        if constexpr (BITS == 5) *(u32*)(slice + 64 * groups + lane * 16 + row * 4) = words[4];
        if constexpr (BITS == 6)
            *(uint2*)(slice + 64 * groups + (row / 2 * groups + lane) * 16 + row % 2 * 8) = make_uint2(words[4], words[5]);
        if constexpr (T == Q4_0 || T == Q5_0 || T == Q8_0) *(u16*)(at + lane * 8 + row * 2) = (u16)in.d;
        if constexpr (T == Q4_1 || T == Q5_1) *(u32*)(at + lane * 16 + row * 4) = in.d;
        if constexpr (T == Q6_K) {
            *(u16*)(at + lane * 8 + row * 2) = (u16)((in.scale[0] + 128) | (in.scale[1] + 128) << 8);
            if (lane % 8 == 0) *(u16*)(at + 8 * groups + lane / 8 * 8 + row * 2) = (u16)in.d;
        }
    }
    if constexpr (T == Q4_K || T == Q5_K) {
        if (active) {
            if (lane % 8 == 0) *(u32*)(at + lane / 8 * 16 + row * 4) = in.d;
            shared.scale[row][lane] = (u8)in.scale[0];
            shared.min[row][lane] = (u8)in.min;
        }
        __syncthreads();
        if (active && row == 0) {
            int scale[4], min[4];
#pragma unroll
            for (int r = 0; r < 4; r++) scale[r] = shared.scale[r][lane], min[r] = shared.min[r][lane];
            u32 low;
            u16 high;
            KScales::pack(scale, min, low, high);
            *(u32*)(at + 2 * groups + lane * 4) = low;
            *(u16*)(at + 6 * groups + lane * 2) = high;
        }
    }
}

// The bytes of a row tile that its slices leave are zeroed, lest a comparison of buffers trip over them.
template <int T>
__device__ __forceinline__ void zero_rest(u8* tile, int columns) {
    int used = columns / GROUP * Layout<T>::TILE_GROUP;
    if (used + (int)threadIdx.x < Layout<T>::row_tile_bytes(columns)) tile[used + threadIdx.x] = 0;
}

template <int S>
__device__ __forceinline__ void repack(const u8* blocks, u8* tiles, int rows, int columns, int first_row) {
    constexpr int T = stored_as(S);
    constexpr int SEGMENT = SLICE / block_columns(S) * block_bytes(S);  // source bytes of a whole slice of one row
    __shared__ __align__(16) u8 raw[TILE_ROWS][(SEGMENT + 15) / 16 * 16];
    __shared__ SliceScales scales;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    int slices = (columns + SLICE - 1) / SLICE;
    int row_bytes = columns / block_columns(S) * block_bytes(S);
    int units = (rows + TILE_ROWS - 1) / TILE_ROWS * slices;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        int tile = unit / slices, s = unit % slices;
        int groups = min(SLICE, columns - s * SLICE) / GROUP;
        bool present = tile * TILE_ROWS + row < rows;
        // A row may begin at any even byte: read by twos, or by sixteens where all is aligned.
        const u8* from = blocks + (u64)(tile * TILE_ROWS + row) * row_bytes + s * SEGMENT;
        int bytes = groups * GROUP / block_columns(S) * block_bytes(S);
        if (present) {
            if ((((u64)from | bytes) & 15) == 0) {
                for (int i = lane; i < bytes / 16; i += 32) ((uint4*)raw[row])[i] = ((const uint4*)from)[i];
            } else if ((((u64)from | bytes) & 3) == 0) {
                for (int i = lane; i < bytes / 4; i += 32) ((u32*)raw[row])[i] = ((const u32*)from)[i];
            } else {
                for (int i = lane; i < bytes / 2; i += 32) ((u16*)raw[row])[i] = ((const u16*)from)[i];
            }
        }
        __syncthreads();
        Decoded decoded = {};
        if (present && lane < groups) decode<S>(raw[row], lane, decoded);
        u8* to = tiles + (u64)(first_row / TILE_ROWS + tile) * Layout<T>::row_tile_bytes(columns);
        if (s == slices - 1) zero_rest<T>(to, columns);
        write<T>(decoded, to + s * Layout<T>::slice_bytes, groups, lane, row, lane < groups, scales);
        __syncthreads();
    }
}

__device__ __forceinline__ u32 hash(u32 x) {
    x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// A group of random weights of deviation about 0.02: quants uniform, scales spread over a factor of two, signs mixed
// where the type allows, mins such that the mean is zero.
template <int T>
__device__ __forceinline__ void random_group(u32 seed, Decoded& out) {
    constexpr int BITS = quant_bits(T);
    constexpr float DEVIATION = 0.02f;
    constexpr float QUANTS = BITS == 4 ? 4.61f : BITS == 5 ? 9.23f : BITS == 6 ? 18.5f : 73.9f;  // of a uniform quant
    u32 bits = hash(seed);
    float spread = 0.7f + (float)(bits & 1023) / 1706.0f;
    int scale = 32 + (bits >> 10 & 31);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        if (BITS < 16 && i % 4 == 0) bits = hash(bits + i + 1);
        if (BITS < 16) {
            out.quant[i] = bits >> (i % 4 * 8) & ((1u << BITS % 16) - 1);
        } else {
            bits = hash(bits + i + 1);
            float w = ((float)(bits & 0xffff) + (float)(bits >> 16)) / 65535.0f - 1.0f;  // triangular, deviation 0.408
            w *= DEVIATION / 0.408f;
            out.quant[i] = T == F16 ? to_half(w) : __float_as_uint(w) >> 16;
        }
    }
    bool k = T == Q4_K || T == Q5_K || T == Q6_K;
    float d = DEVIATION / QUANTS * spread / (k ? 47.0f : 1.0f);
    float mean = (float)((1 << BITS % 16) - 1) / 2.0f;
    out.scale[0] = scale, out.scale[1] = -scale, out.min = scale;
    out.d = to_half(d) | (has_min(T) ? to_half((k ? mean : -mean) * d) << 16 : 0);
}

template <int T>
__device__ __forceinline__ void random(u8* tiles, int rows, int columns, u32 seed) {
    __shared__ SliceScales scales;
    int lane = threadIdx.x % 32, row = threadIdx.x / 32;
    int slices = (columns + SLICE - 1) / SLICE;
    int units = (rows + TILE_ROWS - 1) / TILE_ROWS * slices;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
        int tile = unit / slices, s = unit % slices;
        int groups = min(SLICE, columns - s * SLICE) / GROUP;
        Decoded decoded = {};
        if (tile * TILE_ROWS + row < rows && lane < groups)
            random_group<T>(hash(seed) + (u32)unit * 128 + threadIdx.x, decoded);
        u8* to = tiles + (u64)tile * Layout<T>::row_tile_bytes(columns);
        if (s == slices - 1) zero_rest<T>(to, columns);
        write<T>(decoded, to + s * Layout<T>::slice_bytes, groups, lane, row, lane < groups, scales);
        __syncthreads();
    }
}

#define REPACK(name, S)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                \
        name(const u8* __restrict__ blocks, u8* __restrict__ tiles, int rows, int columns, int first_row) {          \
        repack<S>(blocks, tiles, rows, columns, first_row);                                                          \
    }
#define RANDOM(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128) name(u8* __restrict__ tiles, int rows, int columns, u32 seed) { \
        random<T>(tiles, rows, columns, seed);                                                                       \
    }

REPACK(repack_f16, F16)
REPACK(repack_bf16, BF16)
REPACK(repack_q4_0, Q4_0)
REPACK(repack_q4_1, Q4_1)
REPACK(repack_q5_0, Q5_0)
REPACK(repack_q5_1, Q5_1)
REPACK(repack_q8_0, Q8_0)
REPACK(repack_q4_k, Q4_K)
REPACK(repack_q5_k, Q5_K)
REPACK(repack_q6_k, Q6_K)
REPACK(convert_q3_k, Q3_K)
REPACK(convert_q2_k, Q2_K)
REPACK(convert_iq4_nl, IQ4_NL)
REPACK(convert_iq4_xs, IQ4_XS)
REPACK(convert_f32, F32)
RANDOM(random_f16, F16)
RANDOM(random_bf16, BF16)
RANDOM(random_q4_0, Q4_0)
RANDOM(random_q4_1, Q4_1)
RANDOM(random_q5_0, Q5_0)
RANDOM(random_q5_1, Q5_1)
RANDOM(random_q8_0, Q8_0)
RANDOM(random_q4_k, Q4_K)
RANDOM(random_q5_k, Q5_K)
RANDOM(random_q6_k, Q6_K)
