// The end of a tile of gemm_wgmma.cu: a warp's sums, those of a cluster added up, are scaled, rounded, turned in shared
// memory and stored as rows of `out`.
#pragma once

#include "barrier.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "swiglu.cuh"
#include "wgmma.cuh"
#include "wgmma_tile.cuh"

// s1, szero and bias of a thread's rows: g, g + 8, ... of its warp's. Read before they are needed.
struct RowVectors {
    __half scale[2 * HALVES], zero[2 * HALVES], shift[2 * HALVES];

    __device__ __forceinline__ RowVectors(const Linear& linear, const Tile& tile, int warp, int lane) {
        const int row = tile.row + warp * WARP_ROWS;
        // Read something in any case: a value that may come or not would have to be there before the products start.
        const __half* bias = linear.bias != nullptr ? linear.bias : linear.s1;
#pragma unroll
        for (int i = 0; i < 2 * HALVES; ++i) {
            const int n = (row < linear.N ? row : 0) + lane / 4 + 8 * i;
            scale[i] = linear.s1[n];
            zero[i] = GROUPED ? scale[i] : linear.szero[n];
            shift[i] = bias[n];
        }
    }
};

// Where a warp's part of a tile goes: from sums in fragments to rows of `out`, 8 * BLOCKS tokens at a time.
struct Output {
    const Linear& linear;
    const RowVectors& rows;
    uint4 (&turned)[8 * BLOCKS][WORDS];
    const float* sx;      // of the tile's tokens
    const int32_t* sums;
    int64_t corner;       // in `out`: this lane's token and rows of the first turn
    int token;            // this lane's of the first turn
    bool exists;          // the warp's rows, and this lane's word

    __device__ __forceinline__ Output(const Linear& linear, const RowVectors& rows, Shared& shared, const Tile& tile,
                                      int warp, int lane)
        : linear(linear),
          rows(rows),
          turned(shared.turned[warp]),
          sx(shared.sx[warp / 4]),
          sums(shared.sums[warp / 4]) {
        const int row = tile.row + warp * WARP_ROWS;
        exists = row < linear.N && lane < 8 * BLOCKS * WORDS;
        token = tile.token + lane / WORDS;
        corner = static_cast<int64_t>(token) * (linear.N / PAIRED) + row / PAIRED + lane % WORDS * 8;
    }

    __device__ __forceinline__ bool within(int turn) const { return exists && token + turn * 8 * BLOCKS < linear.M; }

    __device__ __forceinline__ int64_t place(int turn) const {
        return corner + static_cast<int64_t>(turn * 8 * BLOCKS) * (linear.N / PAIRED);
    }

    // Where 16 bytes of `turned` stand: no bank is met twice.
    __device__ __forceinline__ uint4& at(int line, int word) const {
        return turned[line][word ^ line % 8 * WORDS / 8];
    }

    __device__ __forceinline__ uint4 residual(int turn) const {
        if (SWIGLU || linear.residual == nullptr || !within(turn)) return uint4{};
        return *reinterpret_cast<const uint4*>(linear.residual + place(turn));
    }

