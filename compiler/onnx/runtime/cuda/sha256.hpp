// SHA-256 (FIPS 180-4), by which kernels are known to be those that were built.
#pragma once

#include <stddef.h>

namespace sage_cuda {

constexpr size_t kDigestText = 64;  // in hexadecimal, without the terminating zero

void sha256(const void* data, size_t bytes, char (&text)[kDigestText + 1]);

}  // namespace sage_cuda
