// Decode attention over the paged cache: one query token of each sequence against all of its keys and values.
//
//   out[b, h] = sum_t softmax_t(scale * q[b, h] . K[t]) V[t]  (+ the value offset),   t over the cached tokens of b
//
// A block takes items: (sequence, KV head, up to 8 of its query heads, a split of the tokens). An item costs some us
// besides its copies, so splits are long, and where there is room the next item's copies begin before the results of
// this one are merged. Splits depend on the sequence's length alone, and every sum has one order, so a sequence gets
// the same bits in any batch. The grid has as many blocks as fit; each starts with the item of its number and then
// draws tickets, so ragged batches balance. The last block to finish a split of a sequence and head merges them all.
//
// The last token of each sequence is new. Either the kernel before this one appends them, or this one does: then a
// block makes the queries of its items, and of those that end with the sequence the key and value, in warps that have
// nothing to merge. The other tokens are known to be in the cache, so that the first copies begin before the kernel in
// front ends.
//
// In a block every warp has its own tokens, 16 at a time in a ring of STAGES asynchronous copies, and its own running
// softmax (kv_warp.cuh); nothing is shared until the end.
//
// Bound by memory. Defines: HEAD_DIM, BITS (kv_page.cuh), WARPS, STAGES, BLOCKS (a multiprocessor), APART (0, 1).
#pragma once

#include <cuda_fp16.h>

#include "kv_warp.cuh"
#include "overlap.cuh"
#include "types.cuh"

constexpr int RING_BYTES = STAGES * STAGE_BYTES;  // of a warp
// Where there is room, warps leave their results apart from their rings, which the next item's first copies then enter.
constexpr int RESULT_BYTES = APART ? HEADS * RESULT_ROW * 4 : RING_BYTES;
static_assert(APART || HEADS * RESULT_ROW * 4 <= RING_BYTES, "a warp leaves its result in its own ring");

// qoq/kernels/attention.py knows these three.
constexpr int SPLIT_PAGES = 32;  // a longer sequence is split, evenly
constexpr int MAX_SPLITS = 32;
constexpr int MAX_BATCH = 1024;
constexpr int NONE = -1;

// The tokens of a sequence that attention reads, and their splits.
struct Splits {
    int first;  // token; those before it are outside the window
    int begin;  // first token of its page
    int pages;  // of a split
    int count;

    __device__ Splits(int length, int window) {
        first = window > 0 ? max(length - window, 0) : 0;
        begin = first / PAGE * PAGE;
        const int all = (length - begin + PAGE - 1) / PAGE;
        pages = max(all, 1), count = 1;  // an empty sequence is one split, too: its output is zeros
        if (all > SPLIT_PAGES) {
            const int wanted = min((all + SPLIT_PAGES - 1) / SPLIT_PAGES, MAX_SPLITS);
            pages = (all + wanted - 1) / wanted;
            count = (all + pages - 1) / pages;
        }
    }
};

// before[b] = splits of the sequences before b, the first of each not counted. Returns their number in all.
__device__ int count_more_splits(const int32_t* context_lens, int batch, int window, int* before) {
    __shared__ int of_warp[WARPS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    int done = 0;
    for (int start = 0; start < batch; start += THREADS) {
        const int b = start + threadIdx.x;
        const int count = b < batch ? Splits(context_lens[b], window).count - 1 : 0;
        int sum = count;
#pragma unroll
        for (int distance = 1; distance < LANES; distance *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (lane == LANES - 1) of_warp[warp] = sum;
        __syncthreads();
        int earlier = done;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) earlier += of_warp[w];
            done += of_warp[w];
        }
        if (b < batch) before[b] = earlier + sum - count;
        __syncthreads();
    }
    return done;
}

// The last sequence with before[b] <= split.
__device__ int sequence_of(int split, const int* before, int batch) {
    int low = 0, high = batch;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (before[middle] <= split ? low : high) = middle;
    }
    return low;
}

