// The mean of the first tokens of K, by which a cache smooths all of them; see kMeanTokens. They
// are added up in an order that does not depend on how they came.
#pragma once

#include <sage/staged.cuh>

namespace sage {

template <class Input, int kHeadDim>
struct KeyMean {
    using Params = KeyMeanParams;
    using At = Position<kHeadDim>;
    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = At::kRows * kHeadDim * sizeof(float);

    SAGE_DEVICE static void run(Params const& p) {
        arch::launch_dependents();  // Append
        At const at;
        int const head = static_cast<int>(arch::block_index());  // b * Hkv + h
        Appended<Input, kHeadDim> const tokens(p.key, p.staged, head, p.heads, p.length, p.end);
        int64_t const count = p.end < kMeanTokens ? p.end : kMeanTokens;
        float total[kChunk] = {};
        for (int64_t token = at.row; token < count; token += At::kRows) {
            float x[kChunk];
            tokens.chunk(token, at.channel).unpack(x);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) total[i] += x[i];
        }

        float* const shared = reinterpret_cast<float*>(arch::shared_memory());  // (kRows, D)
        store_floats_shared(shared + at.row * kHeadDim + at.channel, total);
        arch::barrier();
        int const channel = arch::thread_index();
        if (channel >= kHeadDim) return;
        float sum = 0.0f;
        SAGE_UNROLL
        for (int row = 0; row < At::kRows; ++row) {
            sum += arch::load_shared(shared + row * kHeadDim + channel);
        }
        arch::store_global(p.mean + int64_t{head} * kHeadDim + channel,
                           arch::divide(sum, static_cast<float>(count)));
    }
};

}  // namespace sage
