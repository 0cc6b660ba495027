// Exponentials and tanh on vectors.
#pragma once

#include "plan.hpp"

namespace sage_cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kLargestFloat = 3.4028235e38f;

// 2^r on [-1/2, 1/2] by the polynomial of least relative error (Remez), low powers first.
// Largest relative errors: 7.5e-5, 2.6e-6, 1.9e-9; P in 8 bits resolves 2e-3, in 16 bits 8e-6.
template <int Degree>
struct Exp2Polynomial;
template <>
struct Exp2Polynomial<3> {
    static constexpr float kTerms[] = {0.9999280735f, 0.6932609855f, 0.2426111222f, 0.05517166907f};
};
template <>
struct Exp2Polynomial<4> {
    static constexpr float kTerms[] = {0.9999992614f, 0.6931218147f, 0.2402474483f, 0.05591786032f,
                                       0.009570101908f};
};
template <>
struct Exp2Polynomial<6> {
    static constexpr float kTerms[] = {1.000000001f,   0.6931472057f,   0.2402264689f,
                                       0.05550328777f, 0.009618488957f, 0.001339993122f,
                                       0.00015345812f};
};

// factor * 2^((x - maximum) * unit) for x <= maximum; unit > 0.
template <int Degree>
struct Exponential {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
    static constexpr float kRounder = 12582912.0f;
    // Exponents are cut here. What they stand for vanishes beside the maximum's 1, in any format.
    static constexpr float kLowest = -120.0f;

    Isa::Floats maximum, unit, lowest, terms[Degree + 1];

    SAGE_INLINE Exponential(float maximum_, float unit_, float factor)
        : maximum(Isa::set(maximum_)), unit(Isa::set(unit_)), lowest(Isa::set(kLowest / unit_)) {
#pragma GCC unroll 8
        for (int i = 0; i <= Degree; i++)
            terms[i] = Isa::set(Exp2Polynomial<Degree>::kTerms[i] * factor);
    }

    SAGE_INLINE Isa::Floats power(Isa::Floats below) const {
        Isa::Floats rounder = Isa::set(kRounder);
        Isa::Floats shifted = Isa::fma(below, unit, rounder);
        Isa::Floats rest = Isa::fma(below, unit, rounder - shifted);
        Isa::Floats y = terms[Degree];
#pragma GCC unroll 8
        for (int i = Degree - 1; i >= 0; i--) y = Isa::fma(y, rest, terms[i]);
        Isa::Ints exponent = Isa::shift_left<23>(Isa::as_int(shifted));
        return Isa::as_float(Isa::add(Isa::as_int(y), exponent));
    }

    SAGE_INLINE Isa::Ints rounded(Isa::Floats x) const {
        return Isa::round(power(Isa::max(x - maximum, lowest)));
    }
    // Exactly zero where the exponent is cut: what is hidden must have no weight at all.
    SAGE_INLINE Isa::Floats exact(Isa::Floats x) const {
        Isa::Floats below = x - maximum;
        return Isa::select(Isa::less(lowest, below), power(Isa::max(below, lowest)),
                           Isa::set(0.0f));
    }
};

// 2^x for x <= 0, -infinity included.
SAGE_INLINE Isa::Floats exp2(Isa::Floats x) { return Exponential<6>(0.0f, 1.0f, 1.0f).exact(x); }

// By its series near zero, where the quotient would cancel, else as 1 - 2 / (1 + e^(2 |x|)).
SAGE_INLINE Isa::Floats tanh(Isa::Floats x) {
    Isa::Floats one = Isa::set(1.0f), size = Isa::abs(x), square = x * x;
    Isa::Floats series = Isa::fma(square, Isa::set(62.0f / 2835.0f), Isa::set(-17.0f / 315.0f));
    series = Isa::fma(series, square, Isa::set(2.0f / 15.0f));
    series = Isa::fma(series, square, Isa::set(-1.0f / 3.0f));
    series = Isa::fma(series * square, size, size);
    Isa::Floats decayed = exp2(size * Isa::set(-2.0f * kLog2E));
    Isa::Floats quotient = (one - decayed) / (one + decayed);
    Isa::Floats result = Isa::select(Isa::less(size, Isa::set(0.25f)), series, quotient);
    result = Isa::select(Isa::less(x, Isa::set(0.0f)), Isa::set(0.0f) - result, result);
    return Isa::select(Isa::unordered(x, x), x, result);
}

}  // namespace
}  // namespace sage_cpu
