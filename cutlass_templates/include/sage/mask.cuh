// Elements of an explicit mask.
#pragma once

#include <sage/numeric.cuh>
#include <sage/params.cuh>

namespace sage {

// An element of a 16-bit or 32-bit float type.
SAGE_DEVICE float load_float(void const* data, int64_t index, MaskKind kind) {
    switch (kind) {
        case MaskKind::kHalf:
            return arch::unpack_half(arch::load_global(static_cast<uint16_t const*>(data) + index))
                .x;
        case MaskKind::kBfloat16:
            return arch::unpack_bfloat16(
                       arch::load_global(static_cast<uint16_t const*>(data) + index))
                .x;
        default:
            return arch::load_global(static_cast<float const*>(data) + index);
    }
}

// What an element of a mask adds to a score, in natural units.
SAGE_DEVICE float natural_bias(Mask const& mask, int64_t index) {
    if (mask.kind == MaskKind::kBool) {
        uint8_t const visible = arch::load_global(static_cast<uint8_t const*>(mask.data) + index);
        return visible != 0 ? 0.0f : -infinity();
    }
    return load_float(mask.data, index, mask.kind);
}

// From natural units to those of log 2: finite stays finite.
SAGE_DEVICE float in_log2(float natural) {
    float const scaled = natural * kLog2E;
    bool const overflows = magnitude(scaled) > kLargest && magnitude(natural) <= kLargest;
    return overflows ? with_sign(kLargest, natural) : scaled;
}

}  // namespace sage
