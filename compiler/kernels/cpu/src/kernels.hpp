// An instruction set's kernels, all of them from the same source: isa_*.cpp define `Isa` first.
#pragma once

#include "attend.hpp"
#include "mask.hpp"
#include "pack.hpp"

namespace sage_cpu {
namespace {

inline int64_t scratch_bytes(const sage_cpu_problem& p) {
    return max(attend_scratch_bytes(p), p.mask.data == nullptr ? 0 : scan_scratch_bytes(p));
}

constexpr Kernels make_kernels() { return {scan, pack, attend, scratch_bytes}; }

}  // namespace
}  // namespace sage_cpu
