// Two kernels of the shapes that Hopper wants, with faults that `fault` turns on: the executor must
// find every one of them, and nothing where it is kNone.
#include <sage/arch/hopper.cuh>

namespace hopper_faults {

using namespace sage;

struct Params {
    uint32_t* memory;  // of 1024 words: 16 tiles of 64 words
    uint32_t* sums;    // (256)
    int64_t fault;
};

// A producer warp fills a ring, eight warps read it: thread t adds up word t % 64 of all tiles.
struct Ring {
    using Params = hopper_faults::Params;
    static constexpr int kTileBytes = 256, kTiles = 16, kStages = 3;
    static constexpr int kThreads = 384, kConsumers = 256, kMinBlocks = 1;
    static constexpr int kSharedBytes = kStages * (kTileBytes + 16);

    enum Fault {
        kNone,
        kMissingArrive,
        kWrongPhase,
        kNoWait,
        kRefilledAtOnce,
        kTooFewBytes,
        kTooManyBytes,
        kOneArrivalMore,
        kOtherBarrier,
        kOddBytes,
        kBeyondShared,
        kBeyondGlobal,
        kIntoBarrier,
        kTooManyRegisters,
        kNotMade,
        kUnordered,
        kEarlyEnd,
    };

    SAGE_DEVICE static uint64_t* full(int stage) {
        return reinterpret_cast<uint64_t*>(arch::shared_memory() + kStages * kTileBytes) + stage;
    }
    SAGE_DEVICE static uint64_t* empty(int stage) { return full(kStages + stage); }

    SAGE_DEVICE static void run(Params const& p) {
        auto const fault = static_cast<Fault>(p.fault);
        int const thread = arch::thread_index();
        if (thread == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                arch::mbarrier_init(full(stage), 1);
                if (fault == kNotMade) continue;
                arch::mbarrier_init(empty(stage), kConsumers + (fault == kOneArrivalMore));
            }
            arch::mbarrier_init_fence();
        }
        if (fault != kUnordered) arch::barrier();
        if (thread >= kConsumers) {
            arch::registers_decrease<24>();
            if (thread == kConsumers) produce(p, fault);
        } else {
            if (fault == kTooManyRegisters) {
                arch::registers_increase<256>();
            } else {
                arch::registers_increase<240>();
            }
            consume(p, fault);
        }
    }

    SAGE_DEVICE static void produce(Params const& p, Fault fault) {
        for (int tile = 0; tile < kTiles + (fault == kEarlyEnd); ++tile) {
            int const stage = tile % kStages, round = tile / kStages;
            if (fault != kRefilledAtOnce) arch::mbarrier_wait(empty(stage), (round + 1) % 2);
            int const off = fault == kTooFewBytes ? -16 : fault == kTooManyBytes ? 16 : 0;
            arch::mbarrier_arrive_expect(full(stage), kTileBytes + off);
            char* to = arch::shared_memory() + stage * kTileBytes;
            if (fault == kBeyondShared) to += kSharedBytes;
            if (fault == kIntoBarrier && stage == kStages - 1) to += 16;
            uint32_t const* from = p.memory + tile % kTiles * 64;
            if (fault == kBeyondGlobal && tile == kTiles - 1) from += 4;
            arch::copy_bulk(to, from, fault == kOddBytes ? 8 : kTileBytes, full(stage));
        }
    }

    SAGE_DEVICE static void consume(Params const& p, Fault fault) {
        int const thread = arch::thread_index();
        uint32_t sum = 0;
        for (int tile = 0; tile < kTiles; ++tile) {
            int const stage = tile % kStages, round = tile / kStages;
            int const parity = (round + (fault == kWrongPhase)) % 2;
            int const waited = fault == kOtherBarrier ? (stage + 1) % kStages : stage;
            if (fault != kNoWait) arch::mbarrier_wait(full(waited), parity);
            sum += arch::load_shared(
                reinterpret_cast<uint32_t*>(arch::shared_memory() + stage * kTileBytes) +
                thread % 64);
            if (fault == kMissingArrive && thread == 70 && tile == 5) continue;
            arch::mbarrier_arrive(empty(stage));
        }
        arch::store_global(p.sums + thread, sum);
    }
};

