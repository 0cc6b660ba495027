// How a kernel that copies tiles of its mask to shared memory finds them.
#pragma once

#include <sage/params.cuh>

#include "attention.hpp"
#include "driver.hpp"

namespace sage_cuda {

// The parameters of such a kernel: with a tensor map of the mask, where there can be one. Else the
// kernel reads the mask where it lies, and the numbers are the same.
sage::MaskedAttendParams with_mask_map(const sage::AttendParams& attend, const Attention& a,
                                       const Driver& driver);

}  // namespace sage_cuda
