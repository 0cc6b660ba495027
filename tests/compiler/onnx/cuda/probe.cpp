// An operator for ONNX Runtime on CPUs that asks for what the CUDA provider asks for, as far as a
// CPU has it, so that a runtime's table is known to have these entries at these places.
#include <cstring>

#include "ort_abi.hpp"

using namespace sage_ort;

namespace {

// What was found, each 1 if it is as it must be.
enum Answer { kDeviceId, kStream, kScratch, kFree, kName, kLog, kAnswers };

OrtApi const* api = nullptr;

struct Kernel {
    OrtAllocator* allocator;
    OrtLogger const* logger;
    char name[64];
};

OrtCustomOp make_operator() {
    OrtCustomOp op = {};
    op.version = kApiVersion;
    op.GetName = [](OrtCustomOp const*) { return "Probe"; };
    op.GetExecutionProviderType = [](OrtCustomOp const*) { return "CPUExecutionProvider"; };
    op.GetInputTypeCount = [](OrtCustomOp const*) { return size_t{1}; };
    op.GetInputType = [](OrtCustomOp const*, size_t) { return kFloat32; };
    op.GetInputCharacteristic = [](OrtCustomOp const*, size_t) { return kRequired; };
    op.GetInputMemoryType = [](OrtCustomOp const*, size_t) { return kMemoryDefault; };
    op.GetOutputTypeCount = [](OrtCustomOp const*) { return size_t{1}; };
    op.GetOutputType = [](OrtCustomOp const*, size_t) { return kFloat32; };
    op.GetOutputCharacteristic = [](OrtCustomOp const*, size_t) { return kRequired; };
    auto const none = [](OrtCustomOp const*) { return 0; };
    op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = none;
    op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = none;
    op.GetStartVersion = [](OrtCustomOp const*) { return 1; };
    op.GetEndVersion = [](OrtCustomOp const*) { return INT32_MAX; };
    op.CreateKernelV2 = [](OrtCustomOp const*, OrtApi const*, OrtKernelInfo const* info,
                           void** kernel) {
        static Kernel only = {};
        *kernel = &only;
        size_t bytes = sizeof only.name;
        OrtStatus* failed = api->KernelInfo_GetNodeName(info, only.name, &bytes);
        if (failed == nullptr) failed = api->KernelInfo_GetLogger(info, &only.logger);
        if (failed != nullptr) return failed;
        return api->KernelInfoGetAllocator(info, kMemoryDefault, &only.allocator);
    };
    op.KernelDestroy = [](void* kernel) {
        api->ReleaseAllocator(static_cast<Kernel*>(kernel)->allocator);
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
        OrtAllocator* const allocator = static_cast<Kernel*>(kernel)->allocator;
        OrtMemoryInfo const* const info = allocator->Info(allocator);
        int64_t const dims[] = {kAnswers};
        OrtValue* value = nullptr;
        void* data = nullptr;
        OrtStatus* failed = api->KernelContext_GetOutput(context, 0, dims, 1, &value);
        if (failed == nullptr) failed = api->GetTensorMutableData(value, &data);
        if (failed != nullptr) return failed;
        float* const answers = static_cast<float*>(data);

        int id = -1;
        answers[kDeviceId] = api->MemoryInfoGetId(info, &id) == nullptr && id == 0;
        void* stream = data;  // a CPU has none
        answers[kStream] = api->KernelContext_GetGPUComputeStream(context, &stream) == nullptr &&
                           stream == nullptr;
        void* scratch = data;  // none is asked for: memory comes with a stream
        answers[kScratch] =
            api->KernelContext_GetScratchBuffer(context, info, 0, &scratch) == nullptr &&
            scratch == nullptr;
        void* const memory = allocator->Alloc(allocator, 64);
        answers[kFree] = memory != nullptr;
        allocator->Free(allocator, memory);
        answers[kName] = std::strcmp(static_cast<Kernel*>(kernel)->name, "the node") == 0;
        answers[kLog] =
            api->Logger_LogMessage(static_cast<Kernel*>(kernel)->logger, ORT_LOGGING_LEVEL_WARNING,
                                   "the probe warns", "probe.cpp", 7, "probe") == nullptr;
        return nullptr;
    };
    return op;
}

OrtCustomOp const probe = make_operator();

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, OrtApiBase const* base) {
    api = base->GetApi(kApiVersion);
    OrtCustomOpDomain* domain = nullptr;
    OrtStatus* failed = api->CreateCustomOpDomain("test", &domain);
    if (failed == nullptr) failed = api->CustomOpDomain_Add(domain, &probe);
    return failed != nullptr ? failed : api->AddCustomOpDomain(options, domain);
}
