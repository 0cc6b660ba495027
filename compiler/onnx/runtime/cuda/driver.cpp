#include "driver.hpp"

#include <dlfcn.h>

namespace sage_cuda {
namespace {

constexpr char kSystemDriver[] = "libcuda.so.1";
// The first CUDA whose graphs have edges for launches that depend on one another and overlap.
constexpr int kKeepsDependence = 12030;

struct Entry {
    const char* name;
    void** place;
};

}  // namespace

Driver::~Driver() {
    if (library_ != nullptr) dlclose(library_);
}

bool Driver::open(const char* path, Error& error) {
    const char* const name = path == nullptr ? kSystemDriver : path;
    library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr)
        return error.set(
            "there is no CUDA driver: %s; install NVIDIA's driver, or run with "
            "CPUExecutionProvider only",
            dlerror());
#define SAGE_CUDA_ENTRY(name, arguments) {#name, reinterpret_cast<void**>(&name)},
    const Entry entries[] = {SAGE_CUDA_ENTRIES(SAGE_CUDA_ENTRY)};
    const Entry newer[] = {SAGE_CUDA_NEWER_ENTRIES(SAGE_CUDA_ENTRY)};
#undef SAGE_CUDA_ENTRY
    for (const Entry& entry : entries) {
        *entry.place = dlsym(library_, entry.name);
        if (*entry.place == nullptr)
            return error.set("the CUDA driver %s has no %s; update NVIDIA's driver", name,
                             entry.name);
    }
    for (const Entry& entry : newer) *entry.place = dlsym(library_, entry.name);
    Error reason;
    int version = 0;
    if (!SAGE_CUDA_CHECK(*this, reason, cuInit, 0) ||
        !SAGE_CUDA_CHECK(*this, reason, cuDriverGetVersion, &version))
        return error.set("the CUDA driver %s: %s", name, reason.text);
    if (version >= kKeepsDependence)
        cuLaunchKernelEx_ = reinterpret_cast<LaunchEx>(dlsym(library_, "cuLaunchKernelEx"));
    return true;
}

bool Driver::check(const char* call, CUresult status, Error& error) const {
    if (status == CUDA_SUCCESS) return true;
    const char *name = nullptr, *words = nullptr;
    cuGetErrorName(status, &name);
    cuGetErrorString(status, &words);
    if (name == nullptr || words == nullptr) return error.set("%s: CUresult %d", call, status);
    return error.set("%s: %s (%d), %s", call, name, status, words);
}

bool Driver::launch(CUfunction function, unsigned blocks, unsigned threads, unsigned shared_bytes,
                    CUstream stream, const void* params, bool dependent, Error& error) const {
    void* pointers[] = {const_cast<void*>(params)};  // the driver copies what they point to
    CUresult status = CUDA_ERROR_NOT_SUPPORTED;
    if (dependent && cuLaunchKernelEx_ != nullptr) {
        CUlaunchAttribute attribute = {};
        attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmatic_stream_serialization = 1;
        const CUlaunchConfig config = {blocks,       1,      1,          threads, 1, 1,
                                       shared_bytes, stream, &attribute, 1};
        status = cuLaunchKernelEx_(&config, function, pointers, nullptr);
    }
    if (status == CUDA_ERROR_NOT_SUPPORTED)
        status = cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream,
                                pointers, nullptr);
    return check("cuLaunchKernel", status, error);
}

bool Driver::read_capturing(CUstream stream, bool* capturing, Error& error) const {
    int status = 0;
    const CUresult result = cuStreamIsCapturing(stream, &status);
    // Of the default stream, while another one is capturing.
    *capturing = status != 0 || result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    return *capturing || check("cuStreamIsCapturing", result, error);
}

Current::Current(const Driver& driver, CUcontext context, Error& error)
    : driver_(driver),
      ok_(context != nullptr && SAGE_CUDA_CHECK(driver, error, cuCtxPushCurrent_v2, context)) {}

Current::~Current() {
    CUcontext popped;
    if (ok_) driver_.cuCtxPopCurrent_v2(&popped);
}

}  // namespace sage_cuda
