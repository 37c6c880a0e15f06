// New tokens enter the paged cache, a head of TEAMS tokens in each warp (common/append.cuh, which names the defines).

#include <cuda_fp16.h>

#define TEAM 8
#include "common/append.cuh"
#include "common/overlap.cuh"
#include "common/types.cuh"

using namespace append;
constexpr int WARPS = 4;

// qkv (tokens, q_heads + 2 * kv_heads, HEAD_DIM); cos, sin (positions, HALF_DIM); positions, slots (tokens); offsets
// (kv_heads, HEAD_DIM) or null; norms (HEAD_DIM) or null; cache (pages, kv_heads, RECORD); q_out (tokens, q_heads,
// HEAD_DIM). A slot is page * PAGE + index, or -1 for a token that is not kept.
extern "C" __global__ void __launch_bounds__(WARPS * LANES)
    rope_kv_append(const __half* qkv, const float* cos, const float* sin, const int64_t* positions,
                   const int64_t* slots, const __half* k_offset, const __half* v_offset, const __half* q_norm,
                   const __half* k_norm, float eps, int rotate, unsigned char* cache, __half* q_out, int tokens,
                   int q_heads, int kv_heads) {
    __shared__ __align__(16) unsigned char codes[WARPS][TEAMS][SCRATCH];
    const Tokens all{qkv, cos, sin, k_offset, v_offset, q_norm, k_norm, eps, rotate, cache, q_heads, kv_heads};

    const int warp = threadIdx.x / LANES, team = threadIdx.x % LANES / TEAM, lane = threadIdx.x % TEAM;
    const int heads = q_heads + 2 * kv_heads;
    const int item = blockIdx.x * WARPS + warp, group = item / heads;
    // Keys and values take longest, so they lie evenly between the queries: no multiprocessor gets many of them.
    const int nth = item - group * heads, before = nth * 2 * kv_heads / heads;
    const int head = (nth + 1) * 2 * kv_heads / heads > before ? q_heads + before : nth - before;
    allow_successor();
    wait_for_predecessor();
    if (group * TEAMS >= tokens) return;
    const bool exists = group * TEAMS + team < tokens;
    const int token = exists ? group * TEAMS + team : tokens - 1;

    float x[VALUES];
    const int64_t slot = slots[token];
    all.make(x, token, positions[token], head, lane);
    if (all.is_query(head)) {
        if (exists) store_halves(x, q_out + (int64_t(token) * q_heads + head) * HEAD_DIM, lane);
    } else {
        all.keep(x, slot, head, exists && slot >= 0, codes[warp][team], lane);
    }
}
