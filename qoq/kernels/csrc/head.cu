// logits = x * W^T: the output head. fp16 times fp16, summed and written in fp32, on mma.sync, sm_80 and newer.
//
// Compiled for one tile: ROWS rows of W (128 or 256) by TOKENS tokens (8, 16, 32, 64 or 128), STAGES copies in flight.
// Rows of W are the products' m, tokens their n. Eight warps share a tile; a block takes tile after tile, and its
// copies run on from one into the next.
//
// Each logit is one chain of products in one accumulator, features 0..15, 16..31, ... in order, never split: the same
// chain in every tile and at every place in it. So its bits do not depend on the batch.

#include <cuda_fp16.h>

#include "common/mma.cuh"
#include "common/mma_f16.cuh"
#include "common/overlap.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int STEP = 64;                              // features of K in one stage
constexpr int CHUNKS = STEP / 8;                      // of 16 bytes in a line of a stage
constexpr int PRODUCTS = STEP / 16;                   // one after the other in a stage
constexpr int LINES = THREADS / CHUNKS;               // that all threads copy at once
constexpr int TOKEN_WARPS = TOKENS >= 64 ? 2 : 1;     // side by side
constexpr int WARP_ROWS = ROWS * TOKEN_WARPS / WARPS;
constexpr int WARP_TOKENS = TOKENS / TOKEN_WARPS;
constexpr int ROW_BLOCKS = WARP_ROWS / 16, TOKEN_BLOCKS = WARP_TOKENS / 8;

static_assert(ROWS % LINES == 0 && WARP_ROWS % 16 == 0, "ROWS is 128 or 256");
static_assert(TOKENS == 8 || WARP_TOKENS % 16 == 0, "TOKENS is 8 or a multiple of 16");
static_assert(STAGES >= 2, "one stage is read while another is written");

// Chunk c of line l stands at c ^ l % 8: neither the copies nor ldmatrix meet a bank twice.
struct alignas(128) Stage {
    __half rows[ROWS][STEP];
    __half tokens[TOKENS][STEP];
};

struct Head {
    const __half *x, *weight;
    float* logits;
    int M, V, K;

    __device__ __forceinline__ int token_tiles() const { return (M + TOKENS - 1) / TOKENS; }
    __device__ __forceinline__ int tiles() const { return (V + ROWS - 1) / ROWS * token_tiles(); }
};

// Where the next stage comes from. Each thread copies one chunk of every LINES-th line.
struct Source {
    const Head& head;
    const int line, chunk;      // the first line, the chunk of a line
    int tile, feature;          // the feature: of this thread's chunk
    const __half *row, *token;  // its first
    int rows_left, tokens_left;

    __device__ __forceinline__ Source(const Head& head)
        : head(head), line(threadIdx.x / CHUNKS), chunk(threadIdx.x % CHUNKS) {
        enter(blockIdx.x);
    }

    __device__ __forceinline__ bool exists() const { return tile < head.tiles(); }

    __device__ __forceinline__ void enter(int tile) {
        this->tile = tile;
        feature = chunk * 8;
        const int first_row = tile / head.token_tiles() * ROWS + line;
        const int first_token = tile % head.token_tiles() * TOKENS + line;
        row = head.weight + (static_cast<int64_t>(first_row) * head.K + feature);
        token = head.x + (static_cast<int64_t>(first_token) * head.K + feature);
        rows_left = head.V - first_row;
        tokens_left = head.M - first_token;
    }

    __device__ __forceinline__ void advance() {
        feature += STEP, row += STEP, token += STEP;
        if (feature - chunk * 8 >= head.K) enter(tile + gridDim.x);
    }

    __device__ __forceinline__ void copy_rows(Stage& stage) const { copy(stage.rows, row, rows_left); }
    __device__ __forceinline__ void copy_tokens(Stage& stage) const { copy(stage.tokens, token, tokens_left); }

    // Lines and features that do not exist become zeros.
    template <int COUNT>
    __device__ __forceinline__ void copy(__half (&lines)[COUNT][STEP], const __half* from, int left) const {
        if (COUNT < LINES && line >= COUNT) return;
#pragma unroll
        for (int i = 0; i < COUNT; i += LINES) {
            copy16_async(&lines[line + i][(chunk ^ line % 8) * 8], from + static_cast<int64_t>(i) * head.K,
                         i < left && feature < head.K);
        }
    }
};

using Sums = float[ROW_BLOCKS][TOKEN_BLOCKS][4];

