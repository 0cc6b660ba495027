// Which keys some query sees, and which count in statistics: those that a query sees with an
// ordinary bias, and those of queries that see no such key.
#pragma once

#include <sage/visibility.cuh>

namespace sage {

// A thread has one key, and every kRows-th query of all heads of the group.
template <int kBlockThreads>
struct MaskKeys {
    using Params = MaskKeysParams;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kRows = kThreads / kKeyBlock;
    static constexpr int kSharedBytes = kThreads * sizeof(uint32_t);

    SAGE_DEVICE static void run(Params const& p) {
        int const column = arch::thread_index() % kKeyBlock;
        int const row = arch::thread_index() / kKeyBlock;
        Split const block(arch::block_index(), p.key_blocks);
        Split const head(block.outer, p.heads);
        int64_t const key = int64_t{block.inner} * kKeyBlock + column;

        uint32_t found = 0;
        for (int64_t member = 0; member < p.group && key < p.key_length; ++member) {
            int64_t const query_head = head.inner * p.group + member;
            HeadMask const mask(p.mask, head.outer, query_head);
            uint8_t const* const discerning =
                p.discerning + (head.outer * p.heads * p.group + query_head) * p.query_length;
            for (int64_t query = row; query < p.query_length; query += kRows) {
                if (key - query < p.lower || key - query > p.upper) continue;
                float const bias = mask.bias(query, key);
                bool const counts = is_ordinary(bias) || arch::load_global(discerning + query) == 0;
                if (sees(bias)) found |= counts ? kSeen | kCounts : kSeen;
            }
        }

        uint32_t* const shared = reinterpret_cast<uint32_t*>(arch::shared_memory());
        arch::store_shared(shared + arch::thread_index(), found);
        arch::barrier();
        if (row != 0 || key >= p.key_length) return;
        SAGE_UNROLL
        for (int other = 1; other < kRows; ++other) {
            found |= arch::load_shared(shared + other * kKeyBlock + column);
        }
        arch::store_global(p.keys + block.outer * p.key_length + key, static_cast<uint8_t>(found));
    }
};

}  // namespace sage
