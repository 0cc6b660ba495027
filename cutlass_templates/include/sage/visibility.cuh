// What a mask shows, see "What counts in statistics" of docs/numerics.md, whose executable form is
// sage_compiler/kernels/visibility.py.
#pragma once

#include <sage/mask.cuh>

namespace sage {

constexpr int kMaskThreads = 256;
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

// The bits that any lane of a warp has.
SAGE_DEVICE uint32_t any_of_warp(uint32_t bits) {
    SAGE_UNROLL
    for (int mask = 1; mask < 32; mask *= 2) bits |= arch::shuffle_xor(bits, mask);
    return bits;
}

}  // namespace sage
