// An instruction set's kernels, all of them from the same source: isa_*.cpp define `Isa` first.
#pragma once

#include "attend.hpp"
#include "mask.hpp"
#include "pack.hpp"

namespace sage_cpu {
namespace {

constexpr Kernels make_kernels() { return {scan, pack, attend, attend_scratch_bytes}; }

}  // namespace
}  // namespace sage_cpu
