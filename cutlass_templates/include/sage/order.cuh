// In which order the bytes of a matrix of codes lie: rows behind one another, or as wgmma reads
// them from shared memory.
#pragma once

#include <sage/arch.cuh>

namespace sage {

// A matrix (kRows, kRowBytes), row by row.
template <int kRows, int kRowBytes>
struct RowByRow {
    static constexpr int kBytes = kRows * kRowBytes;
    SAGE_DEVICE static int offset(int row, int byte) { return row * kRowBytes + byte; }
};

// The same in panels of at most 128 bytes of each row, so that a panel's rows are as wide as one of
// the swizzles of PTX's matrix descriptors: the column of 16 bytes is XORed with the index of its
// line of 128 bytes. A tile in this order is copied as it lies, and needs no tensor map.
template <int kRows, int kRowBytes>
struct Panels {
    static constexpr int kWidth = kRowBytes < 128 ? kRowBytes : 128;
    static_assert((kWidth == 64 || kWidth == 128) && kRowBytes % kWidth == 0 && kRows % 16 == 0);
    static constexpr int kCount = kRowBytes / kWidth;
    static constexpr int kPanelBytes = kRows * kWidth;
    static constexpr int kBytes = kRows * kRowBytes;

    SAGE_DEVICE static int offset(int row, int byte) {
        int const line = row * kWidth / 128;
        int const column = byte % kWidth ^ line % (kWidth / 16) * 16;
        return byte / kWidth * kPanelBytes + row * kWidth + column;
    }
};

template <bool kPanels, int kRows, int kRowBytes>
using Order = cute::conditional_t<kPanels, Panels<kRows, kRowBytes>, RowByRow<kRows, kRowBytes>>;

}  // namespace sage
