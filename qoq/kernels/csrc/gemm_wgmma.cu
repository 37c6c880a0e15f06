// out = x8 * W^T, scaled, plus bias, plus residual: int8 activations times 4-bit weights on wgmma, sm_90a.
//
// Compiled for one tile: ROWS weight rows (128 or 256) by TOKENS tokens (8, 16, 32, 64, 96 or 128), STAGES steps of K
// in flight, SPLITS blocks of a cluster that share a tile along K, GROUP_SIZE 128, 64 or -1 (per channel). Same face
// and same bits as gemm_mma.cu, but the activations come as a tensor map, the blocks of a cluster meet in shared memory,
// and nothing is kept in `workspace`.
//
//     consumers: a warpgroup for 128 rows    read 16 bytes per lane, dequantize, multiply, scale, store
//     producers: warp 0                      weights and their scales: bulk copies    }  a ring of STAGES steps with
//                warp 1                      activations: tensor copies               }  barriers `full` and `empty`
//
// Weights are the products' first operand, in registers; tokens the second, in shared memory. A warp's 16 bytes per
// lane hold rows 0..15 of its 32-row strip in the low nibbles and rows 16..31 in the high ones: four strips give two
// 64-row products, `low` and `high`. While the products of 32 features run, the next 32 are dequantized. With
// SPLITS == 1 a block takes tile after tile, its producers ahead of its consumers; else it takes one.
//
// With SWIGLU == 1 each strip is 16 rows of a gate and 16 of an up, whose values a thread has in `low` and in `high`:
// out (M, N / 2) = silu(gate) * up, of gate and up rounded to fp16, without a residual.

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

constexpr int STRIP = 32;               // weight rows of a warp
constexpr int STRIPS = ROWS / STRIP;
constexpr int STEP = 128;               // features of K in one stage
constexpr int CHUNK = 32;               // features of one product
constexpr int CHUNKS = STEP / CHUNK;
constexpr int CHUNK_BYTES = STRIP * CHUNK / 2;
constexpr bool GROUPED = GROUP_SIZE != -1;
constexpr int STEP_GROUPS = GROUPED ? STEP / GROUP_SIZE : 1;
constexpr int GROUP_CHUNKS = CHUNKS / STEP_GROUPS;
constexpr int BLOCKS = TOKENS / 8;      // of eight tokens
constexpr int PAIRED = SWIGLU ? 2 : 1;  // weight rows that make one of `out`
constexpr int BAND = 16;                // row tiles that run side by side

constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = ROWS;         // threads
constexpr int THREADS = CONSUMERS + WARPGROUP;
constexpr int LEAD = STAGES / 2;        // steps that one warpgroup of consumers is ahead of the other
constexpr int AT_ONCE = TOKENS < 64 || SPLITS < 6 ? SPLITS : 4;  // sums read of other blocks; more leave no registers
constexpr int AHEAD = BLOCKS < 4 ? BLOCKS : 4;  // residuals on their way

// Three warpgroups start with 168 registers a thread; a tile of 128 int32 for each consumer needs more.
constexpr bool SHIFT_REGISTERS = ROWS * TOKENS > 256 * 64;
constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;

static_assert(ROWS == 128 || ROWS == 256, "one or two warpgroups of 128 rows");
static_assert(SPLITS >= 1 && SPLITS <= 8, "a cluster has at most eight blocks");
static_assert(STAGES >= 2, "one stage is read while another is written");

struct Stage {
    uint8_t x[TOKENS][STEP];            // 16-byte chunk c of token t at c ^ t % 8
    uint4 weights[STRIPS][CHUNKS][32];  // as packed
};

struct Shared {
    Stage ring[STAGES];                 // after the last step of a split tile: its sums
    uint8_t levels[STAGES][STEP_GROUPS][2][ROWS];  // s2, zeros
    uint4 turned[STRIPS][8][4];         // eight tokens by 32 rows of fp16, on their way out
    float sx[CONSUMERS / WARPGROUP][TOKENS];
    int32_t sums[CONSUMERS / WARPGROUP][TOKENS];
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
};

struct Tile {
    int row, token;  // its first
};

// What a block does: tiles first, first + stride, ..., and of each the steps begin..end of K.
struct Work {
    int first, stride, tiles, begin, end;

