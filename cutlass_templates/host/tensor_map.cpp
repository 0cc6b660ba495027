#include "tensor_map.hpp"

#include <algorithm>
#include <cstring>

namespace sage::host {

namespace {

constexpr uint64_t kMark = 0x7465'6e73'6f72'6d61;
constexpr int kUnit = 16;  // bytes that a swizzle moves together

// Of CUtensorMapDataType, in its order: UINT8 to UINT64, FLOAT16 to FLOAT64, BFLOAT16, and float32
// and tfloat32 with subnormals flushed or not.
constexpr uint8_t kElementBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr int kDataTypes = sizeof kElementBytes;

// Of CUtensorMapSwizzle: NONE, 32B, 64B, 128B.
constexpr uint8_t kSwizzles[] = {0, 32, 64, 128};
constexpr int kSwizzleKinds = sizeof kSwizzles;

std::string of(std::string const& what, uint64_t value, std::string const& needed) {
    return what + " is " + std::to_string(value) + "; " + needed;
}

// PTX, "Swizzling modes": of an address in units of 16 bytes, the last one, two or three bits are
// XORed with as many bits from the third on, which are those of its line of 128 bytes.
size_t swizzled(size_t offset, int row_bytes) {
    if (row_bytes == 0) return offset;
    size_t const units = static_cast<size_t>(row_bytes / kUnit);
    return offset ^ (offset / 128 % units) * kUnit;
}

}  // namespace

std::string TensorMap::encode(TensorMapArguments const& a, void* to) {
    if (reinterpret_cast<uintptr_t>(to) % kAlignment != 0) return "the map is not 64-byte aligned";
    if (a.data_type < 0 || a.data_type >= kDataTypes) return "there is no such data type";
    if (a.rank < 1 || a.rank > kMostDims) return of("the rank", a.rank, "it must be 1 to 5");
    if (a.interleave != 0) return "interleaved layouts are not imitated";
    if (a.swizzle < 0 || a.swizzle >= kSwizzleKinds) return "this swizzle is not imitated";
    if (a.l2_promotion < 0 || a.l2_promotion > 3) return "there is no such promotion in L2";
    if (a.oob_fill != 0) return "what is out of bounds is zero; other fills are not imitated";
    if (reinterpret_cast<uintptr_t>(a.address) % kUnit != 0) {
        return "the tensor is not 16-byte aligned";
    }
    TensorMap map;
    map.mark_ = kMark;
    map.address_ = static_cast<char const*>(a.address);
    map.rank_ = static_cast<uint8_t>(a.rank);
    map.element_bytes_ = kElementBytes[a.data_type];
    map.swizzle_ = kSwizzles[a.swizzle];
    map.strides_[0] = map.element_bytes_;
    for (uint32_t i = 0; i < a.rank; ++i) {
        std::string const dim = " of dim " + std::to_string(i);
        if (a.dims[i] < 1 || a.dims[i] > uint64_t{1} << 32) {
            return of("the size" + dim, a.dims[i], "it must be 1 to 2^32");
        }
        if (a.box[i] < 1 || a.box[i] > 256) {
            return of("the box" + dim, a.box[i], "it must be 1 to 256");
        }
        if (a.element_strides[i] != 1) {
            return of("the element stride" + dim, a.element_strides[i], "others are not imitated");
        }
        map.dims_[i] = a.dims[i];
        map.box_[i] = static_cast<uint16_t>(a.box[i]);
        if (i == 0) continue;
        uint64_t const stride = a.strides[i - 1];
        if (stride == 0 || stride % kUnit != 0 || stride >= uint64_t{1} << 40) {
            return of("the stride" + dim, stride,
                      "it must be a multiple of 16 bytes, above 0 and below 2^40");
        }
        map.strides_[i] = stride;
    }
    if (map.row_bytes() % kUnit != 0) {
        return of("the bytes of a box's row", static_cast<uint64_t>(map.row_bytes()),
                  "they must be a multiple of 16");
    }
    if (map.swizzle_ != 0 && map.row_bytes() != map.swizzle_) {
        return of("the bytes of a box's row", static_cast<uint64_t>(map.row_bytes()),
                  "narrower ones than the swizzle are not imitated, and wider ones are wrong");
    }
    std::memset(to, 0, kBytes);
    std::memcpy(to, &map, sizeof map);
    return "";
}

bool TensorMap::decode(void const* map) {
    std::memcpy(this, map, sizeof *this);
    return mark_ == kMark;
}

int64_t TensorMap::rows() const {
    int64_t count = 1;
    for (int i = 1; i < rank_; ++i) count *= box_[i];
    return count;
}

TensorBox::TensorBox(TensorMap const& map, int const* at) : map_(map) {
    std::copy(at, at + map.rank_, at_);
}

TensorBox::Row TensorBox::row(int64_t index) const {
    char const* from = map_.address_;
    bool inside = true;
    for (int i = 1; i < map_.rank_; ++i) {
        int64_t const element = at_[i] + index % map_.box_[i];
        index /= map_.box_[i];
        inside = inside && element >= 0 && element < static_cast<int64_t>(map_.dims_[i]);
        if (inside) from += element * static_cast<int64_t>(map_.strides_[i]);
    }
    int64_t const element = map_.element_bytes_;
    int64_t const length = static_cast<int64_t>(map_.dims_[0]) * element, first = at_[0] * element;
    int64_t const begin = std::max<int64_t>(0, -first);
    int64_t const end = std::min(map_.row_bytes(), length - first);
    if (!inside || begin >= end) return {nullptr, 0, 0};
    return {from + first + begin, begin, end};
}

void TensorBox::copy(char* shared, size_t offset) const {
    int64_t const row_bytes = map_.row_bytes();
    for (int64_t index = 0; index < rows(); ++index, offset += static_cast<size_t>(row_bytes)) {
        Row const source = row(index);
        for (int64_t unit = 0; unit < row_bytes; unit += kUnit) {
            char bytes[kUnit] = {};
            int64_t const begin = std::max(unit, source.begin);
            int64_t const end = std::min(unit + kUnit, source.end);
            if (begin < end) {
                std::memcpy(bytes + (begin - unit), source.from + (begin - source.begin),
                            static_cast<size_t>(end - begin));
            }
            size_t const to = swizzled(offset + static_cast<size_t>(unit), map_.swizzle_);
            std::memcpy(shared + to, bytes, kUnit);
        }
    }
}

}  // namespace sage::host
