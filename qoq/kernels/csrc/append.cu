// New tokens enter the paged cache: QK-norm, RoPE, offsets, Hadamard rotation, quantization; queries come out rotated.
//
// One warp makes one head of one token; lane l holds dims l, l + 32, ..., so that sums over halves pair values of a
// lane first and lanes after. Every step is rounded as in qoq/paged.py and quantize_kv, so codes, scales and minima have
// the same bits. Defines: HEAD_DIM and BITS (common/kv_page.cuh); RATIOS, the shrunken ranges to try, and MARGINS, what
// each takes off either end, (1 - ratio) / 2: float literals with commas between.

#include <cuda_fp16.h>

#include "common/kv_page.cuh"
#include "common/overlap.cuh"
#include "common/types.cuh"

constexpr int LANES = 32, WARPS = 8;
constexpr uint32_t ALL_LANES = 0xffffffff;
constexpr int VALUES = HEAD_DIM / LANES;  // of a lane
constexpr int HALF_DIM = HEAD_DIM / 2;    // RoPE pairs dims i and i + HALF_DIM
constexpr int POWER = VALUES == 3 ? 4 : VALUES;
constexpr int ROTATED = HEAD_DIM & -HEAD_DIM;  // dims of a Hadamard block: the largest power of two in HEAD_DIM
constexpr float LEVELS = (1 << BITS % 16) - 1;
constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: added and taken off again, it rounds half to even

// float(ROTATED ** -0.5), of double precision first, as torch multiplies.
constexpr float HADAMARD_SCALE = ROTATED == 256   ? 0.0625f
                                 : ROTATED == 128 ? float(0.08838834764831845)
                                 : ROTATED == 64  ? 0.125f
                                                  : float(0.17677669529663687);
static_assert(ROTATED >= 32 && VALUES <= 8 && (VALUES == 3 || (VALUES & (VALUES - 1)) == 0), "96 or a power of two");

__device__ __forceinline__ float rounded(float x) { return __half2float(__float2half_rn(x)); }

// The sum over HEAD_DIM values, padded with zeros to a power of two: first half plus second half, repeatedly.
__device__ float sum_by_halves(const float (&x)[VALUES]) {
    float sum[POWER];
#pragma unroll
    for (int j = 0; j < POWER; ++j) sum[j] = j < VALUES ? x[j] : 0.0f;
#pragma unroll
    for (int half = POWER / 2; half > 0; half /= 2) {
#pragma unroll
        for (int j = 0; j < half; ++j) sum[j] = __fadd_rn(sum[j], sum[j + half]);
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
        sum[0] = __fadd_rn(sum[0], __shfl_xor_sync(ALL_LANES, sum[0], lanes));
    }
    return sum[0];
}

__device__ void norm(float (&x)[VALUES], const __half* weight, float eps, int lane) {
    float squares[VALUES];
#pragma unroll
    for (int j = 0; j < VALUES; ++j) squares[j] = __fmul_rn(x[j], x[j]);
    const float mean = __fdiv_rn(sum_by_halves(squares), float(HEAD_DIM));
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
#pragma unroll
    for (int j = 0; j < VALUES; ++j) {
        x[j] = rounded(__fmul_rn(__fmul_rn(x[j], scale), __half2float(weight[lane + LANES * j])));
    }
}

// partner[j] = the value HALF_DIM dims away.
__device__ void find_partners(const float (&x)[VALUES], float (&partner)[VALUES], int lane) {
    if constexpr (HALF_DIM % LANES == 0) {
#pragma unroll
        for (int j = 0; j < VALUES; ++j) partner[j] = x[(j + VALUES / 2) % VALUES];
    } else {  // 48 dims away of 96: 16 lanes, and one or two values
        float other[VALUES];
#pragma unroll
        for (int j = 0; j < VALUES; ++j) other[j] = __shfl_xor_sync(ALL_LANES, x[j], 16);
#pragma unroll
        for (int j = 0; j < VALUES; ++j) partner[j] = lane < 16 ? other[(j + 1) % VALUES] : other[(j + 2) % VALUES];
    }
}

