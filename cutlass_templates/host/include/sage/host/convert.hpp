// Conversions between float and the narrow formats, bit for bit as the GPU's cvt instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace sage::host {

inline uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, sizeof u);
    return u;
}

inline float from_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, sizeof x);
    return x;
}

constexpr uint32_t kMagnitude = 0x7fff'ffff;
constexpr uint32_t kInfinity = 0x7f80'0000;

// A narrow format's exponent and mantissa, moved to where float has them, are a float too small by
// 2^(the difference of the biases), subnormals included: one exact product puts that right.
inline float half_to_float(uint32_t half) {
    uint32_t const magnitude = (half & 0x7fff) << 13;
    uint32_t const finite = bits(from_bits(magnitude) * 0x1p112f);
    uint32_t const special = magnitude >= 0x7c00u << 13 ? kInfinity : 0;
    return from_bits(finite | special | (half & 0x8000) << 16);
}

inline float e4m3_to_float(uint32_t code) {
    uint32_t const magnitude = (code & 0x7f) << 20;
    uint32_t const finite = bits(from_bits(magnitude) * 0x1p120f);
    uint32_t const nan = (code & 0x7f) == 0x7f ? kMagnitude : 0;
    return from_bits(finite | nan | (code & 0x80) << 24);
}

inline float bfloat16_to_float(uint32_t bfloat16) { return from_bits(bfloat16 << 16); }

// Adds half a unit of the last kept bit, to even, to a magnitude with `dropped` bits to drop.
inline uint32_t round_to_even(uint32_t magnitude, int dropped) {
    return (magnitude + (1u << (dropped - 1)) - 1 + (magnitude >> dropped & 1)) >> dropped;
}

// Nearest, ties to even; overflow is infinite; every NaN becomes 0x7fff.
inline uint32_t float_to_half(float x) {
    uint32_t const magnitude = bits(x) & kMagnitude, sign = bits(x) >> 16 & 0x8000;
    if (magnitude > kInfinity) return 0x7fff;
    if (magnitude >= bits(0x1p16f)) return sign | 0x7c00;
    if (magnitude < bits(0x1p-14f)) {  // subnormal: 0.5 has the unit 2^-24 of these
        return sign | (bits(from_bits(magnitude) + 0.5f) - bits(0.5f));
    }
    return sign | round_to_even(magnitude - (112u << 23), 13);
}

// Nearest, ties to even; saturates to 448; every NaN becomes 0x7f.
inline uint32_t float_to_e4m3(float x) {
    uint32_t const magnitude = bits(x) & kMagnitude, sign = bits(x) >> 24 & 0x80;
    if (magnitude > kInfinity) return 0x7f;
    if (magnitude > bits(448.f)) return sign | 0x7e;
    if (magnitude < bits(0x1p-6f)) {  // subnormal: 2^14 has the unit 2^-9 of these
        return sign | (bits(from_bits(magnitude) + 0x1p14f) - bits(0x1p14f));
    }
    return sign | round_to_even(magnitude - (120u << 23), 20);
}

// Nearest, ties to even; every NaN becomes 0x7fff.
inline uint32_t float_to_bfloat16(float x) {
    uint32_t const magnitude = bits(x) & kMagnitude, sign = bits(x) >> 16 & 0x8000;
    return magnitude > kInfinity ? 0x7fff : sign | round_to_even(magnitude, 16);
}

// Nearest, ties away from zero; every NaN becomes 0x7fffffff.
inline uint32_t float_to_tf32(float x) {
    uint32_t const magnitude = bits(x) & kMagnitude;
    if (magnitude > kInfinity) return kMagnitude;
    return (bits(x) + (magnitude == kInfinity ? 0 : 0x1000)) & 0xffff'e000;
}

}  // namespace sage::host
