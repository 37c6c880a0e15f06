// New tokens enter the paged cache: QK-norm, RoPE, offsets, Hadamard rotation, quantization; queries come out rotated.
//
// A warp makes TEAMS heads, a team of TEAM lanes each. Lane l of a team holds dims 2 TEAM k + 2 l + i, i < 2, as
// x[2 k + i]: so RoPE's partners are in one lane, and a Hadamard transform exchanges over lanes in log2(TEAM) of its
// stages, as a sum over halves does in so many of its steps, of two values only. Small teams take fewer instructions,
// large ones less time for a head. Every step is rounded as in qoq/paged.py and quantize_kv, so codes, scales and
// minima have the same bits. Defines: HEAD_DIM and BITS (kv_page.cuh); TEAM; RATIOS, the shrunken ranges to try, and
// MARGINS, what each takes off either end, (1 - ratio) / 2: float literals with commas between.
#pragma once

#include <cuda_fp16.h>

#include "kv_page.cuh"
#include "types.cuh"

namespace append {

constexpr int LANES = 32;
constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr int TEAMS = LANES / TEAM;
constexpr int PAIRS = HEAD_DIM / (2 * TEAM), VALUES = 2 * PAIRS;                 // of a lane
constexpr int POWER = PAIRS <= 2 ? PAIRS : PAIRS <= 4 ? 4 : PAIRS <= 8 ? 8 : 16;  // PAIRS or more
constexpr int HALF_DIM = HEAD_DIM / 2, HALF_VALUES = VALUES / 2;  // RoPE pairs dims i and i + HALF_DIM
constexpr int ROTATED = HEAD_DIM & -HEAD_DIM;  // dims of a Hadamard block: the largest power of two in HEAD_DIM
constexpr float LEVELS = (1 << BITS % 16) - 1;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: added and taken off again, it rounds half to even

// float(ROTATED ** -0.5), of double precision first, as torch multiplies.
constexpr float HADAMARD_SCALE = ROTATED == 256   ? 0.0625f
                                 : ROTATED == 128 ? float(0.08838834764831845)
                                 : ROTATED == 64  ? 0.125f
                                                  : float(0.17677669529663687);
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256 && ROTATED >= 32, "blocks of a Hadamard transform");
static_assert(HALF_DIM % (2 * TEAM) == 0, "a lane has both values of a rotation");

__device__ __forceinline__ void round_all(float (&x)[VALUES]) {
#pragma unroll
    for (int j = 0; j < VALUES; j += 2) {
        const float2 pair = __half22float2(__floats2half2_rn(x[j], x[j + 1]));
        x[j] = pair.x, x[j + 1] = pair.y;
    }
}

// The sum over HEAD_DIM values, padded with zeros to a power of two: first half plus second half, repeatedly.
__device__ __forceinline__ float sum_by_halves(const float (&x)[VALUES]) {
    float sum[2 * POWER];
#pragma unroll
    for (int j = 0; j < 2 * POWER; ++j) sum[j] = j < VALUES ? x[j] : 0.0f;
    // for each half that is a power of two (the compiler does not unroll a loop that halves)
#pragma unroll
    for (int shift = 0; POWER >> shift >= 2; ++shift) {
#pragma unroll
        for (int j = 0; j < POWER; ++j) {
            if (j < POWER >> shift) sum[j] = __fadd_rn(sum[j], sum[j + (POWER >> shift)]);
        }
    }
#pragma unroll
    for (int lanes = TEAM / 2; lanes > 0; lanes /= 2) {
        sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(ALL_LANES, sum[0], lanes));
        sum[1] = __fadd_rn(sum[1], __shfl_xor_sync(ALL_LANES, sum[1], lanes));
    }
    return __fadd_rn(sum[0], sum[1]);
}

__device__ __forceinline__ float2 half_pair(const __half* from) {
    return __half22float2(*reinterpret_cast<const __half2*>(from));
}