// What a block works on. In shared memory, since registers are short while it does.
struct Item {
    int b, kv_head, split, splits;
    int page;        // first of the split, in the block table of b
    int row, heads;  // of q and out: the first, and how many
    int place;       // of (sequence, KV head, block of heads) among all
};

// Four dims of a head, summed over parts in their order: load(i) are the sums of part i, stats[i * stats_stride] the
// base and the total of its probabilities.
struct Merged {
    float4 sum{};
    float top = NO_SCORE, total = 0.0f;

    template <class Load>
    __device__ __forceinline__ Merged(int parts, const float2* stats, int stats_stride, Load load) {
        for (int i = 0; i < parts; ++i) top = fmaxf(top, stats[i * stats_stride].x);
#pragma unroll 8
        for (int i = 0; i < parts; ++i) {
            const float2 stat = stats[i * stats_stride];
            const float by = exp2_fast(stat.x - top);
            const float4 x = load(i);
            total += stat.y * by;
            sum.x += x.x * by, sum.y += x.y * by, sum.z += x.z * by, sum.w += x.w * by;
        }
    }

    // fp16 of sum / total + offset; zeros for a sequence without tokens.
    __device__ __forceinline__ void write(__half* out, const __half* offset) const {
        float4 y{};
        if (total != 0.0f) {
            const float by = 1.0f / total;
            if (offset != nullptr) {
                const uint2 raw = *reinterpret_cast<const uint2*>(offset);
                const float2 low = half_pair(raw.x), high = half_pair(raw.y);
                y = {low.x, low.y, high.x, high.y};
            }
            y = {y.x + sum.x * by, y.y + sum.y * by, y.z + sum.z * by, y.w + sum.w * by};
        }
        *reinterpret_cast<uint2*>(out) = make_uint2(half_bits(y.x, y.y), half_bits(y.z, y.w));
    }
};

