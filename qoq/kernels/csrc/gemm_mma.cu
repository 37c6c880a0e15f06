// out = x8 * W^T, scaled, plus bias, plus residual: int8 activations times 4-bit weights on mma.sync, sm_80 and newer.
//
// Compiled for one tile: ROWS weight rows (32, 64, 128 or 256) by TOKENS tokens (8, 16, 32, 64 or 128), STAGES copies
// in flight, GROUP_SIZE 128, 64 or -1 (per channel). Weight rows are the products' m, tokens their n. Eight warps share
// a tile: each owns 32 rows and all its tokens, so that no weight is dequantized twice; where ROWS < 256, teams of
// ROWS / 32 warps take turns at the steps of K, 128 wide, and their sums are added through shared memory. A team has
// its own ring of stages and its own barrier. `splits` blocks may share a tile in the same way, through `workspace`.
//
//     a tile, ROWS = 64:     warp 0  warp 2  warp 4  warp 6  warp 0 ...     rows 0..31     K ->
//                            warp 1  warp 3  warp 5  warp 7  warp 1 ...     rows 32..63
//
// Sums are integers: every tile, every split and every order of addition gives the same bits.

#include "common/dequant.cuh"
#include "common/epilogue.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr int STEP = 128;                     // features of K in one stage
constexpr int STRIP = 32;                     // weight rows of a warp
constexpr int TEAM_WARPS = ROWS / STRIP;      // warps side by side
constexpr int TEAM_THREADS = TEAM_WARPS * 32;
constexpr int TEAMS = WARPS / TEAM_WARPS;     // teams one after the other in K
constexpr bool CHANNEL = GROUP_SIZE == -1;
constexpr int GROUP = CHANNEL ? STEP : GROUP_SIZE;
constexpr int GROUPS = STEP / GROUP;          // in a step
constexpr int SUMS = TOKENS;                  // accumulators of a thread: STRIP * TOKENS / 32
constexpr int BAND = 8;                       // token tiles that run side by side
constexpr int COUNTERS = 16384;               // words of `workspace` before the partial sums
constexpr int OUT_PITCH = ROWS + 8;           // halves; 4 words past a multiple of 32 banks, or 20

static_assert(ROWS % STRIP == 0 && WARPS % TEAM_WARPS == 0, "ROWS is 32, 64, 128 or 256");
static_assert(TOKENS == 8 || TOKENS % 16 == 0, "TOKENS is 8 or a multiple of 16");
static_assert(STAGES >= 2, "one stage is read while another is written");

// What a team copies for one step. Chunk c (16 bytes) of token t stands at c ^ t % 8 of its row: neither the copies nor
// ldmatrix meet a bank twice.
struct alignas(128) Stage {
    uint4 weights[TEAM_WARPS][STEP / 32][32];  // strip, 32 features, lane: as packed
    uint8_t x[TOKENS][STEP];
    uint8_t levels[GROUPS][2][ROWS];  // s2, zeros; not used per channel
};

// What the end of a tile keeps in the same memory.
struct Finale {
    float sx[TOKENS];
    int32_t sums[TOKENS];
    union {
        int4 parts[TEAMS > 1 ? TEAMS - 1 : 1][SUMS / 4][TEAM_THREADS];
        __half out[TOKENS][OUT_PITCH];
    };
};

using Sums = int32_t[2][TOKENS / 8][4];  // rows 0..15 and 16..31 of the strip, eight tokens, the fragment

struct Tile {
    int row, token;  // its first
};

// Bands of a few token tiles, inside a band all row tiles: blocks that run together share activations and weights.
__device__ Tile place(int M, int N) {
    const int row_tiles = (N + ROWS - 1) / ROWS;
    const int token_tiles = (M + TOKENS - 1) / TOKENS;
    const int band = blockIdx.x / (BAND * row_tiles);
    const int inside = blockIdx.x - band * BAND * row_tiles;
    const int width = min(BAND, token_tiles - band * BAND);
    return {inside / width * ROWS, (band * BAND + inside % width) * TOKENS};
}