// `weight` and `offset` below are of a lane's first dim.
__device__ __forceinline__ void norm(float (&x)[VALUES], const __half* weight, float eps) {
    float squares[VALUES];
#pragma unroll
    for (int j = 0; j < VALUES; ++j) squares[j] = __fmul_rn(x[j], x[j]);
    const float mean = __fdiv_rn(sum_by_halves(squares), float(HEAD_DIM));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
#pragma unroll
    for (int j = 0; j < VALUES; j += 2) {
        const float2 by = half_pair(weight + TEAM * j);
        x[j] = __fmul_rn(__fmul_rn(x[j], scale), by.x);
        x[j + 1] = __fmul_rn(__fmul_rn(x[j + 1], scale), by.y);
    }
    round_all(x);
}

// `cos` and `sin` are of the token's position and a lane's first dim.
__device__ __forceinline__ void rope(float (&x)[VALUES], const float* cos, const float* sin) {
#pragma unroll
    for (int j = 0; j < HALF_VALUES; j += 2) {
        const float2 both_cos = *reinterpret_cast<const float2*>(cos + TEAM * j);
        const float2 both_sin = *reinterpret_cast<const float2*>(sin + TEAM * j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float c = i ? both_cos.y : both_cos.x, s = i ? both_sin.y : both_sin.x;
            const float first = x[j + i], second = x[j + i + HALF_VALUES];
            x[j + i] = __fadd_rn(__fmul_rn(first, c), __fmul_rn(-second, s));
            x[j + i + HALF_VALUES] = __fadd_rn(__fmul_rn(second, c), __fmul_rn(first, s));
        }
    }
    round_all(x);
}

template <int STRIDE>
__device__ __forceinline__ void butterfly(float (&x)[VALUES]) {
#pragma unroll
    for (int j = 0; j < VALUES; ++j) {
        if (j & STRIDE) continue;
        const float sum = __fadd_rn(x[j], x[j + STRIDE]), difference = __fsub_rn(x[j], x[j + STRIDE]);
        x[j] = sum, x[j + STRIDE] = difference;
    }
}

__device__ __forceinline__ void hadamard(float (&x)[VALUES], int lane) {
    butterfly<1>(x);
#pragma unroll
    for (int lanes = 1; lanes < TEAM; lanes *= 2) {
        const float sign = lane & lanes ? -1.0f : 1.0f;  // first + second, or first - second
#pragma unroll
        for (int j = 0; j < VALUES; ++j) {
            x[j] = __fmaf_rn(x[j], sign, __shfl_xor_sync(ALL_LANES, x[j], lanes));
        }
    }
    butterfly<2>(x);  // 2 TEAM dims away
    if constexpr (ROTATED > 4 * TEAM) butterfly<4>(x);
    if constexpr (ROTATED > 8 * TEAM) butterfly<8>(x);
    if constexpr (ROTATED > 16 * TEAM) butterfly<16>(x);
#pragma unroll
    for (int j = 0; j < VALUES; ++j) x[j] = __fmul_rn(x[j], HADAMARD_SCALE);
}

// One way to cut a row's range into 2^BITS codes: value = code * scale + minimum.
struct Grid {
    float scale, minimum;  // fp16 values
    float inverse;         // of scale, correctly rounded; 0 where all codes are 0

    Grid() = default;
    __device__ __forceinline__ Grid(float low, float width, float ratio, float margin) {
        const float around = __fadd_rn(low, __fmul_rn(width, margin));
        const float2 both = __half22float2(__floats2half2_rn(__fdiv_rn(__fmul_rn(width, ratio), LEVELS), around));
        scale = both.x, minimum = both.y;
        inverse = scale == 0.0f ? 0.0f : __frcp_rn(scale);
    }

    // The grid that a lane of the team has.
    __device__ __forceinline__ Grid of_lane(int lane) const {
        Grid grid;
        grid.scale = __shfl_sync(ALL_LANES, scale, lane, TEAM);
        grid.minimum = __shfl_sync(ALL_LANES, minimum, lane, TEAM);
        grid.inverse = __shfl_sync(ALL_LANES, inverse, lane, TEAM);
        return grid;
    }

