// Tiles in shared memory: rows of 32, 64, 128 or 256 bytes, swizzled so that neither a row-wise
// copy nor an ldmatrix down a column of 16 bytes has bank conflicts.
#pragma once

#include <cute/tensor.hpp>
#include <sage/arch.cuh>
#include <sage/params.cuh>

namespace sage {

constexpr int kStepBytes = 32;  // of the contracted dim that one mma takes, whatever the format
constexpr int kAccessBytes = 16;

template <int kRows, int kRowBytes>
struct Tile {
    static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256);
    static_assert(kRows % 16 == 0);
    static constexpr int kBytes = kRows * kRowBytes;
    static constexpr int kSteps = kRowBytes / kStepBytes;

    // The column of 16 bytes is XORed with the index of its line of 128 bytes, which is all banks;
    // in longer rows with the row's.
    static constexpr int kSwizzleBits = kRowBytes >= 128 ? 3 : kRowBytes == 64 ? 2 : 1;
    static constexpr int kSwizzleShift = kRowBytes == 256 ? 4 : 3;
    using Layout =
        decltype(cute::composition(cute::Swizzle<kSwizzleBits, 4, kSwizzleShift>{},
                                   cute::Layout<cute::Shape<cute::Int<kRows>, cute::Int<kRowBytes>>,
                                                cute::Stride<cute::Int<kRowBytes>, cute::_1>>{}));

    SAGE_DEVICE static int offset(int row, int byte) { return Layout{}(row, byte); }

    // Begins to copy the first rows of a tile from memory where they lie without gaps.
    template <int kThreads, int kCopiedRows = kRows>
    SAGE_DEVICE static void copy_async(char* tile, void const* source) {
        constexpr int kCopiedBytes = kCopiedRows * kRowBytes;
        constexpr int kAtOnce = kThreads * kAccessBytes;
        int const first = arch::thread_index() * kAccessBytes;
        // Whole multiples of the swizzle's period lie between the rows of a thread.
        constexpr int kPeriod = 8 * (kRowBytes > 128 ? kRowBytes : 128);
        static_assert(kAtOnce % kPeriod == 0 || kCopiedBytes <= kAtOnce);
        char const* const from = static_cast<char const*>(source) + first;
        char* const to = tile + offset(first / kRowBytes, first % kRowBytes);
        SAGE_UNROLL
        for (int start = 0; start < kCopiedBytes; start += kAtOnce) {
            if (start + kAtOnce <= kCopiedBytes || first < kCopiedBytes - start) {
                arch::copy_async(to + start, from + start);
            }
        }
    }

    // Begins to copy rows that lie anywhere: `address_of(row)` is where, 16 bytes aligned.
    template <int kThreads, class AddressOf>
    SAGE_DEVICE static void copy_rows_async(char* tile, AddressOf const& address_of) {
        SAGE_UNROLL
        for (int start = 0; start < kBytes; start += kThreads * kAccessBytes) {
            int const first = start + arch::thread_index() * kAccessBytes;
            if (first >= kBytes) continue;
            int const row = first / kRowBytes, byte = first % kRowBytes;
            arch::copy_async(tile + offset(row, byte), address_of(row) + byte);
        }
    }

    // One step of 16 rows, by ldmatrix: as operand A in the atom's order; as operand B, registers i
    // and i + 2 are those of the rows 8 i to 8 i + 7. `row` is a multiple of 16.
    SAGE_DEVICE static void load(uint32_t (&operand)[4], char const* tile, int of_lane, int row,
                                 int step) {
        // The step's bits are clear in a lane's unswizzled column, so that it may be XORed in late.
        arch::load_matrix_x4(operand, tile + row * kRowBytes + (of_lane ^ step * kStepBytes));
    }
    // For it, the offset of the calling lane's row and column.
    SAGE_DEVICE static int of_lane() {
        int const lane = arch::thread_index() % 32;
        return offset(lane % 16, lane / 16 * kAccessBytes);
    }
};

// A tile of kKeyBlock keys as the quantizers write it and the attention kernel copies it, in one
// piece: the rows of K (keys, kKeyDim), those of V transposed (kValueDim, keys), K's scales, and
// where V has scales for each tile, these. Padded, so that every tile begins at a line of the
// cache.
template <class Qk, class Pv, int kKeyDim, int kValueDim, bool kValueScales>
struct KeyValueTile {
    using Key = Tile<kKeyBlock, kKeyDim * Qk::kBits / 8>;
    using Value = Tile<kValueDim, kKeyBlock * Pv::kBits / 8>;
    static constexpr int kValueOffset = Key::kBytes;
    static constexpr int kScalesOffset = kValueOffset + Value::kBytes;
    static constexpr int kValueScalesOffset = kScalesOffset + 128;
    static constexpr int kValueScalesBytes = kValueScales ? kValueDim * sizeof(float) : 0;
    static constexpr int kBytes = kValueScalesOffset + kValueScalesBytes;
    static_assert(kScalesOffset % 128 == 0 && kKeyGroups * sizeof(float) == kAccessBytes);
};

}  // namespace sage
