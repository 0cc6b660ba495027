// The CUDA core of the operator library for ctypes, without ONNX Runtime.
#include <new>

#include "attention.hpp"
#include "safe.hpp"

using namespace sage_cuda;

#define API extern "C" __attribute__((visibility("default")))

API size_t harness_attention_bytes() { return sizeof(Attention); }
API size_t harness_error_bytes() { return sizeof(Error); }

struct Opened {
    Driver driver;
    Runtime runtime{driver};
};

API Opened* harness_open(char const* driver, char const* pack, Error* error) {
    auto* const opened = new Opened;
    if (opened->runtime.open(pack, *error) && opened->driver.open(driver, *error)) return opened;
    delete opened;
    return nullptr;
}

API void harness_close(Opened* opened) { delete opened; }

API Runtime* harness_shared(Error* error) { return Runtime::shared(*error); }

API Device* harness_device(Opened* opened, int ordinal, Error* error) {
    return opened->runtime.device(ordinal, *error);
}

API bool harness_plan(Device const* device, Attention const* attention, int64_t* scratch_bytes,
                      Error* error) {
    Work work;
    if (!work.plan(*device, *attention, *error)) return false;
    *scratch_bytes = work.scratch_bytes();
    return true;
}

API bool harness_launch(Device* device, Attention const* attention, void* scratch, CUstream stream,
                        Error* error) {
    Work work;
    return work.plan(*device, *attention, *error) &&
           work.launch(*device, *attention, scratch, stream, *error);
}

API bool harness_check_recipe(Device const* device, int dtype, bool automatic, int recipe,
                              Error* error) {
    return check_recipe(*device, Dtype(dtype), automatic, Recipe(recipe), *error);
}

API void harness_sha256(void const* data, size_t bytes, char (*text)[kDigestText + 1]) {
    sha256(data, bytes, *text);
}

API bool harness_check_safe(char const* folder, Error* error) { return check_safe(folder, *error); }
