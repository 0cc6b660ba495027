// The devices of a process, and the kernels that are loaded on them.
#pragma once

#include <pthread.h>
#include <stdint.h>

#include "driver.hpp"
#include "pack.hpp"

namespace sage_cuda {

// A device with its primary context, which the CUDA runtime uses too. Threads may share it.
class Device {
 public:
    Device(const Driver& driver, const Pack& pack) : driver_(driver), pack_(pack) {}
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;
    ~Device();

    // Finds the device's architecture in the pack, and retains its context.
    bool open(int ordinal, Error& error);

    const Pack& pack() const { return pack_; }
    const Arch& arch() const { return *arch_; }
    int multiprocessors() const { return multiprocessors_; }
    const Driver& driver() const { return driver_; }
    CUcontext context() const { return context_; }

    // Loads a kernel of the pack, once. Nothing is loaded while a CUDA graph is captured on the
    // stream where it is to run; the device's context is current.
    bool load(int64_t kernel, CUstream stream, Error& error);

    // Starts a loaded kernel: `params` is its struct, of `bytes`; `dependent` as of Driver::launch.
    bool launch(int64_t kernel, int64_t blocks, const void* params, size_t bytes, CUstream stream,
                bool dependent, Error& error) const;

 private:
    struct Loaded {
        CUmodule module;
        CUfunction function;  // null: not loaded
    };

    bool load_image(const Kernel& kernel, const void* image, Loaded* loaded, Error& error) const;

    const Driver& driver_;
    const Pack& pack_;
    const Arch* arch_ = nullptr;
    CUdevice device_ = 0;
    int multiprocessors_ = 0;
    CUcontext context_ = nullptr;
    Array<Loaded> loaded_;  // by kernel
    pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
};

// The driver of this process, SAGE_CUDA_DRIVER or the system's, opened by the first who asks. Null,
// and why, where that fails; then the next one tries again.
const Driver* shared_driver(Error& error);

// A pack, and the devices of a driver that were asked for. Threads may share it.
class Runtime {
 public:
    explicit Runtime(const Driver& driver) : driver_(driver) {}
    Runtime(const Runtime&) = delete;
    Runtime& operator=(const Runtime&) = delete;
    ~Runtime();

    // `pack` is a folder.
    bool open(const char* pack, Error& error);

    // The device with this ordinal, opened once; null, and why, where that fails.
    Device* device(int ordinal, Error& error);

    // The one of this process, on its driver, opened by the first who asks: the pack is
    // SAGE_KERNEL_PACK or the one beside this library in its package. Null, and why, where that
    // fails; then the next one tries again.
    static Runtime* shared(Error& error);

 private:
    static constexpr int kMostDevices = 64;

    const Driver& driver_;
    Pack pack_;
    Device* devices_[kMostDevices] = {};
    pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
};

}  // namespace sage_cuda
