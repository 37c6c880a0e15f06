// Pages back to rows: K and V of some sequences, dequantized to fp16, one sequence after the other.
//
//   k[i] = fp16(code * scale + minimum), v[i] = fp16((code * scale + minimum) + offset)
//
// K stays as it was stored, without its offset and rotated, as the queries are; V gets its offset back. A thread makes
// 8 neighbouring dims. Bound by the write of fp16. Defines: HEAD_DIM, BITS (common/kv_page.cuh).

#include <cuda_fp16.h>

#include "common/kv_page.cuh"
#include "common/overlap.cuh"
#include "common/types.cuh"

constexpr int THREADS = 256, DIMS = 8, PIECES = HEAD_DIM / DIMS;

// Eight codes, BITS bytes, as one load takes them.
template <int WIDTH>
struct PieceOf;
template <>
struct PieceOf<4> {
    using Type = uint32_t;
};
template <>
struct PieceOf<8> {
    using Type = uint2;
};
template <>
struct PieceOf<16> {
    using Type = uint4;
};
using Piece = PieceOf<BITS>::Type;

__device__ __forceinline__ float2 half_pair(uint32_t bits) {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}

// Codes, or values of 16 bits, 2 * pair and 2 * pair + 1.
__device__ __forceinline__ float2 codes(const Piece& piece, int pair) {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(&piece);
    if constexpr (BITS == 4) return make_float2(bytes[pair] & 15, bytes[pair] >> 4);
    if constexpr (BITS == 8) return make_float2(bytes[2 * pair], bytes[2 * pair + 1]);
    return half_pair(reinterpret_cast<const uint32_t*>(&piece)[pair % (BITS / 4)]);
}

// The sequence whose rows start at or before `row`; starts (sequences + 1) rises from 0.
__device__ int sequence_of(int row, const int32_t* starts, int sequences) {
    int low = 0, high = sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (starts[middle] <= row ? low : high) = middle;
    }
    return low;
}

// cache (pages, kv_heads, RECORD); block_tables (sequences, max_pages); v_offset (kv_heads, HEAD_DIM) or null; k, v
// (rows, kv_heads, HEAD_DIM). blockIdx.y is 0 for K, 1 for V.
extern "C" __global__ void __launch_bounds__(THREADS)
    kv_gather(const unsigned char* cache, const int32_t* block_tables, const int32_t* starts, const __half* v_offset,
              __half* k, __half* v, int rows, int sequences, int kv_heads, int max_pages) {
    const int64_t item = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    const int piece = item % PIECES, head = item / PIECES % kv_heads, row = item / PIECES / kv_heads;
    allow_successor();
    wait_for_predecessor();
    if (row >= rows) return;
    const bool is_value = blockIdx.y == 1;

    const int b = sequence_of(row, starts, sequences), token = row - starts[b], index = token % PAGE;
    const int64_t page = block_tables[int64_t(b) * max_pages + token / PAGE];
    const unsigned char* record = cache + (page * kv_heads + head) * RECORD;
    const Piece raw = reinterpret_cast<const Piece*>(record + (is_value ? V_ROWS : 0) + index * ROW)[piece];

    float2 grid = make_float2(1.0f, 0.0f);  // scale, minimum
    if constexpr (BITS < 16) {
        const unsigned char* both = record + GRIDS + index * GRID + (is_value ? GRID / 2 : 0);
        grid = half_pair(*reinterpret_cast<const uint32_t*>(both));
    }
    uint4 offset{}, out;
    if (is_value && v_offset != nullptr) offset = reinterpret_cast<const uint4*>(v_offset + head * HEAD_DIM)[piece];
    const auto two = [&](int pair) {
        const float2 code = codes(raw, pair), plus = half_pair(reinterpret_cast<const uint32_t*>(&offset)[pair]);
        const auto value = [&](float x, float y) {
            return __fadd_rn(BITS < 16 ? __fadd_rn(__fmul_rn(x, grid.x), grid.y) : x, y);
        };
        const __half2 both = __floats2half2_rn(value(code.x, plus.x), value(code.y, plus.y));
        return *reinterpret_cast<const uint32_t*>(&both);
    };
    out.x = two(0), out.y = two(1), out.z = two(2), out.w = two(3);
    reinterpret_cast<uint4*>(is_value ? v : k)[item] = out;
}
