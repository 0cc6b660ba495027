// The number formats, and the scales that bring values into their range; see "Q and K" and "P and
// V" of docs/numerics.md, whose executable form is sage_compiler/kernels/quantize.py.
#pragma once

#include <cutlass/numeric_types.h>

#include <sage/arch.cuh>

namespace sage {

constexpr float kLn2 = 0.693147180559945309f;
constexpr float kLog2E = 1.44269504088896341f;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kMagnitudeMask = 0x7fffffffu;
constexpr uint32_t kNanBits = 0x7fffffffu;
constexpr float kLargest = 3.402823466e38f;
constexpr float kSmallestScale = 1.17549435e-38f;  // 2^-126: a group of zeros is not 0/0

// index = outer * count + inner. In 32 bits, which hold all that a grid counts: a division of 64
// bits is a call.
struct Split {
    int outer, inner;

    SAGE_DEVICE Split(int64_t index, int64_t count)
        : outer(static_cast<uint32_t>(index) / static_cast<uint32_t>(count)),
          inner(static_cast<uint32_t>(index) % static_cast<uint32_t>(count)) {}
};

SAGE_DEVICE float infinity() { return arch::from_bits(kInfinityBits); }

// Formats of Q and K.
struct Int4 {
    static constexpr int kBits = 4;
    static constexpr float kLimit = 7.0f;
    using Atom = arch::MmaS4;
};
struct Int8 {
    static constexpr int kBits = 8;
    static constexpr float kLimit = 127.0f;
    using Atom = arch::MmaS8;
};

// Formats of P and V. 2^kLog2WeightFactor is what makes P in [0, 1] fill the range of its format.
struct E4m3 {
    static constexpr int kBits = 8;
    static constexpr float kLimit = 448.0f;
    static constexpr float kLog2WeightFactor = 8.80735492205760411f;  // log2(448)
};
struct Half {
    static constexpr int kBits = 16;
    static constexpr float kLimit = 65504.0f;
    static constexpr float kLog2WeightFactor = 0.0f;
};

// SageAttention2++: the largest |V|, so that 64 products of at most 448 * 2.25 stay below 65504,
// the largest half.
constexpr float kHalfAccumulatorLimit = 2.25f;

// Two values of a 16-bit input and output type in one register.
template <class Type>
struct Packed2;

template <>
struct Packed2<cutlass::half_t> {
    SAGE_DEVICE static uint32_t pack(float low, float high) { return arch::pack_half(low, high); }
    SAGE_DEVICE static float2 unpack(uint32_t x) { return arch::unpack_half(x); }
};

template <>
struct Packed2<cutlass::bfloat16_t> {
    SAGE_DEVICE static uint32_t pack(float low, float high) {
        return arch::pack_bfloat16(low, high);
    }
    SAGE_DEVICE static float2 unpack(uint32_t x) { return arch::unpack_bfloat16(x); }
};

// By an exponential, which is exacter than the instruction of this name, and near zero, where that
// would cancel, by two terms of the series.
SAGE_DEVICE float hyperbolic_tangent(float x) {
    constexpr float kFlat = 20.0f;  // where it is 1 in float32; NaN stays NaN
    constexpr float kSmall = 0.04f;
    if (x < kSmall && x > -kSmall) return x - x * x * x * (1.0f / 3.0f);
    x = x > kFlat ? kFlat : x < -kFlat ? -kFlat : x;
    return 1.0f - arch::divide(2.0f, arch::exp2(x * (2.0f * kLog2E)) + 1.0f);
}

SAGE_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The bits of |x|: ordered as the magnitudes are, infinity above them and NaN above infinity.
SAGE_DEVICE uint32_t magnitude_bits(float x) { return arch::bits(x) & kMagnitudeMask; }
SAGE_DEVICE float magnitude(float x) { return arch::from_bits(magnitude_bits(x)); }

// A magnitude with the sign of another number.
SAGE_DEVICE float with_sign(float magnitude, float signed_number) {
    return arch::from_bits(arch::bits(magnitude) | (arch::bits(signed_number) & ~kMagnitudeMask));
}

// amax / limit; positive for a group of zeros, NaN for a group that is not finite.
SAGE_DEVICE float scale_of(uint32_t amax_bits, float limit) {
    if (amax_bits >= kInfinityBits) return arch::from_bits(kNanBits);
    return arch::maximum(arch::divide(arch::from_bits(amax_bits), limit), kSmallestScale);
}

// x / scale, within [-limit, limit], which only a token that does not count exceeds; NaN stays NaN.
// Neither the reciprocal of a scale may be in range, nor such a token's quotient.
SAGE_DEVICE float quotient_within(float x, float scale, float limit) {
    float const shrink = scale > 0x1p125f ? 0.125f : 1.0f;
    float const quotient = arch::divide(x * shrink, scale * shrink);
    float const most = limit * scale;
    return x > most ? limit : x < -most ? -limit : quotient;
}

// The power of two that brings amax into [2^14, 2^15), the top of FP16's range; NaN for a channel
// that is not finite.
SAGE_DEVICE float power_of_two_scale_of(uint32_t amax_bits) {
    if (amax_bits >= kInfinityBits) return arch::from_bits(kNanBits);
    // amax lies in [2^(e - 127), 2^(e - 126)), so e - 126 - 15 is the exponent of the scale.
    int const biased = static_cast<int>(amax_bits >> 23) - 14;
    return arch::from_bits(static_cast<uint32_t>(biased > 1 ? biased : 1) << 23);
}

}  // namespace sage
