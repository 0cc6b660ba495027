#include "call.hpp"

#include <stdio.h>

#include "status.hpp"

namespace sage_ort {
namespace {

constexpr size_t kRank = 4;
constexpr size_t kMostDims = 8;  // of a tensor that is refused, as far as messages show them

char nothing;  // stands for the memory of an empty tensor: it may have none, and is there all the
               // same

const char* const kInputNames[kInputs] = {"query", "key", "value", "attn_mask", "sinks"};

struct Tensor {
    const void* data;  // null: not given
    ElementType dtype;
    size_t rank;
    int64_t dims[kMostDims];
};

struct Text {
    char text[192];
};

// "(2, 3)"
Text in_words(const int64_t* dims, size_t rank) {
    Text words;
    int used = snprintf(words.text, sizeof words.text, "(");
    for (size_t i = 0; i < rank && i < kMostDims; i++)
        used += snprintf(words.text + used, sizeof words.text - size_t(used), "%s%lld",
                         i == 0 ? "" : ", ", static_cast<long long>(dims[i]));
    snprintf(words.text + used, sizeof words.text - size_t(used), "%s)",
             rank > kMostDims ? ", ..."
             : rank == 1      ? ","
                              : "");
    return words;
}

// The runtime's numbers of element types.
const char* name_of(ElementType dtype) {
    static const char* const kNames[] = {"undefined",  "float",   "uint8",  "int8",   "uint16",
                                         "int16",      "int32",   "int64",  "string", "bool",
                                         "float16",    "double",  "uint32", "uint64", "complex64",
                                         "complex128", "bfloat16"};
    constexpr size_t kCount = sizeof kNames / sizeof kNames[0];
    return size_t(dtype) < kCount ? kNames[size_t(dtype)] : "an 8-bit or smaller type";
}

OrtStatus* read_info(const OrtApi& api, const OrtTensorTypeAndShapeInfo* info, Tensor* tensor) {
    SAGE_ORT_TRY(api.GetTensorElementType(info, &tensor->dtype));
    SAGE_ORT_TRY(api.GetDimensionsCount(info, &tensor->rank));
    size_t shown = tensor->rank < kMostDims ? tensor->rank : kMostDims;
    return api.GetDimensions(info, tensor->dims, shown);
}

OrtStatus* read_input(const OrtApi& api, const OrtKernelContext* context, Input index,
                      Tensor* tensor) {
    *tensor = {};
    const OrtValue* value = nullptr;
    SAGE_ORT_TRY(api.KernelContext_GetInput(context, index, &value));
    if (value == nullptr) return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    SAGE_ORT_TRY(api.GetTensorTypeAndShape(value, &info));
    OrtStatus* status = read_info(api, info, tensor);
    api.ReleaseTensorTypeAndShapeInfo(info);
    if (status != nullptr) return status;
    void* data = nullptr;
    SAGE_ORT_TRY(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor->data = data == nullptr ? &nothing : data;
    return nullptr;
}

// Whether no product of some of a tensor's dims passes 64 bits, in bytes either, and also where its
// rows are filled up for a kernel that takes no narrow ones. A tensor that has no elements may have
// other dims of any size.
bool fits(const int64_t* dims) {
    constexpr double kNarrow = 16;
    double product = double(dims[kRank - 1]) < kNarrow ? kNarrow : double(dims[kRank - 1]);
    for (size_t i = 0; i < kRank - 1; i++) product *= dims[i] < 1 ? 1 : double(dims[i]);
    return product < 0x1p56;
}

OrtStatus* check_operands(const OrtApi& api, const Tensor* inputs, ElementType dtype) {
    for (size_t i = kQuery; i <= kValue; i++) {
        const Tensor& x = inputs[i];
        if (x.data == nullptr)
            return refuse(api, ORT_INVALID_ARGUMENT, "%s is missing", kInputNames[i]);
        if (x.dtype != dtype)
            return refuse(api, ORT_INVALID_ARGUMENT,
                          "%s is of type %s, and query of type %s; query, key and value must be of "
                          "the same type",
                          kInputNames[i], name_of(x.dtype), name_of(dtype));
        if (x.rank != kRank)
            return refuse(api, ORT_INVALID_ARGUMENT,
                          "%s has shape %s; 4 dims are needed: (batch, heads, length, head_dim)",
                          kInputNames[i], in_words(x.dims, x.rank).text);
    }
    const int64_t *query = inputs[kQuery].dims, *key = inputs[kKey].dims,
                  *value = inputs[kValue].dims;
    const int64_t output[kRank] = {query[0], query[1], query[2], value[3]};
    const char* wrong = nullptr;
    if (key[0] != query[0] || value[0] != query[0])
        wrong = "they must have the same batch";
    else if (key[1] != value[1])
        wrong = "key and value must have the same number of heads";
    else if (query[1] != 0 && (key[1] == 0 || query[1] % key[1] != 0))
        wrong = "query's number of heads must be a multiple of key's";
    else if (key[2] != value[2])
        wrong = "key and value must have the same length";
    else if (key[3] != query[3])
        wrong = "query and key must have the same head_dim";
    else if (!fits(query) || !fits(key) || !fits(value) || !fits(output))
        wrong = "what they describe must fit in memory";
    if (wrong == nullptr) return nullptr;
    return refuse(api, ORT_INVALID_ARGUMENT, "query %s, key %s, value %s; %s",
                  in_words(query, kRank).text, in_words(key, kRank).text,
                  in_words(value, kRank).text, wrong);
}

OrtStatus* read_mask(const OrtApi& api, const Tensor& mask, const int64_t* full, Mask* result) {
    *result = {};
    if (mask.data == nullptr) return nullptr;
    if (mask.dtype != kBool && mask.dtype != kFloat32 && mask.dtype != kFloat16 &&
        mask.dtype != kBFloat16)
        return refuse(api, ORT_INVALID_ARGUMENT,
                      "attn_mask is of type %s; it must be bool, float, float16 or bfloat16",
                      name_of(mask.dtype));
    bool broadcasts = mask.rank >= 1 && mask.rank <= kRank;
    int64_t stride = 1;
    for (size_t i = 0; broadcasts && i < mask.rank; i++) {  // from the last dim on
        int64_t size = mask.dims[mask.rank - 1 - i];
        size_t dim = kRank - 1 - i;
        broadcasts = size == full[dim] || size == 1;
        result->stride[dim] = size == 1 ? 0 : stride;
        if (broadcasts) stride *= size;  // others may be of any size
    }
    if (!broadcasts)
        return refuse(api, ORT_INVALID_ARGUMENT,
                      "attn_mask has shape %s, which does not broadcast to (B, H, Lq, Lk) = %s",
                      in_words(mask.dims, mask.rank).text, in_words(full, kRank).text);
    result->data = mask.data;
    result->dtype = mask.dtype;
    return nullptr;
}

OrtStatus* check_sinks(const OrtApi& api, const Tensor& sinks, int64_t heads) {
    if (sinks.data == nullptr) return nullptr;
    if (sinks.dtype != kFloat32 && sinks.dtype != kFloat16 && sinks.dtype != kBFloat16)
        return refuse(api, ORT_INVALID_ARGUMENT,
                      "sinks is of type %s; it must be float, float16 or bfloat16",
                      name_of(sinks.dtype));
    if (sinks.rank != 1 || sinks.dims[0] != heads)
        return refuse(api, ORT_INVALID_ARGUMENT,
                      "sinks has shape %s; one logit per head is needed: (%lld,)",
                      in_words(sinks.dims, sinks.rank).text, static_cast<long long>(heads));
    return nullptr;
}

// The memory of an output; null where it is not asked for.
OrtStatus* allocate(const OrtApi& api, OrtKernelContext* context, Output index, const int64_t* dims,
                    size_t rank, void** data) {
    *data = nullptr;
    OrtValue* value = nullptr;
    SAGE_ORT_TRY(api.KernelContext_GetOutput(context, index, dims, rank, &value));
    if (value == nullptr) return nullptr;
    SAGE_ORT_TRY(api.GetTensorMutableData(value, data));
    if (*data == nullptr) *data = &nothing;
    return nullptr;
}

}  // namespace

OrtStatus* read_call(const OrtApi& api, OrtKernelContext* context, const Node& node,
                     ElementType dtype, Call* call) {
    Tensor inputs[kInputs];
    for (size_t i = 0; i < kInputs; i++)
        SAGE_ORT_TRY(read_input(api, context, Input(i), &inputs[i]));
    SAGE_ORT_TRY(check_operands(api, inputs, dtype));
    const int64_t *query = inputs[kQuery].dims, *value = inputs[kValue].dims;
    *call = {};
    call->dtype = dtype;
    call->batch = query[0];
    call->heads = query[1];
    call->query_length = query[2];
    call->head_dim = query[3];
    call->kv_heads = value[1];
    call->key_length = value[2];
    call->value_head_dim = value[3];
    int64_t full[kRank] = {query[0], query[1], query[2], value[2]};
    if (!fits(full))
        return refuse(api, ORT_INVALID_ARGUMENT, "there are scores of shape %s; they are too many",
                      in_words(full, kRank).text);
    SAGE_ORT_TRY(read_mask(api, inputs[kMask], full, &call->mask));
    SAGE_ORT_TRY(check_sinks(api, inputs[kSinks], call->heads));
    call->band = node.band(call->query_length, call->key_length);
    call->query = inputs[kQuery].data;
    call->key = inputs[kKey].data;
    call->value = inputs[kValue].data;
    call->sinks = inputs[kSinks].data;
    call->sinks_dtype = inputs[kSinks].dtype;

    int64_t shape[kRank] = {query[0], query[1], query[2], value[3]};
    SAGE_ORT_TRY(allocate(api, context, kOutput, shape, kRank, &call->output));
    void* lse;
    SAGE_ORT_TRY(allocate(api, context, kLse, shape, kRank - 1, &lse));
    call->lse = static_cast<float*>(lse);
    return nullptr;
}

OrtStatus* infer_shapes(const OrtApi& api, OrtShapeInferContext* context) {
    // Query's shape with value's last dim. The LSE gets none: a node may lack it, the context
    // cannot be asked whether it does, and ONNX Runtime up to 1.27 at least aborts when it is given
    // the shape of an output that is not there.
    int64_t dims[kRank];
    const char* names[kRank];
    ElementType dtype = kUndefined;
    const Input shaped[] = {kQuery, kValue};
    for (Input index : shaped) {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        SAGE_ORT_TRY(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
        if (index == kQuery) SAGE_ORT_TRY(api.GetTensorElementType(info, &dtype));
        size_t rank = 0;
        SAGE_ORT_TRY(api.GetDimensionsCount(info, &rank));
        if (rank != kRank) return nullptr;  // an unknown shape looks like a scalar's
        int64_t input_dims[kRank];
        const char* input_names[kRank];
        SAGE_ORT_TRY(api.GetDimensions(info, input_dims, kRank));
        SAGE_ORT_TRY(api.GetSymbolicDimensions(info, input_names, kRank));
        for (size_t i = index == kQuery ? 0 : kRank - 1; i < kRank; i++) {
            dims[i] = input_dims[i];
            names[i] = input_names[i];
        }
    }
    for (size_t i = 0; i < kRank; i++)  // what is neither a number nor a name cannot be said
        if (dims[i] < 0 && names[i][0] == '\0') return nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    SAGE_ORT_TRY(api.CreateTensorTypeAndShapeInfo(&info));
    OrtStatus* status = api.SetTensorElementType(info, dtype);
    if (status == nullptr) status = api.SetDimensions(info, dims, kRank);
    if (status == nullptr) status = api.SetSymbolicDimensions(info, names, kRank);
    if (status == nullptr)
        status = api.ShapeInferContext_SetOutputTypeShape(context, kOutput, info);
    api.ReleaseTensorTypeAndShapeInfo(info);
    return status;
}

}  // namespace sage_ort