// One stage: each warp multiplies its strip by all tokens.
__device__ __forceinline__ void multiply(Sums& sums, const Stage& stage, int strip, int lane) {
    // The chunk that this lane names to ldmatrix, of the first 32 features (8 tokens: 64). Rows have 128 bytes, so that
    // flipping bits 5 and 6 of its address finds the others.
    const int token = TOKENS == 8 ? lane % 8 : lane / 16 * 8 + lane % 8;
    const int chunk = TOKENS == 8 ? lane / 8 : lane / 8 % 2;
    const uint32_t x = shared_address(&stage.x[token][(chunk ^ token % 8) * 16]);

    RowScales rows;
    uint32_t b[4];
#pragma unroll
    for (int k = 0; k < STEP / 32; ++k) {
        const uint4 packed = stage.weights[strip][k][lane];
        uint32_t low[4], high[4];
        if constexpr (CHANNEL) {
            codes_low(low, packed);
            codes_high(high, packed);
        } else {
            if (k * 32 % GROUP == 0) {
                const auto& levels = stage.levels[k * 32 / GROUP];
                const int column = strip * STRIP + lane / 4 * 4;
                rows = unpack_scales(*reinterpret_cast<const uint32_t*>(&levels[0][column]),
                                     *reinterpret_cast<const uint32_t*>(&levels[1][column]));
            }
            dequantize_low(low, packed, rows);
            dequantize_high(high, packed, rows);
        }
        if constexpr (TOKENS == 8) {
            if (k % 2 == 0) load_matrices(b, x ^ k * 32);
            multiply_add(sums[0][0], low, b[k % 2 * 2], b[k % 2 * 2 + 1]);
            multiply_add(sums[1][0], high, b[k % 2 * 2], b[k % 2 * 2 + 1]);
        } else {
#pragma unroll
            for (int n = 0; n < TOKENS / 8; n += 2) {
                load_matrices(b, (x ^ k * 32) + n * 8 * STEP);
                multiply_add(sums[0][n], low, b[0], b[1]);
                multiply_add(sums[1][n], high, b[0], b[1]);
                multiply_add(sums[0][n + 1], low, b[2], b[3]);
                multiply_add(sums[1][n + 1], high, b[2], b[3]);
            }
        }
    }
}

// Team 0 gets the sums of all teams.
__device__ __forceinline__ void add_teams(Sums& acc, Finale& finale, int team, int member) {
#pragma unroll
    for (int i = 0; i < SUMS / 4; ++i) {
        const int32_t(&v)[4] = acc[i / (TOKENS / 8)][i % (TOKENS / 8)];
        if (team > 0) finale.parts[team - 1][i][member] = make_int4(v[0], v[1], v[2], v[3]);
    }
    __syncthreads();
    if (team == 0) {
#pragma unroll
        for (int i = 0; i < SUMS / 4; ++i) {
            int32_t(&v)[4] = acc[i / (TOKENS / 8)][i % (TOKENS / 8)];
#pragma unroll
            for (int other = 0; other < TEAMS - 1; ++other) {
                const int4 part = finale.parts[other][i][member];
                v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
            }
        }
    }
    __syncthreads();
}

// Of the blocks that share a tile, the last to come finds all sums in the workspace and leaves zeros; true for it.
__device__ __forceinline__ bool add_blocks(Sums& acc, int32_t* workspace, int splits, int team, int member) {
    int32_t* total = workspace + COUNTERS + static_cast<int64_t>(blockIdx.x) * (SUMS * TEAM_THREADS) + member;
    if (team == 0) {
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            atomicAdd(total + i * TEAM_THREADS, acc[i / (SUMS / 2)][i / 4 % (TOKENS / 8)][i % 4]);
        }
        __threadfence();
    }
    __syncthreads();
    const bool last = threadIdx.x == 0 && atomicAdd(workspace + blockIdx.x, 1) == splits - 1;
    if (!__syncthreads_or(last)) return false;
    if (threadIdx.x == 0) workspace[blockIdx.x] = 0;
    if (team == 0) {
        __threadfence();
#pragma unroll
        for (int i = 0; i < SUMS; ++i) {
            acc[i / (SUMS / 2)][i / 4 % (TOKENS / 8)][i % 4] = __ldcg(total + i * TEAM_THREADS);
            __stcg(total + i * TEAM_THREADS, 0);
        }
    }
    return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, TOKENS >= 64 ? 1 : 2)
