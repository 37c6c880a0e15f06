// A8: rows of activations to int8, alone or behind the norm or the SwiGLU that makes them. M rows of K values.
//
//   quant_rows       x8, sx, sums of x
//   rmsnorm          x += residual, if any; y = fp16(x / rms(x) * weight)
//   rmsnorm_quant    the same, then x8, sx, sums of y
//   silu_mul_quant   x8, sx, sums of fp16(silu(gate) * up)
//
// One block makes one row, reads it once and keeps it in registers as fp16: thread t holds the vectors of 8 values
// t, t + blockDim.x, ..., VECTORS of them, of which only the last may lie beyond the row's end:
//     (VECTORS - 1) * blockDim.x * 8 <= K <= VECTORS * blockDim.x * 8,  K % 8 == 0,  blockDim.x <= THREADS
// VECTORS and THREADS are defines. All this follows from K alone, so a row does not depend on its batch.

#include <cuda_fp16.h>

#include "common/block.cuh"
#include "common/overlap.cuh"
#include "common/swiglu.cuh"
#include "common/types.cuh"

constexpr uint32_t kInfinity = 0x7c00;  // fp16; everything above is NaN

struct alignas(16) Vector {  // moved as one uint4
    __half2 pair[4];
};

// Which vector of the row is this thread's v-th, and whether the row has it.
__device__ int index_of(int v) { return v * blockDim.x + threadIdx.x; }
__device__ bool in_row(int v, int vectors) { return v < VECTORS - 1 || index_of(v) < vectors; }

// A vector beyond the end is zero: it changes no maximum and no sum.
__device__ Vector load(const __half* row, int v, int vectors) {
    Vector vector;
    reinterpret_cast<uint4&>(vector) =
        in_row(v, vectors) ? reinterpret_cast<const uint4*>(row)[index_of(v)] : make_uint4(0, 0, 0, 0);
    return vector;
}

struct Row {
    Vector vector[VECTORS];

    __device__ void load(const __half* from, int vectors) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) vector[v] = ::load(from, v, vectors);
    }

    __device__ void store(__half* to, int vectors) const {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const uint4 words = reinterpret_cast<const uint4&>(vector[v]);
            if (in_row(v, vectors)) reinterpret_cast<uint4*>(to)[index_of(v)] = words;
        }
    }
};

// rint(x * inverse) of four values as int8. Adding 1.5 * 2^23 rounds to an integer, half to even, and leaves it in
// the low bits.
__device__ uint32_t to_int8(__half2 first, __half2 second, float inverse) {
    const auto rounded = [=](float x) { return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f)); };
    const uint32_t low = __byte_perm(rounded(__low2float(first)), rounded(__high2float(first)), 0x0040);
    const uint32_t high = __byte_perm(rounded(__low2float(second)), rounded(__high2float(second)), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// A8 of the block's row, as quantize_rows() in qoq/quant.py: x8 = rint(x * (127 / amax)), sx = amax / 127.
// |x * (127 / amax)| < 127.5 after both roundings, so nothing needs a clamp.
__device__ void quantize(const Row& row, int vectors, int8_t* x8, float* sx, int32_t* sums) {
    __shared__ uint32_t of_max[kWarp];
    __shared__ int of_sum[kWarp];

    __half2 largest = __float2half2_rn(0.0f);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = __hmax2_nan(largest, __habs2(row.vector[v].pair[i]));
    }
    // Positive fp16 values order as their bits do, with NaN above infinity.
    const uint32_t in_thread = max(__half_as_ushort(__low2half(largest)), __half_as_ushort(__high2half(largest)));
    const uint32_t bits = over_block(in_thread, 0u, of_max, Max());
    const float amax = __half2float(__ushort_as_half(bits));
    const bool finite = bits < kInfinity;
    const float inverse = bits > 0 ? __fdiv_rn(127.0f, amax) : 0.0f;

    const int64_t start = int64_t(blockIdx.x) * vectors;
    int sum = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const __half2(&pair)[4] = row.vector[v].pair;
        uint2 packed = make_uint2(to_int8(pair[0], pair[1], inverse), to_int8(pair[2], pair[3], inverse));
        if (!finite) packed = make_uint2(0, 0);
        sum = __dp4a(int(packed.x), 0x01010101, __dp4a(int(packed.y), 0x01010101, sum));
        if (in_row(v, vectors)) reinterpret_cast<uint2*>(x8)[start + index_of(v)] = packed;
    }
    sum = over_block(sum, 0, of_sum, Add());
    if (threadIdx.x == 0) {
        sx[blockIdx.x] = finite ? __fdiv_rn(amax, 127.0f) : __uint_as_float(0x7fc00000);
        sums[blockIdx.x] = sum;
    }
}

// The block's row of x (M, K), with the row of `residual` added and written back if there is one, normed.
__device__ Row norm(__half* x, const __half* residual, const __half* weight, float eps, int k) {
    __shared__ float of_squares[kWarp];
    const int vectors = k / 8;
    const int64_t start = int64_t(blockIdx.x) * k;

    Row row, gain;
    row.load(x + start, vectors);
    gain.load(weight, vectors);
    if (residual != nullptr) {
        Row added;
        added.load(residual + start, vectors);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                __half2& pair = row.vector[v].pair[i];
                pair = __hadd2_rn(pair, added.vector[v].pair[i]);
            }
        }
        row.store(x + start, vectors);
    }

    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(row.vector[v].pair[i]);
            squares += pair.x * pair.x;
            squares += pair.y * pair.y;
        }
    }
    squares = over_block(squares, 0.0f, of_squares, Add());
    const float scale = __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, float(k)), eps));
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            __half2& pair = row.vector[v].pair[i];
            const float2 wide = __half22float2(pair), by = __half22float2(gain.vector[v].pair[i]);
            pair = __floats2half2_rn(__fmul_rn(__fmul_rn(wide.x, scale), by.x),
                                     __fmul_rn(__fmul_rn(wide.y, scale), by.y));
        }
    }
    return row;
}

extern "C" __global__ void __launch_bounds__(THREADS)
quant_rows(const __half* x, int8_t* x8, float* sx, int32_t* sums, int k) {
    allow_successor();
    wait_for_predecessor();
    Row row;
    row.load(x + int64_t(blockIdx.x) * k, k / 8);
    quantize(row, k / 8, x8, sx, sums);
}

#if VECTORS <= 4  // the row, the weight and the residual of a norm fit no more registers
extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm(__half* x, const __half* residual, const __half* weight, float eps, __half* y, int k) {
    allow_successor();
    wait_for_predecessor();
    norm(x, residual, weight, eps, k).store(y + int64_t(blockIdx.x) * k, k / 8);
}

extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm_quant(__half* x, const __half* residual, const __half* weight, float eps, int8_t* x8, float* sx,
              int32_t* sums, int k) {
    allow_successor();
    wait_for_predecessor();
    quantize(norm(x, residual, weight, eps, k), k / 8, x8, sx, sums);
}
#endif

// gate_up (M, 2K): gate in the first K columns, up in the others.
extern "C" __global__ void __launch_bounds__(THREADS)
silu_mul_quant(const __half* gate_up, int8_t* x8, float* sx, int32_t* sums, int k) {
    allow_successor();
    wait_for_predecessor();
    const __half* gate_row = gate_up + int64_t(blockIdx.x) * 2 * k;
    Row row, up;
    row.load(gate_row, k / 8);
    up.load(gate_row + k, k / 8);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            __half2& pair = row.vector[v].pair[i];
            pair = silu_mul(pair, up.vector[v].pair[i]);
        }
    }
    quantize(row, k / 8, x8, sx, sums);
}