    // rint((x - minimum) / scale), between 0 and LEVELS; 0 for NaN. A product with the inverse and one correction give
    // the correctly rounded quotient: scale has 11 significant bits, so the remainder is exact, and no quotient of a
    // 24-bit number by it lies midway between two floats.
    __device__ __forceinline__ float code(float x) const {
        const float distance = __fsub_rn(x, minimum);
        const float guess = __fmul_rn(distance, inverse);
        const float quotient = __fmaf_rn(__fmaf_rn(-guess, scale, distance), inverse, guess);
        return __fsub_rn(__fadd_rn(fminf(fmaxf(quotient, 0.0f), LEVELS), TO_INTEGER), TO_INTEGER);
    }

    __device__ __forceinline__ float squared_error(const float (&x)[VALUES]) const {
        float squares[VALUES];
#pragma unroll
        for (int j = 0; j < VALUES; ++j) {
            const float error = __fsub_rn(__fmaf_rn(code(x[j]), scale, minimum), x[j]);  // the product is exact
            squares[j] = __fmul_rn(error, error);
        }
        return sum_by_halves(squares);
    }
};

// The grid of least squared error, the earlier one on a tie.
__device__ __forceinline__ Grid best_grid(const float (&x)[VALUES], int lane) {
    constexpr float ratios[] = {RATIOS}, margins[] = {MARGINS};
    constexpr int COUNT = sizeof(ratios) / sizeof(float), ROUNDS = (COUNT + TEAM - 1) / TEAM;
    static_assert(COUNT == sizeof(margins) / sizeof(float), "a margin for each ratio");

    // The largest value and the largest of the negated ones at once, NaN if there is one; fp16 holds both exactly.
    __half2 largest = __floats2half2_rn(x[0], x[1]), least = largest;
#pragma unroll
    for (int j = 2; j < VALUES; j += 2) {
        const __half2 pair = __floats2half2_rn(x[j], x[j + 1]);
        largest = __hmax2_nan(largest, pair), least = __hmin2_nan(least, pair);
    }
    __half2 ends = __hmax2_nan(__lows2half2(largest, __hneg2(least)), __highs2half2(largest, __hneg2(least)));
#pragma unroll
    for (int lanes = TEAM / 2; lanes > 0; lanes /= 2) {
        ends = __hmax2_nan(ends, __shfl_xor_sync(ALL_LANES, ends, lanes));
    }
    const float high = __low2float(ends), low = -__high2float(ends), width = __fsub_rn(high, low);

    Grid own[ROUNDS];  // lane i makes grids i, i + TEAM, ...
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round) {
        float ratio = ratios[round * TEAM], margin = margins[round * TEAM];
#pragma unroll
        for (int i = round * TEAM + 1; i < COUNT && i < (round + 1) * TEAM; ++i) {
            if (lane == i % TEAM) ratio = ratios[i], margin = margins[i];
        }
        own[round] = Grid(low, width, ratio, margin);
    }
    Grid best = own[0].of_lane(0);
    if constexpr (COUNT > 1) {
        float least_error = best.squared_error(x);
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            const int end = min(COUNT, (round + 1) * TEAM);
#pragma unroll(VALUES <= 4 ? TEAM : 1)  // instructions have to be fetched, too
            for (int i = max(round * TEAM, 1); i < end; ++i) {
                const Grid grid = own[round].of_lane(i % TEAM);
                const float error = grid.squared_error(x);
                if (error < least_error) least_error = error, best = grid;
            }
        }
    }
    return best;
}

// Two neighbouring dims go to `row` + 2 TEAM k + 2 l.
__device__ __forceinline__ void store_halves(const float (&x)[VALUES], __half* row, int lane) {
#pragma unroll
    for (int j = 0; j < VALUES; j += 2) {
        *reinterpret_cast<__half2*>(row + TEAM * j + 2 * lane) = __floats2half2_rn(x[j], x[j + 1]);
    }
}

constexpr int SCRATCH = BITS < 16 ? ROW : 16;     // bytes of a head's codes
constexpr int PIECES = HEAD_DIM / 16;             // of 16 codes, which a lane stores at once
constexpr int PIECE = BITS < 16 ? 2 * BITS : 16;  // its bytes
struct alignas(PIECE) Piece {
    uint32_t words[PIECE / 4];
};

