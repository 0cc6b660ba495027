// Where the quantized kernel begins to gain: the table of compiler/kernels/cpu/gate.py.
#pragma once

#include <stdint.h>

namespace sage_ort {

struct Gate {
    const char* isa;  // as sage_cpu_isa_name calls it
    int64_t query_length, key_length;
    int64_t products;  // batch * heads * query length * key length * head_dim
};

// A test holds this against GATES of gate.py. An instruction set that is not here does not gain.
constexpr Gate kGates[] = {
    {"avx512vnni", 32, 48, 1 << 19},
    {"avxvnni", 64, 64, 1 << 20},
    {"avx2", 64, 64, 1 << 20},
};

}  // namespace sage_ort
