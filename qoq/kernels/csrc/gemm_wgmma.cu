// out = x8 * W^T, scaled, plus bias, plus residual: int8 activations times 4-bit weights on wgmma, sm_90a.
//
// Compiled for one tile: ROWS weight rows (128 or 256) by TOKENS tokens (8, 16, 32, 64, 96, 128 or, with 128 rows, 256),
// STAGES steps of K in flight, SPLITS blocks of a cluster that share a tile along K, GROUP_SIZE 128, 64 or -1 (per
// channel). Same face and same bits as gemm_mma.cu, but the activations come as a tensor map, the blocks of a cluster
// meet in shared memory, and nothing is kept in `workspace`; and a launch may make some of the tiles.
//
//     consumers: one or two warpgroups       read 16 bytes per lane, dequantize, multiply, scale, store
//     producers: warp 0                      weights and their scales: bulk copies    }  a ring of STAGES steps with
//                warp 1                      activations: tensor copies               }  barriers `full` and `empty`
//
// Weights are the products' first operand, in registers; tokens the second, in shared memory. The 16 bytes per lane of
// a 32-row strip hold rows 0..15 in the low nibbles and rows 16..31 in the high ones. A warp takes both halves, and a
// warpgroup makes two 64-row products, `low` and `high`; with 256 tokens its registers hold the sums of one product, two
// warps share a strip, and a weight is dequantized for twice as many tokens. While the products of 32 features run, the
// next 32 are dequantized. With SPLITS == 1 a block takes tile after tile, its producers ahead of its consumers; else it
// takes one.
//
// With SWIGLU == 1 each half of a strip is 8 rows of a gate and the same 8 of an up, whose values a thread has in rows
// g and g + 8: out (M, N / 2) = silu(gate) * up, of gate and up rounded to fp16, without a residual.

#include "common/barrier.cuh"
#include "common/dequant.cuh"
#include "common/epilogue.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/swiglu.cuh"
#include "common/wgmma.cuh"

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
constexpr int BAND = 16;                // row tiles that run side by side

// Of a warp: halves of a strip, rows, and what it writes at once, of which it has TURNS.
constexpr int HALVES = TOKENS > 128 ? 1 : 2;
constexpr int WARP_ROWS = 16 * HALVES;
constexpr int BLOCKS = 2 / HALVES;      // of eight tokens
constexpr int PAIRED = SWIGLU ? 2 : 1;  // weight rows that make one of `out`
constexpr int WORDS = WARP_ROWS / PAIRED / 8;  // of 16 bytes, of each token
constexpr int TURNS = TOKENS / 8 / BLOCKS;
constexpr int AHEAD = TURNS < 4 ? TURNS : 4;   // residuals on their way

constexpr int WARPGROUP = 128;
constexpr int WARPS = ROWS / WARP_ROWS;
constexpr int CONSUMERS = WARPS * 32;   // threads
constexpr int GROUPS = CONSUMERS / WARPGROUP;
constexpr int THREADS = CONSUMERS + WARPGROUP;
constexpr int LEAD = STAGES / 2;        // steps that one warpgroup of consumers is ahead of the other
constexpr int AT_ONCE = TOKENS < 64 || SPLITS < 6 ? SPLITS : 4;  // sums read of other blocks; more leave no registers

// Three warpgroups start with 168 registers a thread; 128 int32 for each consumer need more.
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

// One warp: a lane for each strip, then one for each row of scales. Weights are there before the predecessor ends.
__device__ __forceinline__ void load_weights(const Linear& linear, const Work& work, Shared& shared) {
    const int lane = threadIdx.x % 32;
    const bool is_strip = lane < STRIPS;
    const int level = lane - STRIPS, group = level / 2;
    const uint32_t target = shared_address(is_strip ? static_cast<void*>(shared.ring[0].weights[lane % STRIPS])
                                                    : shared.levels[0][group % STEP_GROUPS][level % 2]);
    const int target_step = is_strip ? sizeof(Stage) : sizeof(shared.levels[0]);
    const int source_step = is_strip ? CHUNKS * CHUNK_BYTES : STEP_GROUPS * linear.N;
    const uint64_t policy = linear.M <= TOKENS ? evict_first() : keep_normally();  // read once, or by all token tiles
    Place at(shared);
    for (int index = work.first(); index < linear.end; index += work.stride()) {
        const int row = tile_at(index, linear).row;
        const int strips = min(STRIPS, (linear.N - row) / STRIP);
        const int64_t chunks_before = static_cast<int64_t>(row / STRIP + lane) * (linear.K / CHUNK);
        const uint8_t* table = level % 2 == 0 ? linear.s2 : linear.zeros;
        const uint8_t* source = is_strip ? linear.qweight + chunks_before * CHUNK_BYTES
                                         : table + static_cast<int64_t>(group) * linear.N + row;
        for (int step = work.begin; step < work.end; ++step, at.advance()) {
            const int chunks = min(CHUNKS, linear.K / CHUNK - step * CHUNKS);
            const int groups = GROUPED ? chunks / GROUP_CHUNKS : 0;
            wait(at.empty(), at.parity ^ 1);
            if (lane == 0) arrive_expecting(at.full(), strips * (chunks * CHUNK_BYTES + groups * 2 * STRIP));
            __syncwarp();
            if (is_strip ? lane < strips : group < groups) {
                bulk_copy(target + at.stage * target_step, source + static_cast<int64_t>(step) * source_step,
                          is_strip ? chunks * CHUNK_BYTES : strips * STRIP, at.full(), policy);
            }
        }
    }
}

