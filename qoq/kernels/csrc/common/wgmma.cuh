// The warpgroup's integer product of sm_90a: d (64 x TOKENS, int32) += a (64 x 32, unsigned bytes, registers) *
// b (32 x TOKENS, signed bytes, shared memory).
//
// Lane 4 * g + t of warp w holds, as of mma.m16n8k32, rows 16 * w + g and + 8 of `a`: registers a0 (row g), a1 (g + 8)
// with k = 4 * t.., a2, a3 with k = 16 + 4 * t..; and d[4 * j + 2 * r + e] of row g + 8 * r, token 8 * j + 2 * t + e.
#pragma once

#include "types.cuh"

// `b` as TOKENS rows of 128 bytes whose 16-byte chunks c stand at c ^ row % 8, from a 1024-byte aligned shared address.
// Adding 2 to the descriptor moves it by 32 bytes of k.
__device__ __forceinline__ uint64_t swizzled_rows(uint32_t shared) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = (1024ull >> 4) << 32, UNUSED_STRIDE = 1ull << 16;
    return SWIZZLE_128 | EIGHT_ROWS | UNUSED_STRIDE | (shared >> 4);
}

// Before products that read `a`, registers which were written since. Naming them keeps the writes ahead.
template <int OPERANDS>
__device__ __forceinline__ void fence_registers(uint32_t (&a)[OPERANDS][4]) {
#pragma unroll
    for (int i = 0; i < OPERANDS; ++i) {
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]) : : "memory");
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products issued since the last commit become one batch.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING batches are under way; their registers are taken until then.
template <int PENDING>
__device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operands 0 .. TOKENS / 2 - 1 are d, then come a0..a3 and the descriptor.
#define TEN(x) "%" x "0,%" x "1,%" x "2,%" x "3,%" x "4,%" x "5,%" x "6,%" x "7,%" x "8,%" x "9,"
#define FOUR(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define PRODUCT(tokens, operands, a, b, ...)                                                               \
    __device__ __forceinline__ void multiply(int32_t (&d)[tokens / 2], const uint32_t (&a_)[4], uint64_t b_) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k32.s32.u8.s8 {" operands "}, {" a "}, " b ", 1;" \
                     : __VA_ARGS__                                                                         \
                     : "r"(a_[0]), "r"(a_[1]), "r"(a_[2]), "r"(a_[3]), "l"(b_)                             \
                     : "memory");                                                                          \
    }

PRODUCT(8, "%0,%1,%2,%3", "%4,%5,%6,%7", "%8", FOUR(0))
PRODUCT(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8,%9,%10,%11", "%12", FOUR(0), FOUR(4))
PRODUCT(32, TEN("") "%10,%11,%12,%13,%14,%15", "%16,%17,%18,%19", "%20", SIXTEEN(0))
PRODUCT(64, TEN("") TEN("1") TEN("2") "%30,%31", "%32,%33,%34,%35", "%36", SIXTEEN(0), SIXTEEN(16))
PRODUCT(96, TEN("") TEN("1") TEN("2") TEN("3") "%40,%41,%42,%43,%44,%45,%46,%47", "%48,%49,%50,%51", "%52",
        SIXTEEN(0), SIXTEEN(16), SIXTEEN(32))
PRODUCT(128, TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") "%60,%61,%62,%63", "%64,%65,%66,%67", "%68",
        SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48))
PRODUCT(256, TEN("") TEN("1") TEN("2") TEN("3") TEN("4") TEN("5") TEN("6") TEN("7") TEN("8") TEN("9") TEN("10")
        TEN("11") "%120,%121,%122,%123,%124,%125,%126,%127", "%128,%129,%130,%131", "%132", SIXTEEN(0), SIXTEEN(16),
        SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112))

#undef TEN
#undef FOUR
#undef SIXTEEN
#undef PRODUCT

// Four 8 x 8 matrices of 16-bit numbers, or two, in fragments of pairs (row lane / 4, columns 2 * (lane % 4) and + 1),
// stored transposed: lane l names the 16 bytes that column l % 8 of matrix l / 8 fills, if there is one.
__device__ __forceinline__ void store_matrices_turned(uint32_t column_address, const uint32_t (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(column_address),
                 "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}

__device__ __forceinline__ void store_matrices_turned(uint32_t column_address, const uint32_t (&m)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(column_address), "r"(m[0]),
                 "r"(m[1])
                 : "memory");
}

// Registers of each thread of this warpgroup, from or to the pool of the block.
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
