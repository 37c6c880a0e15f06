// What a warp does of decode attention: up to 8 query heads of one KV head against tokens, 16 at a time, that come in
// asynchronous copies; its sums and the maximum that they are relative to end in shared memory.
//
// Both products run on the tensor cores with the tokens or dims as the 16 rows and the 8 query heads as columns:
// S^T = K Q^T, O^T = V^T P^T. Codes become operands by mask and magic exponent (kv_operands.cuh) with no
// multiplication; with K = code * s + m for a token and V alike,
//
//   score = s * (sum_d (offset_d + code_d) q_d - sum_d offset_d q_d) + m * sum_d q_d
//   out   = unit * (sum_t P' (offset + code / unit) - offset * sum_t P') + sum_t P' m / s,    P' = fp16(P * s * gain)
//
// so scales and minima cost few operations a score. gain, a power of two, keeps P' in fp16's range; all sums weigh the
// tokens with the rounded P', or values of both signs would not cancel. Probabilities are relative to a base that is
// moved, and what was summed rescaled, only when a score exceeds it by far: most steps need no maximum over the lanes.
//
// A step of 16 tokens is 2176 bytes at 128 dims in 4 bits and about 290 instructions. Defines: HEAD_DIM, BITS
// (kv_page.cuh), WARPS, those that share the steps.
#pragma once

#include <cuda_fp16.h>

#include "kv_operands.cuh"
#include "kv_page.cuh"
#include "mma.cuh"
#include "mma_f16.cuh"
#include "types.cuh"

constexpr int LANES = 32, THREADS = WARPS * LANES;
constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr int STEP = 16;  // tokens a warp takes at once
constexpr int HEADS = 8;  // query heads of an item: the columns of a product
constexpr int K_STEPS = HEAD_DIM / 16, V_TILES = HEAD_DIM / 16;
constexpr int CHUNK = 16, CHUNKS = ROW / CHUNK;  // bytes of a copy, copies of a row
constexpr bool CODED = BITS < 16;

constexpr int STAGE_GRIDS = 2 * STEP * ROW;  // K rows, V rows, grids
constexpr int STAGE_BYTES = STAGE_GRIDS + STEP * GRID;
constexpr int RESULT_ROW = HEAD_DIM + 4;  // floats of a head in shared memory; 4 spread the banks

// Probabilities are 2^(score - base). A base is the largest score minus RAISED when it is set, and is set anew when a
// score exceeds it by LIMIT: then fp16 holds them all, and few are lost below its range.
constexpr float RAISED = 7.0f, LIMIT = 15.0f;
constexpr float NO_SCORE = -1e30f;      // finite, so that differences of two are 0
constexpr float MASKED = -1e38f;        // far below
constexpr float LARGEST_SCALE = 0.25f;  // what gain makes of the largest value scale seen, up to a factor of 4

