// The CPU's kernels in the place of those that a device lacks.
#pragma once

#include "../kernels.hpp"
#include "driver.hpp"

namespace sage_ort {

// Computes a call whose tensors are on a device as the CPU provider would: copies them to the host,
// and the results back, in the middle of the stream, and returns when that is done.
OrtStatus* take_over(const OrtApi& api, const OrtKernelContext* context, const Node& node,
                     const Call& call, const Gate* gate, const sage_cuda::Driver& driver,
                     sage_cuda::CUstream stream);

}  // namespace sage_ort
