// Decode attention over the paged cache (common/attend.cuh, which names the defines), where another kernel has appended
// the new tokens.

#include <cuda_fp16.h>

#include "common/attend.cuh"
#include "common/types.cuh"

// The queries are there, as is all in the cache, once the predecessor has ended.
struct Appended {
    static constexpr bool APPENDS = false;
    struct Scratch {};
    const __half* q;

    __device__ __forceinline__ const __half* queries(const Item& item, const Scratch&) const {
        return q + int64_t(item.row) * HEAD_DIM;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    kv_decode(const __half* q, const unsigned char* cache, const int32_t* block_tables, const int32_t* context_lens,
              const __half* v_offset, __half* out, float* partials, unsigned* counters, float scale_log2, int batch,
              int kv_heads, int group, int max_pages, int max_splits, int window, int settled) {
    attend(Appended{q}, cache, block_tables, context_lens, v_offset, out, partials, counters, scale_log2, batch,
           kv_heads, group, max_pages, max_splits, window, settled);
}
