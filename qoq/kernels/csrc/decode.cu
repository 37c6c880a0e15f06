// Decode attention over the paged cache: one query token of each sequence against all of its keys and values.
//
//   out[b, h] = sum_t softmax_t(scale * q[b, h] . K[t]) V[t]  (+ the value offset),   t over the cached tokens of b
//
// Items are (sequence, KV head, up to 8 of its query heads, a split of the tokens). Splits depend on the sequence's
// length alone, and every sum has one order, so a sequence gets the same bits in any batch. A block starts with the
// item of its number and then draws tickets, so ragged batches balance.
//
// In a block one warp finds the items and copies, steps of 16 tokens into a ring in shared memory, far ahead of the
// others and on from item to item without a stop; the others take every WARPS-th step of an item (common/kv_attend.cuh)
// and add up what they have at its end. The block that finishes the last split of a sequence and head merges them all,
// at the end of its next item: then only one warp has had to wait to learn that it was the last.
//
// Before the kernel's predecessor has ended, a block brings the pages of its first item into L2. It may see an old
// table then, which does no harm.
//
// Bound by memory: a step is 2176 bytes at 128 dims in 4 bits and about 230 instructions of a warp.
// Defines: HEAD_DIM, BITS (common/kv_page.cuh), WARPS that compute, SLOTS of the ring, BLOCKS (a multiprocessor),
// PREFETCHED bytes that a block asks for early, at most.

#include "common/barrier.cuh"
#include "common/kv_attend.cuh"
#include "common/overlap.cuh"

constexpr int THREADS = WARPS * LANES;  // that compute
constexpr int QUEUE = 4;                // items that have been found at most and are not finished
constexpr int QUERY_BYTES = HEADS * QUERY_ROW, RESULT_BYTES = HEADS * RESULT_ROW * 4;
constexpr int RING_BYTES = SLOTS * STAGE_BYTES;
constexpr int CONSUMERS = 1;           // the barrier of the threads that compute

// qoq/kernels/attention.py knows these three.
constexpr int SPLIT_PAGES = 16;  // a longer sequence is split, evenly
constexpr int MAX_SPLITS = 32;
constexpr int MAX_BATCH = 1024;
static_assert(MAX_SPLITS <= LANES && MAX_BATCH <= LANES * LANES, "one lane each, or one lane a group");

// Dynamic shared memory: the ring, then the queries of the items in the queue, then the results of the warps.
constexpr int QUERIES = RING_BYTES, RESULTS = QUERIES + QUEUE * QUERY_BYTES;

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

struct Arguments {
    const __half* q;
    const unsigned char* cache;
    const int32_t *block_tables, *context_lens;
    int batch, kv_heads, group, max_pages, cache_pages, window;

    __device__ int head_blocks() const { return (group + HEADS - 1) / HEADS; }
    __device__ int columns() const { return kv_heads * head_blocks(); }
    __device__ int first_splits() const { return batch * columns(); }
    // From L2, since it may be read before it is certain; and then it may be anything.
    __device__ int length(int b) const { return min(max(__ldcg(context_lens + b), 0), max_pages * PAGE); }
};

// Items by number: the first split of every sequence, then the others. For one warp.
struct Items {
    const Arguments& of;
    int before;  // splits, but for the first of each, of the sequences before 32 * lane
    int count;   // items in all, once they are counted

