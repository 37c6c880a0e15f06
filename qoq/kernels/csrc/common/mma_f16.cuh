// Tensor-core instructions on fp16 operands. Lane 4 * g + t of a warp is lane (g, t).
#pragma once

#include "types.cuh"

// c (16 x 8, fp32) += a (16 x 16, fp16) * b (16 x 8, fp16). Lane (g, t) holds of a: (row g, columns 2t, 2t+1), (row
// g+8, the same), (row g, columns 2t+8, 2t+9), (row g+8, the same); of b: (rows 2t, 2t+1, column g), (rows 2t+8, 2t+9,
// the same); of c: (row g, columns 2t, 2t+1), (row g+8, the same).
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two or four 8 x 8 matrices of 16-bit elements, each transposed: lane l names row l % 8 of matrix l / 8 (16 bytes),
// lane (g, t) gets the elements (row 2t, column g) and (row 2t+1, column g) of each.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[2], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(m[0]), "=r"(m[1])
                 : "r"(row_address)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row_address)
                 : "memory");
}

// Transpose an 8 x 8 matrix of 16-bit elements: lane (g, t) gives (row g, columns 2t, 2t+1) and gets (rows 2t, 2t+1,
// column g).
__device__ __forceinline__ uint32_t transpose(uint32_t rows) {
    uint32_t columns;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
    return columns;
}

// 2 to the power of x, off by about 2 units in the last place; 0 for minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
