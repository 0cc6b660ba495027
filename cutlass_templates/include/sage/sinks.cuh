// Sinks as floats, each repeated; or, of no sinks, -infinity.
#pragma once

#include <sage/mask.cuh>

namespace sage {

template <int kBlockThreads>
struct Sinks {
    using Params = SinksParams;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;

    SAGE_DEVICE static void run(Params const& p) {
        int64_t const index = arch::block_index() * kThreads + arch::thread_index();
        if (index >= p.count) return;
        Split const row(index, p.repeats);
        Split const head(row.outer, p.heads);
        float const sink =
            p.sinks == nullptr ? -infinity() : load_float(p.sinks, head.inner, p.kind);
        arch::store_global(p.out + index, sink);
    }
};

}  // namespace sage