    // Such splits of the lane's sequence among those from 32 * chunk on, then of all of these before it.
    __device__ int splits_of(int chunk, int& earlier) const {
        const int lane = threadIdx.x % LANES, b = chunk * LANES + lane;
        const int own = b < of.batch ? Splits(of.length(b), of.window).count - 1 : 0;
        int sum = own;
#pragma unroll
        for (int distance = 1; distance < LANES; distance *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, distance);
            if (lane >= distance) sum += other;
        }
        earlier = sum - own;
        return __shfl_sync(ALL_LANES, sum, LANES - 1);
    }

    __device__ void count_all() {
        const int lane = threadIdx.x % LANES;
        int sum = 0, unused;
        for (int chunk = 0; chunk * LANES < of.batch; ++chunk) {
            if (lane == chunk) before = sum;
            sum += splits_of(chunk, unused);
        }
        if (lane * LANES >= of.batch) before = sum + 1;  // none is there
        count = of.first_splits() + sum * of.columns();
    }

    // Sequence and split of split `nth` of those that are not a sequence's first.
    __device__ void find(int nth, int& b, int& split) const {
        const int chunk = __popc(__ballot_sync(ALL_LANES, before <= nth)) - 1;
        const int rest = nth - __shfl_sync(ALL_LANES, before, chunk);
        int earlier;
        splits_of(chunk, earlier);
        const int place = __popc(__ballot_sync(ALL_LANES, earlier <= rest)) - 1;
        b = min(chunk * LANES + place, of.batch - 1);
        split = 1 + rest - __shfl_sync(ALL_LANES, earlier, place);
    }
};

// An item as the computing warps see it; tokens are counted from the split's first.
struct Item {
    int from, to;    // tokens wanted
    int row, heads;  // of q and out: the first, and how many; no heads: the end
    int kv_head, split, splits;
    int place;       // of (sequence, KV head, block of heads) among all
    unsigned steps;  // of the block before this item's
};

// An item and where its pages are listed.
struct Found {
    Item item;
    const int32_t* pages;
    int limit;  // of entries that may be read there

    __device__ Found(const Arguments& of, const Items& items, int number) {
        const int columns = of.columns(), head_blocks = of.head_blocks(), first_splits = of.first_splits();
        const bool is_first = number < first_splits;
        const int among = is_first ? number : number - first_splits, nth = among / columns;
        const int column = among - nth * columns;
        int b = nth, split = 0;
        if (!is_first) items.find(nth, b, split);
        const int length = of.length(b);
        const Splits splits(length, of.window);
        const int start = splits.begin + split * splits.pages * PAGE;
        item.kv_head = column / head_blocks;
        const int first_head = (column - item.kv_head * head_blocks) * HEADS;
        item.heads = min(of.group - first_head, HEADS);
        item.row = (b * of.kv_heads + item.kv_head) * of.group + first_head;
        item.from = max(splits.first - start, 0);
        item.to = min(length - start, splits.pages * PAGE);
        item.split = split, item.splits = splits.count;
        item.place = b * columns + column;
        pages = of.block_tables + int64_t(b) * of.max_pages + start / PAGE;
        limit = of.max_pages - start / PAGE;
    }

    // Page `first` + lane, where the item has one.
    __device__ int load_pages(int first) const {
        const int page = first + threadIdx.x % LANES;
        return page * PAGE < item.to && page < limit ? __ldcg(pages + page) : 0;
    }
};

__device__ __forceinline__ int steps_of(const Item& item) { return max(item.to + STEP - 1, 0) / STEP; }

struct Shared {
    uint64_t full[SLOTS], empty[SLOTS], found[QUEUE], finished[QUEUE];
    Item items[QUEUE];
    float2 stats[WARPS][HEADS];
    Item unmerged;  // the last item that was a split; merged at the end of the next one
    bool is_last;   // of the splits of its sequence and head
};

// The warp that finds and copies.
struct Producer {
    const Arguments& of;
    Shared& shared;
    unsigned char* dynamic;
    int slot = 0, queued = 0;
    unsigned copied = 0;  // steps
    uint32_t ring_parity = 1;