__device__ __forceinline__ float2 half_pair(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

__device__ __forceinline__ uint32_t half_bits(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16-byte chunks of row r stand in shared memory at chunk ^ swizzle(r): eight rows then start in eight different banks.
constexpr int SWIZZLE_BITS = CHUNKS % 8 == 0 ? 3 : CHUNKS % 4 == 0 ? 2 : CHUNKS % 2 == 0 ? 1 : 0;
__device__ __forceinline__ int swizzle(int row) { return row >> (3 - SWIZZLE_BITS) & ((1 << SWIZZLE_BITS) - 1); }

// What lane (g, t) reads of a K row: UNITS pieces of UNIT bytes. Any order of the dims will do, as long as q has the
// same; this one has no bank conflicts.
constexpr int UNIT = ROW % 64 == 0 ? 16 : ROW % 32 == 0 ? 8 : 4, UNITS = ROW / 4 / UNIT;
__device__ __forceinline__ int unit_offset(int unit, int t) {
    return UNIT * (ROW % 128 == 0 ? unit / 2 * 8 + 2 * t + unit % 2 : 4 * unit + t);
}

// x, but the compiler does not know: what depends on it is computed here, not earlier and not again.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Where a lane finds its parts of a stage. Rows whose size is a power of two need one register for all units or chunks.
struct Places {
    static constexpr bool BY_BITS = (ROW & (ROW - 1)) == 0;
    int unit, chunk, copied;  // the first

    __device__ __forceinline__ Places() {
        unit = opaque(unit_at(0)), chunk = opaque(chunk_at(0)), copied = opaque(copied_at(0));
    }

    // Unit of K row g; that of row g + 8 lies 8 rows behind.
    __device__ __forceinline__ int of_unit(int nth) const {
        return BY_BITS ? unit ^ unit_offset(nth, 0) : unit_at(nth);
    }

    // Of two neighbouring chunks of V rows, from an even one on, lane l / 16 selects one; l / 8 % 2 the tokens.
    __device__ __forceinline__ int of_chunk(int even) const { return BY_BITS ? chunk ^ even * CHUNK : chunk_at(even); }

    // Chunk `first` + lane of 16 rows of K or V.
    __device__ __forceinline__ int of_copied(int first) const {
        return BY_BITS ? (copied ^ swizzle(first / CHUNKS) * CHUNK) + first * CHUNK : copied_at(first);
    }

  private:
    static __device__ __forceinline__ int unit_at(int nth) {
        const int g = threadIdx.x % LANES / 4, t = threadIdx.x % 4;
        return g * ROW + (unit_offset(nth, t) ^ swizzle(g) * CHUNK);
    }
    static __device__ __forceinline__ int chunk_at(int even) {
        const int token = threadIdx.x % 16, second = threadIdx.x % LANES / 16;
        return token * ROW + ((even + second) ^ swizzle(token)) * CHUNK;
    }
    static __device__ __forceinline__ int copied_at(int first) {
        const int chunk = first + threadIdx.x % LANES, row = chunk / CHUNKS, column = chunk % CHUNKS;
        return row * ROW + (column ^ swizzle(row)) * CHUNK;
    }
};

using Keys = KeyWords<BITS>;
using Values = ValueWord<BITS>;

struct Unit {
    uint32_t word[UNIT / 4];
    __device__ __forceinline__ explicit Unit(const unsigned char* from) {
        if constexpr (UNIT == 16) {
            const uint4 all = *reinterpret_cast<const uint4*>(from);
            word[0] = all.x, word[1] = all.y, word[2] = all.z, word[3] = all.w;
        } else if constexpr (UNIT == 8) {
            const uint2 all = *reinterpret_cast<const uint2*>(from);
            word[0] = all.x, word[1] = all.y;
        } else {
            word[0] = *reinterpret_cast<const uint32_t*>(from);
        }
    }
};

// The queries of an item as B operands, in the order of dims in which `Keys` takes K apart, with their sums.
struct Queries {
    uint32_t b[K_STEPS][2];
    float minus_offsets[2];  // of heads 2t, 2t+1: -sum_d offset_d q_d
    float sums[2];           // sum_d q_d

    // Head g of `heads` is at q + g * HEAD_DIM; the other columns are zero.
    __device__ void load(const __half* q, int heads) {
        const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
        const unsigned char* row = reinterpret_cast<const unsigned char*>(q + g * HEAD_DIM);
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
#pragma unroll
            for (int word = 0; word < UNIT / 4; word += Keys::WORDS) {
                const int dim = unit_offset(unit, t) * 8 / BITS + word * 32 / BITS;
                const int step = (unit * UNIT / 4 + word) / Keys::WORDS * Keys::STEPS;
                if constexpr (BITS == 4) {
                    const uint4 raw = g < heads ? *reinterpret_cast<const uint4*>(row + 2 * dim) : uint4{};
                    b[step][0] = __byte_perm(raw.x, raw.z, 0x5410);  // dims 0, 4
                    b[step][1] = __byte_perm(raw.x, raw.z, 0x7632);
                    b[step + 1][0] = __byte_perm(raw.y, raw.w, 0x5410);
                    b[step + 1][1] = __byte_perm(raw.y, raw.w, 0x7632);
                } else {
                    const uint2 raw = g < heads ? *reinterpret_cast<const uint2*>(row + 2 * dim) : uint2{};
                    b[step][0] = raw.x;
                    b[step][1] = raw.y;
                }
            }
        }
        if constexpr (CODED) sum_up();
    }

    __device__ void sum_up() {
        float low = 0.0f, high = 0.0f;  // of the dims in `low` and in `high` of Keys
#pragma unroll
        for (int step = 0; step < K_STEPS; ++step) {
            const float2 first = half_pair(b[step][0]), second = half_pair(b[step][1]);
            low += first.x + first.y;
            high += second.x + second.y;
        }
        float offsets = -(Keys::LOW * low + Keys::HIGH * high), sum = low + high;
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            offsets += __shfl_xor_sync(ALL_LANES, offsets, lanes);
            sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        }
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // head g is in lanes 4g..4g+3, wanted are heads 2t and 2t+1
            minus_offsets[i] = __shfl_sync(ALL_LANES, offsets, 4 * (2 * t + i));
            sums[i] = __shfl_sync(ALL_LANES, sum, 4 * (2 * t + i));
        }
    }
};