// New tokens, and what is done to them. Pointers as rope_kv_append() has them.
struct Tokens {
    const __half* qkv;
    const float *cos, *sin;
    const __half *k_offset, *v_offset, *q_norm, *k_norm;
    float eps;
    int rotate;
    unsigned char* cache;
    int q_heads, kv_heads;

    __device__ __forceinline__ bool is_query(int head) const { return head < q_heads; }
    __device__ __forceinline__ bool is_value(int head) const { return head >= q_heads + kv_heads; }
    __device__ __forceinline__ int kv_head(int head) const {
        return is_value(head) ? head - q_heads - kv_heads : head - q_heads;
    }

    // A head of a token, as it is quantized or asks. The heads of a warp are queries, or keys, or values.
    __device__ __forceinline__ void make(float (&x)[VALUES], int token, int64_t position, int head, int lane) const {
        const __half* from = qkv + (int64_t(token) * (q_heads + 2 * kv_heads) + head) * HEAD_DIM + 2 * lane;
#pragma unroll
        for (int j = 0; j < VALUES; j += 2) {
            const float2 pair = half_pair(from + TEAM * j);
            x[j] = pair.x, x[j + 1] = pair.y;
        }
        if (!is_value(head)) {
            const __half* weight = is_query(head) ? q_norm : k_norm;
            if (weight != nullptr) norm(x, weight + 2 * lane, eps);
            const int64_t angles = position * HALF_DIM + 2 * lane;
            rope(x, cos + angles, sin + angles);
        }
        const __half* offset = is_query(head) ? nullptr : is_value(head) ? v_offset : k_offset;
        if (offset != nullptr) {
#pragma unroll
            for (int j = 0; j < VALUES; j += 2) {
                const float2 less = half_pair(offset + kv_head(head) * HEAD_DIM + 2 * lane + TEAM * j);
                x[j] = __fsub_rn(x[j], less.x), x[j + 1] = __fsub_rn(x[j + 1], less.y);
            }
        }
        if (rotate && !is_value(head)) hadamard(x, lane);
        round_all(x);
    }

    // A key or value enters its slot; where `kept` is false, nothing does. `codes`: scratch of the team, SCRATCH bytes.
    __device__ __forceinline__ void keep(const float (&x)[VALUES], int64_t slot, int head, bool kept,
                                         unsigned char* codes, int lane) const {
        const int index = slot % PAGE;
        unsigned char* record = cache + (slot / PAGE * kv_heads + kv_head(head)) * RECORD;
        unsigned char* row = record + (is_value(head) ? V_ROWS : 0) + index * ROW;
        if constexpr (BITS == 16) {
            if (kept) store_halves(x, reinterpret_cast<__half*>(row), lane);
        } else {
            const Grid best = best_grid(x, lane);
#pragma unroll
            for (int j = 0; j < VALUES; j += 2) {  // both codes in the low bits of a float of exponent 23
                const float both = __fmaf_rn(best.code(x[j + 1]), float(1 << BITS % 16), best.code(x[j]));
                const uint32_t bits = __float_as_uint(__fadd_rn(both, 8388608.0f));
                if constexpr (BITS == 4) {
                    codes[TEAM / 2 * j + lane] = bits;
                } else {
                    reinterpret_cast<uint16_t*>(codes)[TEAM / 2 * j + lane] = bits;
                }
            }
            __syncwarp();
            if (!kept) return;
#pragma unroll
            for (int piece = 0; piece < PIECES; piece += TEAM) {
                if (piece + lane < PIECES) {
                    reinterpret_cast<Piece*>(row)[piece + lane] = reinterpret_cast<const Piece*>(codes)[piece + lane];
                }
            }
            unsigned char* grid = record + GRIDS + index * GRID + (is_value(head) ? GRID / 2 : 0);
            if (lane == 0) *reinterpret_cast<__half2*>(grid) = __floats2half2_rn(best.scale, best.minimum);
        }
    }
};

}  // namespace append
