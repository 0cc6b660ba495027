// A runtime of our own behind the library's view of ONNX Runtime's API: it hands out tensors,
// attributes and memory as a test says, fails where a test says, and counts what is not given back.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "ort_abi.hpp"

namespace sage_ort {

struct OrtStatus {
    OrtErrorCode code;
    std::string message;
    bool injected;
};

struct OrtTensorTypeAndShapeInfo {
    ElementType dtype;
    std::vector<int64_t> dims;
    std::vector<std::string> names;
};

struct OrtValue {
    OrtTensorTypeAndShapeInfo info;
    // Of exactly the tensor's bytes, so that AddressSanitizer watches its ends.
    std::unique_ptr<char[]> data;

    OrtValue(ElementType dtype, std::vector<int64_t> dims) : info{dtype, std::move(dims), {}} {
        if (bytes() != 0) data.reset(new char[size_t(bytes())]);
    }
    int64_t elements() const {
        int64_t count = 1;
        for (int64_t dim : info.dims) {
            if (dim == 0) return 0;  // whatever the others are
            count *= dim;
        }
        return count;
    }
    int64_t bytes() const {
        switch (info.dtype) {
            case kFloat32:
                return elements() * 4;
            case kBool:
                return elements();
            case kFloat16:
            case kBFloat16:
                return elements() * 2;
            default:
                return elements() * 8;
        }
    }
};

struct Attribute {
    enum Kind { kFloat, kInt, kString, kFloats, kInts } kind;
    double number = 0;
    std::string text;
};

struct OrtKernelInfo {
    std::map<std::string, Attribute> attributes;
};

struct OrtKernelContext {
    std::vector<std::unique_ptr<OrtValue>> inputs;  // null: not given
    size_t output_count = 2;
    std::unique_ptr<OrtValue> outputs[2];
    ElementType output_dtype = kFloat32;
};

struct OrtShapeInferContext {
    std::vector<OrtTensorTypeAndShapeInfo> inputs;
    OrtTensorTypeAndShapeInfo output{kUndefined, {}, {}};
};

struct OrtCustomOpDomain {
    std::string name;
    std::vector<const OrtCustomOp*> operators;
};

struct OrtSessionOptions {
    std::vector<OrtCustomOpDomain*> domains;
};

// What the runtime does, and what it has seen. One for each process, as a real one.
struct Runtime {
    uint32_t newest_version = kApiVersion;
    const char* version = "1.32.0";
    std::atomic<int64_t> calls_until_failure{-1};  // negative: none fails
    bool has_memory = true;
    enum Parallel { kInOrder, kBackwards, kThreads } parallel = kInOrder;
    std::atomic<int64_t> statuses{0}, infos{0}, allocators{0}, memories{0};  // alive

