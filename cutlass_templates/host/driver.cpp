// A look-alike of the CUDA driver library, for running the launching code and the kernels on a CPU.
// Devices are imaginary; pointers are the process's own; a module's image is a shared library with
// host entries (sage/host/runtime.hpp). Launches run at once, on the calling thread. Errors are not
// sticky. README.md documents it, and the sage_host_* functions, which steer it in tests.
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <sage/host/runtime.hpp>
#include <set>
#include <string>
#include <vector>

#include "executor.hpp"
#include "tensor_map.hpp"

// What cuda.h declares and this library defines, under the same names and values.
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUdeviceptr = unsigned long long;

enum CUresult : int {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
};

enum CUdevice_attribute : int {
    CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 1,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK = 8,
    CU_DEVICE_ATTRIBUTE_WARP_SIZE = 10,
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum CUfunction_attribute : int {
    CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK = 0,
    CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES = 1,
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
};

enum CUstreamCaptureStatus : int {
    CU_STREAM_CAPTURE_STATUS_NONE = 0,
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
};

enum CUlaunchAttributeID : int { CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

struct CUlaunchAttribute {
    CUlaunchAttributeID id;
    char pad[4];
    union {
        int serialization_is_programmatic;
        char pad[64];
    } value;
};

struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    CUstream stream;
    CUlaunchAttribute const* attributes;
    unsigned attribute_count;
};

struct CUctx_st {
    CUdevice device;
};

struct CUfunc_st {
    CUmodule module;
    std::string name;
    sage::host::Entry const* entry;
    int max_dynamic_shared;
};

struct CUmod_st {
    void* library;
    CUcontext context;
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

namespace {

using sage::host::Entry;
using sage::host::Image;
using sage::host::Range;

constexpr int kVersion = 13000;
constexpr int kMaxDevices = 8;
constexpr int kSharedWithoutOptIn = 48 << 10;
constexpr size_t kLoggedLaunches = 10'000;

struct LaunchRecord {
    std::string symbol;
    unsigned grid, block, shared_bytes;
    CUstream stream;
    bool dependent;
    CUcontext context;
    bool captured;
    sage::host::Bytes bytes;
};

// All that the process's threads share, but for what a launch does.
struct Driver {
    std::mutex mutex;
    bool initialized = false;
    int devices = 1;
    int major = 8, minor = 9;
    int version = kVersion;
    uint64_t seed = 0;
    bool detect_races = true;
    bool dry_run = false;
    bool count_bytes = false;
    int64_t cache_bytes = 0;
    CUctx_st contexts[kMaxDevices] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
    std::set<CUmodule> modules;
    std::set<CUstream> capturing;
    std::shared_ptr<std::vector<Range> const> ranges = std::make_shared<std::vector<Range>>();
    std::deque<LaunchRecord> launches;
    std::string message;
};

Driver& driver() {
    static Driver instance;
    return instance;
}

using Lock = std::lock_guard<std::mutex>;

// The contexts that the thread pushed; the last is current.
thread_local std::vector<CUcontext> context_stack;

CUcontext current_context() { return context_stack.empty() ? nullptr : context_stack.back(); }

// Keeps the reason for sage_host_message; the caller holds the lock.
CUresult refuse(CUresult code, std::string const& why) {
    driver().message = why;
    return code;
}

bool valid_device(CUdevice device) { return device >= 0 && device < driver().devices; }

// Shared memory that a block can have, of the CUDA C++ Programming Guide's table of capabilities.
int shared_memory_opt_in(int major, int minor) {
    if (major == 9 || (major == 10 && minor == 0)) return 227 << 10;
    if (major == 8 && (minor == 0 || minor == 7)) return 163 << 10;
    return 99 << 10;
}

// The size of a 64-bit x86 or ARM shared library, whose section headers come last; 0 for what is
// not one. Machine code for GPUs is also ELF, of another machine.
size_t library_bytes(void const* image) {
    Elf64_Ehdr header;
    std::memcpy(&header, image, sizeof header.e_ident);
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return 0;
    if (header.e_ident[EI_CLASS] != ELFCLASS64) return 0;
    std::memcpy(&header, image, sizeof header);
    bool const host_machine = header.e_machine == EM_X86_64 || header.e_machine == EM_AARCH64;
    if (header.e_type != ET_DYN || !host_machine) return 0;
    return header.e_shoff + static_cast<size_t>(header.e_shnum) * header.e_shentsize;
}

// Loads a shared library from memory; null if that fails.
void* load_library(void const* image, size_t bytes, std::string& why) {
    int const file = memfd_create("sage_host_image", MFD_CLOEXEC);
    if (file < 0) {
        why = "memfd_create failed";
        return nullptr;
    }
    char const* rest = static_cast<char const*>(image);
    while (bytes > 0) {
        ssize_t const written = write(file, rest, bytes);
        if (written < 0) {
            close(file);
            why = "writing the image to memory failed";
            return nullptr;
        }
        rest += written;
        bytes -= static_cast<size_t>(written);
    }
    // dlopen takes a library of the same name for the same one, and descriptors are used again: the
    // dots make each name a new one.
    static std::atomic<unsigned> loaded{0};
    std::string path = "/proc/self/fd/";
    for (unsigned count = loaded++; count > 0; count /= 2) path += count % 2 ? "./" : "/";
    path += std::to_string(file);
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) why = dlerror();
    close(file);
    return library;
}

CUresult launch_refused(CUfunction function, std::string const& what) {
    return refuse(CUDA_ERROR_INVALID_VALUE, function->name + ": " + what);
}

// Both ways to launch a kernel. It may be dependent on the launch before it in the stream.
CUresult launch(CUfunction function, CUlaunchConfig const& config, void** params, void** extra,
                bool dependent) {
    Driver& state = driver();
    Entry const& entry = *function->entry;
    std::unique_lock<std::mutex> lock(state.mutex);
    if (current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (current_context() != function->module->context) {
        return refuse(CUDA_ERROR_INVALID_HANDLE,
                      function->name + ": its module was loaded in another context");
    }
    if (params == nullptr || params[0] == nullptr || extra != nullptr) {
        return launch_refused(function, "kernelParams must point to the parameters");
    }
    if (config.grid_x == 0 || config.grid_x > 0x7fff'ffffu || config.grid_y != 1 ||
        config.grid_z != 1) {
        return launch_refused(function, "the grid must be (1 .. 2^31 - 1, 1, 1), not (" +
                                            std::to_string(config.grid_x) + ", " +
                                            std::to_string(config.grid_y) + ", " +
                                            std::to_string(config.grid_z) + ")");
    }
    if (config.block_x != static_cast<unsigned>(entry.threads) || config.block_y != 1 ||
        config.block_z != 1) {
        return launch_refused(function, "the block must be (" + std::to_string(entry.threads) +
                                            ", 1, 1), not (" + std::to_string(config.block_x) +
                                            ", " + std::to_string(config.block_y) + ", " +
                                            std::to_string(config.block_z) + ")");
    }
    if (config.shared_bytes != static_cast<unsigned>(entry.shared_bytes)) {
        return launch_refused(function, "it takes " + std::to_string(entry.shared_bytes) +
                                            " bytes of dynamic shared memory, not " +
                                            std::to_string(config.shared_bytes));
    }
    if (config.shared_bytes > static_cast<unsigned>(function->max_dynamic_shared)) {
        return launch_refused(function,
                              std::to_string(config.shared_bytes) +
                                  " bytes of dynamic shared memory are more than the function's "
                                  "attribute allows, " +
                                  std::to_string(function->max_dynamic_shared));
    }
    bool const captured = state.capturing.count(config.stream) != 0;
    if (state.launches.size() == kLoggedLaunches) state.launches.pop_front();
    state.launches.push_back({function->name,
                              config.grid_x,
                              config.block_x,
                              config.shared_bytes,
                              config.stream,
                              dependent,
                              current_context(),
                              captured,
                              {}});
    if (captured || state.dry_run) return CUDA_SUCCESS;

    sage::host::Bytes bytes;
    bool const count_bytes = state.count_bytes;
    sage::host::Launch const launch = {entry,
                                       params[0],
                                       config.grid_x,
                                       state.seed,
                                       config.stream,
                                       dependent,
                                       state.detect_races,
                                       state.ranges,
                                       count_bytes ? &bytes : nullptr,
                                       state.cache_bytes};
    lock.unlock();
    std::string const failure = sage::host::execute(launch);
    if (count_bytes) {  // for tests of one thread, whose launch is still the last one
        lock.lock();
        state.launches.back().bytes = bytes;
        lock.unlock();
    }
    if (failure.empty()) return CUDA_SUCCESS;
    lock.lock();
    return refuse(CUDA_ERROR_LAUNCH_FAILED, function->name + ": " + failure);
}

}  // namespace

#define SAGE_API extern "C" __attribute__((visibility("default")))

SAGE_API CUresult cuInit(unsigned flags) {
    Lock const lock(driver().mutex);
    if (flags != 0) return refuse(CUDA_ERROR_INVALID_VALUE, "cuInit: flags must be 0");
    driver().initialized = true;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuDriverGetVersion(int* version) {
    Lock const lock(driver().mutex);
    *version = driver().version;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuDeviceGetCount(int* count) {
    Lock const lock(driver().mutex);
    if (!driver().initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *count = driver().devices;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    Lock const lock(driver().mutex);
    if (!driver().initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!valid_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuDeviceGetName(char* name, int bytes, CUdevice device) {
    Lock const lock(driver().mutex);
    if (!driver().initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, static_cast<size_t>(bytes), "CPU executing CUDA kernels");
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    Lock const lock(driver().mutex);
    if (!driver().initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = 1024;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
            *value = kSharedWithoutOptIn;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
            *value = 32;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
            *value = 1;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
            *value = driver().major;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
            *value = driver().minor;
            return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
            *value = shared_memory_opt_in(driver().major, driver().minor);
            return CUDA_SUCCESS;
    }
    return refuse(CUDA_ERROR_INVALID_VALUE, "cuDeviceGetAttribute: attribute " +
                                                std::to_string(attribute) + " is not imitated");
}

SAGE_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    Lock const lock(driver().mutex);
    if (!driver().initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (!valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *context = &driver().contexts[device];
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    Lock const lock(driver().mutex);
    return valid_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

SAGE_API CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    return cuDevicePrimaryCtxRelease_v2(device);
}

SAGE_API CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = current_context();
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuCtxGetDevice(CUdevice* device) {
    if (current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    *device = current_context()->device;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuCtxSetCurrent(CUcontext context) {
    if (!context_stack.empty()) context_stack.pop_back();
    if (context != nullptr) context_stack.push_back(context);
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    context_stack.push_back(context);
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuCtxPushCurrent(CUcontext context) { return cuCtxPushCurrent_v2(context); }

SAGE_API CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    if (context_stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    if (context != nullptr) *context = context_stack.back();
    context_stack.pop_back();
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuCtxPopCurrent(CUcontext* context) { return cuCtxPopCurrent_v2(context); }

SAGE_API CUresult cuModuleLoadData(CUmodule* module, void const* bytes) {
    Lock const lock(driver().mutex);
    if (!driver().initialized) return CUDA_ERROR_NOT_INITIALIZED;
    if (current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (!driver().capturing.empty()) {
        return refuse(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                      "cuModuleLoadData: a stream is capturing");
    }
    size_t const size = library_bytes(bytes);
    if (size == 0) {
        return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU,
                      "cuModuleLoadData: the image is not a shared library of this machine");
    }
    std::string why;
    void* const library = load_library(bytes, size, why);
    if (library == nullptr) {
        return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "cuModuleLoadData: " + why);
    }
    auto* const image = static_cast<Image*>(dlsym(library, "sage_host_image"));
    if (image == nullptr || image->abi != sage::host::kAbi) {
        dlclose(library);
        return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU,
                      "cuModuleLoadData: the image was not made for this driver library");
    }
    image->runtime = &sage::host::kRuntime;
    *module = new CUmod_st{library, current_context(), {}};
    driver().modules.insert(*module);
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuModuleUnload(CUmodule module) {
    Lock const lock(driver().mutex);
    if (driver().modules.erase(module) == 0) return CUDA_ERROR_INVALID_HANDLE;
    dlclose(module->library);
    delete module;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name) {
    Lock const lock(driver().mutex);
    if (driver().modules.count(module) == 0) return CUDA_ERROR_INVALID_HANDLE;
    std::unique_ptr<CUfunc_st>& known = module->functions[name];
    if (known == nullptr) {
        auto const* const entry = static_cast<Entry const*>(dlsym(module->library, name));
        if (entry == nullptr || entry->mark != sage::host::kEntryMark) {
            module->functions.erase(name);
            return refuse(CUDA_ERROR_NOT_FOUND,
                          std::string("cuModuleGetFunction: the image has no kernel ") + name);
        }
        known.reset(new CUfunc_st{module, name, entry, kSharedWithoutOptIn});
    }
    *function = known.get();
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute,
                                     CUfunction function) {
    Lock const lock(driver().mutex);
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = function->entry->threads;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
            *value = 0;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            *value = function->max_dynamic_shared;
            return CUDA_SUCCESS;
    }
    return refuse(CUDA_ERROR_INVALID_VALUE, "cuFuncGetAttribute: attribute " +
                                                std::to_string(attribute) + " is not imitated");
}

SAGE_API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute,
                                     int value) {
    Lock const lock(driver().mutex);
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        return refuse(CUDA_ERROR_INVALID_VALUE, "cuFuncSetAttribute: attribute " +
                                                    std::to_string(attribute) + " is not imitated");
    }
    int const most = shared_memory_opt_in(driver().major, driver().minor);
    if (value < 0 || value > most) {
        return launch_refused(function, "at most " + std::to_string(most) +
                                            " bytes of shared memory, not " +
                                            std::to_string(value));
    }
    function->max_dynamic_shared = value;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                 unsigned grid_z, unsigned block_x, unsigned block_y,
                                 unsigned block_z, unsigned shared_bytes, CUstream stream,
                                 void** params, void** extra) {
    CUlaunchConfig const config = {grid_x,  grid_y,       grid_z, block_x, block_y,
                                   block_z, shared_bytes, stream, nullptr, 0};
    return launch(function, config, params, extra, false);
}

SAGE_API CUresult cuLaunchKernelEx(CUlaunchConfig const* config, CUfunction function, void** params,
                                   void** extra) {
    bool dependent = false;
    for (unsigned i = 0; i < config->attribute_count; ++i) {
        CUlaunchAttribute const& attribute = config->attributes[i];
        if (attribute.id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
            Lock const lock(driver().mutex);
            return launch_refused(function,
                                  "attribute " + std::to_string(attribute.id) + " is not imitated");
        }
        dependent = attribute.value.serialization_is_programmatic != 0;
    }
    return launch(function, *config, params, extra, dependent);
}

// Every thread has a mode; here nothing depends on it.
SAGE_API CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    thread_local int current = 0;
    if (*mode < 0 || *mode > 2) return refuse(CUDA_ERROR_INVALID_VALUE, "no such capture mode");
    std::swap(*mode, current);
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    Lock const lock(driver().mutex);
    *status = driver().capturing.count(stream) != 0 ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                                    : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

SAGE_API CUresult cuStreamSynchronize(CUstream stream) {
    Lock const lock(driver().mutex);
    return driver().capturing.count(stream) != 0 ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
                                                 : CUDA_SUCCESS;
}

// Into a format that the executor reads, tensor_map.hpp.
SAGE_API CUresult cuTensorMapEncodeTiled(void* map, int data_type, uint32_t rank, void* address,
                                         uint64_t const* dims, uint64_t const* strides,
                                         uint32_t const* box, uint32_t const* element_strides,
                                         int interleave, int swizzle, int l2_promotion,
                                         int oob_fill) {
    Lock const lock(driver().mutex);
    std::string const why = sage::host::TensorMap::encode(
        {data_type, rank, address, dims, strides, box, element_strides, interleave, swizzle,
         l2_promotion, oob_fill},
        map);
    if (why.empty()) return CUDA_SUCCESS;
    return refuse(CUDA_ERROR_INVALID_VALUE, "cuTensorMapEncodeTiled: " + why);
}

// At once, as launches.
SAGE_API CUresult cuMemsetD8Async(CUdeviceptr memory, unsigned char value, size_t bytes,
                                  CUstream stream) {
    Lock const lock(driver().mutex);
    if (current_context() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (driver().capturing.count(stream) != 0 || driver().dry_run) return CUDA_SUCCESS;
    std::memset(reinterpret_cast<void*>(memory), value, bytes);
    return CUDA_SUCCESS;
}

namespace {

struct Description {
    CUresult code;
    char const* name;
    char const* text;
};

constexpr Description kDescriptions[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
};

Description const* description_of(CUresult code) {
    for (Description const& description : kDescriptions) {
        if (description.code == code) return &description;
    }
    return nullptr;
}

}  // namespace

SAGE_API CUresult cuGetErrorName(CUresult code, char const** name) {
    Description const* const description = description_of(code);
    *name = description == nullptr ? nullptr : description->name;
    return description == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

SAGE_API CUresult cuGetErrorString(CUresult code, char const** text) {
    Description const* const description = description_of(code);
    *text = description == nullptr ? nullptr : description->text;
    return description == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// Everything but loaded modules and the threads' current contexts as at the start.
SAGE_API void sage_host_reset() {
    Lock const lock(driver().mutex);
    Driver& state = driver();
    state.initialized = false;
    state.devices = 1;
    state.major = 8;
    state.minor = 9;
    state.version = kVersion;
    state.seed = 0;
    state.detect_races = true;
    state.dry_run = false;
    state.count_bytes = false;
    state.cache_bytes = 0;
    state.capturing.clear();
    state.ranges = std::make_shared<std::vector<Range>>();
    state.launches.clear();
    state.message.clear();
}

// How many devices there are, at most 8.
SAGE_API void sage_host_set_devices(int count) {
    Lock const lock(driver().mutex);
    driver().devices = std::clamp(count, 0, kMaxDevices);
}

// The compute capability of all devices.
SAGE_API void sage_host_set_capability(int major, int minor) {
    Lock const lock(driver().mutex);
    driver().major = major;
    driver().minor = minor;
}

// The newest CUDA that the driver is for, as cuDriverGetVersion has it.
SAGE_API void sage_host_set_version(int version) {
    Lock const lock(driver().mutex);
    driver().version = version;
}

// Chooses the order in which the blocks and threads of later launches run.
SAGE_API void sage_host_seed(uint64_t seed) {
    Lock const lock(driver().mutex);
    driver().seed = seed;
}

// From the first of these calls on, kernels may touch only the global memory that they name.
SAGE_API void sage_host_allow(void const* pointer, size_t bytes, bool writable) {
    Lock const lock(driver().mutex);
    auto const begin = reinterpret_cast<uintptr_t>(pointer);
    auto ranges = std::make_shared<std::vector<Range>>(*driver().ranges);
    ranges->push_back({begin, begin + bytes, writable});
    driver().ranges = std::move(ranges);
}

SAGE_API void sage_host_detect_races(bool on) {
    Lock const lock(driver().mutex);
    driver().detect_races = on;
}

// Launches do nothing but check their arguments and get logged.
SAGE_API void sage_host_dry_run(bool on) {
    Lock const lock(driver().mutex);
    driver().dry_run = on;
}

// Launches count the bytes of global memory that they touch, for the log: of one thread only.
SAGE_API void sage_host_count_bytes(bool on) {
    Lock const lock(driver().mutex);
    driver().count_bytes = on;
}

// They also count what a cache of so many bytes would not have (traffic.hpp).
SAGE_API void sage_host_follow_cache(int64_t bytes) {
    Lock const lock(driver().mutex);
    driver().cache_bytes = bytes;
}

// While a stream is capturing, its launches are logged only, and no module can be loaded.
SAGE_API void sage_host_set_capturing(CUstream stream, bool on) {
    Lock const lock(driver().mutex);
    if (on) {
        driver().capturing.insert(stream);
    } else {
        driver().capturing.erase(stream);
    }
}

// Why the last call that failed did, or "". Valid until the calling thread calls this again.
SAGE_API char const* sage_host_message() {
    static thread_local std::string message;
    Lock const lock(driver().mutex);
    message = driver().message;
    return message.c_str();
}

// The last 10,000 launches, oldest first, as a JSON array of objects: symbol, grid, block,
// shared_bytes, stream, context (as integers), dependent, captured, and of global memory the bytes
// that were loaded, loaded_once, stored, streamed and missed (traffic.hpp), if they were counted.
// Valid as sage_host_message's.
SAGE_API char const* sage_host_launches() {
    static thread_local std::string text;
    Lock const lock(driver().mutex);
    text = "[";
    for (LaunchRecord const& launch : driver().launches) {
        if (text.size() > 1) text += ", ";
        text += "{\"symbol\": \"" + launch.symbol + "\", \"grid\": " + std::to_string(launch.grid) +
                ", \"block\": " + std::to_string(launch.block) +
                ", \"shared_bytes\": " + std::to_string(launch.shared_bytes) +
                ", \"stream\": " + std::to_string(reinterpret_cast<uintptr_t>(launch.stream)) +
                ", \"context\": " + std::to_string(reinterpret_cast<uintptr_t>(launch.context)) +
                ", \"dependent\": " + (launch.dependent ? "true" : "false") +
                ", \"captured\": " + (launch.captured ? "true" : "false") +
                ", \"loaded\": " + std::to_string(launch.bytes.loaded) +
                ", \"loaded_once\": " + std::to_string(launch.bytes.loaded_once) +
                ", \"stored\": " + std::to_string(launch.bytes.stored) +
                ", \"streamed\": " + std::to_string(launch.bytes.streamed) +
                ", \"missed\": " + std::to_string(launch.bytes.missed) + "}";
    }
    text += "]";
    return text.c_str();
}
