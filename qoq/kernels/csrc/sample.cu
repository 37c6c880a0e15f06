// One token for each row of logits (B, vocabulary), as sample() in qoq/sampling.py: the largest logit where the
// temperature is 0, else a draw from softmax(logits / temperature) cut to top_k, then top_p, then min_p.
//
// Each token t has one fixed exponential variate e_t, a function of (seed, position, t) alone, and the draw is the t
// of largest weight_t / e_t among those the cuts leave (the exponential race). So nothing is sorted: take the winner
// of all tokens that top_k and min_p leave; if top_p cuts it off, it cuts off all tokens that are no more likely,
// and the winner of the others is next. The last one standing is the winner among the tokens all three leave.
//
// One block for a row, which is read a few times and comes from L2. A result depends on its own row alone; sums of
// floats have a fixed order. A row that holds NaN or +infinity, or only -infinity, gives -1. LOGIT is a define.

#include <cuda_fp16.h>

#include "common/block.cuh"
#include "common/overlap.cuh"
#include "common/types.cuh"

constexpr int kThreads = 1024;
constexpr int kTokens = 4;     // consecutive tokens that a thread looks at together, and that one Philox call serves
constexpr int kInFlight = 3;   // such groups that a thread loads at once
constexpr int kBins = 2048;    // of the histogram that finds the k-th largest logit
// The largest logit has weight 1 and e < 16.7, so whatever wins has weight / e above this; and e >= 2^-33.
constexpr float kLeastRatio = 0.0598f;
constexpr float kLeastWeight = kLeastRatio / 8589934592.0f;

__device__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ float wide(float x) { return x; }
__device__ float wide(__half x) { return __half2float(x); }

struct alignas(kTokens * sizeof(LOGIT)) Packed {
    LOGIT logit[kTokens];
};

struct Row {
    const LOGIT* logits;
    int vocabulary;

    // Logits of group g; -infinity beyond the end.
    __device__ void load(int g, float (&x)[kTokens]) const {
        const int first = g * kTokens;
        if (vocabulary % kTokens == 0) {  // so that every row is aligned
            Packed packed;
            if (first < vocabulary) packed = reinterpret_cast<const Packed*>(logits)[g];
#pragma unroll
            for (int i = 0; i < kTokens; ++i) x[i] = first < vocabulary ? wide(packed.logit[i]) : -infinity();
        } else {
#pragma unroll
            for (int i = 0; i < kTokens; ++i) x[i] = first + i < vocabulary ? wide(logits[first + i]) : -infinity();
        }
    }

    // visit(group, its logits) for all groups of this thread, in rising order.
    template <class Visit>
    __device__ void each(Visit visit) const {
        const int groups = (vocabulary + kTokens - 1) / kTokens;
        for (int first = threadIdx.x; first < groups; first += kInFlight * kThreads) {
            float x[kInFlight][kTokens];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) load(first + i * kThreads, x[i]);
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) visit(first + i * kThreads, x[i]);
        }
    }
};

// Floats as integers of the same order, and back; adding 0 makes -0 the 0 that it equals.
__device__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ float from_ordered(uint32_t rank) {
    return __uint_as_float(rank ^ (rank >> 31 ? 0x80000000u : 0xffffffffu));
}

// A token and what it is chosen for: the larger value wins, and then the lower token.
struct Best {
    float value;
    int token;

    __device__ uint64_t key() const { return uint64_t(ordered(value)) << 32 | ~uint32_t(token); }
    __device__ static Best from(uint64_t key) { return {from_ordered(uint32_t(key >> 32)), int(~uint32_t(key))}; }
};

// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3): four words for a counter and a key.
__device__ uint4 philox(uint4 counter, uint2 key) {
    constexpr uint32_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        counter = make_uint4(__umulhi(kSecond, counter.z) ^ counter.y ^ key.x, kSecond * counter.z,
                             __umulhi(kFirst, counter.x) ^ counter.w ^ key.y, kFirst * counter.x);
        key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}

struct Scratch {
    uint64_t best[kWarp];
    float mass[kWarp];
    int bins[kBins];
    int counts[kWarp];
    int digit, rank;
};

// The k-th largest logit, k <= vocabulary, found digit by digit in a histogram.
__device__ float kth_largest(const Row& row, int k, Scratch& scratch) {
    uint32_t found = 0, known = 0;  // the digits found, and a mask of where they stand
#pragma unroll 1
    for (int shift = 21; shift >= 0; shift = shift == 0 ? -1 : max(shift - 11, 0)) {
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads) scratch.bins[bin] = 0;
        __syncthreads();
        row.each([&](int, const float(&x)[kTokens]) {
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
                const uint32_t bits = ordered(x[i]);
                if ((bits & known) == found) atomicAdd(&scratch.bins[(bits & ~known) >> shift], 1);
            }
        });
        __syncthreads();
        // Count from the top, a run of bins in each thread; the thread where the count passes k has the digit.
        constexpr int kRun = kBins / kThreads;
        const int top = kBins - 1 - kRun * threadIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        int in_run = 0;