// A warp's copies: step `index` of the warps together is 16 tokens, a quarter of a page.
struct Copies {
    const unsigned char* from_lane;  // the KV head's record in page 0, and this lane's place in 32 chunks
    uint32_t page_bytes;             // of all heads
    int from, to;                    // tokens wanted, counted from the split's first

    // Rows outside [from, to) are garbage that the mask hides, but fp16 values may be NaN there: they become zero.
    __device__ __forceinline__ void start(unsigned char* stage, const Places& places, uint32_t page, int index) const {
        const int lane = threadIdx.x % LANES, first_row = index % (PAGE / STEP) * STEP;
        const unsigned char* record = from_lane + uint64_t(page) * page_bytes;
#pragma unroll
        for (int i = 0; i < STEP * CHUNKS; i += LANES) {
            const int chunk = i + lane, token = index * STEP + chunk / CHUNKS;
            if (STEP * CHUNKS % LANES != 0 && chunk >= STEP * CHUNKS) break;
            const bool wanted = CODED || (token >= from && token < to);
            unsigned char* to_row = stage + places.of_copied(i);
            const unsigned char* rows = record + first_row * ROW + i * CHUNK;
            copy16_async(to_row, rows, wanted);
            copy16_async(to_row + STEP * ROW, rows + V_ROWS, wanted);
        }
        if (lane < STEP * GRID / CHUNK) {
            copy16_async(stage + STAGE_GRIDS + lane * CHUNK, record + GRIDS + first_row * GRID, true);
        }
    }
};

// A token's scales and minima.
struct Grids {
    float key_scale, key_minimum, value_scale, value_minimum;
    __device__ __forceinline__ explicit Grids(const unsigned char* from) {
        const uint2 raw = *reinterpret_cast<const uint2*>(from);
        const float2 key = half_pair(raw.x), value = half_pair(raw.y);
        key_scale = key.x, key_minimum = key.y, value_scale = value.x, value_minimum = value.y;
    }
};

// A warp's running softmax and sums for 8 heads; arrays of two are of heads 2t and 2t+1.
struct Running {
    float base[2];     // of the probabilities; scores are to the base 2
    float sum[2];      // of the probabilities, of this lane's tokens
    float minima[2];   // of probability * minimum, likewise
    float weights[4];  // of P', of all lanes' tokens: heads 2t, 2t+1, and again
    float out[V_TILES][4];
    float gain;  // a power of two; it serves value scales up to its inverse
    Exponents exponents;

    __device__ __forceinline__ void clear() {
        base[0] = base[1] = NO_SCORE;
        sum[0] = sum[1] = minima[0] = minima[1] = 0.0f;
        gain = CODED ? __int_as_float(0x7f800000) : 1.0f;
        weights[0] = weights[1] = weights[2] = weights[3] = 0.0f;
#pragma unroll
        for (int tile = 0; tile < V_TILES; ++tile) {
            out[tile][0] = out[tile][1] = out[tile][2] = out[tile][3] = 0.0f;
        }
    }

