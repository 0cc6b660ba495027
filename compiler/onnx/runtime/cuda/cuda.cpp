// The CUDA execution provider's kernels: those of a kernel pack, on the session's stream and
// memory. What these lack, the CPU computes.

#include <stdlib.h>

#include "../call.hpp"
#include "../log.hpp"
#include "../provider.hpp"
#include "../status.hpp"
#include "attention.hpp"
#include "takeover.hpp"

namespace sage_ort {
namespace {

constexpr ElementType kDtypes[] = {kFloat16, kBFloat16};

struct CudaKernel {
    const OrtApi* api;
    Node node;
    ElementType dtype;
    Log log;
    const Gate* gate;  // of what the CPU computes
    const sage_cuda::Driver* driver;
    OrtAllocator* allocator;    // of memory on the device; null where no kernel is to use it
    sage_cuda::Device* device;  // null: the CPU computes every call
    bool has_warned;
};

// Says, once for each node, that the CPU computes it.
void warn_once(CudaKernel& kernel, const char* reason) {
    if (__atomic_exchange_n(&kernel.has_warned, true, __ATOMIC_RELAXED)) return;
    warn(kernel.log, "is computed on the CPU, with copies there and back: %s", reason);
}

// The nearest recipe of these kernels that is not less accurate; of `auto`, `*automatic` alone, and
// false for what none serves.
bool nearest(Recipe recipe, bool* automatic, sage_cuda::Recipe* nearest) {
    *automatic = recipe == Recipe::kAuto;
    *nearest = sage_cuda::Recipe::kInt8Fp16;
    switch (recipe) {
        case Recipe::kInt4Fp8:
            *nearest = sage_cuda::Recipe::kInt4Fp8;
            return true;
        case Recipe::kInt4Fp16:
            *nearest = sage_cuda::Recipe::kInt4Fp16;
            return true;
        case Recipe::kInt8Fp8:
            *nearest = sage_cuda::Recipe::kInt8Fp8;
            return true;
        case Recipe::kAuto:
        case Recipe::kInt8Fp16:
        case Recipe::kInt8Int8:
        case Recipe::kInt8Int16:
            return true;
        case Recipe::kExact:
            break;
    }
    return false;
}

sage_cuda::Dtype cuda_dtype(ElementType dtype) {
    return dtype == kBFloat16 ? sage_cuda::Dtype::kBFloat16 : sage_cuda::Dtype::kFloat16;
}

sage::MaskKind kind_of(ElementType dtype) {
    switch (dtype) {
        case kBool:
            return sage::MaskKind::kBool;
        case kFloat16:
            return sage::MaskKind::kHalf;
        case kBFloat16:
            return sage::MaskKind::kBfloat16;
        default:
            return sage::MaskKind::kFloat;
    }
}

sage_cuda::Attention describe(const CudaKernel& kernel, const Call& call) {
    sage_cuda::Attention a = {};
    a.dtype = cuda_dtype(call.dtype);
    nearest(kernel.node.recipe, &a.automatic, &a.recipe);
    a.batch = call.batch;
    a.heads = call.heads;
    a.kv_heads = call.kv_heads;
    a.query_length = call.query_length;
    a.key_length = call.key_length;
    a.head_dim = call.head_dim;
    a.value_head_dim = call.value_head_dim;
    a.scale = kernel.node.scale;
    a.softcap = kernel.node.softcap;
    a.dead_rows_are_nan = kernel.node.dead_rows == DeadRows::kNan;
    a.left = call.band.left;
    a.right = call.band.right;
    a.diagonal = call.band.diagonal;
    a.query = call.query;
    a.key = call.key;
    a.value = call.value;
    if (call.mask.data != nullptr) {
        const int64_t (&stride)[4] = call.mask.stride;
        a.mask = {call.mask.data, stride[0], stride[1],
                  stride[2],      stride[3], kind_of(call.mask.dtype)};
    }
    a.sinks = call.sinks;
    a.sinks_kind = kind_of(call.sinks_dtype);
    a.output = call.output;
    a.lse = call.lse;
    return a;
}

// Memory on the device for what runs on the stream of a call, given back at its end: what takes it
// next runs later on the same stream.
class DeviceScratch {
 public:
    explicit DeviceScratch(const CudaKernel& kernel) : kernel_(kernel) {}
    ~DeviceScratch() {
        if (memory_ != nullptr) kernel_.allocator->Free(kernel_.allocator, memory_);
    }
    DeviceScratch(const DeviceScratch&) = delete;
    DeviceScratch& operator=(const DeviceScratch&) = delete;

    // Once for each object. The runtime may throw where there is no memory, through this library,
    // which then must hold nothing.
    OrtStatus* allocate(OrtKernelContext* context, int64_t bytes) {
        return kernel_.api->KernelContext_GetScratchBuffer(
            context, kernel_.allocator->Info(kernel_.allocator), size_t(bytes), &memory_);
    }