// One thread. Zeros come from beyond M and K.
__device__ __forceinline__ void load_activations(const Linear& linear, const Work& work, Shared& shared) {
    prefetch_map(linear.x8);
    wait_for_predecessor();
    Place at(shared);
    for (int index = work.first(); index < linear.end; index += work.stride()) {
        const int token = tile_at(index, linear).token;
        for (int step = work.begin; step < work.end; ++step, at.advance()) {
            wait(at.empty(), at.parity ^ 1);
            arrive_expecting(at.full(), TOKENS * STEP);
            tensor_copy(shared_address(shared.ring[at.stage].x), linear.x8, step * STEP, token, at.full());
        }
    }
}

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
    bool exists;          // the strip, and this lane's word

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
    __device__ __forceinline__ uint4& at(int token, int word) const {
        return turned[token][word ^ token % 8 * WORDS / 8];
    }

    __device__ __forceinline__ uint4 residual(int turn) const {
        if (SWIGLU || linear.residual == nullptr || !within(turn)) return uint4{};
        return *reinterpret_cast<const uint4*>(linear.residual + place(turn));
    }

    // acc[4 * (HALVES * b + h) + 2 * i + e]: row 16 * h + 8 * i + g, token 8 * (turn * BLOCKS + b) + 2 * t + e.
    __device__ __forceinline__ void store(int turn, const int32_t (&acc)[8], const uint4& residual, int lane) const {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
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
        if constexpr (SWIGLU) {
            const uint32_t products[2] = {silu_mul(pairs[0], pairs[1]), silu_mul(pairs[2], pairs[3])};
            store_matrices_turned(column, products);
        } else {
            store_matrices_turned(column, pairs);
        }
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
__device__ __forceinline__ void take(int32_t (&acc)[8], const Sums& sums, int turn) {
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] = sums[i / 4 % HALVES][4 * (BLOCKS * turn + i / 4 / HALVES) + i % 4];
}

// The block's steps of a tile. `until_lead` counts them down to the one at which the other warpgroup may begin.
__device__ __forceinline__ void multiply_steps(Sums& sums, const Work& work, const Shared& shared, Place& at,
                                               int& until_lead, int warp, int lane) {
    __builtin_assume(work.begin < work.end);  // tiling.problem: no more splits than steps
    const int strip = warp * WARP_ROWS / STRIP, half = warp % 2;  // the half matters where a warp takes one alone
    uint32_t operands[2][HALVES][4];
    RowScales rows;
    uint32_t previous = 0;
    for (int step = work.begin; step < work.end; ++step, at.advance()) {
        if (until_lead-- == 0) arrive_at_barrier(3, CONSUMERS);
        const Stage& stage = shared.ring[at.stage];
        const uint64_t x = swizzled_rows(shared_address(stage.x));
        wait(at.full(), at.parity);
        uint4 next = stage.weights[strip][0][lane];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            auto& a = operands[chunk % 2];
            const uint4 packed = HALVES == 2 ? next : half_of(next, half);
            if (chunk + 1 < CHUNKS) next = stage.weights[strip][chunk + 1][lane];
            if constexpr (GROUPED) {
                if (chunk % GROUP_CHUNKS == 0) {
                    const auto& levels = shared.levels[at.stage][chunk / GROUP_CHUNKS];
                    const int column = strip * STRIP + lane / 4 * 4, shift = HALVES == 2 ? 0 : half * 16;
                    rows = unpack_scales(*reinterpret_cast<const uint32_t*>(&levels[0][column]) >> shift,
                                         *reinterpret_cast<const uint32_t*>(&levels[1][column]) >> shift);
                }
            }
            wait_products<1>();  // those before the last have left `a`, and the stage before
            if (chunk == 1 && step > work.begin && lane == 0) arrive(previous);
            if constexpr (GROUPED) {
                dequantize_low(a[0], packed, rows);
                if constexpr (HALVES == 2) dequantize_high(a[1], packed, rows);
            } else {
                codes_low(a[0], packed);
                if constexpr (HALVES == 2) codes_high(a[1], packed);
            }
            fence_registers(a);
#pragma unroll
            for (int h = 0; h < HALVES; ++h) multiply(sums[h], a[h], x + 2 * chunk);
            commit_products();
        }
        previous = at.empty();
    }
    wait_products<0>();
    if (lane == 0) arrive(previous);
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
        int32_t acc[8];
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
        int32_t acc[8];
        take(acc, sums, turn);
        parts[2 * turn * CONSUMERS] = make_int4(acc[0], acc[1], acc[2], acc[3]);
        parts[(2 * turn + 1) * CONSUMERS] = make_int4(acc[4], acc[5], acc[6], acc[7]);
    }
    arrive_at_cluster();
    wait_for_cluster();
    for (int turn = rank; turn < turns; turn += SPLITS) {
        const uint4 residual = output.residual(turn);
        const uint32_t place = shared_address(parts + 2 * turn * CONSUMERS);
        int32_t acc[8] = {};
#pragma unroll AT_ONCE
        for (int other = 0; other < SPLITS; ++other) {
            const int4 a = load_from_cluster(place, other);
            const int4 b = load_from_cluster(place + 16 * CONSUMERS, other);
            acc[0] += a.x, acc[1] += a.y, acc[2] += a.z, acc[3] += a.w;
            acc[4] += b.x, acc[5] += b.y, acc[6] += b.z, acc[7] += b.w;
        }
        output.store(turn, acc, residual, lane);
    }
    // No block ends while another reads its sums: each warp has what it read, and `out` may come later.
    arrive_at_cluster_unordered();
    wait_for_cluster();
}

