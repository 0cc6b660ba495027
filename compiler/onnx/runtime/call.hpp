// One call of the operator: its tensors, checked. Shapes: query (B, H, Lq, D), key
// (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), output (B, H, Lq, Dv), lse (B, H, Lq).
#pragma once

#include "node.hpp"

namespace sage_ort {

enum Input : size_t { kQuery, kKey, kValue, kMask, kSinks, kInputs };
enum Output : size_t { kOutput, kLse, kOutputs };

// An explicit mask; a dim that broadcasts has stride 0. Strides in elements, of (B, H, Lq, Lk).
struct Mask {
    const void* data;  // null: none
    ElementType dtype;
    int64_t stride[4];
};

struct Call {
    ElementType dtype;  // of query, key, value and output
    int64_t batch, heads, kv_heads, query_length, key_length, head_dim, value_head_dim;
    Band band;
    const void *query, *key, *value;
    Mask mask;
    const void* sinks;  // null: none
    ElementType sinks_dtype;
    void* output;
    float* lse;  // null: not asked for
};

// Whether its outputs have no elements. Its inputs may then have dims of any size, that no loop
// should run over.
static constexpr bool writes_nothing(const Call& call) {
    const bool has_rows = call.batch > 0 && call.heads > 0 && call.query_length > 0;
    return !has_rows || (call.value_head_dim == 0 && call.lse == nullptr);
}

static constexpr int64_t element_size(ElementType dtype) {
    return dtype == kFloat32 ? 4 : dtype == kBool ? 1 : 2;
}

// Reads and checks the inputs, and allocates the outputs. `dtype` is the operator's.
OrtStatus* read_call(const OrtApi& api, OrtKernelContext* context, const Node& node,
                     ElementType dtype, Call* call);

// The output's dims from the inputs', as far as they are known.
OrtStatus* infer_shapes(const OrtApi& api, OrtShapeInferContext* context);

}  // namespace sage_ort
