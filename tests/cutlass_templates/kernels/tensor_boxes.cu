// A box of a tensor, as TMA copies it, read back by the swizzles of CuTe; with faults that `fault`
// turns on.
#include <cute/swizzle.hpp>
#include <sage/arch/hopper.cuh>

namespace tensor_boxes {

using namespace sage;

struct Params {
    uint8_t* out;  // of the bytes of the box
    int64_t fault, bytes;
    int4 at;
    TensorMap map, other;  // the latter is no map
};

enum Fault {
    kNone,
    kNoWait,
    kTooFewBytes,
    kTooManyBytes,
    kOtherBarrier,
    kOtherOrder,
    kOffLine,
    kBeyondShared,
    kIntoBarrier,
    kNoMap,
    kMisalignedMap,
    kMapElsewhere,
    kOverwritten,
    kNotAwaited,
};

// kBits: of the column of 16 bytes, how many are XORed with those of the line of 128 bytes.
template <int kBits>
struct Box {
    using Params = tensor_boxes::Params;
    static constexpr int kBytes = 32 << 10, kThreads = 128, kMinBlocks = 1;
    static constexpr int kSharedBytes = kBytes + 128;

    SAGE_DEVICE static void run(Params const& p) {
        auto const fault = static_cast<Fault>(p.fault);
        int const thread = arch::thread_index();
        char* const shared = arch::shared_memory();
        auto* const full = reinterpret_cast<uint64_t*>(shared + kBytes);
        if (thread == 0) {
            arch::mbarrier_init(full, 1);
            arch::mbarrier_init(full + 1, 1);
            arch::mbarrier_init_fence();
        }
        arch::barrier();
        if (thread == 0) {
            int const off = fault == kTooFewBytes ? -16 : fault == kTooManyBytes ? 16 : 0;
            arch::mbarrier_arrive_expect(full, static_cast<int>(p.bytes) + off);
            char* to = shared;
            if (fault == kOffLine) to += 64;
            if (fault == kBeyondShared) to += kSharedBytes / 128 * 128;
            if (fault == kIntoBarrier) to += kBytes;
            int4 const swapped = make_int4(p.at.x, p.at.z, p.at.y, p.at.w);
            TensorMap const elsewhere = p.map;
            auto const* const bytes = reinterpret_cast<char const*>(&p.map);
            TensorMap const& map = fault == kNoMap ? p.other
                                   : fault == kMisalignedMap
                                       ? *reinterpret_cast<TensorMap const*>(bytes + 16)
                                   : fault == kMapElsewhere ? elsewhere
                                                            : p.map;
            arch::copy_tensor(to, map, fault == kOtherOrder ? swapped : p.at,
                              full + (fault == kOtherBarrier));
        }
        if (fault == kNotAwaited) return;
        if (fault == kOverwritten && thread == 70) {
            arch::store_shared(reinterpret_cast<uint32_t*>(shared) + 1, 7u);
        }
        if (fault != kNoWait) arch::mbarrier_wait(full, 0);
        for (int i = thread; i < p.bytes; i += kThreads) {
            char const* const from = shared + cute::Swizzle<kBits, 4, 3>{}(i);
            arch::store_global(p.out + i,
                               arch::load_shared(reinterpret_cast<uint8_t const*>(from)));
        }
    }
};

}  // namespace tensor_boxes

#define BOX(name, bits) \
    SAGE_KERNEL(name, 128, (32 << 10) + 128, sizeof(tensor_boxes::Params), tensor_boxes::Box<bits>)
BOX(box_0, 0)
BOX(box_1, 1)
BOX(box_2, 2)
BOX(box_3, 3)
