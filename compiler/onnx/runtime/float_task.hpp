// The tasks of float arithmetic, and the kernels that instruction sets have for them.
#pragma once

#include "call.hpp"

namespace sage_ort {

constexpr int64_t kFloatTaskRows = 128;  // of one task at most
constexpr int64_t kFloatBlockRows = 4;   // that share the loads of keys and values

// From so many rows of a key/value head on its keys are transposed, for that many rows at least.
constexpr int64_t kTransposedRows = 16;

static constexpr bool is_transposed(const Call& call) {
    return call.heads / call.kv_heads * call.query_length >= kTransposedRows;
}

// Rows of one key/value head: query i of the group's head g is row g * query_length + i, so that
// decoding with grouped heads reads keys and values once.
struct FloatTask {
    const Call* call;
    const Node* node;
    const float* sinks;  // (H,) or null
    int64_t batch, kv_head;
    int64_t first_row, rows;
    char* scratch;  // aligned to 64 bytes
};

// One instruction set's kernels.
struct FloatKernels {
    void (*attend)(const FloatTask&);
    int64_t (*scratch_bytes)(const Call&);
};

// Defined by one object each, for the machines and compilers that have the instruction set.
extern const FloatKernels kFloatPortable, kFloatAvx2, kFloatAvx512;

}  // namespace sage_ort
