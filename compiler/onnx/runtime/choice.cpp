// Who serves a call on CPUs.

#include <stdlib.h>
#include <string.h>

#include "kernels.hpp"
#include "status.hpp"

namespace sage_ort {
namespace {

constexpr int64_t kGreatestHeadDim = 256;  // that the quantized kernel takes

// The nearest recipe of sage_cpu.h that is not less accurate; `auto` is decided call by call.
int32_t nearest(Recipe recipe) {
    switch (recipe) {
        case Recipe::kAuto:
        case Recipe::kInt4Fp8:
        case Recipe::kInt4Fp16:
        case Recipe::kInt8Fp8:
        case Recipe::kInt8Int8:
            return SAGE_CPU_INT8_INT8;
        case Recipe::kInt8Fp16:
        case Recipe::kInt8Int16:
            return SAGE_CPU_INT8_INT16;
        case Recipe::kExact:
            break;
    }
    return SAGE_CPU_FLOAT;
}

bool gains(const Gate& gate, const Call& call) {
    double products = double(call.batch) * double(call.heads) * double(call.query_length) *
                      double(call.key_length) * double(call.head_dim);
    return call.query_length >= gate.query_length && call.key_length >= gate.key_length &&
           products >= double(gate.products) && call.key_length >= kLeastKeys &&
           double(call.key_length) * double(call.head_dim) >= double(kLeastKeyElements);
}

int32_t choose(const Gate* gate, const Node& node, const Call& call) {
    if (call.head_dim > kGreatestHeadDim || call.value_head_dim > kGreatestHeadDim)
        return SAGE_CPU_FLOAT;
    if (node.recipe == Recipe::kAuto && (gate == nullptr || !gains(*gate, call)))
        return SAGE_CPU_FLOAT;
    return nearest(node.recipe);
}

}  // namespace

OrtStatus* check_cpu(const OrtApi& api) {
    if (sage_cpu_isa() >= 0) return nullptr;
    return refuse(api, ORT_FAIL,
                  "the environment variable SAGE_CPU_ISA is \"%s\", which this machine or this "
                  "build does not have; set it to another, or unset it",
                  getenv("SAGE_CPU_ISA"));
}

const Gate* find_gate() {
    const char* isa = sage_cpu_isa_name(sage_cpu_isa());
    for (const Gate& gate : kGates)
        if (isa != nullptr && strcmp(gate.isa, isa) == 0) return &gate;
    return nullptr;
}

OrtStatus* attend(const Setting& setting, const Call& call, const Gate* gate) {
    int32_t recipe = choose(gate, setting.node, call);
    return recipe == SAGE_CPU_FLOAT ? attend_float(setting, call)
                                    : attend_quantized(setting, call, recipe);
}

const char* served_by_cpu(Recipe recipe) {
    if (recipe == Recipe::kAuto && find_gate() == nullptr) return "float";
    switch (nearest(recipe)) {
        case SAGE_CPU_INT8_INT8:
            return "int8_int8";
        case SAGE_CPU_INT8_INT16:
            return "int8_int16";
        default:
            return "float";
    }
}

}  // namespace sage_ort
