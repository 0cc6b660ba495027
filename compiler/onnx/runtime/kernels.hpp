// What CPUs compute: a call in one of two ways, and which of them.
#pragma once

#include "call.hpp"
#include "gate.hpp"
#include "host.hpp"

namespace sage_ort {

// What they need besides the call.
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

// Refuses an instruction set that is asked for and not there; before anything is computed.
OrtStatus* check_cpu(const OrtApi& api);

// What `auto` quantizes on this machine; null: nothing.
const Gate* find_gate();

// A call by what serves the node's recipe: the nearest that is not less accurate. `gate` is what
// find_gate() found.
OrtStatus* attend(const Setting& setting, const Call& call, const Gate* gate);

// The name of what serves a recipe; of `auto`, large calls.
const char* served_by_cpu(Recipe recipe);

}  // namespace sage_ort