w4a8_gemm(const uint4* x8,       // (M, K) int8
          const float* sx,       // (M,)
          const int32_t* sums,   // (M,)
          const uint4* qweight,  // (N, K / 2) bytes, packed
          const __half* s1,      // (N,)
          const uint4* s2,       // (G, N), columns in packed order; null per channel, as `zeros`
          const uint4* zeros,    // (G, N)
          const __half* szero,   // (N,), null for groups
          const __half* bias,    // (N,) or null
          const __half* residual,             // (M, N) or null; may be `out`
          __half* out,                        // (M, N)
          int32_t* workspace,                 // zero before and after; not used when splits == 1
          int M, int N, int K, int splits) {
    allow_successor();
    wait_for_predecessor();
    extern __shared__ __align__(128) uint8_t shared[];
    const int thread = threadIdx.x, lane = thread % 32;
    const int team = TEAMS > 1 ? thread / TEAM_THREADS : 0, member = thread % TEAM_THREADS, strip = member / 32;
    const Tile tile = place(M, N);
    Stage* ring = reinterpret_cast<Stage*>(shared) + team * STAGES;

    // The block's share of the steps; its teams take them in turn.
    const int steps = (K + STEP - 1) / STEP;
    const int split = blockIdx.y;
    const int begin = steps * split / splits + team, end = steps * (split + 1) / splits;

    // What this thread copies of step 0, counted in 16 bytes; registers are scarce here. Where rows are missing the
    // last ones stand in: their products are not written. Missing tokens and features become zeros.
    constexpr int ROWS_AT_ONCE = TEAM_THREADS / 8, LEVEL_CHUNKS = ROWS / 16;
    const uint32_t weights = min(tile.row / STRIP + strip, N / STRIP - 1) * K + lane;
    const int chunk = member % 8, token = member / 8;
    const uint32_t x = (tile.token + token) * (K / 16) + chunk;
    const int tokens = M - tile.token - token;
    const int level = member / LEVEL_CHUNKS, column = member % LEVEL_CHUNKS;
    const uint32_t levels = level / 2 * (N / 16) + min(tile.row / 16 + column, N / 16 - 1);

    const auto copy = [&](int step, Stage& stage) {
        const int features = K - step * STEP;
#pragma unroll
        for (int k = 0; k < STEP / 32; ++k) {
            copy16_async(&stage.weights[strip][k][lane], qweight + (weights + step * STEP) + k * 32,
                         k * 32 < features);
        }
        const uint4* source = x8 + (x + step * (STEP / 16));
#pragma unroll
        for (int i = 0; i < TOKENS; i += ROWS_AT_ONCE, source += ROWS_AT_ONCE * (K / 16)) {
            if (TOKENS % ROWS_AT_ONCE == 0 || token < TOKENS) {
                copy16_async(&stage.x[token + i][(chunk ^ (token + i) % 8) * 16], source,
                             chunk * 16 < features && i < tokens);
            }
        }
        if (!CHANNEL && level < GROUPS * 2) {
            const uint4* table = level % 2 == 0 ? s2 : zeros;
            copy16_async(&stage.levels[level / 2][level % 2][column * 16], table + (levels + step * GROUPS * (N / 16)),
                         level / 2 * GROUP < features);
        }
    };
    const auto meet = [&] {
        if constexpr (TEAM_WARPS == 1) {
            __syncwarp();
        } else {
            named_barrier(1 + team, TEAM_THREADS);
        }
    };

    Sums acc = {};
    for (int i = 0; i < STAGES - 1; ++i) {
        if (begin + i * TEAMS < end) copy(begin + i * TEAMS, ring[i]);
        commit_copies();
    }
    // The end of the tile reads these; they come from device memory, and there is time.
    const __half* const vectors[] = {s1, szero, bias};
    for (const __half* vector : vectors) {
        if (vector != nullptr && thread * 64 < ROWS && tile.row + thread * 64 < N) {
            prefetch(vector + tile.row + thread * 64);
        }
    }

    int slot = 0;
    for (int step = begin; step < end; step += TEAMS) {
        wait_copies<STAGES - 2>();
        meet();  // this step's copies have come, and all have read the stage that the next ones overwrite
        const int next = step + (STAGES - 1) * TEAMS;
        if (next < end) copy(next, ring[slot == 0 ? STAGES - 1 : slot - 1]);
        commit_copies();
        multiply(acc, ring[slot], strip, lane);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }

    // Rows g, g + 8, g + 16, g + 24 of the strip, or of the last one; a token of the tile.
    const int first = min(tile.row + strip * STRIP, N - STRIP) + lane / 4;
    float scale[4], zero[4], shift[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        scale[j] = __half2float(s1[first + 8 * j]);
        zero[j] = CHANNEL ? __half2float(szero[first + 8 * j]) : 0;
        shift[j] = bias != nullptr ? __half2float(bias[first + 8 * j]) : 0;
    }
    const bool exists = thread < TOKENS && tile.token + thread < M;
    const float my_scale = exists ? sx[tile.token + thread] : 0;
    const int32_t my_sum = exists ? sums[tile.token + thread] : 0;

    wait_copies<0>();
    meet();           // for racecheck, which counts a team's reads as over only at its own barrier
    __syncthreads();  // the ring is free
    Finale& finale = *reinterpret_cast<Finale*>(shared);
    if (thread < TOKENS) {
        finale.sx[thread] = my_scale;
        finale.sums[thread] = my_sum;
    }
    if constexpr (CHANNEL) {  // codes_high
#pragma unroll
        for (auto& fragment : acc[1]) {
#pragma unroll
            for (int32_t& value : fragment) value >>= 4;
        }
    }
    if constexpr (TEAMS > 1) {
        add_teams(acc, finale, team, member);
    } else {
        __syncthreads();
    }
    if (splits > 1 && !add_blocks(acc, workspace, splits, team, member)) return;

    // Scale, round, and turn the tile so that a token's rows lie side by side.
    if (team == 0) {
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = n * 8 + lane % 4 * 2 + i;
                const float token_scale = finale.sx[token];
                const int32_t token_sum = finale.sums[token];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int32_t value = acc[j / 2][n][j % 2 * 2 + i];
                    const float y = CHANNEL ? scale_channel(value, token_sum, token_scale, scale[j], zero[j])
                                            : scale_grouped(value, token_sum, token_scale, scale[j]);
                    finale.out[token][strip * STRIP + lane / 4 + 8 * j] = finish(y, shift[j], bias != nullptr);
                }
            }
        }
    }
    __syncthreads();

    for (int i = thread; i < TOKENS * ROWS / 8; i += THREADS) {
        const int token = i / (ROWS / 8), row = i % (ROWS / 8) * 8;
        if (tile.token + token >= M || tile.row + row >= N) continue;
        const int64_t place = static_cast<int64_t>(tile.token + token) * N + tile.row + row;
        uint4 word = *reinterpret_cast<const uint4*>(&finale.out[token][row]);
        if (residual != nullptr) {
            const uint4 base = *reinterpret_cast<const uint4*>(residual + place);
            __half* y = reinterpret_cast<__half*>(&word);
            const __half* r = reinterpret_cast<const __half*>(&base);
#pragma unroll
            for (int j = 0; j < 8; ++j) y[j] = add_residual(r[j], y[j]);
        }
        *reinterpret_cast<uint4*>(out + place) = word;
    }
}
