// What a thread of the attention kernel reads of an explicit mask for a row of its scores: two
// elements of every eight keys of a tile.
#pragma once

#include <sage/mask.cuh>

namespace sage {

SAGE_DEVICE constexpr int element_bytes(MaskKind kind) {
    return kind == MaskKind::kBool ? 1 : kind == MaskKind::kFloat ? 4 : 2;
}

// Whether two neighbours that begin at an even key can be loaded together, in every row.
SAGE_DEVICE bool has_pairs(Mask const& mask) {
    int const bytes = element_bytes(mask.kind);
    bool const even = reinterpret_cast<uintptr_t>(mask.data) % (2 * bytes) == 0 &&
                      (mask.batch_stride | mask.head_stride | mask.query_stride) % 2 == 0;
    return mask.key_stride == 1 && even;
}

// Loading and applying are apart, so that something else may be done until the elements are there.
template <int kAtoms>
class MaskRow {
 public:
    // Elements begin at `row` of the mask's data, keys at `first` of the row. Keys beyond
    // `key_length` are not read. `pairs`: whether the mask has them.
    SAGE_DEVICE void load(Mask const& mask, int64_t row, int first, int64_t key_length,
                          bool pairs) {
        if (pairs && first + (kAtoms - 1) * 8 + 1 < key_length) {
            switch (mask.kind) {
                case MaskKind::kBool:
                    return load_pairs<uint8_t, uint16_t>(mask, row + first);
                case MaskKind::kHalf:
                case MaskKind::kBfloat16:
                    return load_pairs<uint16_t, uint32_t>(mask, row + first);
                default:
                    return load_pairs<float, float2>(mask, row + first);
            }
        }
        load_singly(mask, row, first, key_length);
    }

    // Hides what a bool mask hides, and adds a float one, to scores in units of log 2.
    SAGE_DEVICE void apply(float (*x)[2], MaskKind kind) const {
        switch (kind) {
            case MaskKind::kBool:
                return hide(x);
            case MaskKind::kHalf:  // whose largest does not become infinite
                return add(x, [](uint32_t const* pair) {
                    float2 const natural = arch::unpack_half(pair[0]);
                    return make_float2(natural.x * kLog2E, natural.y * kLog2E);
                });
            default:
                return add(x, [kind](uint32_t const* pair) {
                    float2 const natural =
                        kind == MaskKind::kBfloat16
                            ? arch::unpack_bfloat16(pair[0])
                            : make_float2(arch::from_bits(pair[0]), arch::from_bits(pair[1]));
                    return make_float2(in_log2(natural.x), in_log2(natural.y));
                });
        }
    }

 private:
    uint32_t words_[kAtoms][2];  // a pair of keys: in both words, or of less than 32 bits in one

    template <class Element, class Pair>
    SAGE_DEVICE void load_pairs(Mask const& mask, int64_t index) {
        Pair const* const pairs =
            reinterpret_cast<Pair const*>(static_cast<Element const*>(mask.data) + index);
        SAGE_UNROLL
        for (int atom = 0; atom < kAtoms; ++atom) {
            keep(words_[atom], arch::load_global(pairs + atom * 4));
        }
    }
    SAGE_DEVICE static void keep(uint32_t (&words)[2], uint32_t pair) { words[0] = pair; }
    SAGE_DEVICE static void keep(uint32_t (&words)[2], float2 pair) {
        words[0] = arch::bits(pair.x);
        words[1] = arch::bits(pair.y);
    }

    // Types differ in the loads alone, so that there is little code of each.
    SAGE_DEVICE void load_singly(Mask const& mask, int64_t row, int first, int64_t key_length) {
        int const bytes = element_bytes(mask.kind);
        SAGE_UNROLL
        for (int atom = 0; atom < kAtoms; ++atom) {
            int64_t const key = first + atom * 8;
            bool const exist[2] = {key < key_length, key + 1 < key_length};
            char const* const low =
                static_cast<char const*>(mask.data) + (row + key * mask.key_stride) * bytes;
            char const* const high = low + mask.key_stride * bytes;
            uint32_t found[2] = {0, 0};
            switch (bytes) {
                case 1:
                    load_two<uint8_t>(found, exist, low, high);
                    break;
                case 2:
                    load_two<uint16_t>(found, exist, low, high);
                    break;
                default:
                    load_two<uint32_t>(found, exist, low, high);
            }
            words_[atom][0] = bytes == 4 ? found[0] : found[0] | found[1] << 8 * bytes;
            words_[atom][1] = found[1];
        }
    }

    template <class Word>
    SAGE_DEVICE static void load_two(uint32_t (&found)[2], bool const (&exist)[2], char const* low,
                                     char const* high) {
        if (exist[0]) found[0] = arch::load_global(reinterpret_cast<Word const*>(low));
        if (exist[1]) found[1] = arch::load_global(reinterpret_cast<Word const*>(high));
    }

    SAGE_DEVICE void hide(float (*x)[2]) const {
        SAGE_UNROLL
        for (int atom = 0; atom < kAtoms; ++atom) {
            SAGE_UNROLL
            for (int i = 0; i < 2; ++i) {
                if ((words_[atom][0] >> 8 * i & 0xff) == 0) x[atom][i] = -infinity();
            }
        }
    }

    // What hides is no summand: with a score that is not finite it would not make -inf.
    template <class InLog2>
    SAGE_DEVICE void add(float (*x)[2], InLog2 const& in_log2_of) const {
        SAGE_UNROLL
        for (int atom = 0; atom < kAtoms; ++atom) {
            float2 const pair = in_log2_of(words_[atom]);
            float const added[2] = {pair.x, pair.y};
            SAGE_UNROLL
            for (int i = 0; i < 2; ++i) {
                x[atom][i] = added[i] == -infinity() ? added[i] : x[atom][i] + added[i];
            }
        }
    }
};

}  // namespace sage