    __device__ __forceinline__ Work(const Linear& linear, int rank) {
        const int steps = (linear.K + STEP - 1) / STEP;
        tiles = (linear.N + ROWS - 1) / ROWS * ((linear.M + TOKENS - 1) / TOKENS);
        first = blockIdx.x / SPLITS;
        stride = SPLITS == 1 ? gridDim.x : tiles;
        begin = steps * rank / SPLITS;
        end = steps * (rank + 1) / SPLITS;
    }
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
    const int level = lane - STRIPS;
    const uint64_t policy = linear.M <= TOKENS ? evict_first() : keep_normally();  // read once, or by all token tiles
    Place at(shared);
    for (int index = work.first; index < work.tiles; index += work.stride) {
        const int row = tile_at(index, linear).row;
        const int strips = min(STRIPS, (linear.N - row) / STRIP);
        const int64_t chunks_before = static_cast<int64_t>(row / STRIP + lane) * (linear.K / CHUNK);
        const uint8_t* strip = linear.qweight + chunks_before * CHUNK_BYTES;
        const uint8_t* table = (level % 2 == 0 ? linear.s2 : linear.zeros) + row;
        for (int step = work.begin; step < work.end; ++step, at.advance()) {
            const int bytes = min(CHUNKS, linear.K / CHUNK - step * CHUNKS) * CHUNK_BYTES;
            const int groups = GROUPED ? min(STEP_GROUPS, linear.K / GROUP_SIZE - step * STEP_GROUPS) : 0;
            wait(at.empty(), at.parity ^ 1);
            if (lane == 0) arrive_expecting(at.full(), strips * (bytes + groups * 2 * STRIP));
            __syncwarp();
            if (lane < strips) {
                bulk_copy(shared_address(shared.ring[at.stage].weights[lane]), strip + step * (CHUNKS * CHUNK_BYTES),
                          bytes, at.full(), policy);
            } else if (level >= 0 && level < groups * 2) {
                const int64_t group = step * STEP_GROUPS + level / 2;
                bulk_copy(shared_address(shared.levels[at.stage][level / 2][level % 2]), table + group * linear.N,
                          strips * STRIP, at.full(), policy);
            }
        }
    }
}

// One thread. Zeros come from beyond M and K.
__device__ __forceinline__ void load_activations(const Linear& linear, const Work& work, Shared& shared) {
    prefetch_map(linear.x8);
    wait_for_predecessor();
    Place at(shared);
    for (int index = work.first; index < work.tiles; index += work.stride) {
        const int token = tile_at(index, linear).token;
        for (int step = work.begin; step < work.end; ++step, at.advance()) {
            wait(at.empty(), at.parity ^ 1);
            arrive_expecting(at.full(), TOKENS * STEP);
            tensor_copy(shared_address(shared.ring[at.stage].x), linear.x8, step * STEP, token, at.full());
        }
    }
}

// Where a warp's part of a tile goes: from sums in fragments to rows of `out`, eight tokens at a time.
struct Output {
    const Linear& linear;
    uint4 (&turned)[8][4];
    const float* sx;      // of the tile's tokens
    const int32_t* sums;
    __half scale[4], zero[4], shift[4];  // s1, szero, bias of rows g, g + 8, g + 16, g + 24 of the strip
    int64_t corner;       // in `out`: this lane's token and rows of the first block
    int token;            // this lane's of the first block
    bool exists;          // the strip, and this lane's rows of `out`

