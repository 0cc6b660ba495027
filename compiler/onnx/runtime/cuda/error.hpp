// Why something failed, in one sentence. No exceptions, and no C++ runtime.
#pragma once

namespace sage_cuda {

struct Error {
    char text[896] = "";

    // Formatted as by printf. Returns false, so that a function can fail by `return
    // error.set(...)`.
    __attribute__((format(printf, 2, 3))) bool set(const char* format, ...);
};

}  // namespace sage_cuda
