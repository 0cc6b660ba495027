// The shared memory of the attention kernel for Hopper, and what orders accesses to it.
#pragma once

#include <sage/arch/hopper.cuh>
#include <sage/order.cuh>
#include <sage/params.cuh>

namespace sage {

// A place in a ring: how many turns came before. Of its mbarriers, `parity` is that of the phase
// that is then complete.
template <int kPlaces>
struct RingPlace {
    static_assert((kPlaces & (kPlaces - 1)) == 0, "places are found by masking");
    unsigned turn = 0;

    SAGE_DEVICE int stage() const { return static_cast<int>(turn % kPlaces); }
    SAGE_DEVICE int parity() const { return static_cast<int>(turn / kPlaces % 2); }
    SAGE_DEVICE RingPlace before() const { return {turn - 1}; }
    SAGE_DEVICE void advance() { ++turn; }
};

// The shared memory of a block: a ring of tasks with their Q, one of stages, one of kMaskPlaces
// tiles of a mask, scales of K, with kTileScales those of V, and mbarriers.
// kTaskWords are told of a task besides its index.
template <int kHeadDim, int kValueDim, bool kTileScales, int kTiles, int kStages, int kMaskPlaces,
          int kTaskWords>
struct HopperMemory {
    static constexpr int kQueries = 2;  // Q of the next task comes while this one is worked on
    static constexpr int kStepTiles = kTiles;
    static constexpr bool kCopiesMask = kMaskPlaces > 0;  // to where it can be read from
    using Queries = RingPlace<kQueries>;
    using Stages = RingPlace<kStages>;
    using Masks = RingPlace<kCopiesMask ? kMaskPlaces : 1>;
    static constexpr int kKeys = kTiles * kKeyBlock;
    static constexpr int kRowBytes = padded_dim(kHeadDim);
    using Query = Panels<kQueryBlock, kRowBytes>;
    using Key = Panels<kKeys, kRowBytes>;  // of a stage; its tiles' panels side by side
    using KeyOfTile = Panels<kKeyBlock, kRowBytes>;
    using ValueOfTile = Panels<kValueDim, kKeyBlock>;  // V transposed
    static constexpr int kScaleBytes = kKeyGroups * sizeof(float);
    static constexpr int kValueScaleBytes = kTileScales ? kValueDim * sizeof(float) : 0;
    static_assert(!kTileScales || kTiles == 1, "P V of a step is scaled as one");

    // A packed tile as the quantizers write it.
    static constexpr int kPackedValue = KeyOfTile::kBytes;
    static constexpr int kPackedScales = kPackedValue + padded_dim(kValueDim) * kKeyBlock;
    static constexpr int kPackedValueScales = kPackedScales + 128;
    static constexpr int kPackedBytes =
        kPackedValueScales + (kTileScales ? padded_dim(kValueDim) * sizeof(float) : 0);

    static constexpr int kStageBytes = Key::kBytes + kTiles * ValueOfTile::kBytes;
    static constexpr int kRing = kQueries * Query::kBytes;
    static constexpr int kMasks = kRing + kStages * kStageBytes;
    static constexpr int kMaskBytes = kQueryBlock * kKeyBlock * sizeof(float);  // the most
    static constexpr int kScales = kMasks + kMaskPlaces * kMaskBytes;
    static constexpr int kValueScales = kScales + kStages * kTiles * kScaleBytes;
    static constexpr int kMbarriers = kValueScales + kStages * kValueScaleBytes;
    static constexpr int kTasks =
        kMbarriers + (2 * kQueries + 4 * kStages + 2 * kMaskPlaces) * sizeof(uint64_t);
    static constexpr int kBytes = kTasks + kQueries * (1 + kTaskWords) * sizeof(int);
    static_assert(kStageBytes % 1024 == 0 && ValueOfTile::kBytes % 512 == 0);

    // Bytes that a stage's mbarriers expect.
    static constexpr int kKeyBytes = Key::kBytes + kTiles * kScaleBytes;
    static constexpr int kValueBytes = kTiles * ValueOfTile::kBytes + kValueScaleBytes;

    SAGE_DEVICE static char* query(int place) {
        return arch::shared_memory() + place * Query::kBytes;
    }
    // The index of the task whose Q it is, and what else is told of it.
    SAGE_DEVICE static int* task(int place) {
        return reinterpret_cast<int*>(arch::shared_memory() + kTasks) + place;
    }
    SAGE_DEVICE static int* task_words(int place) { return task(kQueries) + place * kTaskWords; }
    SAGE_DEVICE static char* key(int stage) {
        return arch::shared_memory() + kRing + stage * kStageBytes;
    }
    SAGE_DEVICE static char* value(int stage, int tile) {
        return key(stage) + Key::kBytes + tile * ValueOfTile::kBytes;
    }
    SAGE_DEVICE static char* mask(int place) {
        return arch::shared_memory() + kMasks + place * kMaskBytes;
    }
    SAGE_DEVICE static char* scales(int stage, int tile) {
        return arch::shared_memory() + kScales + (stage * kTiles + tile) * kScaleBytes;
    }
    SAGE_DEVICE static char* value_scales(int stage) {
        return arch::shared_memory() + kValueScales + stage * kValueScaleBytes;
    }
    // Of a stage: what it is full of has come; nobody reads it any more.
    SAGE_DEVICE static uint64_t* key_full(int stage) { return mbarrier(stage); }
    SAGE_DEVICE static uint64_t* key_empty(int stage) { return mbarrier(kStages + stage); }
    SAGE_DEVICE static uint64_t* value_full(int stage) { return mbarrier(2 * kStages + stage); }
    SAGE_DEVICE static uint64_t* value_empty(int stage) { return mbarrier(3 * kStages + stage); }
    // The same of a task and its Q.
    SAGE_DEVICE static uint64_t* query_full(int place) { return mbarrier(4 * kStages + place); }
    SAGE_DEVICE static uint64_t* query_empty(int place) {
        return mbarrier(4 * kStages + kQueries + place);
    }
    // And of a tile of the mask.
    SAGE_DEVICE static uint64_t* mask_full(int place) {
        return mbarrier(4 * kStages + 2 * kQueries + place);
    }
    SAGE_DEVICE static uint64_t* mask_empty(int place) {
        return mbarrier(4 * kStages + 2 * kQueries + kMaskPlaces + place);
    }

    SAGE_DEVICE static void make_mbarriers(int consumer_warps) {
        SAGE_UNROLL
        for (int place = 0; place < kQueries; ++place) {
            arch::mbarrier_init(query_full(place), 1);
            // The task is also read by whoever copies a mask.
            arch::mbarrier_init(query_empty(place), consumer_warps + kCopiesMask);
        }
        SAGE_UNROLL
        for (int stage = 0; stage < kStages; ++stage) {
            arch::mbarrier_init(key_full(stage), 1);
            arch::mbarrier_init(value_full(stage), 1);
            arch::mbarrier_init(key_empty(stage), consumer_warps);
            arch::mbarrier_init(value_empty(stage), consumer_warps);
        }
        SAGE_UNROLL
        for (int place = 0; place < kMaskPlaces; ++place) {
            arch::mbarrier_init(mask_full(place), 1);
            arch::mbarrier_init(mask_empty(place), consumer_warps);
        }
        arch::mbarrier_init_fence();
    }

 private:
    SAGE_DEVICE static uint64_t* mbarrier(int index) {
        return reinterpret_cast<uint64_t*>(arch::shared_memory() + kMbarriers) + index;
    }
};

}  // namespace sage
