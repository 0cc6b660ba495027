// How many keys of a head count in statistics: some, if any is seen, since a query that sees one
// with an ordinary bias makes that count, and another all that it sees.
#pragma once

#include <sage/visibility.cuh>

namespace sage {

template <int kBlockThreads>
struct MaskCounts {
    using Params = MaskCountsParams;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kThreads * sizeof(uint32_t);

    SAGE_DEVICE static void run(Params const& p) {
        Split const head(arch::block_index(), p.heads);
        uint8_t const* const keys = p.keys + arch::block_index() * p.key_length;
        uint32_t counted = 0;
        for (int64_t key = arch::thread_index(); key < p.key_length; key += kThreads) {
            counted += (arch::load_global(keys + key) & kCounts) != 0;
        }

        uint32_t* const shared = reinterpret_cast<uint32_t*>(arch::shared_memory());
        arch::store_shared(shared + arch::thread_index(), counted);
        arch::barrier();
        counted = 0;
        for (int thread = 0; thread < kThreads; ++thread) {
            counted += arch::load_shared(shared + thread);
        }

        int64_t const repeats = p.batch_repeats * p.head_repeats;
        for (int64_t i = arch::thread_index(); i < repeats; i += kThreads) {
            Split const repeat(i, p.head_repeats);
            int64_t const batch = head.outer * p.batch_repeats + repeat.outer;
            int64_t const kv_head = head.inner * p.head_repeats + repeat.inner;
            arch::store_global(p.counts + batch * p.heads * p.head_repeats + kv_head,
                               static_cast<float>(counted));
        }
    }
};

}  // namespace sage