    // Raise the bases to scores x (tokens g and g+8 of heads 2t, 2t+1) that exceed them by LIMIT, and fit gain to the
    // tokens' value scales. Each head decides for itself: a NaN in one does not show in another.
    __device__ void raise(const float (&x)[4], float scale_g, float scale_g8) {
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float largest = fmaxf(x[i], x[i + 2]);
#pragma unroll
            for (int lanes = 4; lanes < LANES; lanes *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
            }
            const float raised = largest > base[i] + LIMIT ? largest - RAISED : base[i];
            factor[i] = exp2_fast(base[i] - raised);
            base[i] = raised;
            sum[i] *= factor[i];
            minima[i] *= factor[i];
        }
        if constexpr (CODED) {
            float largest = fmaxf(scale_g, scale_g8);
#pragma unroll
            for (int lanes = 4; lanes < LANES; lanes *= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
            }
            if (largest * gain > 1.0f) {
                const float power = __uint_as_float(__float_as_uint(largest) & 0x7f800000);  // of two, <= largest
                const float fitting = LARGEST_SCALE / power;
                factor[0] *= fitting / gain;
                factor[1] *= fitting / gain;
                gain = fitting;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[i] *= factor[i % 2];
#pragma unroll
        for (int tile = 0; tile < V_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[tile][i] *= factor[i % 2];
        }
    }

    // 16 tokens at `stage`; of them [from, to) are wanted.
    __device__ __forceinline__ void step(const unsigned char* stage, const Places& places, const Queries& queries,
                                         float scale_log2, int from, int to) {
        const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;

        // Two chains of products, so that one's latency hides in the other's.
        float s[2][4] = {};
        if constexpr (CODED) {
            s[0][0] = s[0][2] = queries.minus_offsets[0];
            s[0][1] = s[0][3] = queries.minus_offsets[1];
        }
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            const unsigned char* of_g = stage + places.of_unit(unit);
            const Unit near(of_g), far(of_g + 8 * ROW);
#pragma unroll
            for (int word = 0; word < UNIT / 4; word += Keys::WORDS) {
                const Keys a(near.word + word, exponents), b(far.word + word, exponents);
#pragma unroll
                for (int i = 0; i < Keys::STEPS; ++i) {
                    const int at = (unit * UNIT / 4 + word) / Keys::WORDS * Keys::STEPS + i;
                    multiply_add(s[at % 2], {a.low[i], b.low[i], a.high[i], b.high[i]}, queries.b[at][0],
                                 queries.b[at][1]);
                }
            }
        }

        // Scores: x[0], x[1] of token g and heads 2t, 2t+1; x[2], x[3] of token g+8.
        float x[4], scale_g = 1.0f, scale_g8 = 1.0f, minimum_g = 0.0f, minimum_g8 = 0.0f;
        if constexpr (CODED) {
            const Grids token_g(stage + STAGE_GRIDS + g * GRID), token_g8(stage + STAGE_GRIDS + (g + 8) * GRID);
            scale_g = token_g.value_scale, minimum_g = token_g.value_minimum;
            scale_g8 = token_g8.value_scale, minimum_g8 = token_g8.value_minimum;
            const float by_g = token_g.key_scale * scale_log2, plus_g = token_g.key_minimum * scale_log2;
            const float by_g8 = token_g8.key_scale * scale_log2, plus_g8 = token_g8.key_minimum * scale_log2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                x[i] = (s[0][i] + s[1][i]) * by_g + plus_g * queries.sums[i];
                x[i + 2] = (s[0][i + 2] + s[1][i + 2]) * by_g8 + plus_g8 * queries.sums[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = (s[0][i] + s[1][i]) * scale_log2;
        }
        if (from > 0 || to < STEP) {
            if (g < from || g >= to) x[0] = x[1] = MASKED, scale_g = minimum_g = 0.0f;
            if (g + 8 < from || g + 8 >= to) x[2] = x[3] = MASKED, scale_g8 = minimum_g8 = 0.0f;
        }

        const bool high = fmaxf(x[0], x[2]) > base[0] + LIMIT || fmaxf(x[1], x[3]) > base[1] + LIMIT;
        if (__any_sync(ALL_LANES, high || (CODED && fmaxf(scale_g, scale_g8) * gain > 1.0f))) {
            raise(x, scale_g, scale_g8);
        }

        // P' = fp16(P * scale * gain). The other sums take P' too, over scale * gain, and so weigh the tokens as it
        // does; a scale of 0 has codes of 0 and may be any other.
        const float by_g = scale_g == 0.0f ? LARGEST_SCALE : scale_g * gain;
        const float by_g8 = scale_g8 == 0.0f ? LARGEST_SCALE : scale_g8 * gain;
        const uint32_t p_g = half_bits(exp2_fast(x[0] - base[0]) * by_g, exp2_fast(x[1] - base[1]) * by_g);
        const uint32_t p_g8 = half_bits(exp2_fast(x[2] - base[0]) * by_g8, exp2_fast(x[3] - base[1]) * by_g8);
        const float2 wide_g = half_pair(p_g), wide_g8 = half_pair(p_g8);
        const float back_g = __fdividef(1.0f, by_g), back_g8 = __fdividef(1.0f, by_g8);
        sum[0] += wide_g.x * back_g + wide_g8.x * back_g8;
        sum[1] += wide_g.y * back_g + wide_g8.y * back_g8;
        const uint32_t b0 = transpose(p_g), b1 = transpose(p_g8);
        if constexpr (CODED) {
            const float plus_g = minimum_g * back_g, plus_g8 = minimum_g8 * back_g8;
            minima[0] += wide_g.x * plus_g + wide_g8.x * plus_g8;
            minima[1] += wide_g.y * plus_g + wide_g8.y * plus_g8;
            const uint32_t one = exponents.of_1;
            multiply_add(weights, {one, one, one, one}, b0, b1);
        }
        add_values(stage + STEP * ROW, places, b0, b1);
    }

    // out += V^T P'^T.
    __device__ __forceinline__ void add_values(const unsigned char* rows, const Places& places, uint32_t b0,
                                               uint32_t b1) {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += 2) {
            uint32_t words[4];
            const uint32_t address = shared_address(rows) + places.of_chunk(chunk);
            if (chunk + 1 < CHUNKS) {
                load_transposed(words, address);
            } else {
                uint32_t pair[2];
                load_transposed(pair, address);
                words[0] = pair[0], words[1] = pair[1];
            }
            if constexpr (CODED) {
#pragma unroll
                for (int i = 0; i < 2 && chunk + i < CHUNKS; ++i) {
                    const Values low(words[2 * i], exponents), high(words[2 * i + 1], exponents);
                    constexpr int DIMS = 16 / BITS;  // of a word
#pragma unroll
                    for (int dim = 0; dim < DIMS; dim += 2) {
                        multiply_add(out[((chunk + i) * DIMS + dim) / 2],
                                     {low.dim[dim], low.dim[dim + 1], high.dim[dim], high.dim[dim + 1]}, b0, b1);
                    }
                }
            } else {
                multiply_add(out[chunk / 2], {words[0], words[2], words[1], words[3]}, b0, b1);
            }
        }
    }