#pragma unroll
        for (int i = 0; i < kRun; ++i) in_run += scratch.bins[top - i];
        int upto = in_run;  // in this run and those above it, of this warp and then of the block
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            const int above = __shfl_up_sync(kAllLanes, upto, distance);
            if (lane >= distance) upto += above;
        }
        if (lane == kWarp - 1) scratch.counts[warp] = upto;
        __syncthreads();
        upto += over_warp(lane < warp ? scratch.counts[lane] : 0, Add());
        int rank = k - (upto - in_run);
        if (0 < rank && rank <= in_run) {
            int bin = top;
            for (; rank > scratch.bins[bin]; --bin) rank -= scratch.bins[bin];
            scratch.digit = bin;
            scratch.rank = rank;
        }
        __syncthreads();
        found |= uint32_t(scratch.digit) << shift;
        known = ~0u << shift;
        k = scratch.rank;
    }
    return from_ordered(found);
}

// What is drawn from: tokens with logit >= at_least, and > above, and weight = exp((logit - peak) / temperature)
// >= min_p.
struct Draw {
    float peak, inverse_temperature, at_least, min_p;
    uint2 seed, position;

    // The winner of the race among tokens above `above`, and the mass of those, min_p aside.
    __device__ Best operator()(const Row& row, float above, float& mass, Scratch& scratch) const {
        Best best{kLeastRatio, -1};
        float sum = 0.0f;
        row.each([&](int group, const float(&x)[kTokens]) {
            float weight[kTokens], largest = 0.0f;
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
                const bool inside = x[i] >= at_least && x[i] > above;
                weight[i] = inside ? expf(__fmul_rn(x[i] - peak, inverse_temperature)) : 0.0f;
                sum += weight[i];
                if (weight[i] < min_p) weight[i] = 0.0f;
                largest = fmaxf(largest, weight[i]);
            }
            if (largest <= kLeastWeight) return;
            const uint4 words = philox(make_uint4(group, 0, position.x, position.y), seed);
            const uint32_t word[kTokens] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
                // u in (0, 1) and e = -log(1 - u) >= u, so most tokens need no logarithm
                const float u = fminf(__fmaf_rn(__uint2float_rn(word[i]), 0x1p-32f, 0x1p-33f), 1.0f - 0x1p-24f);
                if (weight[i] <= best.value * u) continue;
                const float ratio = __fdiv_rn(weight[i], -log1pf(-u));
                if (ratio > best.value) best = {ratio, group * kTokens + i};
            }
        });
        mass = over_block(sum, 0.0f, scratch.mass, Add());
        return Best::from(over_block(best.key(), uint64_t(0), scratch.best, Max()));
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
sample(const LOGIT* logits, const float* temperature, const int32_t* top_k, const float* top_p, const float* min_p,
       const uint64_t* seeds, const uint64_t* positions, int64_t* tokens, int vocabulary) {
    allow_successor();
    wait_for_predecessor();
    __shared__ Scratch scratch;
    const int b = blockIdx.x;
    const Row row{logits + int64_t(b) * vocabulary, vocabulary};

    Best largest{-infinity(), 0};
    bool unusable = false;
    row.each([&](int group, const float(&x)[kTokens]) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            unusable |= !(x[i] < infinity());
            if (x[i] > largest.value) largest = {x[i], group * kTokens + i};
        }
    });
    unusable = __syncthreads_or(unusable);
    largest = Best::from(over_block(largest.key(), uint64_t(0), scratch.best, Max()));
    if (unusable || largest.value == -infinity() || temperature[b] == 0.0f) {
        if (threadIdx.x == 0) tokens[b] = unusable || largest.value == -infinity() ? -1 : largest.token;
        return;
    }

    const int k = top_k[b];
    const float at_least = 0 < k && k < vocabulary ? kth_largest(row, k, scratch) : -infinity();
    const Draw draw{largest.value,
                    __fdiv_rn(1.0f, temperature[b]),
                    at_least,
                    fminf(min_p[b], 1.0f),
                    make_uint2(uint32_t(seeds[b]), uint32_t(seeds[b] >> 32)),
                    make_uint2(uint32_t(positions[b]), uint32_t(positions[b] >> 32))};
    const float share = top_p[b];
    Best winner{0.0f, -1};
    float above = -infinity(), limit = 0.0f;
    while (true) {
        float mass;
        const Best next = draw(row, above, mass, scratch);
        if (next.token < 0 || mass < limit) break;  // top_p leaves the winner: what is above it has less than its share
        if (winner.token < 0) limit = __fmul_rn(share, mass);
        winner = next;
        if (share >= 1.0f) break;
        above = wide(row.logits[winner.token]);
    }
    if (threadIdx.x == 0) tokens[b] = winner.token;
}
