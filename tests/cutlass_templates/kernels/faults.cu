// Kernels with one fault each, which `fault` turns on: the executor must find every one of them,
// and nothing where it is 0. A block is 4 warps and 4096 bytes of shared memory.
#include <sage/arch.cuh>

namespace faults {

using namespace sage;

constexpr int kShared = 4096;

struct Params {
    uint32_t* memory;  // of 1024 words
    int64_t fault;
};

template <void (*kRun)(Params const&)>
struct Kernel {
    using Params = faults::Params;
    static constexpr int kThreads = 128, kSharedBytes = kShared, kMinBlocks = 1;
    SAGE_DEVICE static void run(Params const& p) { kRun(p); }
};

SAGE_DEVICE int thread() { return arch::thread_index(); }
SAGE_DEVICE int lane() { return arch::thread_index() % 32; }
SAGE_DEVICE uint32_t* words() { return reinterpret_cast<uint32_t*>(arch::shared_memory()); }
// What a thread copies: 16 bytes each.
SAGE_DEVICE char* own_shared() { return arch::shared_memory() + thread() * 16; }

SAGE_DEVICE void removed_wait(Params const& p) {
    arch::copy_async(own_shared(), p.memory + thread() * 4);
    arch::copy_async_commit();
    if (p.fault == 0) arch::copy_async_wait<0>();
    arch::barrier();
    uint32_t const word = arch::load_shared(words() + (thread() * 4 + 64) % 512);
    arch::copy_async_wait<0>();
    arch::store_global(p.memory + 512 + thread(), word);
}

SAGE_DEVICE void removed_commit(Params const& p) {
    arch::copy_async(own_shared(), p.memory + thread() * 4);
    if (p.fault == 0) arch::copy_async_commit();
    arch::copy_async_wait<0>();
}

// The newest group may still be in flight after a wait for the others.
SAGE_DEVICE void newest_not_landed(Params const& p) {
    arch::copy_async(own_shared(), p.memory + thread() * 4);
    arch::copy_async_commit();
    if (p.fault == 0) arch::copy_async_commit();  // an empty group is one, too
    arch::copy_async_wait<1>();
    arch::load_shared(words() + thread() * 4);
    arch::copy_async_wait<0>();
}

// Written by one warp, read by another.
SAGE_DEVICE void missing_barrier(Params const& p) {
    arch::store_shared(words() + thread(), uint32_t(thread()));
    if (p.fault == 0) arch::barrier();
    uint32_t const word = arch::load_shared(words() + (thread() + 32) % 128);
    arch::store_global(p.memory + thread(), word);
}

// Read by one thread, then written by one of another warp for the next round.
SAGE_DEVICE void overwritten_while_read(Params const& p) {
    if (thread() == 0) arch::load_shared(words());
    if (p.fault == 0) arch::barrier();
    if (thread() == 100) arch::store_shared(words(), 1u);
}

// Read by two warps, of which one orders its lanes and then writes.
SAGE_DEVICE void overwritten_while_others_read(Params const& p) {
    if (thread() == 0 || thread() == 32) arch::load_shared(words());
    arch::shuffle_xor(0u, 1);
    if (p.fault == 0) arch::barrier();
    if (thread() == 1) arch::store_shared(words(), 1u);
}

// Read by two lanes, of which one then writes.
SAGE_DEVICE void overwritten_by_a_reader(Params const& p) {
    if (thread() < 2) arch::load_shared(words());
    if (p.fault == 0) arch::shuffle_xor(0u, 1);
    if (thread() == 1) arch::store_shared(words(), 1u);
}

// More collectives than the race detector's clock has ticks.
SAGE_DEVICE void after_long(Params const& p) {
    for (int round = 0; round < (1 << 18) + 1000; ++round) arch::shuffle_xor(0u, 1);
    missing_barrier(p);
}

// Both write, perhaps the same value.
SAGE_DEVICE void written_twice(Params const& p) {
    arch::store_shared(words() + (p.fault == 0 ? thread() : thread() % 64), 7u);
}

// Within a warp, a collective orders what its lanes do.
SAGE_DEVICE void unordered_lanes(Params const& p) {
    arch::store_shared(words() + thread(), uint32_t(thread()));
    if (p.fault == 0) arch::shuffle_xor(0u, 1);
    uint32_t const word = arch::load_shared(words() + (thread() ^ 1));
    arch::store_global(p.memory + thread(), word);
}

// A row that a lane of the warp has just written.
SAGE_DEVICE void unordered_matrix(Params const& p) {
    for (int i = 0; i < 4; ++i) arch::store_shared(words() + thread() * 4 + i, uint32_t(i));
    if (p.fault == 0) arch::barrier();
    uint32_t r[4];
    arch::load_matrix_x4(r, own_shared());
    arch::store_global(p.memory + thread(), r[0]);
}

// A wait makes a copy visible to the thread that issued it, a collective to nobody.
SAGE_DEVICE void landed_without_barrier(Params const& p) {
    arch::copy_async(own_shared(), p.memory + thread() * 4);
    arch::copy_async_commit();
    arch::copy_async_wait<0>();
    arch::load_shared(words() + thread() * 4);
    arch::shuffle_xor(0u, 1);
    if (p.fault == 0) arch::barrier();
    arch::load_shared(words() + (thread() ^ 1) * 4);
}

// A place of a ring that is filled again while other warps still read it.
SAGE_DEVICE void refilled_while_read(Params const& p) {
    for (int round = 0; round < 3; ++round) {
        arch::copy_async(own_shared(), p.memory + thread() * 4);
        arch::copy_async_commit();
        arch::copy_async_wait<0>();
        arch::barrier();
        uint32_t r[4];
        arch::load_matrix_x4(r, arch::shared_memory() + (thread() + 32) % 128 * 16);
        if (p.fault == 0) arch::barrier();
    }
}

SAGE_DEVICE void copied_twice(Params const& p) {
    char* const to = p.fault == 0 ? own_shared() : arch::shared_memory() + thread() / 2 * 16;
    arch::copy_async(to, p.memory + thread() * 4);
    arch::copy_async_commit();
    arch::copy_async_wait<0>();
}

// A counter that is touched in another way.
SAGE_DEVICE void loaded_after_ticket(Params const& p) {
    arch::take_ticket(p.memory);
    arch::barrier();
    uint32_t const count = p.fault == 0 ? 0 : arch::load_global(p.memory);
    arch::store_global(p.memory + 1 + thread(), count);
}

// A launch does not load what it stores.
SAGE_DEVICE void loaded_after_store(Params const& p) {
    arch::store_global(p.memory + thread(), 1u);
    arch::barrier();
    arch::load_global(p.memory + (p.fault == 0 ? 128 : 0) + (thread() ^ 32));
}
SAGE_DEVICE void copied_after_store(Params const& p) {
    arch::store_global(reinterpret_cast<uint8_t*>(p.memory) + thread() * 16 + 7, uint8_t{1});
    arch::barrier();
    arch::copy_async(own_shared(), p.memory + (p.fault == 0 ? 512 : 0) + (thread() ^ 32) * 4);
    arch::copy_async_commit();
    arch::copy_async_wait<0>();
}

// Warp 0 takes part once more often.
SAGE_DEVICE void partial_barrier(Params const& p) {
    if (p.fault == 0 || thread() < 32) arch::barrier();
    arch::barrier();
}

SAGE_DEVICE void divergent_barrier(Params const& p) {
    if (p.fault != 0 && lane() < 16) {
        arch::barrier();
    } else {
        arch::barrier();
    }
}

SAGE_DEVICE void divergent_operations(Params const& p) {
    uint32_t r[4] = {0, 0, 0, 0};
    if (p.fault != 0 && lane() < 16) {
        arch::shuffle_xor(1.0f, 1);
    } else {
        uint32_t const a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
        arch::mma<arch::MmaS8>(r, a, b);
    }
}

SAGE_DEVICE void divergent_places(Params const& p) {
    if (p.fault != 0 && lane() == 9) {
        arch::shuffle_xor(1.0f, 1);
    } else {
        arch::shuffle_xor(1.0f, 1);
    }
}

SAGE_DEVICE void deadlock(Params const& p) {
    if (p.fault != 0 && thread() == 0) arch::barrier();
    arch::shuffle_xor(1.0f, 1);
    if (p.fault == 0 || thread() != 0) arch::barrier();
}

// In 256 accesses to memory, other threads get far.
SAGE_DEVICE void linger(Params const& p) {
    for (int i = 0; i < 256; ++i) arch::load_global(p.memory);
}
// Thread 37 exits, in most orders before the others wait for it, or after.
template <class Wait>
SAGE_DEVICE void exit_early(Params const& p, Wait wait) {
    if (p.fault != 0 && thread() == 37) return;
    linger(p);
    wait();
}
template <class Wait>
SAGE_DEVICE void exit_late(Params const& p, Wait wait) {
    if (p.fault != 0 && thread() == 37) return linger(p);
    wait();
}
SAGE_DEVICE void early_exit(Params const& p) {
    exit_early(p, [] { arch::shuffle_xor(1.0f, 1); });
}
SAGE_DEVICE void late_exit(Params const& p) {
    exit_late(p, [] { arch::shuffle_xor(1.0f, 1); });
}
SAGE_DEVICE void early_exit_before_barrier(Params const& p) {
    exit_early(p, [] { arch::barrier(); });
}
SAGE_DEVICE void late_exit_before_barrier(Params const& p) {
    exit_late(p, [] { arch::barrier(); });
}

SAGE_DEVICE void wrong_mask(Params const& p) { arch::shuffle_xor(1.0f, p.fault != 0 ? 32 : 31); }

// `fault` is a distance in bytes, which the accesses of thread 70 are off by.
SAGE_DEVICE int distance(Params const& p) { return thread() == 70 ? static_cast<int>(p.fault) : 0; }
template <class T>
SAGE_DEVICE T* moved(T* pointer, int bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(pointer) + bytes);
}