// Two warpgroups take turns, by named barriers, to multiply what is in shared memory: rows of 64
// bytes, 64 of A and 32 of B.
struct Products {
    using Params = hopper_faults::Params;
    static constexpr int kBytes = 96 * 64;
    static constexpr int kThreads = 256, kSharedBytes = kBytes, kMinBlocks = 1;

    enum Fault {
        kNone,
        kNoFence,
        kNoAsyncFence,
        kNoCommit,
        kNoWait,
        kOverwritten,
        kAccumulatorsWritten,
        kOperandWritten,
        kOneWarpLess,
        kMissingArrive,
        kOtherCount,
        kOffSwizzle,
        kBeyondShared,
        kReadEarly,
        kWrittenWithoutOrder,
    };

    SAGE_DEVICE static void run(Params const& p) {
        auto const fault = static_cast<Fault>(p.fault);
        int const thread = arch::thread_index(), group = thread / 128;
        uint32_t* const words = reinterpret_cast<uint32_t*>(arch::shared_memory());
        for (int i = thread; i < kBytes / 4; i += kThreads) {
            arch::store_shared(words + i, 0x01010101u);
        }
        if (fault != kNoAsyncFence) arch::fence_async();
        arch::barrier();

        if (group == 0) arch::named_barrier_arrive<256>(1);
        uint32_t c[16];
        float d[16];
        uint32_t a[4] = {0x38383838u, 0x38383838u, 0x38383838u, 0x38383838u};  // 1
        uint32_t total = 0;
        for (int round = 0; round < 2; ++round) {
            // The second group begins, each lets the other one.
            if (fault == kOtherCount && thread == 0) {
                arch::named_barrier_sync<128>(1 + (group + 1) % 2);
            }
            arch::named_barrier_sync<256>(1 + (group + 1) % 2);
            char const* const start = arch::shared_memory() + (fault == kOffSwizzle ? 64 : 0);
            uint64_t const of_a = arch::matrix_rows<64>(start);
            uint64_t const of_b = arch::matrix_rows<64>(
                arch::shared_memory() + (fault == kBeyondShared ? kBytes : 64 * 64));
            if (fault != kNoFence) arch::wgmma_fence();
            bool const skips = fault == kOneWarpLess && thread / 32 == 2;
            if (!skips) arch::wgmma_s8<32>(c, of_a, of_b, false);
            arch::wgmma_s8<32>(c, of_a + 2, of_b + 2, true);
            arch::wgmma_e4m3<32>(d, a, of_b, false);
            if (fault != kNoCommit) arch::wgmma_commit();
            if (fault == kAccumulatorsWritten) c[3] = 7;
            if (fault == kOperandWritten) a[1] = 0;
            if (fault == kReadEarly) total += c[0];
            if (fault == kOverwritten && thread == 5) arch::store_shared(words + 64 * 16, 0u);
            if (fault != kNoWait) arch::wgmma_wait<0>();
            if (fault == kMissingArrive && thread == 70) continue;
            if (round == 0 || group == 1) arch::named_barrier_arrive<256>(1 + group);
            total += c[0] + c[15];
        }
        if (fault == kWrittenWithoutOrder && thread == 5) arch::store_shared(words + 64 * 16, 0u);
        arch::store_global(p.sums + thread, total + arch::bits(d[7]));
    }
};

}  // namespace hopper_faults

SAGE_KERNEL(ring, 384, 3 * 272, sizeof(hopper_faults::Params), hopper_faults::Ring)
SAGE_KERNEL(products, 256, 96 * 64, sizeof(hopper_faults::Params), hopper_faults::Products)
