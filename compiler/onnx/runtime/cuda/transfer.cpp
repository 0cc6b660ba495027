#include "transfer.hpp"

#include <stdint.h>

namespace sage_cuda {
namespace {

CUcontext context_of(const Driver& driver, CUstream stream, Error& error) {
    CUcontext context = nullptr;
    return SAGE_CUDA_CHECK(driver, error, cuStreamGetCtx, stream, &context) ? context : nullptr;
}

bool check_not_capturing(const Driver& driver, CUstream stream, Error& error) {
    bool capturing = false;
    if (!driver.read_capturing(stream, &capturing, error)) return false;
    return !capturing ||
           error.set(
               "the CPU has to compute this, and cannot while a CUDA graph is captured; run the "
               "session without graphs, or give it kernels for this node, see the warning in its "
               "log");
}

CUdeviceptr address(const void* device) { return reinterpret_cast<uintptr_t>(device); }

}  // namespace

Transfer::Transfer(const Driver& driver, CUstream stream, Error& error)
    : driver_(driver),
      stream_(stream),
      current_(driver, context_of(driver, stream, error), error),
      ok_(current_.ok() && check_not_capturing(driver, stream, error)) {}

Transfer::~Transfer() {
    if (has_begun_) driver_.cuStreamSynchronize(stream_);
}

bool Transfer::read(void* to, const void* from_device, size_t bytes, Error& error) {
    if (bytes == 0) return true;
    has_begun_ = true;
    return SAGE_CUDA_CHECK(driver_, error, cuMemcpyDtoHAsync_v2, to, address(from_device), bytes,
                           stream_);
}

bool Transfer::write(void* to_device, const void* from, size_t bytes, Error& error) {
    if (bytes == 0) return true;
    has_begun_ = true;
    return SAGE_CUDA_CHECK(driver_, error, cuMemcpyHtoDAsync_v2, address(to_device), from, bytes,
                           stream_);
}

bool Transfer::wait(Error& error) {
    if (!has_begun_) return true;
    has_begun_ = false;
    return SAGE_CUDA_CHECK(driver_, error, cuStreamSynchronize, stream_);
}

}  // namespace sage_cuda
