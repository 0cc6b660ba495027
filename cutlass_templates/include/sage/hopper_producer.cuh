// What the producer of the attention kernel for Hopper does: one thread copies Q, K and V of one
// task after another, another one tiles of masks.
#pragma once

#include <sage/arch/hopper.cuh>
#include <sage/copied_mask.cuh>
#include <sage/hopper_deal.cuh>
#include <sage/params.cuh>

namespace sage {

// Work, Task and Memory as of AttendHopper.
template <class Work, class Task, class Memory>
class HopperProducer {
    using Params = typename Work::Params;
    using Deal = HopperDeal;
    using Stages = typename Memory::Stages;
    using Queries = typename Memory::Queries;
    using Masks = typename Memory::Masks;
    static constexpr int kTiles = Memory::kStepTiles;

 public:
    // It is ahead of the consumers by what the rings hold, so also in their next task.
    SAGE_DEVICE static void produce(Params const& launch) {
        Stages stages;
        Queries queries;
        int position = Deal::first();
        for (; position != Deal::kNone; position = Deal::next(Work::call(launch))) {
            wait_for_place(queries);
            int* const words = Memory::task_words(queries.stage());
            int const index = arch::warp_uniform(Work::find(launch, position, words));
            if (index < 0) continue;
            arch::store_shared(Memory::task(queries.stage()), index);
            stages.turn = arch::warp_uniform(stages.turn);
            Work const work(launch, words);
            Task const task(work.params(), index);
            if (task.is_step(task.first_step())) {
                copy_query(work.params(), task, queries.stage());
            } else {
                arch::mbarrier_arrive(Memory::query_full(queries.stage()));
            }
            queries.advance();
            copy_steps(work.params(), task, stages);
        }
        wait_for_place(queries);
        arch::store_shared(Memory::task(queries.stage()), Deal::kNone);
        arch::mbarrier_arrive(Memory::query_full(queries.stage()));
    }

    // The producer of masks is a thread of another warp, so that neither waits for the other's
    // places, and each has registers for itself. Like a consumer, it is told the tasks.
    SAGE_DEVICE static void produce_masks(Params const& p) {
        Queries queries;
        Masks masks;
        for (;; queries.advance()) {
            arch::mbarrier_wait(Memory::query_full(queries.stage()), queries.parity());
            int const index = arch::load_shared(Memory::task(queries.stage()));
            if (index == Deal::kNone) break;
            arch::mbarrier_arrive(Memory::query_empty(queries.stage()));
            if (p.mask_rows != 0) copy_masks(p, Task(p, index), masks);
        }
    }

 private:
    // Until consumers do not look any more for a task where they will for the next.
    SAGE_DEVICE static void wait_for_place(Queries const& place) {
        arch::mbarrier_wait(Memory::query_empty(place.stage()), place.parity() ^ 1);
    }

    SAGE_DEVICE static void copy_query(AttendParams const& p, Task const& task, int place) {
        constexpr int kBytes = Memory::Query::kBytes;
        arch::mbarrier_arrive_expect(Memory::query_full(place), kBytes);
        arch::copy_bulk(Memory::query(place),
                        static_cast<char const*>(p.query_codes) + task.rows().tile() * kBytes,
                        kBytes, Memory::query_full(place));
    }

    SAGE_DEVICE static void copy_steps(AttendParams const& p, Task const& task, Stages& place) {
        SAGE_ROLLED
        for (int tile = task.first_step(); task.is_step(tile); tile = task.step_after(tile)) {
            arch::mbarrier_wait(Memory::key_empty(place.stage()), place.parity() ^ 1);
            arch::mbarrier_arrive_expect(Memory::key_full(place.stage()), Memory::kKeyBytes);
            SAGE_ROLLED
            for (int i = 0; i < kTiles; ++i) copy_key(packed(p, task, tile + i), place.stage(), i);
            arch::mbarrier_wait(Memory::value_empty(place.stage()), place.parity() ^ 1);
            arch::mbarrier_arrive_expect(Memory::value_full(place.stage()), Memory::kValueBytes);
            SAGE_ROLLED
            for (int i = 0; i < kTiles; ++i) {
                arch::copy_bulk(Memory::value(place.stage(), i),
                                packed(p, task, tile + i) + Memory::kPackedValue,
                                Memory::ValueOfTile::kBytes, Memory::value_full(place.stage()));
            }
            if constexpr (Memory::kValueScaleBytes > 0) {
                arch::copy_bulk(Memory::value_scales(place.stage()),
                                packed(p, task, tile) + Memory::kPackedValueScales,
                                Memory::kValueScaleBytes, Memory::value_full(place.stage()));
            }
            place.advance();
        }
    }

    SAGE_DEVICE static char const* packed(AttendParams const& p, Task const& task, int tile) {
        return static_cast<char const*>(p.key_value_tiles) +
               int64_t{task.copied(tile)} * Memory::kPackedBytes;
    }

    SAGE_DEVICE static void copy_key(char const* packed, int stage, int index) {
        using OfTile = typename Memory::KeyOfTile;
        // So that the panels of the stage's tiles are what those of each are, behind one another.
        static_assert(kTiles == 1 || OfTile::kCount == 1);
        arch::copy_bulk(Memory::key(stage) + index * OfTile::kBytes, packed, OfTile::kBytes,
                        Memory::key_full(stage));
        arch::copy_bulk(Memory::scales(stage, index), packed + Memory::kPackedScales,
                        Memory::kScaleBytes, Memory::key_full(stage));
    }

    // The tiles of which elements are wanted.
    SAGE_DEVICE static void copy_masks(Params const& p, Task const& task, Masks& place) {
        SAGE_ROLLED
        for (int step = task.first_step(); task.is_step(step); step = task.step_after(step)) {
            SAGE_ROLLED
            for (int tile = step; tile < step + kTiles; ++tile) {
                if (task.shown_of(tile) != kMixed) continue;
                arch::mbarrier_wait(Memory::mask_empty(place.stage()), place.parity() ^ 1);
                CopiedMask::copy(p, task.rows().head(0, 0), task.rows().first_query(), tile,
                                 Memory::mask(place.stage()), Memory::mask_full(place.stage()));
                place.advance();
            }
        }
    }
};

}  // namespace sage