    // acc[4 * (HALVES * b + h) + 2 * i + e]: row 16 * h + 8 * i + g, token 8 * (turn * BLOCKS + b) + 2 * t + e.
    __device__ __forceinline__ void store(int turn, const int32_t (&acc)[SUMS], const uint4& residual, int lane) const {
        uint32_t pairs[SUMS / 2];
#pragma unroll
        for (int i = 0; i < SUMS / 2; ++i) {
            const int block = turn * BLOCKS + i / (2 * HALVES), row = i % (2 * HALVES);
            const float2 token_scale = *reinterpret_cast<const float2*>(&sx[block * 8 + lane % 4 * 2]);
            const int2 token_sum = *reinterpret_cast<const int2*>(&sums[block * 8 + lane % 4 * 2]);
            const float s = __half2float(rows.scale[row]);
            const float bias = linear.bias != nullptr ? __half2float(rows.shift[row]) : -0.0f;  // y + -0 is y, -0 too
            const auto y = [&](int32_t value, int32_t sum, float token_scale) -> uint32_t {
                const int32_t codes = HALVES == 2 && row >= 2 ? value >> 4 : value;  // codes_high
                const float product = GROUPED
                                          ? scale_grouped(value, sum, token_scale, s)
                                          : scale_channel(codes, sum, token_scale, s, __half2float(rows.zero[row]));
                return __half_as_ushort(finish(product, bias, true));
            };
            pairs[i] = y(acc[2 * i], token_sum.x, token_scale.x) | y(acc[2 * i + 1], token_sum.y, token_scale.y) << 16;
        }
        // Columns are tokens. Matrix after matrix: of a block of tokens its words.
        const uint32_t column = shared_address(&at(lane / 8 / WORDS % BLOCKS * 8 + lane % 8, lane / 8 % WORDS));
        uint32_t matrices[SUMS / 2 / PAIRED];
#pragma unroll
        for (int i = 0; i < SUMS / 2 / PAIRED; ++i) {
            matrices[i] = SWIGLU ? silu_mul(pairs[PAIRED * i], pairs[PAIRED * i + PAIRED - 1]) : pairs[i];
        }
        store_matrices_turned(column, matrices);
        __syncwarp();
        if (within(turn)) {
            uint4 word = at(lane / WORDS, lane % WORDS);
            if (!SWIGLU && linear.residual != nullptr) {
                __half* y = reinterpret_cast<__half*>(&word);
                const __half* r = reinterpret_cast<const __half*>(&residual);
#pragma unroll
                for (int i = 0; i < 8; ++i) y[i] = add_residual(r[i], y[i]);
            }
            *reinterpret_cast<uint4*>(linear.out + place(turn)) = word;
        }
        __syncwarp();
    }
};

// A thread's sums of a tile, as products leave them: for each half of a strip and eight tokens two rows and two tokens.
using Sums = int32_t[HALVES][TOKENS / 2];

// Of one turn, as Output::store takes them.
__device__ __forceinline__ void take(int32_t (&acc)[SUMS], const Sums& sums, int turn) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) acc[i] = sums[i / 4 % HALVES][4 * (BLOCKS * turn + i / 4 / HALVES) + i % 4];
}

// The turns in which a tile is written: as many as its tokens need.
__device__ __forceinline__ int turns_of(const Tile& tile, const Linear& linear) {
    return min(TURNS, (linear.M - tile.token + 8 * BLOCKS - 1) / (8 * BLOCKS));
}

__device__ __forceinline__ void store_tile(const Output& output, const Sums& sums, int turns, int lane) {
    uint4 residuals[AHEAD];
#pragma unroll
    for (int turn = 0; turn < AHEAD; ++turn) residuals[turn] = output.residual(turn);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        if (turn >= turns) break;
        int32_t acc[SUMS];
        take(acc, sums, turn);
        const uint4 residual = residuals[turn % AHEAD];
        if (turn + AHEAD < TURNS) residuals[turn % AHEAD] = output.residual(turn + AHEAD);
        output.store(turn, acc, residual, lane);
    }
}

// Each block of the cluster shows its sums, in the ring, and adds up and stores those of some tokens.
__device__ __forceinline__ void meet_and_store(const Output& output, const Sums& sums, Shared& shared, int turns,
                                               int rank, int lane) {
    int4* parts = reinterpret_cast<int4*>(shared.ring) + threadIdx.x;
    named_barrier(3, CONSUMERS);  // all have read the last stage
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        int32_t acc[SUMS];
        take(acc, sums, turn);
#pragma unroll
        for (int i = 0; i < SUMS / 4; ++i) {
            parts[(SUMS / 4 * turn + i) * CONSUMERS] =
                make_int4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        }
    }
    arrive_at_cluster();
    wait_for_cluster();
    for (int turn = rank; turn < turns; turn += SPLITS) {
        const uint4 residual = output.residual(turn);
        const uint32_t place = shared_address(parts + SUMS / 4 * turn * CONSUMERS);
        int32_t acc[SUMS] = {};
#pragma unroll AT_ONCE
        for (int other = 0; other < SPLITS; ++other) {
#pragma unroll
            for (int i = 0; i < SUMS / 4; ++i) {
                const int4 a = load_from_cluster(place + 16 * i * CONSUMERS, other);
                acc[4 * i] += a.x, acc[4 * i + 1] += a.y, acc[4 * i + 2] += a.z, acc[4 * i + 3] += a.w;
            }
        }
        output.store(turn, acc, residual, lane);
    }
    // No block ends while another reads its sums: each warp has what it read, and `out` may come later.
    arrive_at_cluster_unordered();
    wait_for_cluster();
}