    // A step's rows, each lane its chunks. Those outside [from, to) are garbage that the mask hides, but fp16 values
    // may be NaN there: they become zero.
    __device__ __forceinline__ void copy(const Item& item, int page, int index) {
        const int lane = threadIdx.x % LANES, first_row = index % (PAGE / STEP) * STEP;
        const unsigned char* record = of.cache + (int64_t(page) * of.kv_heads + item.kv_head) * RECORD;
        const unsigned char* rows = record + first_row * ROW + lane * CHUNK;
        unsigned char* stage = dynamic + slot * STAGE_BYTES;
        wait(shared_address(&shared.empty[slot]), ring_parity);
#pragma unroll
        for (int i = 0; i < STEP * CHUNKS; i += LANES) {
            const int chunk = i + lane, row = chunk / CHUNKS, column = chunk % CHUNKS;
            if (STEP * CHUNKS % LANES != 0 && chunk >= STEP * CHUNKS) break;
            const int token = index * STEP + row;
            const bool wanted = CODED || (token >= item.from && token < item.to);
            unsigned char* to_row = stage + row * ROW + (column ^ swizzle(row)) * CHUNK;
            copy16_async(to_row, rows + i * CHUNK, wanted);
            copy16_async(to_row + STEP * ROW, rows + i * CHUNK + V_ROWS, wanted);
        }
        if (lane < STEP * GRID / CHUNK) {
            copy16_async(stage + STAGE_GRIDS + lane * CHUNK, record + GRIDS + first_row * GRID + lane * CHUNK, true);
        }
        arrive_when_copied(shared_address(&shared.full[slot]));
        if (++slot == SLOTS) slot = 0, ring_parity ^= 1;
        ++copied;
    }

    __device__ void announce(const Item& item) {
        const int place = queued % QUEUE, lane = threadIdx.x % LANES;
        constexpr int COPIES = HEAD_DIM * 2 / CHUNK;  // of a head
        wait(shared_address(&shared.finished[place]), (queued / QUEUE & 1) ^ 1);
        unsigned char* to = dynamic + QUERIES + place * QUERY_BYTES;
        const unsigned char* from = reinterpret_cast<const unsigned char*>(of.q + int64_t(item.row) * HEAD_DIM);
        for (int i = lane; i < item.heads * COPIES; i += LANES) {
            copy16_async(to + i / COPIES * QUERY_ROW + i % COPIES * CHUNK, from + i * CHUNK, true);
        }
        arrive_when_copied(shared_address(&shared.found[place]));
        if (lane == 0) {
            shared.items[place] = item;
            shared.items[place].steps = copied;
            arrive(shared_address(&shared.found[place]));
        }
        ++queued;
    }

    __device__ void bring_near(const Found& found) const {
#if __CUDA_ARCH__ >= 900
        const int lane = threadIdx.x % LANES, page = found.load_pages(0);
        if (lane * PAGE < found.item.to && lane < PREFETCHED / RECORD && page >= 0 && page < of.cache_pages) {
            prefetch_bulk(of.cache + (int64_t(page) * of.kv_heads + found.item.kv_head) * RECORD, RECORD);
        }
#endif
    }

    // counters[0] is the ticket, counters[1] counts the blocks that will draw no more.
    __device__ void run(unsigned* counters) {
        const int lane = threadIdx.x % LANES, first_splits = of.first_splits();
        Items items{of, 0, first_splits};
        int number = blockIdx.x;
        const auto start = [&] {
            if (number >= first_splits) items.count_all();
            return number < items.count;
        };
#if __CUDA_ARCH__ >= 900
        if (start()) bring_near(Found(of, items, number));
#endif
        wait_for_predecessor();
        bool counted = number >= first_splits, more = start();
        while (more) {
            unsigned ticket = 0;
            if (lane == 0) ticket = atomicAdd(&counters[0], 1);
            const Found found(of, items, number);
            int pages = found.load_pages(0);
            announce(found.item);
            const int steps = steps_of(found.item);
            for (int step = 0; step < steps; ++step) {
                const int page = step / (PAGE / STEP);
                if (page > 0 && step % (LANES * PAGE / STEP) == 0) pages = found.load_pages(page);
                copy(found.item, __shfl_sync(ALL_LANES, pages, page % LANES), step);
            }
            if (!counted) items.count_all(), counted = true;
            number = gridDim.x + __shfl_sync(ALL_LANES, ticket, 0);
            more = number < items.count;
        }
        announce(Item{});
        if (lane == 0 && atomicInc(&counters[1], gridDim.x - 1) == gridDim.x - 1) counters[0] = 0;
    }
};

