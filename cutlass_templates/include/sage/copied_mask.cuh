// A tile of an explicit mask in shared memory, kQueryBlock queries of one head by kKeyBlock keys,
// as TMA copies it by a tensor map: the caller's tensor, in whatever type and strides it has.
//
// Rows are 64 bytes of a bool mask, 128 of 16 bits, two panels of 128 in float, each swizzled as
// wide as it is (Panels of order.cuh). So the pairs of keys that the lanes of a warp read, of eight
// rows, lie in different banks, but in float: there each pair of rows shares them.
#pragma once

#include <sage/arch/hopper.cuh>
#include <sage/mask_row.cuh>
#include <sage/order.cuh>
#include <sage/params.cuh>

namespace sage {

class CopiedMask {
    static constexpr int kPanelKeyBytes = 128;
    static constexpr int kPanelBytes = kQueryBlock * kPanelKeyBytes;

 public:
    // Begins to copy a tile of keys, of `head`, which is b * H + h, from a query on, to a place
    // whose mbarrier is `full`. By one thread.
    SAGE_DEVICE static void copy(MaskedAttendParams const& p, int head, int first_query, int tile,
                                 char* place, uint64_t* full) {
        int const bytes = element_bytes(p.mask.kind);
        arch::mbarrier_arrive_expect(full, static_cast<int>(p.mask_rows) * kKeyBlock * bytes);
        // A dim that broadcasts has the one coordinate.
        Split const index(head, p.heads);
        int const query = p.mask_rows == 1 ? 0 : first_query;
        int const of_head = p.mask.head_stride == 0 ? 0 : index.inner;
        int const batch = p.mask.batch_stride == 0 ? 0 : index.outer;
        int const panel_keys = bytes == 4 ? kPanelKeyBytes / 4 : kKeyBlock;
        SAGE_ROLLED
        for (int key = 0; key < kKeyBlock; key += panel_keys, place += kPanelBytes) {
            int4 const at = make_int4(tile * kKeyBlock + key, query, of_head, batch);
            arch::copy_tensor(place, p.mask_map, at, full);
        }
    }

    // Two rows of a tile, eight apart, with elements of a type.
    template <MaskKind kKind>
    class Rows {
        static constexpr int kBytes = element_bytes(kKind);
        using Tile = Panels<kQueryBlock, kKeyBlock * kBytes>;
        static_assert(Tile::kCount == 1 || Tile::kPanelBytes == kPanelBytes);

     public:
        // `mask_rows` as of MaskedAttendParams: with one, it is both.
        SAGE_DEVICE Rows(char const* tile, int row, int64_t mask_rows)
            : tile_(tile), row_(mask_rows == 1 ? 0 : row), apart_(mask_rows == 1 ? 0 : 8) {}

        // What an even key and the next one add to scores, in units of log 2.
        SAGE_DEVICE float2 pair(int half, int key) const {
            char const* const from =
                tile_ + Tile::offset(row_, key * kBytes) + half * apart_ * Tile::kWidth;
            if constexpr (kKind == MaskKind::kBool) {
                uint16_t const shown = arch::load_shared(reinterpret_cast<uint16_t const*>(from));
                return make_float2((shown & 0xff) != 0 ? 0.0f : -infinity(),
                                   shown >> 8 != 0 ? 0.0f : -infinity());
            } else if constexpr (kKind == MaskKind::kFloat) {
                return in_log2(arch::load_shared(reinterpret_cast<float2 const*>(from)));
            } else {
                uint32_t const packed = arch::load_shared(reinterpret_cast<uint32_t const*>(from));
                if constexpr (kKind == MaskKind::kBfloat16) {
                    return in_log2(arch::unpack_bfloat16(packed));
                }
                float2 const natural = arch::unpack_half(packed);  // no overflow
                return make_float2(natural.x * kLog2E, natural.y * kLog2E);
            }
        }

     private:
        char const* tile_;
        int row_, apart_;

        SAGE_DEVICE static float2 in_log2(float2 natural) {
            return make_float2(sage::in_log2(natural.x), sage::in_log2(natural.y));
        }
    };
};

}  // namespace sage
