// What an execution provider contributes: the kernels of one device.
#pragma once

#include "node.hpp"

namespace sage_ort {

struct Provider {
    const char* name;           // as the runtime calls it
    const ElementType* dtypes;  // that query may have
    size_t dtype_count;

    // Makes the kernel of one node; `*kernel` is handed to the other two.
    OrtStatus* (*create)(const OrtApi&, const OrtKernelInfo*, ElementType, void** kernel);
    OrtStatus* (*compute)(void* kernel, OrtKernelContext*);
    void (*destroy)(void* kernel);

    // The name of what serves a recipe here, or null.
    const char* (*served)(Recipe);
};

extern const Provider kCpuProvider, kCudaProvider;

}  // namespace sage_ort
