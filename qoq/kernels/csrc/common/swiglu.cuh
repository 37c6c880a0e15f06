// silu(gate) * up of fp16 values: in fp32, rounded once. One function for all kernels, so that they give the same bits.
#pragma once

#include <cuda_fp16.h>

#include "types.cuh"

__device__ __forceinline__ float silu_mul(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

__device__ __forceinline__ __half2 silu_mul(__half2 gate, __half2 up) {
    const float2 g = __half22float2(gate), u = __half22float2(up);
    return __floats2half2_rn(silu_mul(g.x, u.x), silu_mul(g.y, u.y));
}

// Two values in a word.
__device__ __forceinline__ uint32_t silu_mul(uint32_t gate, uint32_t up) {
    const __half2 product = silu_mul(reinterpret_cast<const __half2&>(gate), reinterpret_cast<const __half2&>(up));
    return reinterpret_cast<const uint32_t&>(product);
}
