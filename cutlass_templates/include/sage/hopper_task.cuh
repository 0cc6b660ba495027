// What a block of the attention kernel for Hopper does: a query block of one head, and which tiles
// of keys that sees.
#pragma once

#include <sage/arch/hopper.cuh>
#include <sage/numeric.cuh>
#include <sage/params.cuh>

namespace sage {

// For both roles. A task is known by its index alone, so that a block may have several.
template <bool kWindow, bool kMasked, int kTiles>
class HopperTask {
 public:
    // How many tasks a head makes, the longest first.
    SAGE_DEVICE static int of_head(AttendParams const& p) {
        return static_cast<int>(p.query_blocks);
    }

    SAGE_DEVICE HopperTask(AttendParams const& p, int64_t index) : p_(p) {
        // The last blocks first: under a causal mask they have the most to do.
        Split const task(index, p.query_blocks);
        block_ = arch::warp_uniform(static_cast<int>(p.query_blocks) - 1 - task.inner);
        head_ = arch::warp_uniform(task.outer);
        kv_head_ = arch::warp_uniform(Split(head_, p.group).outer);  // G divides H
        int const first = first_key(first_query()) / kKeyBlock;
        int const last = first_query() + kQueryBlock - 1;
        end_tile_ = arch::warp_uniform((end_key(last) + kKeyBlock - 1) / kKeyBlock);
        first_tile_ = kWindow ? arch::warp_uniform(first < end_tile_ ? first : end_tile_) : 0;
    }

    SAGE_DEVICE int head() const { return head_; }        // b * H + h
    SAGE_DEVICE int kv_head() const { return kv_head_; }  // b * Hkv + h / G
    SAGE_DEVICE int first_query() const { return block_ * kQueryBlock; }
    SAGE_DEVICE int64_t block() const { return head_ * p_.query_blocks + block_; }

    // Query `row` sees the keys from the one on, and before the other. Lengths, lower and upper are
    // below 2^30 in magnitude.
    SAGE_DEVICE int first_key(int row) const {
        if constexpr (!kWindow) return 0;
        return within_keys(row + static_cast<int>(p_.lower));
    }
    SAGE_DEVICE int end_key(int row) const {
        return within_keys(row + static_cast<int>(p_.upper) + 1);
    }

    // The keys are done in steps of kTiles tiles, from a multiple of kTiles on, so that a result
    // does not depend on where a block begins: the first tile of the first step, and of the one
    // after another one. Steps of which nothing is seen are left out.
    SAGE_DEVICE int first_step() const { return seen_from(first_tile_ / kTiles * kTiles); }
    SAGE_DEVICE int step_after(int tile) const { return seen_from(tile + kTiles); }
    SAGE_DEVICE bool is_step(int tile) const { return tile < end_tile_; }

    // What the mask shows of a tile; of one outside of what the block sees, nothing.
    SAGE_DEVICE uint8_t shown_of(int tile) const {
        if (tile < first_tile_ || tile >= end_tile_) return kHidesAll;
        if constexpr (!kMasked) return kShowsAll;
        Split const head(head_, p_.heads);
        return arch::load_global(p_.tiles.data + head.outer * p_.tiles.batch_stride +
                                 head.inner * p_.tiles.head_stride +
                                 block_ * p_.tiles.token_stride + tile);
    }

    // The tile that is copied for `tile`: where a step has fewer than kTiles, the last one again,
    // because hidden V must be finite.
    SAGE_DEVICE int copied(int tile) const {
        int const last = end_tile_ - 1;
        return kv_head_ * static_cast<int>(p_.key_blocks) + (tile < last ? tile : last);
    }

 private:
    SAGE_DEVICE int within_keys(int key) const {
        int const end = static_cast<int>(p_.key_length);
        return key < 0 ? 0 : key < end ? key : end;
    }
    SAGE_DEVICE int seen_from(int tile) const {
        if constexpr (kMasked) {
            while (tile < end_tile_ && hides_all(tile)) tile += kTiles;
        }
        return tile;
    }
    SAGE_DEVICE bool hides_all(int tile) const {
        SAGE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            if (shown_of(tile + i) != kHidesAll) return false;
        }
        return true;
    }

    AttendParams const& p_;
    int block_, head_, kv_head_;
    int first_tile_, end_tile_;  // of keys that the block sees
};

}  // namespace sage
