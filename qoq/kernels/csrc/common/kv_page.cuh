// Where the bytes of the paged KV cache lie; qoq/paged.py draws it. HEAD_DIM and BITS are defines.
#pragma once

#include "types.cuh"

constexpr int PAGE = 64;                                    // tokens
constexpr int ROW = HEAD_DIM * BITS / 8;                    // bytes of one token's codes
constexpr int GRID = BITS < 16 ? 8 : 0;                     // scale and minimum of K, then of V, of one token, in fp16
constexpr int V_ROWS = PAGE * ROW, GRIDS = 2 * PAGE * ROW;  // offsets within a record; K's rows come first
constexpr int RECORD = GRIDS + PAGE * GRID;                 // bytes, of one page and KV head

static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= 256, "a warp handles a head");
static_assert(BITS == 4 || BITS == 8 || BITS == 16, "codes of 4 or 8 bits, or fp16 as it is");
