// What TMA knows of a tensor: where it lies, and what boxes of it are like.
#pragma once

#if defined(__CUDACC_RTC__)
#include <cuda/std/cstdint>  // NVRTC has no standard library of its own
#else
#include <cstdint>
#endif

namespace sage {

// As the driver encodes it (cuTensorMapEncodeTiled), and a parameter of a kernel.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

}  // namespace sage
