// Tensor maps, and the boxes that TMA copies by them. NVIDIA's are opaque; these are in a format of
// this library's own, which its driver encodes and its executor decodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sage::host {

// What cuTensorMapEncodeTiled is told, with the names and numbers of cuda.h.
struct TensorMapArguments {
    int data_type;
    uint32_t rank;
    void const* address;
    uint64_t const* dims;
    uint64_t const* strides;  // in bytes, of all dims but the first
    uint32_t const* box;
    uint32_t const* element_strides;
    int interleave, swizzle, l2_promotion, oob_fill;
};

class TensorMap {
 public:
    static constexpr size_t kBytes = 128, kAlignment = 64;
    static constexpr int kMostDims = 5;

    // Writes a map of kBytes; returns why there can be none, or "".
    static std::string encode(TensorMapArguments const& arguments, void* map);

    // Reads a map; false where there is none.
    bool decode(void const* map);

    int rank() const { return rank_; }
    int box_bytes() const { return static_cast<int>(rows() * row_bytes()); }
    int element_bytes() const { return element_bytes_; }

 private:
    friend class TensorBox;

    int64_t rows() const;  // of a box: all of its dims but the first
    int64_t row_bytes() const { return int64_t{box_[0]} * element_bytes_; }

    uint64_t mark_ = 0;
    char const* address_ = nullptr;
    uint64_t dims_[kMostDims] = {};
    uint64_t strides_[kMostDims] = {};  // in bytes
    uint16_t box_[kMostDims] = {};
    uint8_t rank_ = 0, element_bytes_ = 0;
    uint8_t swizzle_ = 0;  // the bytes of its rows; 0: none
};
static_assert(sizeof(TensorMap) <= TensorMap::kBytes);

// A box of a tensor that begins at some element of it, inside or outside.
class TensorBox {
 public:
    TensorBox(TensorMap const& map, int const* at);

    // The bytes [begin, end) of a row of the box that the tensor has, which lie at `from` and after
    // it; none where begin is end.
    struct Row {
        char const* from;
        int64_t begin, end;
    };
    int64_t rows() const { return map_.rows(); }
    Row row(int64_t index) const;

    // Copies it to an offset of the shared memory that begins at `shared`, which has the alignment
    // that swizzles count from; zeros where the tensor is not.
    void copy(char* shared, size_t offset) const;

 private:
    TensorMap map_;
    int64_t at_[TensorMap::kMostDims] = {};
};

}  // namespace sage::host
