// Reductions over a block of whole warps; every thread gets the result.
#pragma once

#include "common/types.cuh"

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Add {
    template <class T>
    __device__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
    template <class T>
    __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Combine two by two at distances 16, 8, ..., 1: all lanes get the same bits.
template <class T, class Combine>
__device__ T over_warp(T value, Combine combine) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
}
// Integers have an instruction for it.
__device__ inline int over_warp(int value, Add) { return __reduce_add_sync(kAllLanes, value); }
__device__ inline uint32_t over_warp(uint32_t value, Max) { return __reduce_max_sync(kAllLanes, value); }

// `neutral` changes nothing when combined. `scratch` holds a value for each warp; between two uses of it there must
// be a barrier that is not its own.
template <class T, class Combine>
__device__ T over_block(T value, T neutral, T* scratch, Combine combine) {
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    value = over_warp(value, combine);
    if (lane == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    return over_warp(lane < warps ? scratch[lane] : neutral, combine);
}
