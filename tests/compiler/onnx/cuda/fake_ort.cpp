// ONNX Runtime for tests: as much of its API as one node takes, over memory that tests own. It
// counts what it lends, and takes every device for a CUDA one.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "ort_abi.hpp"

namespace sage_ort {

struct OrtStatus {
    OrtErrorCode code;
    std::string message;
};
struct OrtCustomOpDomain {
    std::vector<OrtCustomOp const*> operators;
};
struct OrtMemoryInfo {
    int id;
};
struct OrtLogger {
    bool is_there;
    std::vector<std::string> warnings;
};
struct OrtKernelInfo {
    std::map<std::string, std::string> words;
    std::map<std::string, float> floats;
    std::map<std::string, int64_t> integers;
};
struct OrtTensorTypeAndShapeInfo {
    ElementType dtype;
    std::vector<int64_t> dims;
};
struct OrtValue {
    ElementType dtype;
    std::vector<int64_t> dims;
    void* data;
};
struct OrtKernelContext {
    std::vector<OrtValue> inputs, outputs;  // a null pointer: not there
    void* stream;
    bool has_memory;
};

}  // namespace sage_ort

namespace {

using namespace sage_ort;

struct Lent {
    long statuses, infos, allocators, scratch;
} lent;

OrtMemoryInfo memory_info = {0};
OrtLogger logger = {true, {}};
OrtCustomOpDomain* domain = nullptr;  // of the library that was registered last
long domains = 0;

OrtStatus* make_status(OrtErrorCode code, char const* message) {
    lent.statuses++;
    return new OrtStatus{code, message};
}

template <class T>
OrtStatus* find(std::map<std::string, T> const& values, char const* name, T* value) {
    auto const found = values.find(name);
    if (found == values.end()) return make_status(ORT_FAIL, "no such attribute");
    *value = found->second;
    return nullptr;
}

OrtApi make_api() {
    OrtApi api = {};
    api.CreateStatus = make_status;
    api.ReleaseStatus = [](OrtStatus* status) {
        lent.statuses--;
        delete status;
    };
    api.CreateCustomOpDomain = [](char const*, OrtCustomOpDomain** made) -> OrtStatus* {
        domains++;
        *made = new OrtCustomOpDomain;
        return nullptr;
    };
    api.CustomOpDomain_Add = [](OrtCustomOpDomain* to, OrtCustomOp const* op) -> OrtStatus* {
        to->operators.push_back(op);
        return nullptr;
    };
    api.AddCustomOpDomain = [](OrtSessionOptions*, OrtCustomOpDomain* added) -> OrtStatus* {
        domain = added;
        return nullptr;
    };
    api.GetTensorMutableData = [](OrtValue* value, void** data) -> OrtStatus* {
        *data = value->data;
        return nullptr;
    };
    api.GetTensorTypeAndShape = [](OrtValue const* value,
                                   OrtTensorTypeAndShapeInfo** info) -> OrtStatus* {
        lent.infos++;
        *info = new OrtTensorTypeAndShapeInfo{value->dtype, value->dims};
        return nullptr;
    };
    api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) {
        lent.infos--;
        delete info;
    };
    api.GetTensorElementType = [](OrtTensorTypeAndShapeInfo const* info,
                                  ElementType* dtype) -> OrtStatus* {
        *dtype = info->dtype;
        return nullptr;
    };
    api.GetDimensionsCount = [](OrtTensorTypeAndShapeInfo const* info, size_t* rank) -> OrtStatus* {
        *rank = info->dims.size();
        return nullptr;
    };
    api.GetDimensions = [](OrtTensorTypeAndShapeInfo const* info, int64_t* dims,
                           size_t rank) -> OrtStatus* {
        std::memcpy(dims, info->dims.data(), rank * sizeof *dims);
        return nullptr;
    };
    api.MemoryInfoGetId = [](OrtMemoryInfo const* info, int* id) -> OrtStatus* {
        *id = info->id;
        return nullptr;
    };
    api.KernelInfoGetAttribute_float = [](OrtKernelInfo const* info, char const* name,
                                          float* value) { return find(info->floats, name, value); };
    api.KernelInfoGetAttribute_int64 = [](OrtKernelInfo const* info, char const* name,
                                          int64_t* value) {
        return find(info->integers, name, value);
    };
    api.KernelInfoGetAttribute_string = [](OrtKernelInfo const* info, char const* name, char* text,
                                           size_t* bytes) -> OrtStatus* {
        std::string word;
        if (OrtStatus* const status = find(info->words, name, &word)) return status;
        *bytes = word.size() + 1;
        if (text != nullptr) std::memcpy(text, word.c_str(), *bytes);
        return nullptr;
    };
    api.KernelInfoGetAttributeArray_float = [](OrtKernelInfo const*, char const*, float*, size_t*) {
        return make_status(ORT_FAIL, "no such attribute");
    };
    api.KernelInfoGetAttributeArray_int64 = [](OrtKernelInfo const*, char const*, int64_t*,
                                               size_t*) {
        return make_status(ORT_FAIL, "no such attribute");
    };
    api.KernelInfoGetAllocator = [](OrtKernelInfo const*, OrtMemType type,
                                    OrtAllocator** made) -> OrtStatus* {
        if (type != kMemoryDefault) return make_status(ORT_FAIL, "not the device's memory");
        lent.allocators++;
        *made = new OrtAllocator{
            kApiVersion, nullptr,
            [](OrtAllocator*, void* memory) {
                lent.scratch--;
                std::free(memory);
            },
            [](OrtAllocator const*) -> OrtMemoryInfo const* { return &memory_info; }};
        return nullptr;
    };
    api.KernelInfo_GetNodeName = [](OrtKernelInfo const* info, char* text,
                                    size_t* bytes) -> OrtStatus* {
        std::string name;
        if (OrtStatus* const status = find(info->words, "name of the node", &name)) return status;
        if (*bytes < name.size() + 1) return make_status(ORT_INVALID_ARGUMENT, "too long");
        *bytes = name.size() + 1;
        std::memcpy(text, name.c_str(), *bytes);
        return nullptr;
    };
    api.KernelInfo_GetLogger = [](OrtKernelInfo const*, OrtLogger const** found) -> OrtStatus* {
        if (!logger.is_there) return make_status(ORT_INVALID_GRAPH, "no logger");
        *found = &logger;
        return nullptr;
    };
    api.Logger_LogMessage = [](OrtLogger const* to, OrtLoggingLevel level, char const* message,
                               char const*, int, char const*) -> OrtStatus* {
        if (to != &logger || level != ORT_LOGGING_LEVEL_WARNING)
            return make_status(ORT_FAIL, "not a warning");
        logger.warnings.push_back(message);
        return nullptr;
    };
    api.KernelContext_ParallelFor = [](OrtKernelContext const*, void (*body)(void*, size_t),
                                       size_t total, size_t, void* argument) -> OrtStatus* {
        for (size_t index = 0; index < total; index++) body(argument, index);
        return nullptr;
    };
    api.ReleaseAllocator = [](OrtAllocator* allocator) {
        lent.allocators--;
        delete allocator;
    };
    api.KernelContext_GetInput = [](OrtKernelContext const* context, size_t index,
                                    OrtValue const** value) -> OrtStatus* {
        OrtValue const& input = context->inputs[index];
        *value = input.data == nullptr ? nullptr : &input;
        return nullptr;
    };
    api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t index, int64_t const* dims,
                                     size_t rank, OrtValue** value) -> OrtStatus* {
        OrtValue& output = context->outputs[index];
        *value = nullptr;
        if (output.data == nullptr) return nullptr;
        if (output.dims != std::vector<int64_t>(dims, dims + rank))
            return make_status(ORT_FAIL, "an output of another shape than the test expects");
        *value = &output;
        return nullptr;
    };
    api.KernelContext_GetGPUComputeStream = [](OrtKernelContext const* context,
                                               void** stream) -> OrtStatus* {
        *stream = context->stream;
        return nullptr;
    };
    api.KernelContext_GetScratchBuffer = [](OrtKernelContext const* context,
                                            OrtMemoryInfo const* info, size_t bytes,
                                            void** memory) -> OrtStatus* {
        if (!context->has_memory) return make_status(ORT_FAIL, "out of device memory");
        if (info != &memory_info) return make_status(ORT_FAIL, "not the device's memory");
        lent.scratch++;
        *memory = std::malloc(bytes);
        std::memset(*memory, 0xC5, bytes);
        return nullptr;
    };
    return api;
}

