// What a block of the attention kernel for Hopper does: a tile of queries, and which tiles of keys
// that sees.
#pragma once

#include <sage/numeric.cuh>
#include <sage/params.cuh>
#include <sage/query_rows.cuh>

namespace sage {

// For both roles. A task is known by its index alone, so that a block may have several. The first
// warp of the first warpgroup of consumers has the first 16 rows, and so on.
template <bool kPackedHeads, bool kSplitKeys, bool kWindow, bool kMasked, int kTiles>
class HopperTask {
    static constexpr int kWarpRows = 16;

 public:
    using Rows = cute::conditional_t<kPackedHeads, PackedRows<kQueryBlock, kWarpRows, true>,
                                     HeadRows<kQueryBlock, kWarpRows, true>>;

    // How many tasks a head makes, or where heads are packed a head of K and V; they are behind one
    // another, the longest first.
    SAGE_DEVICE static int of_head(AttendParams const& p) {
        return static_cast<int>((kPackedHeads ? p.row_blocks : p.query_blocks) *
                                (kSplitKeys ? p.parts : 1));
    }

    SAGE_DEVICE HopperTask(AttendParams const& p, int64_t index)
        : HopperTask(p, Split(index, kSplitKeys ? p.parts : 1)) {}

    // Which queries the rows of the tile are.
    SAGE_DEVICE Rows const& rows() const { return rows_; }
    // Those of a warpgroup are not before the one, nor after the other.
    SAGE_DEVICE int first_query(int warpgroup) const {
        return rows_.first_query() + (kPackedHeads ? 0 : warpgroup * (kQueryBlock / 2));
    }
    SAGE_DEVICE int last_query(int warpgroup) const {
        return kPackedHeads ? rows_.last_query() : first_query(warpgroup + 1) - 1;
    }

    SAGE_DEVICE int part() const { return part_; }  // of the keys, of p.parts

    // A query sees the keys from the one on, and before the other. Lengths, lower and upper are
    // below 2^30 in magnitude.
    SAGE_DEVICE int first_key(int query) const {
        if constexpr (!kWindow) return 0;
        return within_keys(query + static_cast<int>(p_.lower));
    }
    SAGE_DEVICE int end_key(int query) const {
        return within_keys(query + static_cast<int>(p_.upper) + 1);
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
        return rows_.shown(tile);
    }

    // The tile that is copied for `tile`: where a step has fewer than kTiles, the last one again,
    // because hidden V must be finite.
    SAGE_DEVICE int copied(int tile) const {
        int const last = end_tile_ - 1;
        return rows_.kv_head() * static_cast<int>(p_.head_tiles) + (tile < last ? tile : last);
    }

 private:
    SAGE_DEVICE HopperTask(AttendParams const& p, Split const& task)
        : p_(p), rows_(p, task.outer), part_(task.inner) {
        first_tile_ = first_key(rows_.first_query()) / kKeyBlock;
        end_tile_ = (end_key(last_query(1)) + kKeyBlock - 1) / kKeyBlock;
        if (first_tile_ > end_tile_) first_tile_ = end_tile_;
        if constexpr (kSplitKeys) take_part();
        first_tile_ = arch::warp_uniform(first_tile_);
        end_tile_ = arch::warp_uniform(end_tile_);
    }

    // Whole steps, the first parts one more than the last ones where they do not come out even;
    // none where there are fewer steps than parts.
    SAGE_DEVICE void take_part() {
        int const first = first_tile_ / kTiles, end = (end_tile_ + kTiles - 1) / kTiles;
        Split const share(end - first, p_.parts);
        int const begin = first + share.outer * part_ + (part_ < share.inner ? part_ : share.inner);
        int const begin_tile = begin * kTiles;
        int const after = begin_tile + (share.outer + (part_ < share.inner)) * kTiles;
        if (first_tile_ < begin_tile) first_tile_ = begin_tile;
        if (end_tile_ > after) end_tile_ = after;
    }

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
    Rows const rows_;
    int const part_;
    int first_tile_, end_tile_;  // of keys that the block sees
};

}  // namespace sage
