// The register tile: a few rows of A times panels of B, all sums in registers.
#pragma once

#include "plan.hpp"

namespace sage_cpu {
namespace {

// What is multiplied: rows of A, and panels of B that continue each other along the sum.
template <class Element>
struct Operands {
    const Element* a;  // rows of a_stride elements
    int64_t a_stride;
    int64_t planes;  // further planes of A, this many elements apart, hold lower bytes
    const char* const* panels;
    int64_t panel_count;
    int64_t steps;       // per panel: groups of elements that are summed by one instruction
    int64_t step_bytes;  // of a panel
};

// An instruction set's own loop for its largest tile, where Isa::kHasRegisterTile says so.
template <bool SignedA, int Planes, class Start, class Finish>
SAGE_INLINE void register_tile(const Operands<Isa::Element>& o, Start start, Finish finish);

// Calls finish(row, sums) for each row, with sums[v] = start(row) + sum over k of A[row, k] * B[k,
// v]. With two planes A is 256 times the first plus the second.
template <int Rows, int Vectors, bool SignedA, int Planes, class Start, class Finish>
SAGE_INLINE void multiply(const Operands<Isa::Element>& o, Start start, Finish finish) {
    if constexpr (Rows == kGroupRows && Vectors == Isa::kVectors && Isa::kHasRegisterTile) {
        register_tile<SignedA, Planes>(o, start, finish);
    } else {
        Isa::Sum sums[Rows][Vectors];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; v++) sums[r][v] = Isa::begin(start(r));
        }
        for (int plane = 0; plane < Planes; plane++) {
            if (plane > 0) {
#pragma GCC unroll 8
                for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 8
                    for (int v = 0; v < Vectors; v++) sums[r][v] = Isa::times_256(sums[r][v]);
                }
            }
            const Isa::Element* a = o.a + plane * o.planes;
            for (int64_t p = 0; p < o.panel_count; p++) {
                const char* b = o.panels[p];
                for (int64_t k = 0; k < o.steps; k++) {
                    Isa::Panel columns[Vectors];
#pragma GCC unroll 8
                    for (int v = 0; v < Vectors; v++)
                        columns[v] = Isa::load_panel(b + v * Isa::kLanes * 4);
#pragma GCC unroll 8
                    for (int r = 0; r < Rows; r++) {
                        Isa::Group group = Isa::broadcast_group(a + r * o.a_stride);
#pragma GCC unroll 8
                        for (int v = 0; v < Vectors; v++)
                            sums[r][v] = Isa::template dot<SignedA>(sums[r][v], group, columns[v]);
                    }
                    a += 4;
                    b += o.step_bytes;
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            Isa::Ints totals[Vectors];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; v++) totals[v] = Isa::total(sums[r][v]);
            finish(r, totals);
        }
    }
}

// The same in floats, one element a step, for the recipe without quantization.
template <int Rows, int Vectors, class Finish>
SAGE_INLINE void multiply_floats(const Operands<float>& o, Finish finish) {
    Isa::Floats sums[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++) sums[r][v] = Isa::set(0.0f);
    }
    const float* a = o.a;
    for (int64_t p = 0; p < o.panel_count; p++) {
        const char* b = o.panels[p];
        for (int64_t k = 0; k < o.steps; k++) {
            Isa::Floats columns[Vectors];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; v++)
                columns[v] = Isa::load(reinterpret_cast<const float*>(b) + v * Isa::kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; r++) {
                Isa::Floats element = Isa::set(a[r * o.a_stride]);
#pragma GCC unroll 8
                for (int v = 0; v < Vectors; v++)
                    sums[r][v] = Isa::fma(element, columns[v], sums[r][v]);
            }
            a += 1;
            b += o.step_bytes;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++) finish(r, sums[r]);
}

}  // namespace
}  // namespace sage_cpu