OrtApi const api = make_api();

// "" and a null status for success, else the message; the status is given back.
int finish(OrtStatus* status, char* message, size_t bytes) {
    message[0] = '\0';
    if (status == nullptr) return 0;
    int const code = status->code;
    std::strncpy(message, status->message.c_str(), bytes - 1);
    message[bytes - 1] = '\0';
    api.ReleaseStatus(status);
    return code;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Registers the operators of a library; the number of them.
API int fake_register(char const* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return -1;
    auto* const enter = reinterpret_cast<OrtStatus* (*)(void*, OrtApiBase const*)>(
        dlsym(library, "RegisterCustomOps"));
    static OrtApiBase const base = {
        [](uint32_t version) { return version <= kApiVersion ? &api : nullptr; },
        [] { return "1.32.0"; }};
    if (enter == nullptr || enter(nullptr, &base) != nullptr) return -1;
    return static_cast<int>(domain->operators.size());
}

// Closes a library as often as fake_register has opened it; whether it is still loaded.
API bool fake_unload(char const* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return false;
    dlclose(library);
    dlclose(library);
    void* const again = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (again != nullptr) dlclose(again);
    return again != nullptr;
}

// The domains that were ever made.
API long fake_domains() { return domains; }

// The operator of a provider and a type of query, or null.
API OrtCustomOp const* fake_find(char const* provider, int dtype) {
    for (OrtCustomOp const* op : domain->operators)
        if (std::strcmp(op->GetExecutionProviderType(op), provider) == 0 &&
            op->GetInputType(op, 0) == dtype)
            return op;
    return nullptr;
}

API void fake_set_device(int id) { memory_info.id = id; }

// Whether nodes have a logger from now on.
API void fake_set_logger(bool is_there) { logger.is_there = is_there; }

// What was logged since this was last asked, one by one; null at the end.
API char const* fake_warning(size_t index) {
    static std::vector<std::string> taken;
    if (index == 0) {
        taken = std::move(logger.warnings);
        logger.warnings.clear();
    }
    return index < taken.size() ? taken[index].c_str() : nullptr;
}

API OrtKernelInfo* fake_info() { return new OrtKernelInfo; }
API void fake_word(OrtKernelInfo* info, char const* name, char const* word) {
    info->words[name] = word;
}
API void fake_float(OrtKernelInfo* info, char const* name, float value) {
    info->floats[name] = value;
}
API void fake_integer(OrtKernelInfo* info, char const* name, int64_t value) {
    info->integers[name] = value;
}

// The kernel of a node, whose info is given back; its code, 0 for success.
API int fake_create(OrtCustomOp const* op, OrtKernelInfo* info, void** kernel, char* message,
                    size_t bytes) {
    OrtStatus* const status = op->CreateKernelV2(op, &api, info, kernel);
    delete info;
    return finish(status, message, bytes);
}

API void fake_destroy(OrtCustomOp const* op, void* kernel) { op->KernelDestroy(kernel); }

API OrtKernelContext* fake_context(void* stream, bool has_memory) {
    auto* const context = new OrtKernelContext;
    context->inputs.resize(5);
    context->outputs.resize(2);
    context->stream = stream;
    context->has_memory = has_memory;
    return context;
}

API void fake_tensor(OrtKernelContext* context, bool is_output, size_t index, int dtype,
                     int64_t const* dims, size_t rank, void* data) {
    auto& values = is_output ? context->outputs : context->inputs;
    values[index] = {static_cast<ElementType>(dtype), std::vector<int64_t>(dims, dims + rank),
                     data};
}

// One call, whose context is given back.
API int fake_compute(OrtCustomOp const* op, void* kernel, OrtKernelContext* context, char* message,
                     size_t bytes) {
    OrtStatus* const status = op->KernelComputeV2(kernel, context);
    delete context;
    return finish(status, message, bytes);
}

// What is lent and not given back: statuses, infos, allocators, scratch.
API void fake_lent(long (*counts)[4]) {
    (*counts)[0] = lent.statuses;
    (*counts)[1] = lent.infos;
    (*counts)[2] = lent.allocators;
    (*counts)[3] = lent.scratch;
}