    static Runtime& get() {
        static Runtime runtime;
        return runtime;
    }
    bool nothing_is_left() const {
        return statuses == 0 && infos == 0 && allocators == 0 && memories == 0;
    }
};

inline OrtStatus* make_status(OrtErrorCode code, const std::string& message, bool injected) {
    ++Runtime::get().statuses;
    return new OrtStatus{code, message, injected};
}

// The failure of an entry of the table, where the test wants one at this call.
inline OrtStatus* injected_failure() {
    std::atomic<int64_t>& left = Runtime::get().calls_until_failure;
    if (left < 0 || left-- > 0) return nullptr;
    return make_status(ORT_FAIL, "injected", true);
}
#define FAKE_TRY() \
    if (OrtStatus* status = injected_failure()) return status

struct FakeAllocator : OrtAllocator {
    FakeAllocator() {
        version = kApiVersion;
        Alloc = [](OrtAllocator*, size_t bytes) -> void* {
            if (!Runtime::get().has_memory) return nullptr;
            ++Runtime::get().memories;
            return std::malloc(bytes);
        };
        Free = [](OrtAllocator*, void* memory) {
            --Runtime::get().memories;
            std::free(memory);
        };
    }
};

template <class T>
OrtStatus* read_number(const OrtKernelInfo* info, const char* name, Attribute::Kind kind, T* out) {
    FAKE_TRY();
    auto found = info->attributes.find(name);
    if (found == info->attributes.end() || found->second.kind != kind)
        return make_status(ORT_FAIL, std::string("no attribute ") + name, false);
    *out = T(found->second.number);
    return nullptr;
}

template <class T>
OrtStatus* read_list(const OrtKernelInfo* info, const char* name, Attribute::Kind kind, T*,
                     size_t* count) {
    FAKE_TRY();
    auto found = info->attributes.find(name);
    if (found == info->attributes.end() || found->second.kind != kind)
        return make_status(ORT_FAIL, std::string("no attribute ") + name, false);
    *count = 2;
    return nullptr;
}

inline OrtApi make_api() {
    OrtApi api{};
    api.CreateStatus = [](OrtErrorCode code, const char* message) {
        return make_status(code, message, false);
    };
    api.ReleaseStatus = [](OrtStatus* status) {
        --Runtime::get().statuses;
        delete status;
    };
    api.CreateCustomOpDomain = [](const char* name, OrtCustomOpDomain** out) -> OrtStatus* {
        FAKE_TRY();
        *out = new OrtCustomOpDomain{name, {}};
        return nullptr;
    };
    api.ReleaseCustomOpDomain = [](OrtCustomOpDomain* domain) { delete domain; };
    api.CustomOpDomain_Add = [](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
        FAKE_TRY();
        domain->operators.push_back(op);
        return nullptr;
    };
    api.AddCustomOpDomain = [](OrtSessionOptions* options, OrtCustomOpDomain* domain) {
        OrtStatus* status = injected_failure();
        if (status == nullptr) options->domains.push_back(domain);
        return status;
    };
    api.GetTensorMutableData = [](OrtValue* value, void** data) -> OrtStatus* {
        FAKE_TRY();
        *data = value->data.get();
        return nullptr;
    };
    api.CreateTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo** out) -> OrtStatus* {
        FAKE_TRY();
        ++Runtime::get().infos;
        *out = new OrtTensorTypeAndShapeInfo{kUndefined, {}, {}};
        return nullptr;
    };
    api.GetTensorTypeAndShape = [](const OrtValue* value,
                                   OrtTensorTypeAndShapeInfo** out) -> OrtStatus* {
        FAKE_TRY();
        ++Runtime::get().infos;
        *out = new OrtTensorTypeAndShapeInfo(value->info);
        return nullptr;
    };
    api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) {
        --Runtime::get().infos;
        delete info;
    };
    api.SetTensorElementType = [](OrtTensorTypeAndShapeInfo* info,
                                  ElementType dtype) -> OrtStatus* {
        FAKE_TRY();
        info->dtype = dtype;
        return nullptr;
    };
    api.SetDimensions = [](OrtTensorTypeAndShapeInfo* info, const int64_t* dims,
                           size_t rank) -> OrtStatus* {
        FAKE_TRY();
        info->dims.assign(dims, dims + rank);
        return nullptr;
    };
    api.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo* info,
                                  ElementType* dtype) -> OrtStatus* {
        FAKE_TRY();
        *dtype = info->dtype;
        return nullptr;
    };
    api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info, size_t* rank) -> OrtStatus* {
        FAKE_TRY();
        *rank = info->dims.size();
        return nullptr;
    };
    api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* dims,
                           size_t rank) -> OrtStatus* {
        FAKE_TRY();
        if (rank > info->dims.size()) std::abort();
        std::copy_n(info->dims.begin(), rank, dims);
        return nullptr;
    };
    api.GetSymbolicDimensions = [](const OrtTensorTypeAndShapeInfo* info, const char** names,
                                   size_t rank) -> OrtStatus* {
        FAKE_TRY();
        for (size_t i = 0; i < rank; ++i) names[i] = info->names.at(i).c_str();
        return nullptr;
    };
    api.SetSymbolicDimensions = [](OrtTensorTypeAndShapeInfo* info, const char** names,
                                   size_t rank) -> OrtStatus* {
        FAKE_TRY();
        info->names.assign(names, names + rank);
        return nullptr;
    };
    api.KernelInfoGetAttribute_float = [](const OrtKernelInfo* info, const char* name, float* out) {
        return read_number(info, name, Attribute::kFloat, out);
    };
    api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo* info, const char* name,
                                          int64_t* out) {
        return read_number(info, name, Attribute::kInt, out);
    };
    api.KernelInfoGetAttributeArray_float = [](const OrtKernelInfo* info, const char* name,
                                               float* out, size_t* count) {
        return read_list(info, name, Attribute::kFloats, out, count);
    };
    api.KernelInfoGetAttributeArray_int64 = [](const OrtKernelInfo* info, const char* name,
                                               int64_t* out, size_t* count) {
        return read_list(info, name, Attribute::kInts, out, count);
    };
    api.KernelInfoGetAttribute_string = [](const OrtKernelInfo* info, const char* name, char* out,
                                           size_t* bytes) -> OrtStatus* {
        FAKE_TRY();
        auto found = info->attributes.find(name);
        if (found == info->attributes.end() || found->second.kind != Attribute::kString)
            return make_status(ORT_FAIL, std::string("no attribute ") + name, false);
        size_t needed = found->second.text.size() + 1;
        if (out != nullptr) {
            if (*bytes < needed) return make_status(ORT_FAIL, "too small", false);
            std::memcpy(out, found->second.text.c_str(), needed);
        }
        *bytes = needed;
        return nullptr;
    };
    api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t index,
                                    const OrtValue** out) -> OrtStatus* {
        FAKE_TRY();
        *out = index < context->inputs.size() ? context->inputs[index].get() : nullptr;
        return nullptr;
    };
    api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t index, const int64_t* dims,
                                     size_t rank, OrtValue** out) -> OrtStatus* {
        FAKE_TRY();
        *out = nullptr;
        if (index >= context->output_count) return nullptr;
        ElementType dtype = index == 0 ? context->output_dtype : kFloat32;
        context->outputs[index] =
            std::make_unique<OrtValue>(dtype, std::vector<int64_t>(dims, dims + rank));
        *out = context->outputs[index].get();
        if ((*out)->data) std::memset((*out)->data.get(), 0xff, size_t((*out)->bytes()));
        return nullptr;
    };
    api.ReleaseAllocator = [](OrtAllocator* allocator) {
        --Runtime::get().allocators;
        delete static_cast<FakeAllocator*>(allocator);
    };
    api.KernelInfoGetAllocator = [](const OrtKernelInfo*, OrtMemType,
                                    OrtAllocator** out) -> OrtStatus* {
        FAKE_TRY();
        ++Runtime::get().allocators;
        *out = new FakeAllocator;
        return nullptr;
    };
    api.ShapeInferContext_GetInputTypeShape = [](const OrtShapeInferContext* context, size_t index,
                                                 OrtTensorTypeAndShapeInfo** out) -> OrtStatus* {
        FAKE_TRY();
        *out = const_cast<OrtTensorTypeAndShapeInfo*>(&context->inputs.at(index));
        return nullptr;
    };
    api.ShapeInferContext_SetOutputTypeShape =
        [](const OrtShapeInferContext* context, size_t index,
           const OrtTensorTypeAndShapeInfo* info) -> OrtStatus* {
        FAKE_TRY();
        if (index != 0) std::abort();  // the node may have no other
        const_cast<OrtShapeInferContext*>(context)->output = *info;
        return nullptr;
    };
    api.KernelContext_ParallelFor = [](const OrtKernelContext*, void (*body)(void*, size_t),
                                       size_t total, size_t batches, void* argument) -> OrtStatus* {
        if (batches != 0) std::abort();
        FAKE_TRY();
        switch (Runtime::get().parallel) {
            case Runtime::kInOrder:
                for (size_t i = 0; i < total; ++i) body(argument, i);
                break;
            case Runtime::kBackwards:
                for (size_t i = total; i-- > 0;) body(argument, i);
                break;
            case Runtime::kThreads: {
                std::vector<std::thread> threads;
                for (size_t i = 0; i < total; ++i) threads.emplace_back(body, argument, i);
                for (std::thread& thread : threads) thread.join();
            }
        }
        return nullptr;
    };
    return api;
}

inline const OrtApiBase* api_base() {
    static const OrtApi api = make_api();
    static const OrtApiBase base = {
        [](uint32_t version) { return version <= Runtime::get().newest_version ? &api : nullptr; },
        [] { return Runtime::get().version; },
    };
    return &base;
}

}  // namespace sage_ort
