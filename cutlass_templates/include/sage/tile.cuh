// Tiles in shared memory: rows of 32, 64 or 128 bytes, swizzled so that neither a row-wise copy nor
// an ldmatrix down a column of 16 bytes has bank conflicts.
#pragma once

#include <cute/tensor.hpp>
#include <sage/arch.cuh>
#include <sage/params.cuh>

namespace sage {

constexpr int kStepBytes = 32;  // of the contracted dim that one mma takes, whatever the format
constexpr int kAccessBytes = 16;

template <int kRows, int kRowBytes>
struct Tile {
    static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
    static_assert(kRows % 16 == 0);
    static constexpr int kBytes = kRows * kRowBytes;
    static constexpr int kSteps = kRowBytes / kStepBytes;

    // Over 128 bytes, all of the banks, the 16-byte column is XORed with the index of that line.
    static constexpr int kSwizzleBits = kRowBytes == 128 ? 3 : kRowBytes == 64 ? 2 : 1;
    using Layout =
        decltype(cute::composition(cute::Swizzle<kSwizzleBits, 4, 3>{},
                                   cute::Layout<cute::Shape<cute::Int<kRows>, cute::Int<kRowBytes>>,
                                                cute::Stride<cute::Int<kRowBytes>, cute::_1>>{}));

    SAGE_DEVICE static int offset(int row, int byte) { return Layout{}(row, byte); }

    // Begins to copy the whole tile from memory where its rows lie without gaps.
    template <int kThreads>
    SAGE_DEVICE static void copy_async(char* tile, void const* source) {
        constexpr int kAtOnce = kThreads * kAccessBytes;
        int const first = arch::thread_index() * kAccessBytes;
        // Whole multiples of the swizzle's period lie between the rows of a thread.
        static_assert(kAtOnce % (8 * 128) == 0 || kBytes <= kAtOnce);
        char const* const from = static_cast<char const*>(source) + first;
        char* const to = tile + offset(first / kRowBytes, first % kRowBytes);
        SAGE_UNROLL
        for (int start = 0; start < kBytes; start += kAtOnce) {
            if (start + kAtOnce <= kBytes || first < kBytes - start) {
                arch::copy_async(to + start, from + start);
            }
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
// piece: the rows of K (keys, D), those of V transposed (D, keys), and K's scales. Padded, so that
// every tile begins at a line of the cache.
template <class Qk, class Pv, int kHeadDim>
struct KeyValueTile {
    using Key = Tile<kKeyBlock, kHeadDim * Qk::kBits / 8>;
    using Value = Tile<kHeadDim, kKeyBlock * Pv::kBits / 8>;
    static constexpr int kValueOffset = Key::kBytes;
    static constexpr int kScalesOffset = kValueOffset + Value::kBytes;
    static constexpr int kBytes = kScalesOffset + 128;
    static_assert(kScalesOffset % 128 == 0 && kKeyGroups * sizeof(float) == kAccessBytes);
};

}  // namespace sage