// Add up `parts` of each head: stat(head, i) are the base and the total of the probabilities of part i, values(head, i,
// dim) the sums of four dims; result(head, dim, sums, base, total). Warps take heads, lanes dims; each part's factor is
// one lane's work.
template <class Stat, class Values, class Result>
__device__ __forceinline__ void merge(int heads, int parts, Stat stat, Values values, Result result) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    for (int head = warp; head < heads; head += WARPS) {
        const float2 own = lane < parts ? stat(head, lane) : make_float2(NO_SCORE, 0.0f);
        float top = own.x;
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
        const float factor = exp2_fast(own.x - top);
        float total = own.y * factor;
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(ALL_LANES, total, lanes);
        for (int first = 0; first < HEAD_DIM; first += 4 * LANES) {
            const int dim = first + 4 * lane;
            float4 sum{};
#pragma unroll 8
            for (int i = 0; i < parts; ++i) {
                const float by = __shfl_sync(ALL_LANES, factor, i);
                const float4 x = dim < HEAD_DIM ? values(head, i, dim) : float4{};
                sum.x += x.x * by, sum.y += x.y * by, sum.z += x.z * by, sum.w += x.w * by;
            }
            if (dim < HEAD_DIM) result(head, dim, sum, top, total);
        }
    }
}

