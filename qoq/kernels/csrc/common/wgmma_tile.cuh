// What the parts of gemm_wgmma.cu agree on: sizes, shared memory, and which tiles and steps a block takes. Defines
// are those of gemm_wgmma.cu.
#pragma once

#include <cuda_fp16.h>

#include "barrier.cuh"
#include "mma.cuh"
#include "types.cuh"

#ifndef SWIGLU
#define SWIGLU 0
#endif

constexpr int STRIP = 32;               // weight rows that are packed together
constexpr int STRIPS = ROWS / STRIP;
constexpr int STEP = 128;               // features of K in one stage
constexpr int CHUNK = 32;               // features of one product
constexpr int CHUNKS = STEP / CHUNK;
constexpr int CHUNK_BYTES = STRIP * CHUNK / 2;
constexpr bool GROUPED = GROUP_SIZE != -1;
constexpr int STEP_GROUPS = GROUPED ? STEP / GROUP_SIZE : 1;
constexpr int GROUP_CHUNKS = CHUNKS / STEP_GROUPS;
constexpr int PREFETCHED = (192 << 10) / (STRIPS * CHUNKS * CHUNK_BYTES);  // steps: those of all blocks fill half of L2
constexpr int BAND = 16;                // row tiles that run side by side

// Of a warp: halves of a strip, rows, and what it writes at once, of which it has TURNS.
constexpr int HALVES = TOKENS > 128 ? 1 : 2;
constexpr int WARP_ROWS = 16 * HALVES;
constexpr int PAIRED = SWIGLU ? 2 : 1;  // weight rows that make one of `out`
constexpr int WORDS = WARP_ROWS / PAIRED / 8;  // of 16 bytes, of each token
constexpr int BLOCKS = TOKENS == 8 ? 1 : 4 / WORDS;  // of eight tokens: a word for each lane
constexpr int SUMS = 4 * HALVES * BLOCKS;  // of a thread
constexpr int TURNS = TOKENS / 8 / BLOCKS;
constexpr int AHEAD = TURNS < 4 ? TURNS : 4;   // residuals on their way

constexpr int WARPGROUP = 128;
constexpr int WARPS = ROWS / WARP_ROWS;
constexpr int CONSUMERS = WARPS * 32;   // threads
constexpr int GROUPS = CONSUMERS / WARPGROUP;
constexpr int THREADS = CONSUMERS + WARPGROUP;
constexpr int LEAD = STAGES / 2;        // steps that one warpgroup of consumers is ahead of the other
constexpr int AT_ONCE = TOKENS < 64 || SPLITS < 6 ? SPLITS : 4;  // sums read of other blocks; more leave no registers

// Three warpgroups start with 168 registers a thread; consumers with more than 64 sums need more.
constexpr bool SHIFT_REGISTERS = ROWS * TOKENS > 256 * 64;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;

static_assert(GROUPS == 1 || GROUPS == 2, "one or two warpgroups of consumers");
static_assert(SPLITS >= 1 && SPLITS <= 8, "a cluster has at most eight blocks");
static_assert(STAGES >= 2, "one stage is read while another is written");

struct Stage {
    uint8_t x[TOKENS][STEP];            // 16-byte chunk c of token t at c ^ t % 8
    uint4 weights[STRIPS][CHUNKS][32];  // as packed
};

struct Shared {
    Stage ring[STAGES];                 // after the last step of a split tile: its sums
    uint8_t levels[STAGES][STEP_GROUPS][2][ROWS];  // s2, zeros
    uint4 turned[WARPS][8 * BLOCKS][WORDS];  // on their way out
    float sx[GROUPS][TOKENS];
    int32_t sums[GROUPS][TOKENS];
    uint64_t full[STAGES], empty[STAGES];
};

static_assert(sizeof(Stage) % 1024 == 0, "swizzled rows start at multiples of 1024 bytes");
static_assert(SPLITS == 1 || sizeof(Shared::ring) >= ROWS * TOKENS * 4, "the ring must hold the sums of a tile");

// Two blocks for a multiprocessor where its registers and its shared memory are enough.
constexpr bool FEW_REGISTERS = ROWS == 128 && TOKENS <= (SPLITS > 1 ? 64 : 32);
constexpr int RESIDENT = FEW_REGISTERS && 2 * (sizeof(Shared) + 1024) <= 228 * 1024 ? 2 : 1;

struct Linear {
    const TensorMap* x8;
    const float* sx;
    const int32_t* sums;
    const uint8_t* qweight;
    const __half* s1;
    const uint8_t *s2, *zeros;
    const __half *szero, *bias, *residual;
    __half* out;
    int M, N, K;
    int first, end;  // tiles
};

struct Tile {
    int row, token;  // its first
};

// What a block does: tiles first(), first() + stride(), ... before linear.end, and of each the steps begin..end of K.
struct Work {
    const Linear& linear;
    int begin, end;

    __device__ __forceinline__ Work(const Linear& linear, int rank) : linear(linear) {
        const int steps = (linear.K + STEP - 1) / STEP;
        begin = steps * rank / SPLITS;
        end = steps * (rank + 1) / SPLITS;
    }
    // not kept: registers are short
    __device__ __forceinline__ int first() const { return linear.first + blockIdx.x / SPLITS; }
    __device__ __forceinline__ int stride() const { return SPLITS == 1 ? gridDim.x : linear.end; }
};

// Bands of row tiles, inside a band all token tiles: blocks that run together share activations and weights.
__device__ __forceinline__ Tile tile_at(int index, const Linear& linear) {
    const int row_tiles = (linear.N + ROWS - 1) / ROWS;
    const int token_tiles = (linear.M + TOKENS - 1) / TOKENS;
    const int band = index / (BAND * token_tiles);
    const int inside = index - band * BAND * token_tiles;
    const int height = min(BAND, row_tiles - band * BAND);
    return {(band * BAND + inside % height) * ROWS, inside / height * TOKENS};
}

// A stage of the ring, its barriers, and the parity of their current phase.
struct Place {
    uint32_t barriers;
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ explicit Place(const Shared& shared) : barriers(shared_address(shared.full)) {}
    __device__ __forceinline__ uint32_t full() const { return barriers + 8 * stage; }
    __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * (STAGES + stage); }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