struct Fragments {
    uint32_t rows[ROW_BLOCKS][4], tokens[(TOKEN_BLOCKS + 1) / 2][4];

    // Of 16 features. Addresses are of what this lane names to ldmatrix, of the first 16: lines have 128 bytes, so
    // that flipping bits 5 and 6 finds the others.
    __device__ __forceinline__ void load(uint32_t row, uint32_t token, int product) {
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) load_matrices(rows[i], (row ^ product * 32) + i * 16 * STEP * 2);
#pragma unroll
        for (int i = 0; i < (TOKEN_BLOCKS + 1) / 2; ++i) {
            load_matrices(tokens[i], (token ^ product * 32) + i * 16 * STEP * 2);
        }
    }

    __device__ __forceinline__ void multiply(Sums& sums) const {
#pragma unroll
        for (int n = 0; n < TOKEN_BLOCKS; ++n) {
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; ++m) {
                multiply_add(sums[m][n], rows[m], tokens[n / 2][n % 2 * 2], tokens[n / 2][n % 2 * 2 + 1]);
            }
        }
    }
};

// Eight rows of a token are 32 bytes side by side.
__device__ __forceinline__ void store(const Head& head, const Sums& sums, int first_row, int first_token, int lane) {
    const int row = first_row + lane / 4;
#pragma unroll
    for (int n = 0; n < TOKEN_BLOCKS; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = first_token + n * 8 + lane % 4 * 2 + i;
            if (token >= head.M) continue;
            float* line = head.logits + (static_cast<int64_t>(token) * head.V + row);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; ++m) {
                if (row + m * 16 < head.V) line[m * 16] = sums[m][n][i];
                if (row + m * 16 + 8 < head.V) line[m * 16 + 8] = sums[m][n][2 + i];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
lm_head(const __half* x,       // (M, K)
        const __half* weight,  // (V, K), K % 8 == 0
        float* logits,         // (M, V)
        int M, int V, int K) {
    allow_successor();
    extern __shared__ __align__(128) uint8_t shared[];
    Stage* ring = reinterpret_cast<Stage*>(shared);
    const Head head{x, weight, logits, M, V, K};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / TOKEN_WARPS * WARP_ROWS, warp_token = warp % TOKEN_WARPS * WARP_TOKENS;

    // Weights are there before the predecessor ends. They belong to the first batch of copies.
    Source source(head);
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (source.exists()) source.copy_rows(ring[stage]);
        source.advance();
    }
    wait_for_predecessor();
    source.enter(blockIdx.x);
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (source.exists()) source.copy_tokens(ring[stage]);
        commit_copies();
        source.advance();
    }

    // ldmatrix: rows 0..7 and 8..15 of the first 8 features, then of the next; tokens 0..7 of both, then 8..15.
    const int row_line = warp_row + lane % 16, row_chunk = lane / 16;
    const int token_line = warp_token + (lane / 16 * 8 + lane % 8) % WARP_TOKENS, token_chunk = lane / 8 % 2;
    const uint32_t first_row = shared_address(&ring->rows[row_line][(row_chunk ^ row_line % 8) * 8]);
    const uint32_t first_token = shared_address(&ring->tokens[token_line][(token_chunk ^ token_line % 8) * 8]);

    Fragments fragments[2];
    int slot = 0;
    wait_copies<STAGES - 2>();
    __syncthreads();
    fragments[0].load(first_row, first_token, 0);

    const int steps = (K + STEP - 1) / STEP;
    for (int tile = blockIdx.x; tile < head.tiles(); tile += gridDim.x) {
        Sums sums = {};
        for (int step = 0; step < steps; ++step) {
            // All have read the stage before this one.
            Stage& free = ring[slot == 0 ? STAGES - 1 : slot - 1];
            if (source.exists()) {
                source.copy_rows(free);
                source.copy_tokens(free);
            }
            commit_copies();
            source.advance();
#pragma unroll
            for (int product = 0; product < PRODUCTS; ++product) {
                if (product == PRODUCTS - 1) {
                    wait_copies<STAGES - 2>();
                    __syncthreads();  // the next stage has come, and all have read this one
                    slot = slot + 1 == STAGES ? 0 : slot + 1;
                }
                const uint32_t stage = slot * sizeof(Stage);
                fragments[(product + 1) % 2].load(first_row + stage, first_token + stage, (product + 1) % PRODUCTS);
                fragments[product % 2].multiply(sums);
            }
        }
        store(head, sums, tile / head.token_tiles() * ROWS + warp_row,
              tile % head.token_tiles() * TOKENS + warp_token, lane);
    }
}
