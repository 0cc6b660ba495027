// An explicit mask in the attention kernel for Hopper: what it does to a thread's scores.
#pragma once

#include <sage/copied_mask.cuh>
#include <sage/hopper_scores.cuh>
#include <sage/mask_row.cuh>
#include <sage/numeric.cuh>
#include <sage/query_rows.cuh>

namespace sage {

// Params, Task and Memory as of AttendHopper.
template <class Params, class Task, class Memory>
class HopperMask {
    using Scores = HopperScores<Memory::kStepTiles>;
    using Words = typename Scores::Words;
    using Masks = typename Memory::Masks;
    // Of a mask where it lies, at a time: with more, registers would be spilled.
    static constexpr int kMaskAtoms = 2;

 public:
    SAGE_DEVICE HopperMask(Params const& p, Task const& task) : p_(p), task_(task) {}

    // Hides what a bool mask hides of a tile, the step's i-th, and adds a float one, to scores in
    // units of log 2. `copied` is the place of the next tile of it in shared memory.
    SAGE_DEVICE void apply(Words& scores, int i, int tile, Masks& copied) const {
        uint8_t const shown = task_.shown_of(tile);
        if (shown == kShowsAll) return;
        if (shown == kHidesAll) return hide_tile(scores, i);
        if constexpr (Memory::kCopiesMask) {
            if (p_.mask_rows != 0) return apply_copied(scores, i, copied);
        }
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            SAGE_UNROLL
            for (int atom = 0; atom < Scores::kTileAtoms; atom += kMaskAtoms) {
                apply_read(scores, i, half, atom, tile);
            }
        }
    }

 private:
    SAGE_DEVICE static void hide_tile(Words& scores, int i) {
        SAGE_UNROLL
        for (int word = i * Scores::kTileAtoms * 4; word < (i + 1) * Scores::kTileAtoms * 4;
             ++word) {
            scores[word] = arch::bits(-infinity());
        }
    }

    // The mask where it lies, for a row half and kMaskAtoms atoms.
    SAGE_DEVICE void apply_read(Words& scores, int i, int half, int first_atom, int tile) const {
        MaskRow<kMaskAtoms> row;
        row.load(p_.mask, task_.rows().mask_row(0, half),
                 tile * kKeyBlock + first_atom * 8 + Scores::first_column(), p_.key_length,
                 has_pairs(p_.mask));
        float x[kMaskAtoms][2];
        SAGE_UNROLL
        for (int k = 0; k < kMaskAtoms * 2; ++k) {
            x[k / 2][k % 2] =
                arch::from_bits(scores[Scores::at(i, half, first_atom + k / 2, k % 2)]);
        }
        row.apply(x, p_.mask.kind);
        SAGE_UNROLL
        for (int k = 0; k < kMaskAtoms * 2; ++k) {
            scores[Scores::at(i, half, first_atom + k / 2, k % 2)] = arch::bits(x[k / 2][k % 2]);
        }
    }

    // The same from shared memory. Beyond the last query and key there are zeros, whatever they
    // mean: such keys are hidden, and such rows are nobody's.
    SAGE_DEVICE void apply_copied(Words& scores, int i, Masks& place) const {
        arch::mbarrier_wait(Memory::mask_full(place.stage()), place.parity());
        char const* const tile = Memory::mask(place.stage());
        switch (p_.mask.kind) {
            case MaskKind::kBool:
                apply_copied<MaskKind::kBool>(scores, i, tile);
                break;
            case MaskKind::kHalf:
                apply_copied<MaskKind::kHalf>(scores, i, tile);
                break;
            case MaskKind::kBfloat16:
                apply_copied<MaskKind::kBfloat16>(scores, i, tile);
                break;
            case MaskKind::kFloat:
                apply_copied<MaskKind::kFloat>(scores, i, tile);
                break;
        }
        arch::mbarrier_arrive_warp(Memory::mask_empty(place.stage()));
        place.advance();
    }

    template <MaskKind kKind>
    SAGE_DEVICE void apply_copied(Words& scores, int i, char const* tile) const {
        CopiedMask::Rows<kKind> const rows(tile, first_row_of_thread<16>(), p_.mask_rows);
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            SAGE_UNROLL
            for (int atom = 0; atom < Scores::kTileAtoms; ++atom) {
                float2 const added = rows.pair(half, atom * 8 + Scores::first_column());
                SAGE_UNROLL
                for (int j = 0; j < 2; ++j) {
                    uint32_t& word = scores[Scores::at(i, half, atom, j)];
                    float const x = arch::from_bits(word);
                    float const of_key = j == 0 ? added.x : added.y;
                    word = arch::bits(of_key == -infinity() ? of_key : x + of_key);
                }
            }
        }
    }

    Params const& p_;
    Task const& task_;
};

}  // namespace sage
