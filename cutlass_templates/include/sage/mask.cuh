// Elements of an explicit mask.
#pragma once

#include <sage/numeric.cuh>
#include <sage/params.cuh>

namespace sage {

// What an element of a mask adds to a score, in units of log 2: finite stays finite.
SAGE_DEVICE float bias(Mask const& mask, int64_t index) {
    float natural;
    switch (mask.kind) {
        case MaskKind::kBool: {
            uint8_t const visible =
                arch::load_global(static_cast<uint8_t const*>(mask.data) + index);
            return visible != 0 ? 0.0f : -infinity();
        }
        case MaskKind::kHalf:
            natural = arch::unpack_half(
                          arch::load_global(static_cast<uint16_t const*>(mask.data) + index))
                          .x;
            break;
        case MaskKind::kBfloat16:
            natural = arch::unpack_bfloat16(
                          arch::load_global(static_cast<uint16_t const*>(mask.data) + index))
                          .x;
            break;
        default:
            natural = arch::load_global(static_cast<float const*>(mask.data) + index);
    }
    if (natural == infinity() || natural == -infinity()) return natural;
    float const scaled = natural * kLog2E;
    return scaled > kLargest ? kLargest : scaled < -kLargest ? -kLargest : scaled;
}

}  // namespace sage
