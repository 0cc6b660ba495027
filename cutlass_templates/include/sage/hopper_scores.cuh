// How a thread of the attention kernel for Hopper holds scores of a step.
#pragma once

#include <sage/arch/hopper.cuh>
#include <sage/params.cuh>

namespace sage {

// The accumulators of Q K^T: two rows by two columns of every eight keys, of kTiles tiles.
template <int kTiles>
struct HopperScores {
    static constexpr int kKeys = kTiles * kKeyBlock;
    static constexpr int kWords = kKeys / 2;
    static constexpr int kTileAtoms = kKeyBlock / 8;
    using Words = uint32_t[kWords];

    // Element i of row half `half` and of 8 keys `atom` of a tile.
    SAGE_DEVICE static constexpr int at(int tile, int half, int atom, int i) {
        return (tile * kTileAtoms + atom) * 4 + half * 2 + i;
    }
    // The first column, of every eight, that it holds.
    SAGE_DEVICE static int first_column() { return (arch::thread_index() & 3) * 2; }
};

}  // namespace sage