__device__ __forceinline__ void consume(const Linear& linear, const Work& work, Shared& shared, int rank) {
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // one for all its lanes
    const int group = warp / 4, member = threadIdx.x % WARPGROUP;
    wait_for_predecessor();
    // Of two warpgroups one stores its tile while the other still multiplies.
    const bool staggered = SPLITS == 1 && GROUPS == 2 && work.end > LEAD && work.stride() < linear.end - linear.first;
    if (staggered && group == 1) named_barrier(3, CONSUMERS);
    int until_lead = staggered && group == 0 ? LEAD : -1;

    Place at(shared);
    for (int index = work.first(); index < linear.end; index += work.stride()) {
        const Tile tile = tile_at(index, linear);
        const int turns = turns_of(tile, linear);
        constexpr int EACH = (TOKENS + WARPGROUP - 1) / WARPGROUP;  // tokens of a thread
        float sx[EACH];
        int32_t token_sums[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int own = min(tile.token + member + i * WARPGROUP, linear.M - 1);
            sx[i] = linear.sx[own], token_sums[i] = linear.sums[own];
        }
        const auto share_scales = [&] {
            named_barrier(1 + group, WARPGROUP);  // all have stored the tile before
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                if (TOKENS >= WARPGROUP || member < TOKENS) {
                    shared.sx[group][member + i * WARPGROUP] = sx[i];
                    shared.sums[group][member + i * WARPGROUP] = token_sums[i];
                }
            }
            named_barrier(1 + group, WARPGROUP);
        };
        Sums sums = {};
        if constexpr (SPLITS == 1) {
            const RowVectors rows(linear, tile, warp, lane);  // come while products run
            multiply_steps(sums, work, shared, at, until_lead, warp, lane);
            share_scales();
            store_tile(Output(linear, rows, shared, tile, warp, lane), sums, turns, lane);
        } else {
            share_scales();
            multiply_steps(sums, work, shared, at, until_lead, warp, lane);
            const RowVectors rows(linear, tile, warp, lane);  // come while the cluster meets
            meet_and_store(Output(linear, rows, shared, tile, warp, lane), sums, shared, turns, rank, lane);
        }
    }
}

extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS, RESIDENT)
w4a8_gemm(const __grid_constant__ TensorMap x8,  // (M, K), in boxes of TOKENS by STEP, swizzled
          const float* sx,         // (M,)
          const int32_t* sums,     // (M,)
          const uint8_t* qweight,  // (N, K / 2), packed
          const __half* s1,        // (N,)
          const uint8_t* s2,       // (G, N), columns in packed order; null per channel, as `zeros`
          const uint8_t* zeros,    // (G, N)
          const __half* szero,     // (N,), null for groups
          const __half* bias,      // (N,) or null
          const __half* residual,  // (M, N) or null; may be `out`; none with SWIGLU
          __half* out,             // (M, N), with SWIGLU (M, N / 2)
          int32_t*,                // the workspace of gemm_mma.cu
          int M, int N, int K,
          int first, int end) {    // tiles: all, or some
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Linear linear{&x8, sx, sums, qweight, s1, s2, zeros, szero, bias, residual, out, M, N, K, first, end};
    const int rank = SPLITS == 1 ? 0 : cluster_rank();
    const Work work(linear, rank);
    const int thread = threadIdx.x;

    allow_successor();
    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(shared_address(&shared.full[stage]), 2);
            init_barrier(shared_address(&shared.empty[stage]), CONSUMERS / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();

    if (thread >= CONSUMERS) {
        if constexpr (SHIFT_REGISTERS) give_registers<PRODUCER_REGISTERS>();
        const int warp = (thread - CONSUMERS) / 32;
        if (warp == 0) load_weights(linear, work, shared);
        if (warp == 1 && thread % 32 == 0) load_activations(linear, work, shared);
        if constexpr (SPLITS > 1) {  // as the consumers do
            __syncwarp();
            for (int i = 0; i < 2; ++i) {
                arrive_at_cluster_unordered();
                wait_for_cluster();
            }
        }
    } else {
        if constexpr (SHIFT_REGISTERS) take_registers<CONSUMER_REGISTERS>();
        consume(linear, work, shared, rank);
    }
}
