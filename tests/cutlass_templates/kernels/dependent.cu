// Launches that depend on one another: each of 128 threads, two blocks, has a word of what `source`
// stores, and of what follows. `fault` turns on one fault each.
#include <sage/arch.cuh>

namespace dependent {

using namespace sage;

constexpr int kWords = 256;  // of the grid

struct Params {
    uint32_t* memory;  // kWords each: an input, what source, relay and sink store, counters
    int64_t fault;
};

template <void (*kRun)(Params const&)>
struct Kernel {
    using Params = dependent::Params;
    static constexpr int kThreads = 128, kSharedBytes = 2048, kMinBlocks = 1;
    SAGE_DEVICE static void run(Params const& p) { kRun(p); }
};

SAGE_DEVICE int64_t word() { return arch::block_index() * 128 + arch::thread_index(); }

// It may be the first launch, or depend on one that stores what it loads.
SAGE_DEVICE void source(Params const& p) {
    arch::launch_dependents();
    arch::store_global(p.memory + kWords + word(), arch::load_global(p.memory + word()) + 1);
}

SAGE_DEVICE void relay(Params const& p) {
    uint32_t* const own = p.memory + 2 * kWords + word();
    uint32_t* const before = p.memory + kWords + word();
    bool const first_block = arch::block_index() == 0;
    if (p.fault == 1) arch::store_global(own, arch::load_written(before));
    if (p.fault == 2) arch::store_global(own, 0u);
    if (p.fault == 3) arch::arrive(p.memory + 4 * kWords);
    if (p.fault == 4) {
        arch::copy_async(arch::shared_memory() + arch::thread_index() * 16,
                         p.memory + kWords + word() / 4 * 4);
        arch::copy_async_commit();
        arch::copy_async_wait<0>();
    }
    if (p.fault == 5 && first_block) return;
    if (p.fault == 6) {  // a thread that has not waited itself
        if (arch::thread_index() == 0) arch::await_prerequisites();
        arch::barrier();
    }
    uint32_t const input = arch::load_global(p.memory + word());  // nobody stores it
    if (p.fault != 6) arch::await_prerequisites();
    uint32_t const stored = p.fault == 7 ? arch::load_global(before) : arch::load_written(before);
    arch::store_global(own, stored + input);
}

// The third of a chain.
SAGE_DEVICE void sink(Params const& p) {
    uint32_t const* const first = p.memory + kWords + word();
    uint32_t const early = p.fault == 1 ? arch::load_written(first) : 0;
    arch::await_prerequisites();
    uint32_t const of_first = p.fault == 1 ? early : arch::load_written(first);
    uint32_t const of_second = arch::load_written(p.memory + 2 * kWords + word());
    arch::store_global(p.memory + 3 * kWords + word(), of_first + of_second);
}

}  // namespace dependent

#define DEPENDENT(name) \
    SAGE_KERNEL(name, 128, 2048, sizeof(dependent::Params), dependent::Kernel<dependent::name>)

DEPENDENT(source)
DEPENDENT(relay)
DEPENDENT(sink)
