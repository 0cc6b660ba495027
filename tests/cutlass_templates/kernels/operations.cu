// One kernel for each operation of the arch layer, for comparing with what it should do.
#include <sage/arch.cuh>

namespace operations {

using namespace sage;

struct Params {
    void const* input;
    void* output;
    int64_t count;
};

template <void (*kRun)(Params const&), int kWarps, int kShared>
struct Kernel {
    using Params = operations::Params;
    static constexpr int kThreads = 32 * kWarps, kSharedBytes = kShared, kMinBlocks = 1;
    SAGE_DEVICE static void run(Params const& p) { kRun(p); }
};

SAGE_DEVICE int thread() { return arch::thread_index(); }

template <class T>
SAGE_DEVICE T input(Params const& p, int64_t index) {
    return arch::load_global(static_cast<T const*>(p.input) + index);
}
template <class T>
SAGE_DEVICE void output(Params const& p, int64_t index, T value) {
    arch::store_global(static_cast<T*>(p.output) + index, value);
}

// output (32 masks, 128 threads) of input (128).
template <class T>
SAGE_DEVICE void shuffle(Params const& p) {
    T const own = input<T>(p, thread());
    for (int mask = 0; mask < 32; ++mask) {
        output(p, mask * 128 + thread(), arch::shuffle_xor(own, mask));
    }
}

// Warps and lanes take unequal times between the collectives: output (128) is the sum over 200
// rounds of what a thread got.
SAGE_DEVICE void many_shuffles(Params const& p) {
    uint32_t sum = 0, state = uint32_t(thread());
    for (int round = 0; round < 200; ++round) {
        state = state * 1664525u + 1013904223u;
        for (uint32_t i = 0; i < state >> 29; ++i) input<uint32_t>(p, 0);
        sum += arch::shuffle_xor(state + uint32_t(round), round % 32);
    }
    output(p, thread(), sum);
}

// output (4 warps, 32 lanes, 4 registers); input (128): the row of 16 bytes that a thread
// addresses, of 128 rows with the words 0, 1, 2, ...
SAGE_DEVICE void load_matrix(Params const& p) {
    auto* const words = reinterpret_cast<uint32_t*>(arch::shared_memory());
    for (int i = 0; i < 4; ++i)
        arch::store_shared(words + thread() * 4 + i, uint32_t(thread() * 4 + i));
    arch::barrier();
    uint32_t r[4];
    arch::load_matrix_x4(r, words + input<int32_t>(p, thread()) * 4);
    for (int i = 0; i < 4; ++i) output(p, thread() * 4 + i, r[i]);
}

// Three groups of copies, the second of two. output (4 waits, 128 threads, 4 places): the first
// word of each copy's place before any wait, and after those for all but 2, 1 and 0 groups. To be
// run without the race detector.
SAGE_DEVICE void copies(Params const& p) {
    auto* const words = reinterpret_cast<uint32_t*>(arch::shared_memory());
    auto const place = [&](int copy) { return words + (copy * 128 + thread()) * 4; };
    auto const copy = [&](int index) {
        arch::copy_async(place(index),
                         static_cast<uint32_t const*>(p.input) + (index * 128 + thread()) * 4);
    };
    auto const look = [&](int wait) {
        for (int i = 0; i < 4; ++i) {
            output(p, (wait * 128 + thread()) * 4 + i, arch::load_shared(place(i)));
        }
    };
    copy(0);
    arch::copy_async_commit();
    copy(1);
    copy(2);
    arch::copy_async_commit();
    copy(3);
    arch::copy_async_commit();
    look(0);
    arch::copy_async_wait<2>();
    look(1);
    arch::copy_async_wait<1>();
    look(2);
    arch::copy_async_wait<0>();
    look(3);
}

// output (128): each round, a thread takes what its neighbour in another warp had.
SAGE_DEVICE void barriers(Params const& p) {
    auto* const words = reinterpret_cast<uint32_t*>(arch::shared_memory());
    uint32_t value = input<uint32_t>(p, thread());
    for (int round = 0; round < 50; ++round) {
        arch::store_shared(words + thread(), value);
        arch::barrier();
        value = arch::load_shared(words + (thread() + 37) % 128) + 1;
        arch::barrier();
    }
    output(p, thread(), value);
}

// output (1 + 128): a counter that each thread reads and adds 1 to, not atomically, and what each
// thread read: this shows the order in which threads ran.
SAGE_DEVICE void order(Params const& p) {
    auto* const counter = static_cast<uint32_t*>(p.output);
    for (int round = 0; round < 20; ++round) {
        uint32_t const count = arch::load_global(counter);
        arch::store_global(counter + 1 + thread(), count);
        arch::store_global(counter, count + 1);
    }
}

// output (blocks): the order in which blocks ran; input (1): a counter.
SAGE_DEVICE void order_of_blocks(Params const& p) {
    if (thread() != 0) return;
    auto* const counter = static_cast<uint32_t*>(const_cast<void*>(p.input));
    uint32_t const count = arch::load_global(counter);
    arch::store_global(counter, count + 1);
    output(p, arch::block_index(), count);
}

// Shared memory as a block finds it, and where it is: output (32, 2).
SAGE_DEVICE void fresh_memory(Params const& p) {
    auto* const words = reinterpret_cast<uint32_t*>(arch::shared_memory());
    output(p, 2 * thread(), arch::load_shared(words + thread()));
    output(p, 2 * thread() + 1, uint32_t(reinterpret_cast<uintptr_t>(words) % 1024));
    arch::barrier();
    arch::store_shared(words + thread(), 0u);
}

// Functions of one element of `count`: input and output are 32 bits wide.
template <class T, class Function>
SAGE_DEVICE void map(Params const& p, Function function) {
    for (int64_t i = thread(); i < p.count; i += 32) output(p, i, function(input<T>(p, i)));
}

SAGE_DEVICE void pack_e4m3(Params const& p) {
    map<float>(p, [](float x) { return arch::pack_e4m3(x, 0, -x, 1); });
}
SAGE_DEVICE void pack_half(Params const& p) {
    map<float>(p, [](float x) { return arch::pack_half(x, -x); });
}
SAGE_DEVICE void pack_bfloat16(Params const& p) {
    map<float>(p, [](float x) { return arch::pack_bfloat16(x, -x); });
}
SAGE_DEVICE void to_tf32(Params const& p) {
    map<float>(p, [](float x) { return arch::to_tf32(x); });
}
SAGE_DEVICE void round_to_int(Params const& p) {
    map<float>(p, [](float x) { return arch::round_to_int(x); });
}
SAGE_DEVICE void exp2(Params const& p) {
    map<float>(p, [](float x) { return arch::exp2(x); });
}
SAGE_DEVICE void log2(Params const& p) {
    map<float>(p, [](float x) { return arch::log2(x); });
}
SAGE_DEVICE void unpack_half(Params const& p) {
    for (int64_t i = thread(); i < p.count; i += 32) {
        output(p, i, arch::unpack_half(input<uint32_t>(p, i)));
    }
}
SAGE_DEVICE void unpack_bfloat16(Params const& p) {
    for (int64_t i = thread(); i < p.count; i += 32) {
        output(p, i, arch::unpack_bfloat16(input<uint32_t>(p, i)));
    }
}
// input (count, 2): a and b.
SAGE_DEVICE void divide(Params const& p) {
    for (int64_t i = thread(); i < p.count; i += 32) {
        float2 const x = input<float2>(p, i);
        output(p, i, arch::divide(x.x, x.y));
    }
}
SAGE_DEVICE void maximum(Params const& p) {
    for (int64_t i = thread(); i < p.count; i += 32) {
        float2 const x = input<float2>(p, i);
        output(p, i, arch::maximum(x.x, x.y));
    }
}

}  // namespace operations