    void* memory() const { return memory_; }

 private:
    const CudaKernel& kernel_;
    void* memory_ = nullptr;
};

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    CudaKernel& kernel = *static_cast<CudaKernel*>(opaque);
    const OrtApi& api = *kernel.api;
    Call call;
    SAGE_ORT_TRY(read_call(api, context, kernel.node, kernel.dtype, &call));
    void* given = nullptr;
    SAGE_ORT_TRY(api.KernelContext_GetGPUComputeStream(context, &given));
    if (given == nullptr) return refuse(api, ORT_FAIL, "the runtime gave no CUDA stream");
    sage_cuda::CUstream const stream = static_cast<sage_cuda::CUstream>(given);
    const auto by_cpu = [&] {
        return take_over(api, context, kernel.node, call, kernel.gate, *kernel.driver, stream);
    };
    if (kernel.device == nullptr) return by_cpu();

    const sage_cuda::Attention attention = describe(kernel, call);
    sage_cuda::Error error;
    sage_cuda::Work work;
    if (!work.plan(*kernel.device, attention, error)) {
        warn_once(kernel, error.text);
        return by_cpu();
    }
    DeviceScratch scratch(kernel);
    if (work.scratch_bytes() > 0) SAGE_ORT_TRY(scratch.allocate(context, work.scratch_bytes()));
    if (work.launch(*kernel.device, attention, scratch.memory(), stream, error)) return nullptr;
    return refuse(api, ORT_FAIL, "%s", error.text);
}

// For a node that kernels may serve: the device that its memory is allocated on, opened in the
// runtime of this process.
OrtStatus* open_device(const OrtApi& api, const OrtKernelInfo* info, CudaKernel* kernel) {
    SAGE_ORT_TRY(api.KernelInfoGetAllocator(info, kMemoryDefault, &kernel->allocator));
    int ordinal = 0;
    SAGE_ORT_TRY(api.MemoryInfoGetId(kernel->allocator->Info(kernel->allocator), &ordinal));
    sage_cuda::Error error;
    sage_cuda::Runtime* const runtime = sage_cuda::Runtime::shared(error);
    sage_cuda::Device* const device =
        runtime == nullptr ? nullptr : runtime->device(ordinal, error);
    if (device == nullptr) return refuse(api, ORT_NOT_IMPLEMENTED, "%s", error.text);
    kernel->driver = &device->driver();
    bool automatic;
    sage_cuda::Recipe recipe;
    nearest(kernel->node.recipe, &automatic, &recipe);
    if (check_recipe(*device, cuda_dtype(kernel->dtype), automatic, recipe, error))
        kernel->device = device;
    else
        warn_once(*kernel, error.text);
    return nullptr;
}

// For a node that no kernel serves.
OrtStatus* open_driver(const OrtApi& api, CudaKernel* kernel) {
    SAGE_ORT_TRY(check_cpu(api));
    sage_cuda::Error error;
    kernel->driver = sage_cuda::shared_driver(error);
    if (kernel->driver == nullptr) return refuse(api, ORT_NOT_IMPLEMENTED, "%s", error.text);
    warn_once(*kernel, "recipe exact has no CUDA kernel");
    return nullptr;
}

void release(const CudaKernel& kernel) {
    if (kernel.allocator != nullptr) kernel.api->ReleaseAllocator(kernel.allocator);
}

OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, ElementType dtype, void** result) {
    *result = nullptr;
    CudaKernel kernel = {};
    kernel.api = &api;
    kernel.dtype = dtype;
    SAGE_ORT_TRY(read_node(api, info, &kernel.node));
    kernel.log = open_log(api, info);
    kernel.gate = find_gate();
    OrtStatus* status = kernel.node.recipe == Recipe::kExact ? open_driver(api, &kernel)
                                                             : open_device(api, info, &kernel);
    void* const memory = status == nullptr ? malloc(sizeof kernel) : nullptr;
    if (memory == nullptr) {
        release(kernel);
        return status != nullptr ? status : refuse(api, ORT_FAIL, "no memory for a kernel");
    }
    *static_cast<CudaKernel*>(memory) = kernel;
    *result = memory;
    return nullptr;
}

void destroy(void* opaque) {
    CudaKernel* kernel = static_cast<CudaKernel*>(opaque);
    release(*kernel);
    free(kernel);
}

// What `auto` is, and whether there is a kernel, depends on the device and the pack.
const char* served(Recipe recipe) {
    bool automatic;
    sage_cuda::Recipe found;
    if (!nearest(recipe, &automatic, &found)) return served_by_cpu(recipe);
    return automatic ? nullptr : sage_cuda::name_of(found);
}

}  // namespace

const Provider kCudaProvider = {"CUDAExecutionProvider",
                                kDtypes,
                                sizeof kDtypes / sizeof kDtypes[0],
                                create,
                                compute,
                                destroy,
                                served};

}  // namespace sage_ort