// fp16 of sum / total + offset; zeros for a sequence without tokens.
__device__ __forceinline__ void write(__half* out, const float4& sum, float total, const __half* offset) {
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

// Where results go, and splits until they are merged.
struct Outputs {
    const __half* v_offset;
    __half* out;
    float* partials;
    unsigned* arrived;  // splits, for each place
    int places, max_splits, part_heads;

    __device__ float* sums(int place) const {
        return partials + int64_t(place) * max_splits * part_heads * HEAD_DIM;
    }
    __device__ float2* stats(int place) const {
        float* behind = partials + int64_t(places) * max_splits * part_heads * HEAD_DIM;
        return reinterpret_cast<float2*>(behind) + int64_t(place) * max_splits * part_heads;
    }
    __device__ void write_row(const Item& item, int head, int dim, const float4& sum, float total) const {
        const __half* offset = v_offset == nullptr ? nullptr : v_offset + item.kv_head * HEAD_DIM + dim;
        write(out + int64_t(item.row + head) * HEAD_DIM + dim, sum, total, offset);
    }

    // The item's sums are stored, and all threads have met; says whether it was the last of its splits.
    __device__ bool arrive(const Item& item) const {
        __threadfence();
        const unsigned last = item.splits - 1;
        const bool is_last = atomicInc(&arrived[item.place], last) == last;  // and back to zero
        __threadfence();
        return is_last;
    }

    __device__ void merge_warps(const Item& item, const unsigned char* results,
                                const float2 (&warp_stats)[WARPS][HEADS]) const {
        const auto values = [&](int head, int i, int dim) {
            return *reinterpret_cast<const float4*>(results + i * RESULT_BYTES + (head * RESULT_ROW + dim) * 4);
        };
        merge(item.heads, WARPS, [&](int head, int i) { return warp_stats[i][head]; }, values,
              [&](int head, int dim, const float4& sum, float top, float total) {
                  if (item.splits == 1) return write_row(item, head, dim, sum, total);
                  const int part = item.split * part_heads + head;
                  *reinterpret_cast<float4*>(sums(item.place) + part * HEAD_DIM + dim) = sum;
                  if (dim == 0) stats(item.place)[part] = make_float2(top, total);
              });
    }

    __device__ void merge_splits(const Item& item) const {
        const float* from = sums(item.place);
        const float2* from_stats = stats(item.place);
        const auto values = [&](int head, int i, int dim) {
            return __ldcg(reinterpret_cast<const float4*>(from + (i * part_heads + head) * HEAD_DIM + dim));
        };
        merge(item.heads, item.splits, [&](int head, int i) { return __ldcg(from_stats + i * part_heads + head); },
              values, [&](int head, int dim, const float4& sum, float top, float total) {
                  write_row(item, head, dim, sum, total);
              });
    }
};

// The warps that compute.
__device__ __forceinline__ void consume(Shared& shared, unsigned char* dynamic, Outputs outputs, float scale_log2) {
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    unsigned char* results = dynamic + RESULTS;
    for (unsigned taken = 0;; ++taken) {
        const Item& item = shared.items[taken % QUEUE];  // read again and again: registers are short
        wait(shared_address(&shared.found[taken % QUEUE]), taken / QUEUE & 1);
        if (item.heads == 0) break;
        {
            Queries queries;
            queries.load(dynamic + QUERIES + taken % QUEUE * QUERY_BYTES, item.heads);
            Running running;
            running.clear();
            for (int token = warp * STEP; token < item.to; token += WARPS * STEP) {
                const unsigned number = item.steps + token / STEP, slot = number % SLOTS;
                wait(shared_address(&shared.full[slot]), number / SLOTS & 1);
                running.step(dynamic + slot * STAGE_BYTES, queries, scale_log2, item.from - token, item.to - token);
                __syncwarp();
                if (lane == 0) arrive(shared_address(&shared.empty[slot]));
            }
            named_barrier(CONSUMERS, THREADS);  // all have read what is overwritten now
            running.finish(reinterpret_cast<float*>(results + warp * RESULT_BYTES), shared.stats[warp], item.heads);
        }
        named_barrier(CONSUMERS, THREADS);
        const bool merging = shared.is_last;
        if (merging) outputs.merge_splits(shared.unmerged);
        outputs.merge_warps(item, results, shared.stats);
        if (merging || item.splits > 1) {
            named_barrier(CONSUMERS, THREADS);
            if (threadIdx.x == THREADS - 1) {  // of the warp that has the fewest steps
                shared.is_last = item.splits > 1 && outputs.arrive(item);
                shared.unmerged = item;
            }
        }
        __syncwarp();
        if (lane == 0) arrive(shared_address(&shared.finished[taken % QUEUE]));
    }
    named_barrier(CONSUMERS, THREADS);
    if (shared.is_last) outputs.merge_splits(shared.unmerged);
}

// q, out (batch, kv_heads * group, HEAD_DIM); cache (cache_pages, kv_heads, RECORD); block_tables (batch, max_pages);
// v_offset (kv_heads, HEAD_DIM) or null. max_splits is what max_pages may need. With P = batch * kv_heads * blocks of 8
// heads and H = min(group, 8), partials holds (P, max_splits, H, HEAD_DIM) sums, then (P, max_splits, H) bases and
// totals; counters, zero between launches, the ticket, the blocks that are through, and the splits that arrived for
// each of P.
extern "C" __global__ void __launch_bounds__(THREADS + LANES, BLOCKS)
    kv_decode(const __half* q, const unsigned char* cache, const int32_t* block_tables, const int32_t* context_lens,
              const __half* v_offset, __half* out, float* partials, unsigned* counters, float scale_log2, int batch,
              int kv_heads, int group, int max_pages, int cache_pages, int max_splits, int window) {
    extern __shared__ __align__(128) unsigned char dynamic[];
    __shared__ Shared shared;

    allow_successor();
    for (int i = threadIdx.x; i < SLOTS; i += THREADS + LANES) {
        init_barrier(shared_address(&shared.full[i]), LANES);
        init_barrier(shared_address(&shared.empty[i]), 1);
    }
    if (threadIdx.x == 0) shared.is_last = false;
    if (threadIdx.x < QUEUE) {
        init_barrier(shared_address(&shared.found[threadIdx.x]), LANES + 1);
        init_barrier(shared_address(&shared.finished[threadIdx.x]), WARPS);
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        const Arguments of{q,        cache, block_tables, context_lens, batch,
                           kv_heads, group, max_pages,    cache_pages,  window};
        Producer{of, shared, dynamic}.run(counters);
    } else {
        wait_for_predecessor();
        const int places = batch * kv_heads * ((group + HEADS - 1) / HEADS);
        consume(shared, dynamic, {v_offset, out, partials, counters + 2, places, max_splits, min(group, HEADS)},
                scale_log2);
    }
}
