// A decode step's new tokens enter the paged cache (common/append.cuh) and attend to their sequences
// (common/attend.cuh): one kernel, with the bits of rope_kv_append and kv_decode. Defines are those of both.

#include <cuda_fp16.h>

#define TEAM (HEAD_DIM % 128 == 0 ? 32 : HEAD_DIM % 64 == 0 ? 16 : 8)
#include "common/append.cuh"
#include "common/attend.cuh"
#include "common/types.cuh"

// Queries stay in shared memory. Where several blocks make a key and value, they store the same bits.
struct Fresh {
    static constexpr bool APPENDS = true;
    struct Scratch {
        __align__(16) __half q[HEADS][HEAD_DIM];
        __align__(16) unsigned char codes[2][append::TEAMS][append::SCRATCH];
    };
    append::Tokens tokens;
    const int32_t* block_tables;
    int max_pages;

    // A warp makes the key, another the value, the next ones a query in each team: the last warps first, since the
    // first ones merge.
    __device__ __forceinline__ void make(const Item& item, int length, bool ends, Scratch& scratch) const {
        const int thread = opaque(threadIdx.x), team = thread % LANES / TEAM, lane = thread % TEAM;
        const int position = max(length - 1, 0);
        for (int job = WARPS - 1 - thread / LANES; (job - 2) * append::TEAMS < item.heads; job += WARPS) {
            const bool is_query = job >= 2;
            if (!is_query && !(ends && length > 0)) continue;
            const int own = min((job - 2) * append::TEAMS + team, item.heads - 1);
            const int head = is_query ? item.row - item.b * tokens.q_heads + own
                                      : tokens.q_heads + job * tokens.kv_heads + item.kv_head;
            float x[append::VALUES];
            tokens.make(x, item.b, position, head, lane);
            if (is_query) {
                append::store_halves(x, scratch.q[own], lane);
            } else {
                const int64_t page = block_tables[int64_t(item.b) * max_pages + position / PAGE];
                tokens.keep(x, page * PAGE + position % PAGE, head, team == 0, scratch.codes[job][team], lane);
            }
        }
    }

    __device__ __forceinline__ const __half* queries(const Item&, const Scratch& scratch) const {
        return scratch.q[0];
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kv_append_decode(const __half* qkv, const float* cos, const float* sin, const __half* k_offset,
                     const __half* v_offset, const __half* q_norm, const __half* k_norm, float eps, int rotate,
                     unsigned char* cache, const int32_t* block_tables, const int32_t* context_lens, __half* out,
                     float* partials, unsigned* counters, float scale_log2, int batch, int kv_heads, int group,
                     int max_pages, int max_splits, int window, int settled) {
    const append::Tokens tokens{qkv,    cos, sin,    k_offset, v_offset,         q_norm,
                                k_norm, eps, rotate, cache,    kv_heads * group, kv_heads};
    attend(Fresh{tokens, block_tables, max_pages}, cache, block_tables, context_lens, v_offset, out, partials, counters,
           scale_log2, batch, kv_heads, group, max_pages, max_splits, window, settled);
}
