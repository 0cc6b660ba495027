// The library as the runtime sees it: RegisterCustomOps, and the operators that it registers.

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "call.hpp"
#include "provider.hpp"
#include "sage_ort.h"
#include "status.hpp"

namespace sage_ort {
namespace {

constexpr char kDomain[] = "ai.sage";
constexpr char kName[] = "Attention";
const Provider* const kProviders[] = {&kCpuProvider, &kCudaProvider};
constexpr size_t kMostOperators = 8;

// One name, one operator for each provider and type of query: the runtime takes the one whose
// types fit.
struct Operator {
    OrtCustomOp base;  // first: callbacks are handed a pointer to it
    const OrtApi* api;
    const Provider* provider;
    ElementType dtype;
};

const Operator& of(const OrtCustomOp* op) { return *reinterpret_cast<const Operator*>(op); }

struct Kernel {
    const Provider* provider;
    void* kernel;
};

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                  void** result) {
    Kernel* kernel = static_cast<Kernel*>(calloc(1, sizeof(Kernel)));
    if (kernel == nullptr) return refuse(*api, ORT_FAIL, "no memory for a kernel");
    kernel->provider = of(op).provider;
    OrtStatus* status = kernel->provider->create(*api, info, of(op).dtype, &kernel->kernel);
    if (status != nullptr) {
        free(kernel);
        kernel = nullptr;
    }
    *result = kernel;
    return status;
}

OrtStatus* compute(void* opaque, OrtKernelContext* context) {
    Kernel* kernel = static_cast<Kernel*>(opaque);
    return kernel->provider->compute(kernel->kernel, context);
}

void destroy(void* opaque) {
    Kernel* kernel = static_cast<Kernel*>(opaque);
    kernel->provider->destroy(kernel->kernel);
    free(kernel);
}

// Before 1.24 the runtime reads the type of an input that a node leaves out when its operator
// infers shapes: sinks without a mask would crash it. There it gets types alone.
bool infers_shapes_safely(const char* runtime_version) {
    char* end;
    long major = strtol(runtime_version, &end, 10);
    long minor = *end == '.' ? strtol(end + 1, nullptr, 10) : 0;
    return major > 1 || (major == 1 && minor >= 24);
}

Operator make_operator(const OrtApi* api, const Provider* provider, ElementType dtype,
                       bool infers_shapes) {
    Operator op{};
    op.api = api;
    op.provider = provider;
    op.dtype = dtype;
    OrtCustomOp& base = op.base;
    base.version = kApiVersion;
    base.GetName = [](const OrtCustomOp*) { return kName; };
    base.GetExecutionProviderType = [](const OrtCustomOp* o) { return of(o).provider->name; };
    base.GetInputTypeCount = [](const OrtCustomOp*) { return size_t(kInputs); };
    base.GetInputType = [](const OrtCustomOp* o, size_t index) {
        return index <= kValue ? of(o).dtype : kUndefined;  // masks and sinks are checked by us
    };
    base.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
        return index <= kValue ? kRequired : kOptional;
    };
    base.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kMemoryDefault; };
    base.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(kOutputs); };
    base.GetOutputType = [](const OrtCustomOp* o, size_t index) {
        return index == kOutput ? of(o).dtype : kFloat32;
    };
    base.GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
        return index == kOutput ? kRequired : kOptional;
    };
    auto none = [](const OrtCustomOp*) { return 0; };
    base.GetVariadicInputMinArity = base.GetVariadicInputHomogeneity = none;
    base.GetVariadicOutputMinArity = base.GetVariadicOutputHomogeneity = none;
    base.CreateKernelV2 = create;
    base.KernelComputeV2 = compute;
    base.KernelDestroy = destroy;
    if (infers_shapes)
        base.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
            return infer_shapes(*of(o).api, context);
        };
    base.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    base.GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    return op;
}

// The operators and their domain, made once for each runtime in this process. The runtime keeps
// pointers to them as long as there are sessions, and unloads the library after the last of them:
// so they are part of the library.
struct Registration {
    const OrtApi* api;  // null: free
    OrtCustomOpDomain* domain;
    Operator operators[kMostOperators];
};

constexpr size_t kMostRuntimes = 8;
Registration registrations[kMostRuntimes];
pthread_mutex_t registrations_lock = PTHREAD_MUTEX_INITIALIZER;

OrtStatus* fill(Registration* registration, const OrtApi* api, bool infers_shapes) {
    OrtCustomOpDomain* domain;
    SAGE_ORT_TRY(api->CreateCustomOpDomain(kDomain, &domain));
    size_t count = 0;
    for (const Provider* provider : kProviders)
        for (size_t i = 0; i < provider->dtype_count; i++) {
            Operator& op = registration->operators[count++];
            op = make_operator(api, provider, provider->dtypes[i], infers_shapes);
            OrtStatus* status = api->CustomOpDomain_Add(domain, &op.base);
            if (status == nullptr) continue;
            api->ReleaseCustomOpDomain(domain);
            return status;
        }
    registration->domain = domain;
    registration->api = api;
    return nullptr;
}

OrtStatus* find_or_fill(const OrtApi* api, const char* runtime_version,
                        OrtCustomOpDomain** domain) {
    pthread_mutex_lock(&registrations_lock);
    Registration* found = registrations;
    Registration* end = registrations + kMostRuntimes;
    while (found != end && found->api != api && found->api != nullptr) found++;
    OrtStatus* status = nullptr;
    if (found == end)
        status = refuse(*api, ORT_FAIL, "there are already %zu ONNX Runtimes in this process",
                        kMostRuntimes);
    else if (found->api == nullptr)
        status = fill(found, api, infers_shapes_safely(runtime_version));
    if (status == nullptr) *domain = found->domain;
    pthread_mutex_unlock(&registrations_lock);
    return status;
}

}  // namespace
}  // namespace sage_ort

using namespace sage_ort;

extern "C" {

void* RegisterCustomOps(void* options, const void* api_base) {
    const OrtApiBase& base = *static_cast<const OrtApiBase*>(api_base);
    const OrtApi* api = base.GetApi(kApiVersion);
    if (api == nullptr) {
        // The first entries of the table are those of its first version.
        const OrtApi* oldest = base.GetApi(1);
        if (oldest == nullptr) return nullptr;
        return refuse(*oldest, ORT_NOT_IMPLEMENTED,
                      "this library needs version %u of ONNX Runtime's API; this is ONNX Runtime "
                      "%s, which does not have it: ONNX Runtime 1.21 or newer is needed",
                      kApiVersion, base.GetVersionString());
    }
    OrtCustomOpDomain* domain;
    SAGE_ORT_TRY(find_or_fill(api, base.GetVersionString(), &domain));
    return api->AddCustomOpDomain(static_cast<OrtSessionOptions*>(options), domain);
}

const char* sage_ort_version(void) { return SAGE_VERSION; }

const char* sage_ort_served(const char* provider, const char* recipe) {
    Recipe parsed;
    if (provider == nullptr || recipe == nullptr || !parse_recipe(recipe, &parsed)) return nullptr;
    for (const Provider* known : kProviders)
        if (strcmp(known->name, provider) == 0) return known->served(parsed);
    return nullptr;
}

}  // extern "C"
