// From packed cache codes to fp16 tensor-core operands without a multiplication: bits in the mantissa under a fixed
// exponent read offset + code / unit, exactly. A nibble at bits 0..3 or a byte under the exponent of 1024 reads
// 1024 + code, a nibble at bits 4..7 under that of 64 reads 64 + code, one at bits 6..9 under that of 1 reads
// 1 + code / 16. Who multiplies takes the offsets off its sums.
#pragma once

#include "types.cuh"

// Halves 1, 64, 1024, twice in a word. Not constexpr: the compiler sets a constant that it knows anew before each use.
__constant__ uint32_t exponents_of_1_64_1024[3] = {0x3c003c00, 0x54005400, 0x64006400};

struct Exponents {
    uint32_t of_1 = exponents_of_1_64_1024[0], of_64 = exponents_of_1_64_1024[1], of_1024 = exponents_of_1_64_1024[2];
};

// Bytes FIRST and SECOND of `word`, each under the exponent of 1024.
template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t bytes_1024(uint32_t word, Exponents exponents) {
    return __byte_perm(word, exponents.of_1024, 0x5050 | SECOND << 8 | FIRST);
}

// WORDS neighbouring words of a K row as a lane's part of the A operand of STEPS products over 16 dims: `low[i]` is
// columns 2t, 2t+1 of product i, `high[i]` columns 2t+8, 2t+9. Offsets are LOW and HIGH; the unit is 1.
template <int WIDTH>
struct KeyWords;

// Nibbles (0, 4) and (1, 5), then (2, 6) and (3, 7).
template <>
struct KeyWords<4> {
    static constexpr int WORDS = 1, STEPS = 2;
    static constexpr float LOW = 1024.0f, HIGH = 64.0f;
    uint32_t low[2], high[2];
    __device__ __forceinline__ KeyWords(const uint32_t* words, Exponents exponents) {
        uint32_t word = words[0];
#pragma unroll
        for (int i = 0; i < 2; ++i, word >>= 8) {
            low[i] = (word & 0x000f000f) | exponents.of_1024;
            high[i] = (word & 0x00f000f0) | exponents.of_64;
        }
    }
};

// Bytes (0, 1) and (2, 3).
template <>
struct KeyWords<8> {
    static constexpr int WORDS = 1, STEPS = 1;
    static constexpr float LOW = 1024.0f, HIGH = 1024.0f;
    uint32_t low[1], high[1];
    __device__ __forceinline__ KeyWords(const uint32_t* words, Exponents exponents)
        : low{bytes_1024<0, 1>(words[0], exponents)}, high{bytes_1024<2, 3>(words[0], exponents)} {}
};

// Values as they are.
template <>
struct KeyWords<16> {
    static constexpr int WORDS = 2, STEPS = 1;
    static constexpr float LOW = 0.0f, HIGH = 0.0f;
    uint32_t low[1], high[1];
    __device__ __forceinline__ KeyWords(const uint32_t* words, Exponents exponents) : low{words[0]}, high{words[1]} {}
};

// A word of V rows as `load_transposed` gives it: in each half, 16 / WIDTH neighbouring dims of one of two tokens.
// `dim[i]` holds dim i of both tokens, as OFFSET + code / UNIT. The smaller the offset beside the codes, the less the
// sums over many tokens lose.
template <int WIDTH>
struct ValueWord;

template <>
struct ValueWord<4> {
    static constexpr float OFFSET = 1.0f, UNIT = 16.0f;
    uint32_t dim[4];
    __device__ __forceinline__ ValueWord(uint32_t word, Exponents exponents) {
        dim[0] = (word << 6 & 0x03c003c0) | exponents.of_1;
        dim[1] = (word << 2 & 0x03c003c0) | exponents.of_1;
        dim[2] = (word >> 2 & 0x03c003c0) | exponents.of_1;
        dim[3] = (word >> 6 & 0x03c003c0) | exponents.of_1;
    }
};

template <>
struct ValueWord<8> {
    static constexpr float OFFSET = 1024.0f, UNIT = 1.0f;
    uint32_t dim[2];
    __device__ __forceinline__ ValueWord(uint32_t word, Exponents exponents)
        : dim{bytes_1024<0, 2>(word, exponents), bytes_1024<1, 3>(word, exponents)} {}
};

template <>
struct ValueWord<16> {
    static constexpr float OFFSET = 0.0f, UNIT = 1.0f;
    uint32_t dim[1];
    __device__ __forceinline__ ValueWord(uint32_t word, Exponents exponents) : dim{word} {}
};
