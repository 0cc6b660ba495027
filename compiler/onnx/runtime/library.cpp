// The library as the runtime sees it: RegisterCustomOps, and the operators that it registers.

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "call.hpp"
#include "cuda/device.hpp"
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
    // A later version may mean something else. What a runtime makes of this, schema.py says.
    base.GetEndVersion = [](const OrtCustomOp*) { return 1; };
    return op;
}

// The operators and their domain, made once for each runtime in this process, and once more if CUDA
// can be opened later. The runtime keeps pointers to them as long as there are sessions, and closes
// the library after the last of them; it stays loaded, with what is kept here and on devices.
//
// A runtime is known by its table. One that is unloaded, and another version loaded at the same
// address, would get the domain of the first: that is not served.
struct Registration {
    const OrtApi* api;  // null: free
    bool has_cuda;
    OrtCustomOpDomain* domain;
    Operator operators[kMostOperators];
};

constexpr size_t kMostRegistrations = 16;
Registration registrations[kMostRegistrations];
pthread_mutex_t registrations_lock = PTHREAD_MUTEX_INITIALIZER;

void stay_loaded() {
    Dl_info info;
    if (dladdr(registrations, &info) != 0)
        dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
}

OrtStatus* add_operators(const OrtApi* api, bool has_cuda, bool infers_shapes,
                         OrtCustomOpDomain* domain, Operator (&operators)[kMostOperators]) {
    size_t count = 0;
    for (const Provider* provider : kProviders) {
        if (provider == &kCudaProvider && !has_cuda) continue;
        for (size_t i = 0; i < provider->dtype_count; i++) {
            if (count == kMostOperators)
                return refuse(*api, ORT_FAIL, "there is room for %zu operators", kMostOperators);
            Operator& op = operators[count++];
            op = make_operator(api, provider, provider->dtypes[i], infers_shapes);
            SAGE_ORT_TRY(api->CustomOpDomain_Add(domain, &op.base));
        }
    }
    return nullptr;
}

OrtStatus* fill(Registration* registration, const OrtApi* api, bool has_cuda, bool infers_shapes) {
    OrtCustomOpDomain* domain;
    SAGE_ORT_TRY(api->CreateCustomOpDomain(kDomain, &domain));
    OrtStatus* status =
        add_operators(api, has_cuda, infers_shapes, domain, registration->operators);
    if (status != nullptr) {
        api->ReleaseCustomOpDomain(domain);
        return status;
    }
    stay_loaded();
    registration->domain = domain;
    registration->has_cuda = has_cuda;
    registration->api = api;
    return nullptr;
}

OrtStatus* find_or_fill(const OrtApi* api, const char* runtime_version,
                        OrtCustomOpDomain** domain) {
    // Without a driver or a pack there are no operators for CUDA: the runtime assigns nodes by name
    // and type alone, and could not turn to a CPU, or to the model's own body, afterwards.
    sage_cuda::Error ignored;
    bool has_cuda = sage_cuda::Runtime::shared(ignored) != nullptr;
    pthread_mutex_lock(&registrations_lock);
    Registration* found = registrations;
    Registration* end = registrations + kMostRegistrations;
    while (found != end && found->api != nullptr &&
           !(found->api == api && found->has_cuda == has_cuda))
        found++;
    OrtStatus* status = nullptr;
    if (found == end)
        status = refuse(*api, ORT_FAIL, "there are too many ONNX Runtimes in this process");
    else if (found->api == nullptr)
        status = fill(found, api, has_cuda, infers_shapes_safely(runtime_version));
    if (status == nullptr) *domain = found->domain;
    pthread_mutex_unlock(&registrations_lock);
    return status;
}

// What a runtime gets that has no table to make a status with: one laid out as its own are. To give
// it back takes that table too.
struct {
    OrtErrorCode code = ORT_NOT_IMPLEMENTED;
    char message[96] = "ai.sage::Attention: this ONNX Runtime has no API of version 1";
} no_table;

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
        if (oldest == nullptr) return &no_table;
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

const char* sage_ort_cuda_state(void) {
    static thread_local sage_cuda::Error error;
    error.text[0] = '\0';
    sage_cuda::Runtime::shared(error);
    return error.text;
}

}  // extern "C"
