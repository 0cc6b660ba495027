// What becomes of a row when all of its keys are summed up: the factor of its output, its LSE, its
// sink, and the value of a row that sees no key.
#pragma once

#include <sage/numeric.cuh>
#include <sage/params.cuh>

namespace sage {

// log(exp(lse) + exp(sink)); a sink of +inf gives NaN, as NaN does.
SAGE_DEVICE float with_sink(float lse, float sink) {
    if (sink == infinity() || sink != sink) return sink - sink;
    if (lse != lse) return lse;
    float const larger = arch::maximum(lse, sink);
    if (larger == -infinity()) return larger;
    float const sum = arch::exp2((lse - larger) * kLog2E) + arch::exp2((sink - larger) * kLog2E);
    return larger + arch::log2(sum) * kLn2;
}

class RowEnd {
 public:
    // Of a row whose P, times 2^log2_weight_factor, sums to `total`, relative to `maximum` in units
    // of log 2; or of a dead one, which sees no key.
    SAGE_DEVICE RowEnd(float maximum, float total, float log2_weight_factor, bool dead,
                       float dead_value)
        : dead_(dead), value_of_dead_(dead_value), factor_(arch::divide(1.0f, total)) {
        float const log2_total = arch::log2(total) - log2_weight_factor;
        lse_ = dead ? -infinity() : (maximum + log2_total) * kLn2;
    }

    // What K's smoothing took from the scores, where they do not have it back as under a softcap.
    SAGE_DEVICE void add_row_term(float row_term) {
        if (!dead_) lse_ += row_term;
    }

    // One more logit.
    SAGE_DEVICE void add_sink(float sink) {
        float const of_keys = lse_;
        lse_ = with_sink(of_keys, sink);
        factor_ *= arch::exp2((of_keys - lse_) * kLog2E);  // the keys' share
        // It makes a row without keys one of zeros, or of NaN where it is +inf.
        if (lse_ != -infinity()) value_of_dead_ = 0.0f * lse_;
    }

    SAGE_DEVICE float lse() const { return lse_; }  // natural logarithm

    // A sum of P V in one channel as the output has it: an average of V, at most `limit`, with its
    // scale back. The rounded P may sum to a little more than 1, which may not make an infinity of
    // a V near the top of its range.
    SAGE_DEVICE float value(float sum, float limit, float scale) const {
        if (dead_) return value_of_dead_;
        float const average = sum * factor_;
        return (average > limit ? limit : average < -limit ? -limit : average) * scale;
    }

 private:
    bool dead_;
    float value_of_dead_, factor_, lse_;
};

// The largest magnitude of V in P V.
template <class Pv, bool kHalfAccumulator>
SAGE_DEVICE float value_limit() {
    if constexpr (Pv::kBits == 16) return infinity();
    return kHalfAccumulator ? kHalfAccumulatorLimit : Pv::kLimit;
}

// Whether pairs of a row's channels can be stored by one access.
template <class Output>
SAGE_DEVICE bool stores_pairs(Output const* row, int64_t channels) {
    return channels % 2 == 0 && reinterpret_cast<uintptr_t>(row) % (2 * sizeof(Output)) == 0;
}

template <class Output>
SAGE_DEVICE void store_pair(Output* address, float low, float high) {
    if constexpr (sizeof(Output) == sizeof(float)) {
        arch::store_global(reinterpret_cast<float2*>(address), make_float2(low, high));
    } else {
        arch::store_global(reinterpret_cast<uint32_t*>(address), Packed2<Output>::pack(low, high));
    }
}

template <class Output>
SAGE_DEVICE void store_one(Output* address, float x) {
    if constexpr (sizeof(Output) == sizeof(float)) {
        arch::store_global(reinterpret_cast<float*>(address), x);
    } else {
        uint16_t const bits = static_cast<uint16_t>(Packed2<Output>::pack(x, 0.0f));
        arch::store_global(reinterpret_cast<uint16_t*>(address), bits);
    }
}

}  // namespace sage
