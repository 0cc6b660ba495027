// What a mask shows, see "What counts in statistics" of docs/numerics.md, whose executable form is
// sage_compiler/kernels/visibility.py.
#pragma once

#include <sage/mask.cuh>

namespace sage {

constexpr float kNegligibleBias = -5000.0f;  // such a key is padding in disguise

// Written so that NaN is seen, and counts.
SAGE_DEVICE bool sees(float bias) { return bias != -infinity(); }
SAGE_DEVICE bool is_ordinary(float bias) { return !(bias <= kNegligibleBias); }

// The elements of one head of a mask.
class HeadMask {
 public:
    SAGE_DEVICE HeadMask(Mask const& mask, int64_t batch, int64_t head)
        : mask_(mask), base_(batch * mask.batch_stride + head * mask.head_stride) {}

    SAGE_DEVICE float bias(int64_t query, int64_t key) const {
        return natural_bias(mask_, base_ + query * mask_.query_stride + key * mask_.key_stride);
    }

 private:
    Mask const& mask_;
    int64_t base_;
};

// The bits that any of some words in shared memory has.
template <int kCount>
SAGE_DEVICE uint32_t any_of(uint32_t const* words) {
    uint32_t all = 0;
    SAGE_UNROLL
    for (int i = 0; i < kCount; ++i) all |= arch::load_shared(words + i);
    return all;
}

}  // namespace sage
