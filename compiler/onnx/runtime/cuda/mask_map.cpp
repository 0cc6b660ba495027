#include "mask_map.hpp"

namespace sage_cuda {
namespace {

// Of masks.py and tensor_map.py, which have the reasons.
constexpr int64_t kUnit = 16;        // bytes; a tensor and its rows begin at multiples of it
constexpr int64_t kWidestRow = 128;  // bytes, of a box
constexpr int64_t kStridesEnd = int64_t{1} << 40;
constexpr uint32_t kRank = 4;

int64_t bytes_of(sage::MaskKind kind) {
    switch (kind) {
        case sage::MaskKind::kBool:
            return 1;
        case sage::MaskKind::kHalf:
        case sage::MaskKind::kBfloat16:
            return 2;
        case sage::MaskKind::kFloat:
            break;
    }
    return 4;
}

}  // namespace

sage::MaskedAttendParams with_mask_map(const sage::AttendParams& attend, const Attention& a,
                                       const Driver& driver) {
    sage::MaskedAttendParams params = {attend, 0, {}};
    const sage::Mask& mask = attend.mask;
    const int64_t size = bytes_of(mask.kind);
    const int64_t strides[] = {mask.query_stride, mask.head_stride, mask.batch_stride};
    const int64_t lengths[] = {a.query_length, a.heads, a.batch};
    if (driver.cuTensorMapEncodeTiled == nullptr || mask.key_stride != 1 ||
        reinterpret_cast<uintptr_t>(mask.data) % kUnit != 0)
        return params;
    // From the keys on; of a dim that broadcasts, the stride may be anything.
    uint64_t dims[kRank] = {uint64_t(a.key_length), 1, 1, 1};
    uint64_t bytes[kRank - 1];
    for (uint32_t i = 0; i < kRank - 1; i++) {
        const int64_t stride = strides[i] * size;
        if (stride % kUnit != 0 || stride >= kStridesEnd) return params;
        if (stride != 0) dims[i + 1] = uint64_t(lengths[i]);
        const int64_t anything = (a.key_length * size + kUnit - 1) / kUnit * kUnit;
        bytes[i] = uint64_t(stride != 0 ? stride : anything);
    }
    const int64_t keys = sage::kKeyBlock * size <= kWidestRow ? sage::kKeyBlock : kWidestRow / size;
    const int64_t rows = mask.query_stride != 0 ? sage::kQueryBlock : 1;
    const unsigned box[kRank] = {unsigned(keys), unsigned(rows), 1, 1};
    const unsigned steps[kRank] = {1, 1, 1, 1};
    const int type = size == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                     : size == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
    const int swizzle =
        keys * size == kWidestRow ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const CUresult status = driver.cuTensorMapEncodeTiled(
        &params.mask_map, type, kRank, const_cast<void*>(mask.data), dims, bytes, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status == CUDA_SUCCESS) params.mask_rows = rows;
    return params;
}

}  // namespace sage_cuda