    __device__ __forceinline__ Output(const Linear& linear, Shared& shared, const Tile& tile, int strip, int lane)
        : linear(linear),
          turned(shared.turned[strip]),
          sx(shared.sx[strip * STRIP / WARPGROUP]),
          sums(shared.sums[strip * STRIP / WARPGROUP]) {
        const int row = tile.row + strip * STRIP;
        exists = row < linear.N && lane % 4 < 4 / PAIRED;
        token = tile.token + lane / 4;
        corner = static_cast<int64_t>(token) * (linear.N / PAIRED) + row / PAIRED + lane % 4 * 8;
        // Read something in any case: a value that may come or not would have to be there before the products start.
        const __half* bias = linear.bias != nullptr ? linear.bias : linear.s1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int n = (row < linear.N ? row : 0) + lane / 4 + 8 * i;
            scale[i] = linear.s1[n];
            zero[i] = GROUPED ? scale[i] : linear.szero[n];
            shift[i] = bias[n];
        }
    }

    __device__ __forceinline__ bool within(int block) const { return exists && token + block * 8 < linear.M; }

    __device__ __forceinline__ uint4 residual(int block) const {
        if (SWIGLU || linear.residual == nullptr || !within(block)) return uint4{};
        return *reinterpret_cast<const uint4*>(linear.residual + corner + static_cast<int64_t>(block * 8) * linear.N);
    }

    // acc[2 * i + e]: row g + 8 * i of the strip, token 8 * block + 2 * t + e.
    __device__ __forceinline__ void store(int block, const int32_t (&acc)[8], const uint4& residual, int lane) const {
        const int g = lane / 4, t = lane % 4;
        const float2 token_scale = *reinterpret_cast<const float2*>(&sx[block * 8 + 2 * t]);
        const int2 token_sum = *reinterpret_cast<const int2*>(&sums[block * 8 + 2 * t]);
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float s = __half2float(scale[i]);
            const float bias = linear.bias != nullptr ? __half2float(shift[i]) : -0.0f;  // y + -0 is y, -0 included
            const auto y = [&](int32_t value, int32_t sum, float token_scale) -> uint32_t {
                const float product =
                    GROUPED ? scale_grouped(value, sum, token_scale, s)
                            : scale_channel(i < 2 ? value : value >> 4, sum, token_scale, s, __half2float(zero[i]));
                return __half_as_ushort(finish(product, bias, true));
            };
            pairs[i] = y(acc[2 * i], token_sum.x, token_scale.x) | y(acc[2 * i + 1], token_sum.y, token_scale.y) << 16;
        }
        // Token r of rows 8 * i.. stands at i ^ r / 2, where no bank is met twice. Lane 4 * r + i gets it back.
        const uint32_t column = shared_address(&turned[lane % 8][lane / 8 ^ lane % 8 / 2]);
        if constexpr (SWIGLU) {
            const uint32_t products[2] = {silu_mul(pairs[0], pairs[2]), silu_mul(pairs[1], pairs[3])};
            store_matrices_turned(column, products);
        } else {
            store_matrices_turned(column, pairs);
        }
        __syncwarp();
        uint4 word = turned[g][t ^ g / 2];
        if (within(block)) {
            if (!SWIGLU && linear.residual != nullptr) {
                __half* y = reinterpret_cast<__half*>(&word);
                const __half* r = reinterpret_cast<const __half*>(&residual);
#pragma unroll
                for (int i = 0; i < 8; ++i) y[i] = add_residual(r[i], y[i]);
            }
            const int64_t below = static_cast<int64_t>(block * 8) * (linear.N / PAIRED);
            *reinterpret_cast<uint4*>(linear.out + corner + below) = word;
        }
        __syncwarp();
    }
};

// A thread's sums of a tile: as products leave them, of rows 0..15 and 16..31 of its strip.
struct Sums {
    int32_t low[TOKENS / 2] = {}, high[TOKENS / 2] = {};

    // Of eight tokens, as Output::store takes them.
    __device__ __forceinline__ void of_block(int block, int32_t (&acc)[8]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i] = low[4 * block + i], acc[4 + i] = high[4 * block + i];
    }
};

// The block's steps of a tile. `until_lead` counts them down to the one at which the other warpgroup may begin.
__device__ __forceinline__ void multiply_steps(Sums& sums, const Work& work, const Shared& shared, Place& at,
                                               int& until_lead, int strip, int lane) {
    __builtin_assume(work.begin < work.end);  // tiling.problem: no more splits than steps
    uint32_t a_low[2][4], a_high[2][4];
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
            uint32_t(&a)[4] = a_low[chunk % 2], (&b)[4] = a_high[chunk % 2];
            const uint4 packed = next;
            if (chunk + 1 < CHUNKS) next = stage.weights[strip][chunk + 1][lane];
            if constexpr (GROUPED) {
                if (chunk % GROUP_CHUNKS == 0) {
                    const auto& levels = shared.levels[at.stage][chunk / GROUP_CHUNKS];
                    const int column = strip * STRIP + lane / 4 * 4;
                    rows = unpack_scales(*reinterpret_cast<const uint32_t*>(&levels[0][column]),
                                         *reinterpret_cast<const uint32_t*>(&levels[1][column]));
                }
            }
            wait_products<1>();  // those before the last have left a and b, and the stage before
            if (chunk == 1 && step > work.begin && lane == 0) arrive(previous);
            if constexpr (GROUPED) {
                dequantize_low(a, packed, rows);
                dequantize_high(b, packed, rows);
            } else {
                codes_low(a, packed);
                codes_high(b, packed);
            }
            fence_registers(a, b);
            multiply(sums.low, a, x + 2 * chunk);
            multiply(sums.high, b, x + 2 * chunk);
            commit_products();
        }
        previous = at.empty();
    }
    wait_products<0>();
    if (lane == 0) arrive(previous);
}

