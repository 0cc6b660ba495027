// What `auto` gives the quantized kernel.
#pragma once

#include <stdint.h>

namespace sage_ort {

struct Gate {
    const char* isa;  // as sage_cpu_isa_name calls it
    int64_t query_length, key_length;
    int64_t products;  // batch * heads * query length * key length * head_dim
};

// The table GATES of compiler/kernels/cpu/gate.py; a test holds one against the other. An
// instruction set that is not here does not gain.
//
// Its rule for CPUs with AMX has no place here: it leaves half precision to PyTorch's kernel, whose
// products use AMX, and what a call is left to here, float arithmetic, does not.
constexpr Gate kGates[] = {
    {"avx512vnni", 32, 48, 1 << 19},
    {"avxvnni", 64, 64, 1 << 20},
    {"avx2", 64, 64, 1 << 20},
};

// With fewer keys, or fewer elements of them, float arithmetic is faster here, since it packs
// nothing; PyTorch's kernel, which the table was measured against, is not. docs/onnx-runtime.md has
// the measurements.
constexpr int64_t kLeastKeys = 64;
constexpr int64_t kLeastKeyElements = 4096;  // key length * head_dim

}  // namespace sage_ort
