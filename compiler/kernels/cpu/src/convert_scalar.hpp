// 16-bit floats one by one, for the ends of rows and for machines without instructions for them.
#pragma once

#include "plan.hpp"

namespace sage_cpu {
namespace {

SAGE_INLINE float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

SAGE_INLINE uint32_t float_to_bits(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

SAGE_INLINE float from_bfloat16(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

SAGE_INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits = float_to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // rounding could carry a NaN into inf
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

SAGE_INLINE float from_float16(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent is 112 too small; the product also makes subnormals normal.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

SAGE_INLINE uint16_t to_float16(float x) {
    uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (rest < 0x38800000) {                                 // subnormal: let the adder round
        uint32_t rounded = float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f);
        return uint16_t(sign | rounded);
    }
    uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
    return uint16_t(sign | (rounded - 0x38000000) >> 13);
}

}  // namespace
}  // namespace sage_cpu
