// The two ways in which the CPU provider computes a call.
#pragma once

#include "call.hpp"
#include "host.hpp"

namespace sage_ort {

// What both need besides the call.
struct Setting {
    const OrtApi& api;
    const Node& node;
    Threads& threads;
    OrtAllocator* allocator;
};

// INT8 Q and K, by the library of compiler/kernels/cpu. `recipe` is a number of sage_cpu.h; head
// dims up to 256.
OrtStatus* attend_quantized(const Setting& setting, const Call& call, int32_t recipe);

// float32 arithmetic on tensors as they lie. Any head dims.
OrtStatus* attend_float(const Setting& setting, const Call& call);

}  // namespace sage_ort
