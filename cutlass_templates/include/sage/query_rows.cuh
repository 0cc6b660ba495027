// Which query of which head each row of the attention kernel's tile is, and where what belongs to
// it lies. Codes, scales, means and delta of Q are stored by head and query (see QueryParams), so a
// row has the same numbers in whatever tile it is computed. Only where wgmma reads codes, which lie
// in its order, are they those of the tile: query.cuh has the same rows.
#pragma once

#include <sage/mask.cuh>
#include <sage/tile.cuh>

namespace sage {

constexpr int kHalves = 2;  // rows lane / 4 and lane / 4 + 8 of a band of 16, which a thread holds

// The row of its warp's first band that a thread holds, as a row of the tile.
template <int kWarpRows>
SAGE_DEVICE int first_row_of_thread() {
    int const thread = arch::thread_index();
    return thread / 32 * kWarpRows + thread % 32 / 4;
}

// The scale of a query, by head and query.
SAGE_DEVICE float query_scale(AttendParams const& p, int64_t head, int query) {
    constexpr int kGroups = kQueryBlock / kQueryWarp * kQueryGroups;
    int const group = query / kQueryWarp * kQueryGroups + query % kQueryGroups;
    return arch::load_written(p.query_scales + head * p.query_blocks * kGroups + group);
}

template <bool kUniform>
SAGE_DEVICE int uniform(int value) {
    return kUniform ? arch::warp_uniform(value) : value;
}

// A query block of one head: what is best where the queries fill it. With kUniform the compiler is
// told what all threads of a warp have in common.
template <int kTileRows, int kWarpRows, bool kUniform = false>
class HeadRows {
    static_assert(kTileRows == kQueryBlock);

 public:
    static constexpr bool kPacked = false;
    static constexpr int kScales = 1;  // of a thread: its rows are a group that shares one

    // Of B * H * M tiles, the last one of a head first: under a causal mask it has the most to do.
    SAGE_DEVICE HeadRows(AttendParams const& p, int64_t tile) : p_(p) {
        Split const task(tile, p.query_blocks);
        block_ = uniform<kUniform>(static_cast<int>(p.query_blocks) - 1 - task.inner);
        head_ = uniform<kUniform>(task.outer);
        kv_head_ = uniform<kUniform>(Split(head_, p.group).outer);  // G divides H
        Split const head(head_, p.heads);
        shown_ = p.tiles.data + head.outer * p.tiles.batch_stride +
                 head.inner * p.tiles.head_stride + block_ * p.tiles.token_stride;
        mask_of_head_ = head.outer * p.mask.batch_stride + head.inner * p.mask.head_stride;
    }

    SAGE_DEVICE int64_t tile() const { return head_ * p_.query_blocks + block_; }  // of memory
    SAGE_DEVICE int kv_head() const { return kv_head_; }  // b * Hkv + h / G
    SAGE_DEVICE int first_query() const { return block_ * kQueryBlock; }
    SAGE_DEVICE int last_query() const {
        int const last = first_query() + kQueryBlock, end = static_cast<int>(p_.query_length);
        return (last < end ? last : end) - 1;
    }

    // Of the thread's rows: the query, whether there is one, and its head, which is b * H + h.
    SAGE_DEVICE int query(int band, int half) const {
        return first_query() + first_row_of_thread<kWarpRows>() + band * 16 + half * 8;
    }
    SAGE_DEVICE bool exists(int band, int half) const {
        return query(band, half) < p_.query_length;
    }
    SAGE_DEVICE int head(int, int) const { return head_; }

    template <class QueryTile, int kThreads>
    SAGE_DEVICE void copy_codes_async(char* tile) const {
        QueryTile::template copy_async<kThreads>(
            tile, static_cast<char const*>(p_.query_codes) + this->tile() * QueryTile::kBytes);
    }
    SAGE_DEVICE void load_scales(float (&scales)[kScales]) const {
        scales[0] = query_scale(p_, head_, query(0, 0));
    }
    static constexpr int scale_of(int, int) { return 0; }

    // The means of Q . K' that the scores of all rows get, for a tile of keys.
    SAGE_DEVICE float const* delta(int key_tile) const {
        return p_.delta + (tile() * p_.key_blocks + key_tile) * kKeyBlock;
    }

    // What the mask shows of a tile of keys.
    SAGE_DEVICE uint8_t shown(int key_tile) const { return arch::load_global(shown_ + key_tile); }

    // Where the mask has a row; of rows that do not exist that of the last query.
    SAGE_DEVICE int64_t mask_row(int band, int half) const {
        int const last = static_cast<int>(p_.query_length) - 1, wanted = query(band, half);
        return mask_of_head_ + (wanted < last ? wanted : last) * p_.mask.query_stride;
    }

 private:
    AttendParams const& p_;
    int block_, head_, kv_head_;
    // Of a kernel with a mask, the same in every turn.
    uint8_t const* shown_;
    int64_t mask_of_head_;
};

// Query heads packed into the tile: (query, head) pairs of all G heads of one key/value head, the
// heads of a query behind one another. So a few queries fill a tile, K and V are read once for all
// heads, and the rows of one tile are few queries, near each other under a diagonal.
template <int kTileRows, int kWarpRows, bool kUniform = false>
class PackedRows {
    static constexpr int kBands = kWarpRows / 16;