    // Leave the sums of the warp in shared memory: `result` (heads, RESULT_ROW) and `stats` (8 heads: base, sum).
    __device__ void finish(float* result, float2* stats, int heads) {
        const int lane = threadIdx.x % LANES, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int lanes = 4; lanes < LANES; lanes *= 2) {
                sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], lanes);
                minima[i] += __shfl_xor_sync(ALL_LANES, minima[i], lanes);
            }
            if (g == 0) stats[2 * t + i] = make_float2(base[i], sum[i]);
        }
        const float by = Values::UNIT / gain;
        constexpr int DIMS = 16 / BITS;  // neighbours among a lane's dims: two tiles of 4 bits, one of 8
        struct alignas(4 * DIMS) Neighbours {
            float value[DIMS];
        };
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (2 * t + i >= heads) break;
            float* head = result + (2 * t + i) * RESULT_ROW + g * DIMS;
#pragma unroll
            for (int place = 0; place < 2 * V_TILES; place += DIMS) {  // rows g, g+8 of tile 0, of tile 1, ...
                Neighbours dims;
#pragma unroll
                for (int dim = 0; dim < DIMS; ++dim) {
                    const float x = out[(place + dim) / 2][(place + dim) % 2 * 2 + i];
                    dims.value[dim] = CODED ? (x - Values::OFFSET * weights[i]) * by + minima[i] : x * by;
                }
                *reinterpret_cast<Neighbours*>(head + place * 8) = dims;
            }
        }
    }
};