SAGE_DEVICE void off_load_global(Params const& p) {
    arch::load_global(moved(p.memory, distance(p)));
}
SAGE_DEVICE void off_store_global(Params const& p) {
    arch::store_global(moved(p.memory + thread(), distance(p)), 1u);
}
SAGE_DEVICE void off_load_shared(Params const& p) {
    arch::load_shared(moved(words(), distance(p)));
}
SAGE_DEVICE void off_store_shared(Params const& p) {
    arch::store_shared(moved(words() + thread(), distance(p)), 1u);
}
SAGE_DEVICE void off_load_matrix(Params const& p) {
    uint32_t r[4];
    arch::load_matrix_x4(r, moved(own_shared(), distance(p)));
}
SAGE_DEVICE void off_copy_from(Params const& p) {
    arch::copy_async(own_shared(), moved(p.memory, distance(p)));
    arch::copy_async_commit();
    arch::copy_async_wait<0>();
}
SAGE_DEVICE void off_copy_to(Params const& p) {
    arch::copy_async(moved(own_shared(), distance(p)), p.memory);
    arch::copy_async_commit();
    arch::copy_async_wait<0>();
}
// Behind the layer's back.
SAGE_DEVICE void raw_store(Params const& p) {
    if (p.fault != 0 && thread() == 70) words()[p.fault / 4] = 0;
}

