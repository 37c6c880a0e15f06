// From QServe's packed 4-bit weights to the A operand of the tensor cores' m16 k32 u8 x s8 product.
//
// A strip is 32 rows of W. Lane 4 * g + t of a warp holds the 16 bytes of a 32 x 32 tile that belong to it: words x, y,
// z, w are registers a0..a3 of the fragment of rows 0..15 in their low nibbles, of rows 16..31 in their high nibbles.
//
// Two-level weights: w8 = code * s2 - z. The operand is the unsigned byte w8 + 128 = code * s2 + a, with a = 128 - z;
// one multiplication and addition serves the four bytes of a word, since no byte leaves 0..255 and so none carries into
// its neighbour. 128 times the sum of the activations, taken off at the end, makes up for the bias. Because z may be
// any integer that keeps w8 in int8, a needs nine bits: the byte of `zeros` gives its low eight (-z mod 256 with bit 7
// flipped), bit 7 of the byte of `s2` is set where a is negative.
#pragma once

#include "types.cuh"

constexpr uint32_t EACH_BYTE = 0x01010101;

// Scale and offset of rows g, g + 8, g + 16, g + 24 of a strip, for one group.
struct RowScales {
    uint32_t scale[4];   // s2
    uint32_t offset[4];  // a in each of the four bytes: a * EACH_BYTE mod 2^32
};

// Bytes of `word` as the nibbles of `selector` name them: 0..3, 4..7 for a zero, 8 + i for bit 7 of byte i, repeated.
__device__ __forceinline__ uint32_t select_bytes(uint32_t word, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(bytes) : "r"(word), "r"(selector));
    return bytes;
}

// `s2` and `zeros` are the words at column 4 * g of the strip's 32, where the columns stand in packed order.
__device__ __forceinline__ RowScales unpack_scales(uint32_t s2, uint32_t zeros) {
    const uint32_t scales = s2 & 31 * EACH_BYTE;
    const uint32_t low = zeros ^ 128 * EACH_BYTE;
    RowScales rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t negative = select_bytes(s2, (8 + i) * 0x1111);  // 0 or -1
        rows.scale[i] = select_bytes(scales, 0x4440 + i);
        rows.offset[i] = select_bytes(low, i * 0x1111) + negative * (256 * EACH_BYTE);
    }
    return rows;
}

__device__ __forceinline__ uint32_t low_codes(uint32_t packed) { return packed & 15 * EACH_BYTE; }
__device__ __forceinline__ uint32_t high_codes(uint32_t packed) { return packed >> 4 & 15 * EACH_BYTE; }

// What `dequantize_low` and `codes_low` take of rows 0..15, half 0, or 16..31, half 1.
__device__ __forceinline__ uint4 half_of(const uint4& packed, int half) {
    const int shift = half * 4;
    return make_uint4(packed.x >> shift, packed.y >> shift, packed.z >> shift, packed.w >> shift);
}

// Fragment of rows 0..15 of the strip: w8 + 128.
__device__ __forceinline__ void dequantize_low(uint32_t (&a)[4], const uint4& packed, const RowScales& rows) {
    a[0] = low_codes(packed.x) * rows.scale[0] + rows.offset[0];
    a[1] = low_codes(packed.y) * rows.scale[1] + rows.offset[1];
    a[2] = low_codes(packed.z) * rows.scale[0] + rows.offset[0];
    a[3] = low_codes(packed.w) * rows.scale[1] + rows.offset[1];
}

// Fragment of rows 16..31.
__device__ __forceinline__ void dequantize_high(uint32_t (&a)[4], const uint4& packed, const RowScales& rows) {
    a[0] = high_codes(packed.x) * rows.scale[2] + rows.offset[2];
    a[1] = high_codes(packed.y) * rows.scale[3] + rows.offset[3];
    a[2] = high_codes(packed.z) * rows.scale[2] + rows.offset[2];
    a[3] = high_codes(packed.w) * rows.scale[3] + rows.offset[3];
}

// Per-channel weights: the codes themselves in rows 0..15; in rows 16..31, to save a shift, 16 times the codes.
__device__ __forceinline__ void codes_low(uint32_t (&a)[4], const uint4& packed) {
    a[0] = low_codes(packed.x), a[1] = low_codes(packed.y), a[2] = low_codes(packed.z), a[3] = low_codes(packed.w);
}

__device__ __forceinline__ void codes_high(uint32_t (&a)[4], const uint4& packed) {
    constexpr uint32_t mask = 240 * EACH_BYTE;
    a[0] = packed.x & mask, a[1] = packed.y & mask, a[2] = packed.z & mask, a[3] = packed.w & mask;
}
