// One parallel region for a whole call: look through the mask, pack, attend.
#pragma once

#include "plan.hpp"

namespace sage_cpu {

// A call: sizes and memory are settled, and arguments have been checked.
struct Call {
    const sage_cpu_problem* problem;
    const Kernels* kernels;
    PackedLayout layout;
    MaskMap map;
    bool has_map;
    bool head_by_head;  // a worker packs and attends a head by itself, in memory of its own
    char* packed;       // of all heads; or of all workers, a head each
    char* scratch;      // of all workers, scratch_bytes each
    int64_t scratch_bytes;
    int64_t first;    // token that packing starts at
    bool everything;  // pack every token as if every query saw it
    bool packs, attends;
};

// Runs the call on the host's threads, or on this one if host is null.
void run(const Call& call, const sage_cpu_host* host);

}  // namespace sage_cpu
