// The CPU execution provider's kernels: the library of compiler/kernels/cpu, on the session's
// threads and memory.

#include <stdlib.h>
#include <string.h>

#include "gate.hpp"
#include "kernels.hpp"
#include "provider.hpp"
#include "status.hpp"

namespace sage_ort {
namespace {

constexpr ElementType kDtypes[] = {kFloat32, kFloat16, kBFloat16};

constexpr int64_t kGreatestHeadDim = 256;  // that the quantized kernel takes

struct CpuKernel {
    const OrtApi* api;
    Node node;
    ElementType dtype;
    OrtAllocator* allocator;
    const Gate* gate;  // null: `auto` never quantizes
};

const Gate* find_gate() {
    const char* isa = sage_cpu_isa_name(sage_cpu_isa());
    for (const Gate& gate : kGates)
        if (isa != nullptr && strcmp(gate.isa, isa) == 0) return &gate;
    return nullptr;
}

// The nearest recipe of sage_cpu.h that is not less accurate; `auto` is decided call by call.
int32_t nearest(Recipe recipe) {
    switch (recipe) {
        case Recipe::kAuto:
        case Recipe::kInt4Fp8:
        case Recipe::kInt4Fp16:
        case Recipe::kInt8Fp8:
        case Recipe::kInt8Int8:
            return SAGE_CPU_INT8_INT8;
        case Recipe::kInt8Fp16:
        case Recipe::kInt8Int16:
            return SAGE_CPU_INT8_INT16;
        case Recipe::kExact:
            break;
    }
    return SAGE_CPU_FLOAT;
}

bool gains(const Gate& gate, const Call& call) {
    double products = double(call.batch) * double(call.heads) * double(call.query_length) *
                      double(call.key_length) * double(call.head_dim);
    return call.query_length >= gate.query_length && call.key_length >= gate.key_length &&
           products >= double(gate.products) && call.key_length >= kLeastKeys &&
           double(call.key_length) * double(call.head_dim) >= double(kLeastKeyElements);
}

int32_t choose(const CpuKernel& kernel, const Call& call) {
    if (call.head_dim > kGreatestHeadDim || call.value_head_dim > kGreatestHeadDim)
        return SAGE_CPU_FLOAT;
    if (kernel.node.recipe == Recipe::kAuto &&
        (kernel.gate == nullptr || !gains(*kernel.gate, call)))
        return SAGE_CPU_FLOAT;
    return nearest(kernel.node.recipe);
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    const CpuKernel& kernel = *static_cast<CpuKernel*>(opaque);
    Call call;
    SAGE_ORT_TRY(read_call(*kernel.api, context, kernel.node, kernel.dtype, &call));
    Threads threads(*kernel.api, context, cpu_count());
    Setting setting{*kernel.api, kernel.node, threads, kernel.allocator};
    int32_t recipe = choose(kernel, call);
    return recipe == SAGE_CPU_FLOAT ? attend_float(setting, call)
                                    : attend_quantized(setting, call, recipe);
}

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, ElementType dtype, void** result) {
    *result = nullptr;
    Node node;
    SAGE_ORT_TRY(read_node(api, info, &node));
    if (sage_cpu_isa() < 0)
        return refuse(api, ORT_FAIL,
                      "the environment variable SAGE_CPU_ISA is \"%s\", which this machine or this "
                      "build does not have; set it to another, or unset it",
                      getenv("SAGE_CPU_ISA"));
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

const char* served(Recipe recipe) {
    if (recipe == Recipe::kAuto && find_gate() == nullptr) return "float";
    switch (nearest(recipe)) {
        case SAGE_CPU_INT8_INT8:
            return "int8_int8";
        case SAGE_CPU_INT8_INT16:
            return "int8_int16";
        default:
            return "float";
    }
}

}  // namespace

const Provider kCpuProvider = {"CPUExecutionProvider",
                               kDtypes,
                               sizeof kDtypes / sizeof kDtypes[0],
                               create,
                               compute,
                               destroy,
                               served};

}  // namespace sage_ort
