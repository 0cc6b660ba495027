// The element types of calls, in the terms of sage_cpu.h.
//
// Compiled into objects with different compiler flags, as the headers of compiler/kernels/cpu/src:
// no function here may have external linkage.
#pragma once

#include "call.hpp"
#include "src/convert_scalar.hpp"

namespace sage_ort {

[[maybe_unused]] static int32_t cpu_dtype(ElementType dtype) {
    switch (dtype) {
        case kFloat16:
            return SAGE_CPU_FLOAT16;
        case kBFloat16:
            return SAGE_CPU_BFLOAT16;
        case kBool:
            return SAGE_CPU_BOOL;
        default:
            return SAGE_CPU_FLOAT32;
    }
}

// How many sinks of a call have to be converted.
[[maybe_unused]] static int64_t sinks_to_convert(const Call& call) {
    return call.sinks == nullptr || call.sinks_dtype == kFloat32 ? 0 : call.heads;
}

// Converts the sinks of a call into `room`, which has a place for each, unless they are floats
// already; null without sinks.
[[maybe_unused]] static const float* read_sinks(const Call& call, float* room) {
    if (call.sinks == nullptr || call.sinks_dtype == kFloat32)
        return static_cast<const float*>(call.sinks);
    const uint16_t* halves = static_cast<const uint16_t*>(call.sinks);
    for (int64_t head = 0; head < call.heads; head++)
        room[head] = call.sinks_dtype == kBFloat16 ? sage_cpu::from_bfloat16(halves[head])
                                                   : sage_cpu::from_float16(halves[head]);
    return room;
}

}  // namespace sage_ort
