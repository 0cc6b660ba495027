// The CPU execution provider's kernels: the library of compiler/kernels/cpu, on the session's
// threads and memory.

#include <stdlib.h>

#include "kernels.hpp"
#include "provider.hpp"
#include "status.hpp"

namespace sage_ort {
namespace {

constexpr ElementType kDtypes[] = {kFloat32, kFloat16, kBFloat16};

struct CpuKernel {
    const OrtApi* api;
    Node node;
    ElementType dtype;
    OrtAllocator* allocator;
    const Gate* gate;
};

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const CpuKernel& kernel = *static_cast<CpuKernel*>(opaque);
    Call call;
    SAGE_ORT_TRY(read_call(*kernel.api, context, kernel.node, kernel.dtype, &call));
    Threads threads(*kernel.api, context, cpu_count());
    return attend({*kernel.api, kernel.node, threads, kernel.allocator}, call, kernel.gate);
}

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, ElementType dtype, void** result) {
    *result = nullptr;
    Node node;
    SAGE_ORT_TRY(read_node(api, info, &node));
    SAGE_ORT_TRY(check_cpu(api));
    OrtAllocator* allocator;
    SAGE_ORT_TRY(api.KernelInfoGetAllocator(info, kMemoryDefault, &allocator));
    void* memory = malloc(sizeof(CpuKernel));
    if (memory == nullptr) {
        api.ReleaseAllocator(allocator);
        return refuse(api, ORT_FAIL, "no memory for a kernel");
    }
    *static_cast<CpuKernel*>(memory) = {&api, node, dtype, allocator, find_gate()};
    *result = memory;
    return nullptr;
}

void destroy(void* opaque) {
    CpuKernel* kernel = static_cast<CpuKernel*>(opaque);
    kernel->api->ReleaseAllocator(kernel->allocator);
    free(kernel);
}

}  // namespace

const Provider kCpuProvider = {
    "CPUExecutionProvider", kDtypes, sizeof kDtypes / sizeof kDtypes[0], create, compute, destroy,
    served_by_cpu};

}  // namespace sage_ort