// `cos` and `sin` are of the token's position.
__device__ void rope(float (&x)[VALUES], const float* cos, const float* sin, int lane) {
    float partner[VALUES];
    find_partners(x, partner, lane);
#pragma unroll
    for (int j = 0; j < VALUES; ++j) {
        const int dim = lane + LANES * j;
        const bool first = dim < HALF_DIM;
        const int angle = first ? dim : dim - HALF_DIM;
        const float across = first ? -partner[j] : partner[j];
        x[j] = rounded(__fadd_rn(__fmul_rn(x[j], cos[angle]), __fmul_rn(across, sin[angle])));
    }
}

__device__ void hadamard(float (&x)[VALUES], int lane) {
#pragma unroll
    for (int stride = 1; stride < LANES; stride *= 2) {
        const float sign = lane & stride ? -1.0f : 1.0f;  // first + second, or first - second
#pragma unroll
        for (int j = 0; j < VALUES; ++j) {
            x[j] = __fmaf_rn(x[j], sign, __shfl_xor_sync(ALL_LANES, x[j], stride));
        }
    }
#pragma unroll
    for (int stride = LANES; stride < ROTATED; stride *= 2) {
#pragma unroll
        for (int j = 0; j < VALUES; ++j) {
            const int second = j + stride / LANES;
            if (j & stride / LANES) continue;
            const float sum = __fadd_rn(x[j], x[second]), difference = __fsub_rn(x[j], x[second]);
            x[j] = sum, x[second] = difference;
        }
    }
#pragma unroll
    for (int j = 0; j < VALUES; ++j) x[j] = rounded(__fmul_rn(x[j], HADAMARD_SCALE));
}

// One way to cut a row's range into 2^BITS codes: value = code * scale + minimum.
struct Grid {
    float scale, minimum;  // fp16 values
    float inverse;         // of scale, correctly rounded; 0 where all codes are 0

    Grid() = default;
    __device__ Grid(float low, float width, float ratio, float margin) {
        minimum = rounded(__fadd_rn(low, __fmul_rn(width, margin)));
        scale = rounded(__fdiv_rn(__fmul_rn(width, ratio), LEVELS));
        inverse = scale == 0.0f ? 0.0f : __frcp_rn(scale);
    }

