// The CUDA driver, opened at run time: nothing here is linked with CUDA. The functions and
// constants are those of cuda.h, as far as they are used.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "error.hpp"

namespace sage_cuda {

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUdeviceptr = unsigned long long;

constexpr CUresult CUDA_SUCCESS = 0;
constexpr CUresult CUDA_ERROR_NOT_SUPPORTED = 801;
constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906;
constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8;
constexpr int CU_STREAM_CAPTURE_MODE_RELAXED = 2;
constexpr int CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0;
constexpr int CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1;
constexpr int CU_TENSOR_MAP_DATA_TYPE_UINT32 = 2;
constexpr int CU_TENSOR_MAP_INTERLEAVE_NONE = 0;
constexpr int CU_TENSOR_MAP_SWIZZLE_64B = 2;
constexpr int CU_TENSOR_MAP_SWIZZLE_128B = 3;
constexpr int CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2;
constexpr int CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0;
constexpr int CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6;

struct CUlaunchAttribute {
    int id;
    char pad[4];
    union {
        int programmatic_stream_serialization;
        char pad[64];
    } value;
};

struct CUlaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    CUstream stream;
    const CUlaunchAttribute* attributes;
    unsigned attribute_count;
};

// X(function, arguments): the entries that are used.
#define SAGE_CUDA_ENTRIES(X)                                                            \
    X(cuInit, (unsigned flags))                                                         \
    X(cuDriverGetVersion, (int* version))                                               \
    X(cuGetErrorName, (CUresult, const char** text))                                    \
    X(cuGetErrorString, (CUresult, const char** text))                                  \
    X(cuDeviceGet, (CUdevice * device, int ordinal))                                    \
    X(cuDeviceGetCount, (int* count))                                                   \
    X(cuDeviceGetAttribute, (int* value, int attribute, CUdevice))                      \
    X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice))                        \
    X(cuDevicePrimaryCtxRelease_v2, (CUdevice))                                         \
    X(cuCtxPushCurrent_v2, (CUcontext))                                                 \
    X(cuCtxPopCurrent_v2, (CUcontext * context))                                        \
    X(cuModuleLoadData, (CUmodule * module, const void* image))                         \
    X(cuModuleUnload, (CUmodule))                                                       \
    X(cuModuleGetFunction, (CUfunction * function, CUmodule, const char* name))         \
    X(cuFuncSetAttribute, (CUfunction, int attribute, int value))                       \
    X(cuStreamIsCapturing, (CUstream, int* status))                                     \
    X(cuThreadExchangeStreamCaptureMode, (int* mode))                                   \
    X(cuStreamGetCtx, (CUstream, CUcontext * context))                                  \
    X(cuStreamSynchronize, (CUstream))                                                  \
    X(cuMemcpyDtoHAsync_v2, (void* to, CUdeviceptr from, size_t bytes, CUstream))       \
    X(cuMemcpyHtoDAsync_v2, (CUdeviceptr to, const void* from, size_t bytes, CUstream)) \
    X(cuMemsetD8Async, (CUdeviceptr, unsigned char value, size_t bytes, CUstream))      \
    X(cuLaunchKernel, (CUfunction, unsigned grid_x, unsigned grid_y, unsigned grid_z,   \
                       unsigned block_x, unsigned block_y, unsigned block_z,            \
                       unsigned shared_bytes, CUstream, void** params, void** extra))

// Those that drivers before CUDA 12 do not have.
#define SAGE_CUDA_NEWER_ENTRIES(X)                                                          \
    X(cuTensorMapEncodeTiled,                                                               \
      (void* map, int type, unsigned rank, void* address, const uint64_t* dims,             \
       const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave, \
       int swizzle, int promotion, int fill))

// A loaded and initialized driver; threads may share it.
class Driver {
 public:
    Driver() = default;
    Driver(const Driver&) = delete;
    Driver& operator=(const Driver&) = delete;
    ~Driver();

    // Loads and initializes a driver library; with a null path the system's, libcuda.so.1.
    bool open(const char* path, Error& error);

    // Whether a call succeeded, and if not, why, in the driver's words.
    bool check(const char* call, CUresult status, Error& error) const;

    // Starts a kernel of blocks of one dimension. A dependent one waits itself for the launch
    // before it in the stream, so that it may begin before that has ended, where the driver can do
    // that.
    bool launch(CUfunction function, unsigned blocks, unsigned threads, unsigned shared_bytes,
                CUstream stream, const void* params, bool dependent, Error& error) const;

    // Finds whether a CUDA graph is being captured on a stream.
    bool read_capturing(CUstream stream, bool* capturing, Error& error) const;

#define SAGE_CUDA_MEMBER(name, arguments) CUresult(*name) arguments = nullptr;
    SAGE_CUDA_ENTRIES(SAGE_CUDA_MEMBER)
    SAGE_CUDA_NEWER_ENTRIES(SAGE_CUDA_MEMBER)  // may stay null
#undef SAGE_CUDA_MEMBER

 private:
    using LaunchEx = CUresult (*)(const CUlaunchConfig*, CUfunction, void** params, void** extra);

    // Null: launches cannot depend on one another, or not in a CUDA graph.
    LaunchEx cuLaunchKernelEx_ = nullptr;
    void* library_ = nullptr;
};

// check() of a call on a driver, with the call's name.
#define SAGE_CUDA_CHECK(driver, error, function, ...) \
    (driver).check(#function, (driver).function(__VA_ARGS__), error)

// Makes a context the thread's current one, while it lives; a null one, which whoever looked for it
// has said why, fails.
class Current {
 public:
    Current(const Driver& driver, CUcontext context, Error& error);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

    bool ok() const { return ok_; }

 private:
    const Driver& driver_;
    bool ok_;
};

}  // namespace sage_cuda
