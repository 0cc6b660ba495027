// The sinks of a call as floats.
#pragma once

#include "call.hpp"
#include "src/convert_scalar.hpp"

namespace sage_ort {

// Converts into `room`, which has a place for each head, unless they are floats already; null
// without sinks.
static inline const float* read_sinks(const Call& call, float* room) {
    if (call.sinks == nullptr || call.sinks_dtype == kFloat32)
        return static_cast<const float*>(call.sinks);
    const uint16_t* halves = static_cast<const uint16_t*>(call.sinks);
    for (int64_t head = 0; head < call.heads; head++)
        room[head] = call.sinks_dtype == kBFloat16 ? sage_cpu::from_bfloat16(halves[head])
                                                   : sage_cpu::from_float16(halves[head]);
    return room;
}

}  // namespace sage_ort
