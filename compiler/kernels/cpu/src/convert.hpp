// Elements of any type and stride as floats.
#pragma once

#include "convert_scalar.hpp"

namespace sage_cpu {
namespace {

SAGE_INLINE int64_t element_size(int32_t dtype) {
    return dtype == SAGE_CPU_FLOAT32 ? 4 : dtype == SAGE_CPU_BOOL ? 1 : 2;
}

// The address of element (batch, head, row, 0).
SAGE_INLINE char* address(const sage_cpu_tensor& t, int32_t dtype, int64_t batch, int64_t head,
                          int64_t row) {
    return static_cast<char*>(t.data) +
           (batch * t.stride[0] + head * t.stride[1] + row * t.stride[2]) * element_size(dtype);
}

SAGE_INLINE float load_element(const char* base, int32_t dtype, int64_t index) {
    if (dtype == SAGE_CPU_FLOAT32) {
        float x;
        __builtin_memcpy(&x, base + index * 4, sizeof x);
        return x;
    }
    uint16_t half;
    __builtin_memcpy(&half, base + index * 2, sizeof half);
    return dtype == SAGE_CPU_BFLOAT16 ? from_bfloat16(half) : from_float16(half);
}

// `count` elements as floats.
inline void load_row(const char* base, int32_t dtype, int64_t stride, int64_t count, float* row) {
    int64_t i = 0;
    if (stride == 1) {
        int64_t whole = count - count % Isa::kLanes;
        if (dtype == SAGE_CPU_FLOAT32) {
            const float* source = reinterpret_cast<const float*>(base);
            for (; i < whole; i += Isa::kLanes) Isa::store(row + i, Isa::load(source + i));
        } else {
            const uint16_t* source = reinterpret_cast<const uint16_t*>(base);
            if (dtype == SAGE_CPU_BFLOAT16)
                for (; i < whole; i += Isa::kLanes)
                    Isa::store(row + i, Isa::load_bfloat16(source + i));
            else
                for (; i < whole; i += Isa::kLanes)
                    Isa::store(row + i, Isa::load_float16(source + i));
        }
    }
    for (; i < count; i++) row[i] = load_element(base, dtype, i * stride);
}

inline void store_row(char* base, int32_t dtype, int64_t stride, int64_t count, const float* row) {
    int64_t i = 0;
    if (stride == 1) {
        int64_t whole = count - count % Isa::kLanes;
        uint16_t* halves = reinterpret_cast<uint16_t*>(base);
        if (dtype == SAGE_CPU_FLOAT32)
            __builtin_memcpy(base, row, size_t(whole) * sizeof(float));
        else if (dtype == SAGE_CPU_BFLOAT16)
            for (; i < whole; i += Isa::kLanes) Isa::store_bfloat16(halves + i, Isa::load(row + i));
        else
            for (; i < whole; i += Isa::kLanes) Isa::store_float16(halves + i, Isa::load(row + i));
        i = whole;
    }
    for (; i < count; i++) {
        if (dtype == SAGE_CPU_FLOAT32) {
            __builtin_memcpy(base + i * stride * 4, row + i, sizeof(float));
        } else {
            uint16_t half = dtype == SAGE_CPU_BFLOAT16 ? to_bfloat16(row[i]) : to_float16(row[i]);
            __builtin_memcpy(base + i * stride * 2, &half, sizeof half);
        }
    }
}

}  // namespace
}  // namespace sage_cpu
