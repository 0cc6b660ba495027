// Copies between a device and the host in the middle of a stream, for what the host computes there.
#pragma once

#include "driver.hpp"

namespace sage_cuda {

class Transfer {
 public:
    // Makes the stream's context the current one. Fails, see ok(), while a CUDA graph is captured
    // on the stream, which cannot hold what the host does.
    Transfer(const Driver& driver, CUstream stream, Error& error);
    // Waits for what was begun: host memory must live as long.
    ~Transfer();
    Transfer(const Transfer&) = delete;
    Transfer& operator=(const Transfer&) = delete;

    bool ok() const { return ok_; }

    // Begin to copy, after all that is on the stream; nothing where there are no bytes.
    bool read(void* to, const void* from_device, size_t bytes, Error& error);
    bool write(void* to_device, const void* from, size_t bytes, Error& error);

    // Returns when what was begun is done.
    bool wait(Error& error);

 private:
    const Driver& driver_;
    const CUstream stream_;
    const Current current_;
    bool ok_;
    bool has_begun_ = false;
};

}  // namespace sage_cuda