 public:
    static constexpr bool kPacked = true;
    static constexpr int kScales = kBands * kHalves;

    // Of B * Hkv * row_blocks tiles.
    SAGE_DEVICE PackedRows(AttendParams const& p, int64_t tile) : p_(p) {
        Split const task(tile, p.row_blocks);
        kv_head_ = uniform<kUniform>(task.outer);
        int const row_block = static_cast<int>(p.row_blocks) - 1 - task.inner;
        first_row_ = uniform<kUniform>(row_block) * kTileRows;
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                int const row = first_row_of_thread<kWarpRows>() + band * 16 + half * 8;
                Split const pair(first_row_ + row, p.group);
                query_[band][half] = pair.outer;
                head_[band][half] = head_of(pair);
                Split const head(head_[band][half], p.heads);
                int const last = static_cast<int>(p.query_length) - 1;
                mask_rows_[band][half] =
                    head.outer * p.mask.batch_stride + head.inner * p.mask.head_stride +
                    (pair.outer < last ? pair.outer : last) * p.mask.query_stride;
            }
        }
        Split const first_head(kv_head_ * p.group, p.heads);
        first_block_ = first_query() / kQueryBlock;
        last_block_ = last_query() / kQueryBlock;
        shown_ = p.tiles.data + first_head.outer * p.tiles.batch_stride +
                 first_head.inner * p.tiles.head_stride;
    }

    SAGE_DEVICE int64_t tile() const { return kv_head_ * p_.row_blocks + first_row_ / kTileRows; }
    SAGE_DEVICE int kv_head() const { return kv_head_; }
    SAGE_DEVICE int first_query() const { return Split(first_row_, p_.group).outer; }
    SAGE_DEVICE int last_query() const { return existing(kTileRows - 1).outer; }

    SAGE_DEVICE int query(int band, int half) const { return query_[band][half]; }
    SAGE_DEVICE bool exists(int band, int half) const {
        return query(band, half) < p_.query_length;
    }
    SAGE_DEVICE int head(int band, int half) const { return head_[band][half]; }

    template <class QueryTile, int kThreads>
    SAGE_DEVICE void copy_codes_async(char* tile) const {
        constexpr int kRowBytes = QueryTile::kBytes / kTileRows;
        QueryTile::template copy_rows_async<kThreads>(tile, [this](int row) {
            Split const pair = existing(row);
            int64_t const token =
                int64_t{head_of(pair)} * p_.query_blocks * kQueryBlock + pair.outer;
            return static_cast<char const*>(p_.query_codes) + token * kRowBytes;
        });
    }
    SAGE_DEVICE void load_scales(float (&scales)[kScales]) const {
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                bool const present = exists(band, half);
                scales[scale_of(band, half)] =
                    present ? query_scale(p_, head(band, half), query(band, half)) : 0.0f;
            }
        }
    }
    static constexpr int scale_of(int band, int half) { return band * kHalves + half; }

    // The means of Q . K' that the scores of a row get, for a tile of keys; of rows that do not
    // exist those of the first.
    SAGE_DEVICE float const* delta(int key_tile, int band, int half) const {
        int const query = exists(band, half) ? query_[band][half] : 0;
        int64_t const block = head_[band][half] * p_.query_blocks + query / kQueryBlock;
        return p_.delta + (block * p_.key_blocks + key_tile) * kKeyBlock;
    }

    // What the masks of the tile's queries, of all heads, show of a tile of keys together.
    SAGE_DEVICE uint8_t shown(int key_tile) const {
        int const members = p_.tiles.head_stride == 0 ? 1 : static_cast<int>(p_.group);
        uint32_t found = 0;  // a bit for each kind
        SAGE_ROLLED
        for (int member = 0; member < members; ++member) {
            SAGE_ROLLED
            for (int block = first_block_; block <= last_block_; ++block) {
                found |= 1u << arch::load_global(shown_ + member * p_.tiles.head_stride +
                                                 block * p_.tiles.token_stride + key_tile);
            }
        }
        return found == 1u << kHidesAll ? kHidesAll : found == 1u << kShowsAll ? kShowsAll : kMixed;
    }

    // Where the mask has a row; of rows that do not exist that of the last query of their head.
    SAGE_DEVICE int64_t mask_row(int band, int half) const { return mask_rows_[band][half]; }

 private:
    // The pair of a row of the tile, or the last one where there are fewer.
    SAGE_DEVICE Split existing(int row) const {
        int64_t const end = p_.group * p_.query_length, wanted = first_row_ + row;
        return Split(wanted < end ? wanted : end - 1, p_.group);
    }
    SAGE_DEVICE int head_of(Split const& pair) const {
        return kv_head_ * static_cast<int>(p_.group) + pair.inner;
    }

    AttendParams const& p_;
    int kv_head_, first_row_;
    int query_[kBands][kHalves], head_[kBands][kHalves];
    // Of a kernel with a mask, the same in every turn.
    int64_t mask_rows_[kBands][kHalves];
    uint8_t const* shown_;  // by the first head
    int first_block_, last_block_;
};

}  // namespace sage