#define OPERATION(name, warps, shared, ...)                           \
    SAGE_KERNEL(name, 32 * warps, shared, sizeof(operations::Params), \
                operations::Kernel<__VA_ARGS__, warps, shared>)

OPERATION(shuffle_float, 4, 0, operations::shuffle<float>)
OPERATION(shuffle_int, 4, 0, operations::shuffle<int32_t>)
OPERATION(shuffle_uint, 4, 0, operations::shuffle<uint32_t>)
OPERATION(many_shuffles, 4, 0, operations::many_shuffles)
OPERATION(load_matrix, 4, 2048, operations::load_matrix)
OPERATION(copies, 4, 8192, operations::copies)
OPERATION(barriers, 4, 512, operations::barriers)
OPERATION(order, 4, 0, operations::order)
OPERATION(order_of_blocks, 1, 0, operations::order_of_blocks)
OPERATION(fresh_memory, 1, 65536, operations::fresh_memory)
OPERATION(pack_e4m3, 1, 0, operations::pack_e4m3)
OPERATION(pack_half, 1, 0, operations::pack_half)
OPERATION(pack_bfloat16, 1, 0, operations::pack_bfloat16)
OPERATION(to_tf32, 1, 0, operations::to_tf32)
OPERATION(round_to_int, 1, 0, operations::round_to_int)
OPERATION(exp2_each, 1, 0, operations::exp2)
OPERATION(log2_each, 1, 0, operations::log2)
OPERATION(unpack_half, 1, 0, operations::unpack_half)
OPERATION(unpack_bfloat16, 1, 0, operations::unpack_bfloat16)
OPERATION(divide, 1, 0, operations::divide)
OPERATION(maximum, 1, 0, operations::maximum)
