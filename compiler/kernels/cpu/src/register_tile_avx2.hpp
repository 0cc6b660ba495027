// Six rows times two vectors with every operand in a named register: GCC spills some of the sums in
// plain C++, as 16 registers leave none to spare. See register_tile_avx512.hpp.
//
//   ymm0-1    one step of the panel       ymm4-15   the sums, two for each row
//   ymm2      a group of A                ymm3      its products, where adding is an instruction
#pragma once

#include "gemm.hpp"

namespace sage_cpu {
namespace {

// X(row, registers of the sums)
#define SAGE_TILE_ROWS(X)  \
    X(0, "ymm4", "ymm5")   \
    X(1, "ymm6", "ymm7")   \
    X(2, "ymm8", "ymm9")   \
    X(3, "ymm10", "ymm11") \
    X(4, "ymm12", "ymm13") \
    X(5, "ymm14", "ymm15")

#if defined(__AVXVNNI__)
// Without the prefix the assembler may take it for the instruction of AVX-512.
#define SAGE_DOT(sum, column)                                                     \
    if constexpr (SignedA)                                                        \
        asm("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(group), "x"(column)); \
    else                                                                          \
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(group), "x"(column));
#else
#define SAGE_DOT(sum, column)                      \
    asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" \
        : "+x"(sum), "=&x"(product)                \
        : "x"(group), "x"(column));
#endif

#define SAGE_DECLARE(row, r0, r1)                                  \
    register __m256i sum##row##0 asm(r0) = Isa::first(start(row)); \
    register __m256i sum##row##1 asm(r1) = sum##row##0;

#define SAGE_STEP(row, r0, r1)                                                     \
    group = Isa::broadcast_group((row < 3 ? top : bottom) + row % 3 * o.a_stride); \
    SAGE_DOT(sum##row##0, column0)                                                 \
    SAGE_DOT(sum##row##1, column1)

#define SAGE_SHIFT(row, r0, r1)                    \
    sum##row##0 = Isa::shift_left<8>(sum##row##0); \
    sum##row##1 = Isa::shift_left<8>(sum##row##1);

#define SAGE_FINISH(row, r0, r1) finish(row, sum##row##0, sum##row##1);

// Two registers of sums per row, of the columns that start `offset` bytes into each step.
template <bool SignedA, int Planes, class Start, class Finish>
SAGE_INLINE void sum_columns(const Operands<Isa::Element>& o, int64_t offset, Start start,
                             Finish finish) {
    register __m256i column0 asm("ymm0");
    register __m256i column1 asm("ymm1");
    register __m256i group asm("ymm2");
    [[maybe_unused]] register __m256i product asm("ymm3");
    SAGE_TILE_ROWS(SAGE_DECLARE)
    for (int plane = 0; plane < Planes; plane++) {
        if (plane > 0) {
            SAGE_TILE_ROWS(SAGE_SHIFT)
        }
        const Isa::Element* top = o.a + plane * o.planes;
        const Isa::Element* bottom = top + 3 * o.a_stride;
        for (int64_t p = 0; p < o.panel_count; p++) {
            const char* b = o.panels[p] + offset;
            for (int64_t k = 0; k < o.steps; k++) {
                column0 = Isa::load_columns(b);
                column1 = Isa::load_columns(b + Isa::kColumnsBytes);
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
#undef SAGE_DOT
#undef SAGE_DECLARE
#undef SAGE_STEP
#undef SAGE_SHIFT
#undef SAGE_FINISH

template <bool SignedA, int Planes, class Start, class Finish>
SAGE_INLINE void register_tile(const Operands<Isa::Element>& o, Start start, Finish finish) {
#if defined(__AVXVNNI__)
    sum_columns<SignedA, Planes>(o, 0, start, [&](int r, Isa::Ints x, Isa::Ints y) SAGE_LAMBDA {
        const Isa::Ints sums[] = {x, y};
        finish(r, sums);
    });
#else
    // The sums of one vector fill the registers: one after the other.
    Isa::Ints totals[kGroupRows][Isa::kVectors];
    for (int v = 0; v < Isa::kVectors; v++)
        sum_columns<SignedA, Planes>(o, v * Isa::kLanes * 4, start,
                                     [&](int r, Isa::Ints x, Isa::Ints y)
                                         SAGE_LAMBDA { totals[r][v] = Isa::total({x, y}); });
#pragma GCC unroll 8
    for (int r = 0; r < kGroupRows; r++) finish(r, totals[r]);
#endif
}

}  // namespace
}  // namespace sage_cpu
