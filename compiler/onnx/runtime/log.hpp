// Warnings about a node, in the log of its session.
#pragma once

#include "ort_abi.hpp"

namespace sage_ort {

struct Log {
    const OrtApi* api;
    const OrtLogger* logger;  // null: the runtime has none here, and nothing is said
    char node[256];           // its name; "" where it has none, or a longer one
};

// The log of a node, as far as the runtime tells of it.
Log open_log(const OrtApi& api, const OrtKernelInfo* info);

// A sentence about a node, formatted as by printf.
__attribute__((format(printf, 2, 3))) void warn(const Log& log, const char* format, ...);

}  // namespace sage_ort