// cache (pages, kv_heads, RECORD); block_tables (batch, max_pages); v_offset (kv_heads, HEAD_DIM) or null; out (batch,
// kv_heads * group, HEAD_DIM). settled: when the predecessor began, all was there but the new tokens, the last of each
// context, and their queries. max_splits is what max_pages may need. With P = batch * kv_heads * blocks of 8 heads and
// H = min(group, 8), partials holds (P, max_splits, H, HEAD_DIM) sums, then (P, max_splits, H) bases and totals;
// counters, zero between launches, the ticket, the blocks that are through, and the splits that arrived for each of P.
//
// New says where queries are: queries(item, scratch), once the block has met. If it APPENDS, make(item, length, ends,
// scratch) makes, after the predecessor, what an item of a sequence of `length` tokens needs, in some warps, with the
// new token's key and value if it `ends` with the sequence.
template <class New>
__device__ __forceinline__ void attend(New fresh, const unsigned char* cache, const int32_t* block_tables,
                                       const int32_t* context_lens, const __half* v_offset, __half* out,
                                       float* partials, unsigned* counters, float scale_log2, int batch, int kv_heads,
                                       int group, int max_pages, int max_splits, int window, int settled) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ int before[MAX_BATCH];
    __shared__ float2 stats[WARPS][HEADS];
    __shared__ Item known[2];  // this item and the next
    __shared__ int next_item, all_items;
    __shared__ bool is_last;
    __shared__ typename New::Scratch scratch;

    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    unsigned char* ring = shared + warp * RING_BYTES;
    unsigned char* results = shared + (APART ? WARPS * RING_BYTES : 0);
    const int head_blocks = (group + HEADS - 1) / HEADS, columns = kv_heads * head_blocks;

    // Items: the first split of every sequence, then the others. Those are counted when the first copies are under way.
    const int first_splits = batch * columns;
    int items = first_splits;
    bool counted = max_splits == 1;
    const auto count_items = [&] {
        if (!counted) items += count_more_splits(context_lens, batch, window, before) * columns;
        counted = true;
    };

    // From `start` on, the first token of the item's split, tokens, steps and pages are counted.
    const auto index_of = [&](int step) { return warp + WARPS * step; };
    const auto load_pages = [&](int sequence, int first, int step) {  // of the warp's next 32 steps, one a lane
        const int page = first + index_of(step + lane) / (PAGE / STEP);
        return page < max_pages ? block_tables[int64_t(sequence) * max_pages + page] : 0;
    };
    const auto item_of = [&](int item) {  // but for what depends on the sequence's length
        const bool is_first = item < first_splits;
        const int among = is_first ? item : item - first_splits, of = opaque(columns);
        const int nth = among / of, column = among - nth * of;
        const int b = is_first ? nth : sequence_of(nth, before, batch), split = is_first ? 0 : 1 + nth - before[b];
        const int kv_head = head_blocks == 1 ? column : column / head_blocks;
        const int first_head = (column - kv_head * head_blocks) * HEADS, heads = min(group - first_head, HEADS);
        const int row = (b * kv_heads + kv_head) * group + first_head;
        return Item{b, kv_head, split, 0, 0, row, heads, b * columns + column};
    };

    // Ask for an item's first tokens, and say what it is.
    const Places places;
    Copies copies;
    int pages, late;  // late: the warp's step, among the first ones, that has the new token, and is not asked for; NONE
    const auto begin = [&](int item, Item& place) {
        Item begun = item_of(item);
        const int b = begun.b;

        // Where the split is the sequence's first, the pages can be looked up while the length is still on its way.
        const int length = context_lens[b];
        int start = 0;
        if (window > 0 || begun.split > 0) {
            const Splits splits(length, window);
            start = splits.begin + begun.split * splits.pages * PAGE;
        }
        pages = load_pages(b, start / PAGE, 0);

        const Splits splits(length, window);
        const int end = min(length - start, splits.pages * PAGE), from = max(splits.first - start, 0);
        begun.splits = splits.count, begun.page = start / PAGE;
        if (threadIdx.x == 0) place = begun;
        copies = {cache + begun.kv_head * RECORD + lane * CHUNK, uint32_t(kv_heads) * RECORD, from, end};
        const int last = (end - 1) / STEP;  // among the steps of all warps
        const bool waits = begun.split == splits.count - 1 && end > 0 && last % WARPS == warp;
        late = waits && last / WARPS < STAGES ? last / WARPS : NONE;
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            const int page = __shfl_sync(ALL_LANES, pages, stage);
            const int index = index_of(stage);
            if (index * STEP < end && stage != late) copies.start(ring + stage * STAGE_BYTES, places, page, index);
            commit_copies();
        }
    };

    const auto attend_to = [&](const Item& current) {  // leaves each warp's sums in `results` and `stats`
        if (late != NONE) {
            copies.start(ring + late * STAGE_BYTES, places, __shfl_sync(ALL_LANES, pages, late), index_of(late));
            commit_copies();
            wait_copies<0>();
        }
        Queries queries;
        queries.load(fresh.queries(current, scratch), current.heads);
        __syncthreads();
        if (threadIdx.x == 0) {
            const int next = all_items > gridDim.x ? gridDim.x + atomicAdd(&counters[0], 1) : all_items;
            next_item = next < all_items ? next : NONE;
        }

        Running running;
        running.clear();
        const uint32_t first_stage = opaque(shared_address(ring));
        uint32_t place = first_stage;  // of the step's stage
        for (int step = 0, token; token = index_of(step) * STEP, token < copies.to; ++step) {
            const int ahead = step + STAGES;
            if (ahead % LANES == 0) pages = load_pages(current.b, current.page, ahead);
            wait_copies<STAGES - 1>();
            __syncwarp();
            unsigned char* stage = static_cast<unsigned char*>(__cvta_shared_to_generic(opaque(place)));
            running.step(stage, places, queries, scale_log2, copies.from - token, copies.to - token);
            const int page = __shfl_sync(ALL_LANES, pages, ahead % LANES);
            __syncwarp();
            if (token + STAGES * WARPS * STEP < copies.to) copies.start(stage, places, page, index_of(ahead));
            commit_copies();
            place = place == first_stage + (STAGES - 1) * STAGE_BYTES ? first_stage : place + STAGE_BYTES;
        }
        running.finish(reinterpret_cast<float*>(results + warp * RESULT_BYTES), stats[warp], current.heads);
    };

    const auto merge = [&](const Item& current) {
        const __half* offset = v_offset == nullptr ? nullptr : v_offset + current.kv_head * HEAD_DIM;
        const int part_heads = min(opaque(group), HEADS), parts = current.place * max_splits;
        float* sums = partials + int64_t(parts) * part_heads * HEAD_DIM;
        float* all_totals = partials + int64_t(first_splits) * max_splits * part_heads * HEAD_DIM;
        float2* totals = reinterpret_cast<float2*>(all_totals) + int64_t(parts) * part_heads;
        constexpr int PIECES = HEAD_DIM / 4;  // four dimensions each
        const int pieces = current.heads * PIECES, first = opaque(threadIdx.x);
        const auto write = [&](const Merged& merged, int head, int dim) {
            __half* to = out + int64_t(current.row + head) * HEAD_DIM + dim;
            merged.write(to, offset == nullptr ? nullptr : offset + dim);
        };
        for (int i = first; i < pieces; i += THREADS) {
            const int head = i / PIECES, dim = i % PIECES * 4;
            const unsigned char* of_head = results + (head * RESULT_ROW + dim) * 4;
            const auto load = [&](int w) { return *reinterpret_cast<const float4*>(of_head + w * RESULT_BYTES); };
            const Merged merged(WARPS, &stats[0][head], HEADS, load);
            if (current.splits == 1) {
                write(merged, head, dim);
            } else {
                const int part = current.split * part_heads + head;
                *reinterpret_cast<float4*>(sums + part * HEAD_DIM + dim) = merged.sum;
                if (dim == 0) totals[part] = make_float2(merged.top, merged.total);
            }
        }
        if (current.splits == 1) return;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            const unsigned last = current.splits - 1;
            is_last = atomicInc(&counters[2 + current.place], last) == last;  // and back to zero
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        float2* all = reinterpret_cast<float2*>(results);  // (splits, part_heads)
        for (int i = first; i < current.splits * part_heads; i += THREADS) all[i] = __ldcg(totals + i);
        __syncthreads();
        for (int i = first; i < pieces; i += THREADS) {
            const int head = i / PIECES, dim = i % PIECES * 4;
            const float* of_first = sums + head * HEAD_DIM + dim;
            const auto load = [&](int split) {
                return __ldcg(reinterpret_cast<const float4*>(of_first + split * part_heads * HEAD_DIM));
            };
            write(Merged(current.splits, all + head, part_heads, load), head, dim);
        }
    };

    allow_successor();
    int item = blockIdx.x;
    const bool early = OVERLAPS && settled && item < first_splits;
    if (!early) wait_for_predecessor();
    if (item >= first_splits) count_items();
    if (item >= items) return;
    begin(item, known[1]);
    count_items();
    if (threadIdx.x == 0) all_items = items;
    if (early) wait_for_predecessor();
    // A round attends to an item and makes what the next one needs; the first round has only a next one.
    bool attends = false;
    for (int turn = 0;; turn ^= 1, attends = true) {
        if (attends) {
            attend_to(known[turn]);
            __syncthreads();
            item = next_item;
            if (APART && item != NONE) begin(item, known[turn ^ 1]);
        }
        if constexpr (New::APPENDS) {
            if (item != NONE) {
                const Item next = item_of(item);
                const int length = context_lens[next.b];
                fresh.make(next, length, next.split == Splits(length, window).count - 1, scratch);
            }
        }
        if (attends) merge(known[turn]);
        __syncthreads();
        if (item == NONE) break;
        if (!APART && attends) {
            begin(item, known[turn ^ 1]);
            __syncthreads();
        }
    }

    if (threadIdx.x == 0 && all_items > gridDim.x && atomicInc(&counters[1], gridDim.x - 1) == gridDim.x - 1) {
        counters[0] = 0;
    }
}
