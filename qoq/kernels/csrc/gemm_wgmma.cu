// out = x8 * W^T, scaled, plus bias, plus residual: int8 activations times 4-bit weights on wgmma, sm_90a.
//
// Compiled for one tile: ROWS weight rows (128 or 256) by TOKENS tokens (8, 16, 32, 64, 96, 128; 256 with 128 rows),
// STAGES steps of K in flight, SPLITS blocks of a cluster that share a tile along K, GROUP_SIZE 128, 64 or -1 (per
// channel). Same face and same bits as gemm_mma.cu, but the activations come as a tensor map, the blocks of a cluster
// meet in shared memory, nothing is kept in `workspace`, and a launch may make some of the tiles.
//
//     consumers: one or two warpgroups       read 16 bytes per lane, dequantize, multiply, scale, store
//     producers: warp 0                      weights and their scales: bulk copies    }  a ring of STAGES steps with
//                warp 1                      activations: tensor copies               }  barriers `full` and `empty`
//
// Weights are the products' first operand, in registers; tokens the second, in shared memory. The 16 bytes per lane of
// a 32-row strip hold rows 0..15 in the low nibbles and rows 16..31 in the high ones. A warp takes both halves, and a
// warpgroup makes two 64-row products. With 256 tokens its registers hold the sums of one: two warps share a strip, and
// a weight is dequantized for twice as many tokens. While the products of 32 features run, the next 32 are dequantized.
// With SPLITS == 1 a block takes tile after tile, its producers ahead of its consumers; else it takes one.
//
// With SWIGLU == 1 each half of a strip is 8 rows of a gate and the same 8 of an up, whose values a thread has in rows
// g and g + 8: out (M, N / 2) = silu(gate) * up, of gate and up rounded to fp16, without a residual.

#include "common/barrier.cuh"
#include "common/dequant.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/wgmma.cuh"
#include "common/wgmma_output.cuh"
#include "common/wgmma_tile.cuh"

// One warp: a lane for each strip, then one for each row of scales. Weights are there before the predecessor ends.
__device__ __forceinline__ void load_weights(const Work& work, Shared& shared) {
    const Linear& linear = work.linear;
    const int lane = threadIdx.x % 32;
    const bool is_strip = lane < STRIPS;
    const int level = lane - STRIPS, group = level / 2;
    const uint32_t target = shared_address(is_strip ? static_cast<void*>(shared.ring[0].weights[lane % STRIPS])
                                                    : shared.levels[0][group % STEP_GROUPS][level % 2]);
    const int target_step = is_strip ? sizeof(Stage) : sizeof(shared.levels[0]);
    const int source_step = is_strip ? CHUNKS * CHUNK_BYTES : STEP_GROUPS * linear.N;
    const bool read_once = linear.M <= TOKENS;  // or by all token tiles
    const uint64_t policy = read_once ? evict_first() : keep_normally();
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
            // Where the ring is full before the predecessor has ended, the next steps come as far as L2.
            if (SPLITS == 1 && read_once && index == work.first() && step == STAGES) {
                for (int later = step; later < min(work.end, STAGES + PREFETCHED); ++later) {
                    if (__any_sync(0xffffffff, is_over(at.empty(), at.parity ^ 1))) break;
                    const int bytes = min(CHUNKS, linear.K / CHUNK - later * CHUNKS) * CHUNK_BYTES;
                    if (is_strip && lane < strips) prefetch(source + later * source_step, bytes, keep_normally());
                }
            }
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
__device__ __forceinline__ void load_activations(const Work& work, Shared& shared) {
    const Linear& linear = work.linear;
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

__device__ __forceinline__ void consume(const Work& work, Shared& shared, int rank) {
    const Linear& linear = work.linear;
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
        if (warp == 0) load_weights(work, shared);
        if (warp == 1 && thread % 32 == 0) load_activations(work, shared);
        if constexpr (SPLITS > 1) {  // as the consumers do
            __syncwarp();
            for (int i = 0; i < 2; ++i) {
                arrive_at_cluster_unordered();
                wait_for_cluster();
            }
        }
    } else {
        if constexpr (SHIFT_REGISTERS) take_registers<CONSUMER_REGISTERS>();
        consume(work, shared, rank);
    }
}