// The tokens of a tile that exist, in eights.
__device__ __forceinline__ int blocks_of(const Tile& tile, const Linear& linear) {
    return min(BLOCKS, (linear.M - tile.token + 7) / 8);
}

__device__ __forceinline__ void store_tile(const Output& output, const Sums& sums, int blocks, int lane) {
    uint4 residuals[AHEAD];
#pragma unroll
    for (int block = 0; block < AHEAD; ++block) residuals[block] = output.residual(block);
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        if (block >= blocks) break;
        int32_t acc[8];
        sums.of_block(block, acc);
        const uint4 residual = residuals[block % AHEAD];
        if (block + AHEAD < BLOCKS) residuals[block % AHEAD] = output.residual(block + AHEAD);
        output.store(block, acc, residual, lane);
    }
}

// Each block of the cluster shows its sums, in the ring, and adds up and stores those of some tokens.
__device__ __forceinline__ void meet_and_store(const Output& output, const Sums& sums, Shared& shared, int blocks,
                                               int rank, int lane) {
    int4* parts = reinterpret_cast<int4*>(shared.ring) + threadIdx.x;
    named_barrier(3, CONSUMERS);  // all have read the last stage
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        int32_t acc[8];
        sums.of_block(block, acc);
        parts[2 * block * CONSUMERS] = make_int4(acc[0], acc[1], acc[2], acc[3]);
        parts[(2 * block + 1) * CONSUMERS] = make_int4(acc[4], acc[5], acc[6], acc[7]);
    }
    arrive_at_cluster();
    wait_for_cluster();
    for (int block = rank; block < blocks; block += SPLITS) {
        const uint4 residual = output.residual(block);
        const uint32_t place = shared_address(parts + 2 * block * CONSUMERS);
        int32_t acc[8] = {};
#pragma unroll AT_ONCE
        for (int other = 0; other < SPLITS; ++other) {
            const int4 a = load_from_cluster(place, other);
            const int4 b = load_from_cluster(place + 16 * CONSUMERS, other);
            acc[0] += a.x, acc[1] += a.y, acc[2] += a.z, acc[3] += a.w;
            acc[4] += b.x, acc[5] += b.y, acc[6] += b.z, acc[7] += b.w;
        }
        output.store(block, acc, residual, lane);
    }
    // No block ends while another reads its sums: each warp has what it read, and `out` may come later.
    arrive_at_cluster_unordered();
    wait_for_cluster();
}

__device__ __forceinline__ void consume(const Linear& linear, const Work& work, Shared& shared, int rank) {
    const int thread = threadIdx.x, lane = thread % 32, strip = thread / 32;
    const int group = __shfl_sync(0xffffffff, thread / WARPGROUP, 0), member = thread % WARPGROUP;  // one for a warp
    wait_for_predecessor();
    // Of two warpgroups one stores its tile while the other still multiplies.
    const bool staggered = SPLITS == 1 && ROWS == 256 && work.end > LEAD && work.stride < work.tiles;
    if (staggered && group == 1) named_barrier(3, CONSUMERS);
    int until_lead = staggered && group == 0 ? LEAD : -1;

    Place at(shared);
    for (int index = work.first; index < work.tiles; index += work.stride) {
        const Tile tile = tile_at(index, linear);
        const int own = min(tile.token + member, linear.M - 1), blocks = blocks_of(tile, linear);
        const float sx = linear.sx[own];
        const int32_t sum = linear.sums[own];
        const auto share_scales = [&] {
            named_barrier(1 + group, WARPGROUP);  // all have stored the tile before
            if (member < TOKENS) {
                shared.sx[group][member] = sx;
                shared.sums[group][member] = sum;
            }
            named_barrier(1 + group, WARPGROUP);
        };
        Sums sums;
        if constexpr (SPLITS == 1) {
            const Output output(linear, shared, tile, strip, lane);  // what it reads comes while products run
            multiply_steps(sums, work, shared, at, until_lead, strip, lane);
            share_scales();
            store_tile(output, sums, blocks, lane);
        } else {
            share_scales();
            multiply_steps(sums, work, shared, at, until_lead, strip, lane);
            const Output output(linear, shared, tile, strip, lane);  // while the cluster meets
            meet_and_store(output, sums, shared, blocks, rank, lane);
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
          int32_t*,                // the workspace and the splits of gemm_mma.cu
          int M, int N, int K, int) {
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const Linear linear{&x8, sx, sums, qweight, s1, s2, zeros, szero, bias, residual, out, M, N, K};
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