// Of three blocks, by their tickets: the first one stores, the second one passes on that it has,
// and the last one loads.
SAGE_DEVICE void relay(Params const& p) {
    uint32_t* const tickets = p.memory;
    uint32_t* const stored = p.memory + 8;
    uint32_t* const passed = p.memory + 16;
    if (thread() == 0) arch::store_shared(words(), arch::take_ticket(tickets));
    arch::barrier();
    int64_t const ticket = p.fault == 1 ? arch::block_index() : arch::load_shared(words());
    if (ticket == 0) {
        arch::store_global(p.memory + 128 + thread(), uint32_t(thread()));
        if (p.fault != 2) arch::barrier();
        if (thread() == 0) arch::arrive(stored);
    } else if (ticket == 1) {
        if (thread() == 0 && p.fault != 3) arch::await(stored, p.fault == 4 ? 2 : 1);
        if (thread() == 0 && p.fault != 5) arch::arrive(passed);
        if (p.fault == 5) {
            if (thread() == 1) arch::arrive(passed);  // it has not been told, without a barrier
        }
    } else {
        if (thread() == 0 && p.fault != 6) arch::await(passed, 1);
        if (p.fault != 7) arch::barrier();
        uint32_t const* const from = p.memory + 128 + (thread() + 1) % 128;
        arch::store_global(p.memory + 256 + thread(),
                           p.fault == 8 ? arch::load_global(from) : arch::load_written(from));
    }
}

}  // namespace faults

#define FAULT(name) \
    SAGE_KERNEL(name, 128, faults::kShared, sizeof(faults::Params), faults::Kernel<faults::name>)

FAULT(removed_wait)
FAULT(removed_commit)
FAULT(newest_not_landed)
FAULT(missing_barrier)
FAULT(after_long)
FAULT(overwritten_while_read)
FAULT(overwritten_while_others_read)
FAULT(overwritten_by_a_reader)
FAULT(written_twice)
FAULT(unordered_lanes)
FAULT(unordered_matrix)
FAULT(landed_without_barrier)
FAULT(refilled_while_read)
FAULT(copied_twice)
FAULT(loaded_after_store)
FAULT(copied_after_store)
FAULT(loaded_after_ticket)
FAULT(partial_barrier)
FAULT(divergent_barrier)
FAULT(divergent_operations)
FAULT(divergent_places)
FAULT(deadlock)
FAULT(early_exit)
FAULT(late_exit)
FAULT(early_exit_before_barrier)
FAULT(late_exit_before_barrier)
FAULT(wrong_mask)
FAULT(off_load_global)
FAULT(off_store_global)
FAULT(off_load_shared)
FAULT(off_store_shared)
FAULT(off_load_matrix)
FAULT(off_copy_from)
FAULT(off_copy_to)
FAULT(raw_store)
FAULT(relay)
