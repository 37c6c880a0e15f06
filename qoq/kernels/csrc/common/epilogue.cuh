// From int32 sums of products to fp16: the float steps of gemm_grouped and gemm_channel in qoq/quant.py, each rounded.
#pragma once

#include <cuda_fp16.h>

#include "types.cuh"

// `acc` is the sum over biased bytes w8 + 128, `sum` the sum of the token's x8. The integer step is exact.
__device__ __forceinline__ float scale_grouped(int32_t acc, int32_t sum, float sx, float s1) {
    return __fmul_rn(__int2float_rn(acc - 128 * sum), __fmul_rn(sx, s1));
}

__device__ __forceinline__ float scale_channel(int32_t acc, int32_t sum, float sx, float s1, float szero) {
    return __fmul_rn(__fsub_rn(__fmul_rn(__int2float_rn(acc), s1), __fmul_rn(__int2float_rn(sum), szero)), sx);
}

// The product of a linear without bias is rounded as it is: -0 + 0 would be +0.
__device__ __forceinline__ __half finish(float y, float bias, bool has_bias) {
    return __float2half_rn(has_bias ? __fadd_rn(y, bias) : y);
}

// As a separate addition of two fp16 tensors.
__device__ __forceinline__ __half add_residual(__half residual, __half y) {
    return __float2half_rn(__fadd_rn(__half2float(residual), __half2float(y)));
}
