#include "device.hpp"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <new>

namespace sage_cuda {
namespace {

constexpr int64_t kSharedBytesUnasked = 48 << 10;
constexpr int64_t kMostBlocks = 0x7fffffff;
// From the folder of this library in its package to where the package may carry a pack.
constexpr char kShipped[] = "/../../kernels/cuda/pack";
constexpr char kTable[] = "/launches.txt";

class Lock {
 public:
    explicit Lock(pthread_mutex_t& mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
    ~Lock() { pthread_mutex_unlock(&mutex_); }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

 private:
    pthread_mutex_t& mutex_;
};

// Lets this thread load while other threads capture graphs of their own.
class RelaxedCapture {
 public:
    explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
        driver_.cuThreadExchangeStreamCaptureMode(&mode_);
    }
    ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
    const Driver& driver_;
    int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// The path of this library, or null.
const char* find_library() {
    static char here;
    Dl_info info;
    return dladdr(&here, &info) == 0 ? nullptr : info.dli_fname;
}

// The pack that the package carries beside this library; false if it carries none.
template <size_t kBytes>
bool find_shipped(char (&path)[kBytes]) {
    const char* const library = find_library();
    const char* const slash = library == nullptr ? nullptr : strrchr(library, '/');
    const size_t folder = slash == nullptr ? 0 : size_t(slash - library);
    if (folder == 0 || folder + sizeof kShipped > kBytes) return false;
    // That of a release wheel is for Python alone, and has no table.
    char table[sizeof path + sizeof kTable];
    memcpy(path, library, folder);
    memcpy(path + folder, kShipped, sizeof kShipped);
    snprintf(table, sizeof table, "%s%s", path, kTable);
    struct stat status;
    return stat(table, &status) == 0 && S_ISREG(status.st_mode);
}

// The value of an environment variable, null where it is not set or empty.
const char* variable(const char* name) {
    const char* const value = getenv(name);
    return value == nullptr || value[0] == '\0' ? nullptr : value;
}

// An object in zeroed memory; null where there is none.
template <class T, class... Arguments>
T* make(Arguments&... arguments) {
    void* const memory = calloc(1, sizeof(T));
    return memory == nullptr ? nullptr : new (memory) T(arguments...);
}

template <class T>
void destroy(T* object) {
    if (object == nullptr) return;
    object->~T();
    free(object);
}

}  // namespace

Device::~Device() {
    if (context_ == nullptr) return;
    {
        Error ignored;
        const Current current(driver_, context_, ignored);
        for (const Loaded& loaded : loaded_)
            if (loaded.function != nullptr) driver_.cuModuleUnload(loaded.module);
    }
    driver_.cuDevicePrimaryCtxRelease_v2(device_);
}

bool Device::open(int ordinal, Error& error) {
    int count = 0, major = 0, minor = 0;
    if (!SAGE_CUDA_CHECK(driver_, error, cuDeviceGetCount, &count)) return false;
    if (ordinal < 0 || ordinal >= count)
        return error.set("there is no CUDA device %d: the driver has %d", ordinal, count);
    if (!SAGE_CUDA_CHECK(driver_, error, cuDeviceGet, &device_, ordinal) ||
        !SAGE_CUDA_CHECK(driver_, error, cuDeviceGetAttribute, &major,
                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_) ||
        !SAGE_CUDA_CHECK(driver_, error, cuDeviceGetAttribute, &minor,
                         CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_) ||
        !SAGE_CUDA_CHECK(driver_, error, cuDeviceGetAttribute, &multiprocessors_,
                         CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device_))
        return false;
    arch_ = pack_.find_arch(major, minor);
    if (arch_ == nullptr) {
        char known[128];
        pack_.list_capabilities(known, sizeof known);
        return error.set(
            "device %d has compute capability %d.%d; the kernel pack %s has kernels for %s; run "
            "with CPUExecutionProvider only, or build kernels with `sagec kernels build "
            "--standalone`",
            ordinal, major, minor, pack_.folder(), known);
    }
    if (!loaded_.resize(pack_.kernels().size())) return error.set("no memory for kernels");
    for (size_t i = 0; i < loaded_.size(); i++) loaded_[i] = {nullptr, nullptr};
    CUcontext context = nullptr;
    if (!SAGE_CUDA_CHECK(driver_, error, cuDevicePrimaryCtxRetain, &context, device_)) return false;
    context_ = context;
    return true;
}

bool Device::load(int64_t index, CUstream stream, Error& error) {
    Loaded& loaded = loaded_[size_t(index)];
    if (__atomic_load_n(&loaded.function, __ATOMIC_ACQUIRE) != nullptr) return true;
    const Kernel& kernel = pack_.kernels()[size_t(index)];
    bool capturing = false;
    if (!driver_.read_capturing(stream, &capturing, error)) return false;
    if (capturing)
        return error.set(
            "%s is not loaded, and nothing can be while a CUDA graph is captured; warm up before "
            "the capture: run the session once outside of it with inputs of the same kinds",
            kernel.symbol);
    const Lock lock(lock_);  // the others wait, and find it loaded
    if (loaded.function != nullptr) return true;
    Array<char> image;
    Loaded made = {nullptr, nullptr};
    if (!pack_.read_image(kernel, image, error) || !load_image(kernel, image.data(), &made, error))
        return false;
    loaded.module = made.module;
    __atomic_store_n(&loaded.function, made.function, __ATOMIC_RELEASE);
    return true;
}

bool Device::load_image(const Kernel& kernel, const void* image, Loaded* loaded,
                        Error& error) const {
    const RelaxedCapture relaxed(driver_);
    Error reason;
    bool ok = SAGE_CUDA_CHECK(driver_, reason, cuModuleLoadData, &loaded->module, image);
    if (ok) {
        ok = SAGE_CUDA_CHECK(driver_, reason, cuModuleGetFunction, &loaded->function,
                             loaded->module, kernel.symbol);
        if (ok && kernel.shared_bytes > kSharedBytesUnasked)
            ok = SAGE_CUDA_CHECK(driver_, reason, cuFuncSetAttribute, loaded->function,
                                 CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                 int(kernel.shared_bytes));
        if (!ok) driver_.cuModuleUnload(loaded->module);
    }
    if (ok) return true;
    int version = 0;
    driver_.cuDriverGetVersion(&version);
    return error.set(
        "%s cannot be loaded: %s; the driver is for CUDA %d.%d: if a newer one made the kernel, "
        "update the driver, or build the pack with an older compiler",
        kernel.symbol, reason.text, version / 1000, version % 1000 / 10);
}

bool Device::launch(int64_t index, int64_t blocks, const void* params, size_t bytes,
                    CUstream stream, bool dependent, Error& error) const {
    const Kernel& kernel = pack_.kernels()[size_t(index)];
    if (size_t(kernel.params_bytes) != bytes)
        return error.set(
            "%s takes %lld bytes of parameters, and this library passes %zu: the kernel pack %s is "
            "of another version; build it again with `sagec kernels build --standalone`",
            kernel.symbol, static_cast<long long>(kernel.params_bytes), bytes, pack_.folder());
    if (blocks > kMostBlocks)
        return error.set("%lld blocks of %s; a launch has at most %lld: split the batch",
                         static_cast<long long>(blocks), kernel.symbol,
                         static_cast<long long>(kMostBlocks));
    Error reason;
    if (driver_.launch(loaded_[size_t(index)].function, unsigned(blocks), unsigned(kernel.threads),
                       unsigned(kernel.shared_bytes), stream, params, dependent, reason))
        return true;
    return error.set("%s: %s", kernel.symbol, reason.text);
}

Runtime::~Runtime() {
    for (Device* device : devices_) destroy(device);
}

bool Runtime::open(const char* pack, Error& error) { return pack_.open(pack, error); }

Device* Runtime::device(int ordinal, Error& error) {
    if (ordinal < 0 || ordinal >= kMostDevices) {
        error.set("CUDA device %d: devices from 0 to %d are served", ordinal, kMostDevices - 1);
        return nullptr;
    }
    const Lock lock(lock_);
    if (devices_[ordinal] == nullptr) {
        Device* const made = make<Device>(driver_, pack_);
        if (made == nullptr) {
            error.set("no memory for CUDA device %d", ordinal);
        } else if (!made->open(ordinal, error)) {
            destroy(made);
        } else {
            devices_[ordinal] = made;
        }
    }
    return devices_[ordinal];
}

const Driver* shared_driver(Error& error) {
    static pthread_mutex_t lock_of_shared = PTHREAD_MUTEX_INITIALIZER;
    static Driver* driver = nullptr;  // never closed: this library stays loaded
    const Lock lock(lock_of_shared);
    if (driver != nullptr) return driver;
    Driver* const made = make<Driver>();
    if (made == nullptr) {
        error.set("no memory for the CUDA driver");
    } else if (!made->open(variable("SAGE_CUDA_DRIVER"), error)) {
        destroy(made);
    } else {
        driver = made;
    }
    return driver;
}

Runtime* Runtime::shared(Error& error) {
    static pthread_mutex_t lock_of_shared = PTHREAD_MUTEX_INITIALIZER;
    static Runtime* runtime = nullptr;  // never closed: this library stays loaded
    const Lock lock(lock_of_shared);
    if (runtime != nullptr) return runtime;
    char shipped[1024];
    const char* pack = variable("SAGE_KERNEL_PACK");
    if (pack == nullptr && find_shipped(shipped)) pack = shipped;
    if (pack == nullptr) {
        error.set(
            "there is no kernel pack; build one with `sagec kernels build --standalone` and set "
            "SAGE_KERNEL_PACK to its folder, or run with CPUExecutionProvider only");
        return nullptr;
    }
    // Only now: where there is no pack, CUDA is not touched, and a process may fork.
    const Driver* const driver = shared_driver(error);
    if (driver == nullptr) return nullptr;
    Runtime* const made = make<Runtime>(*driver);
    if (made == nullptr) {
        error.set("no memory for a kernel pack");
    } else if (!made->open(pack, error)) {
        destroy(made);
    } else {
        runtime = made;
    }
    return runtime;
}

}  // namespace sage_cuda
