// Six rows times four vectors with every operand in a named register. GCC spills some of the 24
// sums of the same loop in plain C++, which halves its speed; pinned as operands of the one
// instruction written in assembly they stay where they are, and all else is left to the compiler.
//
//   zmm0-3    one step of the panel       zmm8-31   the sums, four for each row
//   zmm4-5    groups of A, in turn
#pragma once

#include "gemm.hpp"

namespace sage_cpu {
namespace {

// X(row, register of A, registers of the sums)
#define SAGE_TILE_ROWS(X)                       \
    X(0, 4, "zmm8", "zmm9", "zmm10", "zmm11")   \
    X(1, 5, "zmm12", "zmm13", "zmm14", "zmm15") \
    X(2, 4, "zmm16", "zmm17", "zmm18", "zmm19") \
    X(3, 5, "zmm20", "zmm21", "zmm22", "zmm23") \
    X(4, 4, "zmm24", "zmm25", "zmm26", "zmm27") \
    X(5, 5, "zmm28", "zmm29", "zmm30", "zmm31")

#define SAGE_DECLARE(row, a, r0, r1, r2, r3)                       \
    register __m512i sum##row##0 asm(r0) = Isa::begin(start(row)); \
    register __m512i sum##row##1 asm(r1) = sum##row##0;            \
    register __m512i sum##row##2 asm(r2) = sum##row##0;            \
    register __m512i sum##row##3 asm(r3) = sum##row##0;

#define SAGE_DOT(sum, group, column)                                      \
    if constexpr (SignedA)                                                \
        asm("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(group), "v"(column)); \
    else                                                                  \
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(group), "v"(column));

#define SAGE_STEP(row, a, r0, r1, r2, r3)                                             \
    group##a = Isa::broadcast_group((row < 3 ? top : bottom) + row % 3 * o.a_stride); \
    SAGE_DOT(sum##row##0, group##a, column0)                                          \
    SAGE_DOT(sum##row##1, group##a, column1)                                          \
    SAGE_DOT(sum##row##2, group##a, column2)                                          \
    SAGE_DOT(sum##row##3, group##a, column3)

#define SAGE_SHIFT(row, a, r0, r1, r2, r3)     \
    sum##row##0 = Isa::times_256(sum##row##0); \
    sum##row##1 = Isa::times_256(sum##row##1); \
    sum##row##2 = Isa::times_256(sum##row##2); \
    sum##row##3 = Isa::times_256(sum##row##3);

#define SAGE_FINISH(row, a, r0, r1, r2, r3)                                           \
    {                                                                                 \
        const __m512i sums[4] = {sum##row##0, sum##row##1, sum##row##2, sum##row##3}; \
        finish(row, sums);                                                            \
    }

template <bool SignedA, int Planes, class Start, class Finish>
SAGE_INLINE void register_tile(const Operands<Isa::Element>& o, Start start, Finish finish) {
    register __m512i column0 asm("zmm0");
    register __m512i column1 asm("zmm1");
    register __m512i column2 asm("zmm2");
    register __m512i column3 asm("zmm3");
    register __m512i group4 asm("zmm4");
    register __m512i group5 asm("zmm5");
    SAGE_TILE_ROWS(SAGE_DECLARE)
    for (int plane = 0; plane < Planes; plane++) {
        if (plane > 0) {
            SAGE_TILE_ROWS(SAGE_SHIFT)
        }
        const Isa::Element* top = o.a + plane * o.planes;
        const Isa::Element* bottom = top + 3 * o.a_stride;
        for (int64_t p = 0; p < o.panel_count; p++) {
            const char* b = o.panels[p];
            for (int64_t k = 0; k < o.steps; k++) {
                column0 = Isa::load_panel(b);
                column1 = Isa::load_panel(b + 64);
                column2 = Isa::load_panel(b + 128);
                column3 = Isa::load_panel(b + 192);
                SAGE_TILE_ROWS(SAGE_STEP)
                top += 4;
                bottom += 4;
                b += o.step_bytes;
            }
        }
    }
    SAGE_TILE_ROWS(SAGE_FINISH)
}

#undef SAGE_TILE_ROWS
#undef SAGE_DECLARE
#undef SAGE_DOT
#undef SAGE_STEP
#undef SAGE_SHIFT
#undef SAGE_FINISH

}  // namespace
}  // namespace sage_cpu