    // The grid that a lane has.
    __device__ __forceinline__ Grid of_lane(int lane) const {
        Grid grid;
        grid.scale = __shfl_sync(ALL_LANES, scale, lane);
        grid.minimum = __shfl_sync(ALL_LANES, minimum, lane);
        grid.inverse = __shfl_sync(ALL_LANES, inverse, lane);
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

    __device__ float squared_error(const float (&x)[VALUES]) const {
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
__device__ Grid best_grid(const float (&x)[VALUES], int lane) {
    constexpr float ratios[] = {RATIOS}, margins[] = {MARGINS};
    constexpr int COUNT = sizeof(ratios) / sizeof(float);
    static_assert(COUNT == sizeof(margins) / sizeof(float) && COUNT <= LANES, "a margin for each ratio");

    // The largest value and the largest of the negated ones at once, NaN if there is one; fp16 holds both exactly.
    __half2 ends = __floats2half2_rn(x[0], -x[0]);
#pragma unroll
    for (int j = 1; j < VALUES; ++j) ends = __hmax2_nan(ends, __floats2half2_rn(x[j], -x[j]));
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
        ends = __hmax2_nan(ends, __shfl_xor_sync(ALL_LANES, ends, lanes));
    }
    const float high = __low2float(ends), low = -__high2float(ends), width = __fsub_rn(high, low);

    float ratio = ratios[0], margin = margins[0];  // lane i makes grid i
#pragma unroll
    for (int i = 1; i < COUNT; ++i) {
        if (lane == i) ratio = ratios[i], margin = margins[i];
    }
    const Grid own(low, width, ratio, margin);
    int best = 0;
    if constexpr (COUNT > 1) {
        float least = own.of_lane(0).squared_error(x);
#pragma unroll
        for (int i = 1; i < COUNT; ++i) {
            const float error = own.of_lane(i).squared_error(x);
            if (error < least) least = error, best = i;
        }
    }
    return own.of_lane(best);
}

// Eight codes, a byte each, as eight nibbles, the first lowest.
__device__ __forceinline__ uint32_t pack_nibbles(uint2 bytes) {
    const uint32_t low = bytes.x | bytes.x >> 4, high = bytes.y | bytes.y >> 4;  // pairs in bytes 0 and 2
    return __byte_perm(low, high, 0x6420);
}

// `row` and `grid` are the token's in the record, `codes` the warp's scratch.
__device__ void store(const float (&x)[VALUES], unsigned char* row, unsigned char* grid, unsigned char* codes,
                      int lane) {
    if constexpr (BITS == 16) {
#pragma unroll
        for (int j = 0; j < VALUES; ++j) reinterpret_cast<__half*>(row)[lane + LANES * j] = __float2half_rn(x[j]);
    } else {
        const Grid best = best_grid(x, lane);
#pragma unroll
        for (int j = 0; j < VALUES; ++j) codes[lane + LANES * j] = __float2uint_rn(best.code(x[j]));
        __syncwarp();
        if (lane < HEAD_DIM / 8) {
            const uint2 bytes = reinterpret_cast<const uint2*>(codes)[lane];
            if constexpr (BITS == 4) {
                reinterpret_cast<uint32_t*>(row)[lane] = pack_nibbles(bytes);
            } else {
                reinterpret_cast<uint2*>(row)[lane] = bytes;
            }
        }
        if (lane == 0) *reinterpret_cast<__half2*>(grid) = __floats2half2_rn(best.scale, best.minimum);
    }
}

// qkv (tokens, q_heads + 2 * kv_heads, HEAD_DIM); cos, sin (positions, HALF_DIM); positions, slots (tokens); offsets
// (kv_heads, HEAD_DIM) or null; norms (HEAD_DIM) or null; cache (pages, kv_heads, RECORD); q_out (tokens, q_heads,
// HEAD_DIM). A slot is page * PAGE + index, or -1 for a token that is not kept.
extern "C" __global__ void __launch_bounds__(WARPS * LANES)
    rope_kv_append(const __half* qkv, const float* cos, const float* sin, const int64_t* positions,
                   const int64_t* slots, const __half* k_offset, const __half* v_offset, const __half* q_norm,
                   const __half* k_norm, float eps, int rotate, unsigned char* cache, __half* q_out, int tokens,
                   int q_heads, int kv_heads) {
    __shared__ __align__(8) unsigned char codes[WARPS][HEAD_DIM];

    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int heads = q_heads + 2 * kv_heads;
    const int item = blockIdx.x * WARPS + warp, token = item / heads, head = item % heads;
    allow_successor();
    wait_for_predecessor();
    if (token >= tokens) return;
    const bool is_query = head < q_heads, is_value = head >= q_heads + kv_heads;
    const int64_t slot = slots[token];
    if (!is_query && slot < 0) return;

    float x[VALUES];
#pragma unroll
    for (int j = 0; j < VALUES; ++j) x[j] = __half2float(qkv[int64_t(item) * HEAD_DIM + lane + LANES * j]);

    const int kv_head = is_value ? head - q_heads - kv_heads : head - q_heads;
    if (!is_value) {
        const __half* weight = is_query ? q_norm : k_norm;
        if (weight != nullptr) norm(x, weight, eps, lane);
        const int64_t angles = positions[token] * HALF_DIM;
        rope(x, cos + angles, sin + angles, lane);
    }
    const __half* offset = is_query ? nullptr : is_value ? v_offset : k_offset;
    if (offset != nullptr) {
#pragma unroll
        for (int j = 0; j < VALUES; ++j) {
            x[j] = __fsub_rn(x[j], __half2float(offset[kv_head * HEAD_DIM + lane + LANES * j]));
        }
    }
    if (rotate && !is_value) {
        hadamard(x, lane);
    } else {
#pragma unroll
        for (int j = 0; j < VALUES; ++j) x[j] = rounded(x[j]);
    }

    if (is_query) {
        __half* out = q_out + (int64_t(token) * q_heads + head) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < VALUES; ++j) out[lane + LANES * j] = __float2half_rn(x[j]);
        return;
    }
    const int index = slot % PAGE;
    unsigned char* record = cache + (slot / PAGE * kv_heads + kv_head) * RECORD;
    unsigned char* row = record + (is_value ? V_ROWS : 0) + index * ROW;
    store(x, row, record + GRIDS + index * GRID + (is_value ? GRID / 2 : 0), codes[warp], lane);
}
