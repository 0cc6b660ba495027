// A fuzz target for ONNX Runtime's operator library: bytes become a node and its tensors, valid or
// not, in a runtime that may fail anywhere.
//
// A valid call is compared with double precision; what is invalid must be refused in a sentence of
// the operator; a failure of the runtime must come back; and nothing may be kept of any of it.
//
// tests/native/fuzz_main.cpp makes a program of it.

#include <cmath>
#include <cstdio>
#include <limits>

#include "../native/tensor.hpp"
#include "fake_runtime.hpp"
#include "sage_ort.h"

namespace sage_ort {
namespace {

using fuzz::Choices;
using fuzz::Random;

std::string at_hand;  // the call, in words

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n  %s\n", what.c_str(), at_hand.c_str());
    std::abort();
}
void expect(bool condition, const std::string& what) {
    if (!condition) fail(what);
}

// A status' message, which is given back; "" for null.
std::string take(OrtStatus* status) {
    if (status == nullptr) return "";
    std::string message = status->injected ? "injected" : status->message;
    --Runtime::get().statuses;
    delete status;
    return message;
}

bool is_sentence(const std::string& message) {
    return message.rfind("ai.sage::Attention: ", 0) == 0;
}

int cpu_dtype(ElementType dtype) {
    return dtype == kFloat32    ? SAGE_CPU_FLOAT32
           : dtype == kBFloat16 ? SAGE_CPU_BFLOAT16
           : dtype == kBool     ? SAGE_CPU_BOOL
                                : SAGE_CPU_FLOAT16;
}

double element(const OrtValue& value, int64_t index) {
    int dtype = cpu_dtype(value.info.dtype);
    return fuzz::decode(value.data.get() + index * fuzz::element_size(dtype), dtype);
}

void fill(OrtValue& value, Random& random, double deviation) {
    int dtype = cpu_dtype(value.info.dtype);
    if (value.bytes() != value.elements() * fuzz::element_size(dtype)) {  // a type that is refused
        std::memset(value.data.get(), 0, size_t(value.bytes()));
        return;
    }
    for (int64_t i = 0; i < value.elements(); ++i) {
        double x = random.gaussian() * deviation;
        if (dtype == SAGE_CPU_BOOL) x = x > -0.7;
        fuzz::encode(x, dtype, value.data.get() + i * fuzz::element_size(dtype));
    }
}

constexpr ElementType kFloats[] = {kFloat32, kFloat16, kBFloat16};
constexpr ElementType kMaskTypes[] = {kBool, kFloat32, kFloat16, kBFloat16};

// A node and its tensors. `wrong` says what is wrong with them, if anything is.
struct Case {
    OrtKernelInfo info;
    OrtKernelContext context;
    ElementType dtype;
    int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
    std::string recipe = "auto", mask_class = "none", wrong;
    int64_t left = -1, right = -1;
    double scale, softcap = 0;
    bool dead_is_nan = false, nonfinite = false;
    bool wrong_node = false;  // refused when the kernel is made

    const OrtValue& input(size_t index) const { return *context.inputs[index]; }
    bool has(size_t index) const {
        return index < context.inputs.size() && context.inputs[index] != nullptr;
    }
};

int64_t choose_length(Choices& choices) {
    static const int64_t kLengths[] = {0,  1,  2,  3,  15,  16,  17,  31,
                                       33, 63, 64, 65, 127, 129, 200, 257};
    return choices.of(kLengths);
}

void set_attribute(Case& c, const char* name, Attribute attribute) {
    c.info.attributes[name] = std::move(attribute);
}
void set_number(Case& c, const char* name, Attribute::Kind kind, double x) {
    set_attribute(c, name, {kind, x, ""});
}
void set_word(Case& c, const char* name, const std::string& word) {
    set_attribute(c, name, {Attribute::kString, 0, word});
}

void choose_node(Case& c, Choices& choices) {
    static const char* const kRecipes[] = {"auto",     "exact",     "int4_fp8",  "int4_fp16",
                                           "int8_fp8", "int8_fp16", "int8_int8", "int8_int16"};
    static const char* const kClasses[] = {"none", "causal", "causal_bottom_right", "window",
                                           "window_bottom_right"};
    static const int64_t kSides[] = {-1, 0, 1, 5, 70, INT64_MAX};
    c.recipe = choices.of(kRecipes);
    if (c.recipe != "auto" || choices.one_in(2)) set_word(c, "recipe", c.recipe);
    c.mask_class = choices.of(kClasses);
    set_word(c, "mask_class", c.mask_class);
    if (c.mask_class[0] == 'w') {
        c.left = choices.of(kSides);
        c.right = choices.of(kSides);
        set_attribute(c, "window_left", {Attribute::kInt, 0, ""});
        set_attribute(c, "window_right", {Attribute::kInt, 0, ""});
        // A double does not hold every int64.
        c.left = std::min<int64_t>(c.left, int64_t(1) << 52);
        c.right = std::min<int64_t>(c.right, int64_t(1) << 52);
        c.info.attributes["window_left"].number = double(c.left);
        c.info.attributes["window_right"].number = double(c.right);
    }
    c.scale =
        float((choices.one_in(2) ? 1 : 0.5) / std::sqrt(double(std::max<int64_t>(c.head_dim, 1))));
    set_number(c, "scale", Attribute::kFloat, c.scale);
    if (choices.one_in(4)) {
        c.softcap = choices.one_in(2) ? 5 : 30;
        set_number(c, "softcap", Attribute::kFloat, c.softcap);
    }
    c.dead_is_nan = choices.one_in(3);
    if (c.dead_is_nan) set_word(c, "dead_rows", "nan");
}

void spoil_node(Case& c, Choices& choices) {
    static const char* const kWords[] = {"recipe", "mask_class", "dead_rows"};
    static const char* const kNumbers[] = {"scale", "softcap"};
    static const double kBad[] = {NAN, INFINITY, -INFINITY};
    c.wrong_node = true;
    const char* name;
    switch (choices.below(10)) {
        case 0:
            set_word(c, name = choices.of(kWords), "sideways");
            break;
        case 1:
            set_word(c, name = choices.of(kWords),
                     std::string(size_t(1 + choices.below(2000)), 'x'));
            break;
        case 9:
            set_word(c, name = "recipe", c.recipe + std::string("\0junk", 5));
            break;
        case 2:
            set_number(c, name = choices.of(kWords),
                       choices.one_in(2) ? Attribute::kFloat : Attribute::kInts, 1);
            break;
        case 3:
            set_number(c, name = choices.of(kNumbers), Attribute::kFloat, choices.of(kBad));
            break;
        case 4:
            set_number(c, name = choices.of(kNumbers), Attribute::kInt, 1);
            break;
        case 5:
            c.info.attributes.erase(name = "scale");
            break;
        case 6:
            set_number(c, name = "window_left", Attribute::kInt, -2 - double(choices.below(100)));
            break;
        case 7:
            set_word(c, "mask_class", "causal");
            set_number(c, name = "window_right", Attribute::kInt, 3);
            break;
        default:
            set_number(c, name = "softcap", Attribute::kFloat, -1);
    }
    c.wrong = name;
}

std::unique_ptr<OrtValue> tensor(ElementType dtype, std::vector<int64_t> dims, Random& random,
                                 double deviation = 1) {
    auto value = std::make_unique<OrtValue>(dtype, std::move(dims));
    fill(*value, random, deviation);
    return value;
}

void choose_tensors(Case& c, Choices& choices, Random& random) {
    auto& inputs = c.context.inputs;
    inputs.push_back(tensor(c.dtype, {c.batch, c.heads, c.queries, c.head_dim}, random));
    inputs.push_back(tensor(c.dtype, {c.batch, c.kv_heads, c.keys, c.head_dim}, random));
    inputs.push_back(tensor(c.dtype, {c.batch, c.kv_heads, c.keys, c.value_dim}, random));
    bool mask = choices.one_in(2), sinks = choices.one_in(3);
    if (mask || sinks) inputs.push_back(nullptr);
    if (mask) {
        std::vector<int64_t> dims = {c.batch, c.heads, c.queries, c.keys};
        for (int64_t& dim : dims)
            if (choices.one_in(3)) dim = 1;
        int64_t rank = 1 + choices.below(4);
        dims.erase(dims.begin(), dims.end() - rank);
        inputs[3] = tensor(choices.of(kMaskTypes), dims, random);
        OrtValue& value = *inputs[3];
        int dtype = cpu_dtype(value.info.dtype);
        double low = choices.one_in(2) ? -INFINITY : -10000;
        for (int64_t i = 0; dtype != SAGE_CPU_BOOL && i < value.elements(); ++i)
            if (random.uniform() < 0.3)
                fuzz::encode(low, dtype, value.data.get() + i * fuzz::element_size(dtype));
    }
    if (sinks) inputs.push_back(tensor(choices.of(kFloats), {c.heads}, random));
    if (choices.one_in(8) && c.keys > 0 && c.batch * c.kv_heads > 0) {
        c.nonfinite = true;  // only memory is looked at
        static const double kValues[] = {NAN, INFINITY, -INFINITY, 1e30, -1e30};
        for (size_t i = 0; i < 3; ++i) {
            OrtValue& value = *inputs[i];
            if (value.elements() == 0) continue;
            int dtype = cpu_dtype(c.dtype);
            int64_t at = int64_t(random.bits() % uint64_t(value.elements()));
            fuzz::encode(choices.of(kValues), dtype,
                         value.data.get() + at * fuzz::element_size(dtype));
        }
    }
}

void spoil_tensors(Case& c, Choices& choices, Random& random) {
    auto& inputs = c.context.inputs;
    size_t index = size_t(choices.below(3));
    std::vector<int64_t> dims = c.input(index).info.dims;
    static const ElementType kOthers[] = {ElementType(7), ElementType(11), ElementType(16),
                                          ElementType(1), ElementType(23)};
    auto widen = [&](size_t count) {
        while (inputs.size() < count) inputs.push_back(nullptr);
    };
    auto give = [&](std::vector<int64_t> query, std::vector<int64_t> key,
                    std::vector<int64_t> value) {
        for (std::unique_ptr<OrtValue>& input : inputs) input.reset();
        inputs[0] = std::make_unique<OrtValue>(c.dtype, query);
        inputs[1] = std::make_unique<OrtValue>(c.dtype, key);
        inputs[2] = std::make_unique<OrtValue>(c.dtype, value);
        c.batch = 0;  // of numbers to compare
    };
    constexpr int64_t kVast = int64_t(1) << 40;
    switch (choices.below(12)) {
        case 11:  // rows without number, and nothing to write
            give({1, 1, kVast, 0}, {1, 1, 3, 0}, {1, 1, 3, 0});
            c.context.output_count = 1;
            break;
        case 10:  // an output of more than memory from inputs of nothing
            give({1, 1, kVast, 0}, {1, 1, 0, 0}, {1, 1, 0, kVast});
            c.wrong = "sizes";
            break;
        case 9:
            give({0, 1, 1, 8}, {0, 1, 8, 8}, {0, 1, 8, 8});
            widen(4);
            inputs[3] =
                std::make_unique<OrtValue>(kBool, std::vector<int64_t>{0, int64_t(1) << 61, 1, 8});
            c.wrong = "mask";
            break;
        case 8: {  // no elements, so that other dims may be anything
            static const int64_t kLarge[] = {1 << 18, 1 << 22, int64_t(1) << 40, int64_t(1) << 62};
            int64_t large = choices.of(kLarge);
            give({0, large, large, 8}, {0, large, large, 8}, {0, large, large, 8});
            c.wrong = large > 1 << 18 ? "sizes" : "";
            break;
        }
        case 0: {
            dims.resize(size_t(choices.below(10)), 2);
            if (dims.size() == 4) dims.push_back(1);
            inputs[index] = tensor(c.dtype, dims, random);
            c.wrong = "rank";
            break;
        }
        case 1:
            dims[size_t(choices.below(2)) * 3] += 1;  // batch, or head_dim
            if (index == 2 && dims[3] != c.value_dim) dims[0] += 1;
            inputs[index] = tensor(c.dtype, dims, random);
            c.wrong = "shape";
            break;
        case 2: {
            ElementType other = choices.of(kOthers);
            if (other == c.dtype) other = ElementType(7);
            inputs[index] = tensor(other, dims, random);
            c.wrong = "dtype";
            break;
        }
        case 3:
            dims = c.input(1).info.dims;
            dims[2] += 1;
            inputs[1] = tensor(c.dtype, dims, random);
            c.wrong = "length";
            break;
        case 4:
            widen(4);
            inputs[3] = tensor(kFloat32, {c.keys + 2 + choices.below(3)}, random);
            c.wrong = "mask";
            break;
        case 5:
            widen(4);
            inputs[3] = choices.one_in(2)
                            ? tensor(ElementType(choices.one_in(2) ? 7 : 11), {1}, random)
                            : tensor(kBool,
                                     choices.one_in(2) ? std::vector<int64_t>{}
                                                       : std::vector<int64_t>(9, 1),
                                     random);
            c.wrong = "mask";
            break;
        case 6:
            widen(5);
            inputs[4] = tensor(kFloat32, {c.heads + 1}, random);
            c.wrong = "sinks";
            break;
        default:
            widen(5);
            inputs[4] = choices.one_in(2) ? tensor(ElementType(7), {c.heads}, random)
                                          : tensor(kFloat32, {c.heads, 1}, random);
            c.wrong = "sinks";
    }
}

// --- double precision

double bias(const Case& c, int64_t b, int64_t h, int64_t i, int64_t j) {
    if (!c.has(3)) return 0;
    const OrtValue& mask = c.input(3);
    int64_t place[4] = {b, h, i, j}, index = 0;
    for (size_t d = 0; d < mask.info.dims.size(); ++d) {
        int64_t size = mask.info.dims[d];
        index = index * size + (size == 1 ? 0 : place[4 - mask.info.dims.size() + d]);
    }
    double x = element(mask, index);
    if (mask.info.dtype == kBool) return x != 0 ? 0 : -INFINITY;
    return x;
}

bool in_band(const Case& c, int64_t i, int64_t j) {
    bool bottom_right = c.mask_class.find("bottom_right") != std::string::npos;
    int64_t diagonal = i + (bottom_right ? c.keys - c.queries : 0);
    if (c.mask_class == "none") return true;
    if (c.mask_class[0] == 'c') return j <= diagonal;
    return (c.left < 0 || j >= diagonal - c.left) && (c.right < 0 || j <= diagonal + c.right);
}

void check_row(const Case& c, int64_t b, int64_t h, int64_t i, bool exact) {
    int64_t kv_head = h / (c.heads / c.kv_heads);
    auto row = [&](int64_t heads, int64_t head, int64_t length, int64_t at, int64_t dim) {
        return ((b * heads + head) * length + at) * dim;
    };
    std::vector<double> weights(size_t(c.keys), 0.0);
    double sink = c.has(4) ? element(c.input(4), h) : -INFINITY, maximum = sink, total = 0;
    for (int64_t j = 0; j < c.keys; ++j) {
        double score = 0, shift = bias(c, b, h, i, j);
        for (int64_t d = 0; d < c.head_dim; ++d)
            score += element(c.input(0), row(c.heads, h, c.queries, i, c.head_dim) + d) *
                     element(c.input(1), row(c.kv_heads, kv_head, c.keys, j, c.head_dim) + d);
        score *= c.scale;
        if (c.softcap != 0) score = c.softcap * std::tanh(score / c.softcap);
        weights[size_t(j)] = in_band(c, i, j) ? score + shift : -INFINITY;
        maximum = std::max(maximum, weights[size_t(j)]);
    }
    for (double& weight : weights) {
        weight = weight == -INFINITY ? 0 : std::exp(weight - maximum);
        total += weight;
    }
    if (sink != -INFINITY) total += std::exp(sink - maximum);
    const OrtValue& output = *c.context.outputs[0];
    double largest = 1e-3;
    for (int64_t j = 0; j < c.keys; ++j)
        for (int64_t d = 0; d < c.value_dim; ++d)
            largest = std::max(
                largest, std::fabs(element(c.input(2),
                                           row(c.kv_heads, kv_head, c.keys, j, c.value_dim) + d)));
    double rounding = c.dtype == kFloat32 ? 1e-6 : c.dtype == kFloat16 ? 1e-3 : 8e-3;
    double allowed = (exact ? 1e-5 : 0.08) * largest + rounding * largest;
    // Beside such a bias float32 has few bits left for a score.
    if (maximum < -1000) allowed += 5e-3 * largest;
    for (int64_t d = 0; d < c.value_dim; ++d) {
        double expected = 0;
        for (int64_t j = 0; j < c.keys && total > 0; ++j)
            if (weights[size_t(j)] != 0)
                expected +=
                    weights[size_t(j)] / total *
                    element(c.input(2), row(c.kv_heads, kv_head, c.keys, j, c.value_dim) + d);
        double got = element(output, row(c.heads, h, c.queries, i, c.value_dim) + d);
        if (total == 0 && c.dead_is_nan && c.keys > 0)
            expect(std::isnan(got), "a dead row is not NaN");
        else
            expect(std::fabs(got - expected) <= allowed,
                   "output " + std::to_string(got) + ", expected " + std::to_string(expected));
    }
    if (!c.context.outputs[1]) return;
    double lse = element(*c.context.outputs[1], row(c.heads, h, c.queries, i, 1));
    if (total == 0)
        expect(lse == -INFINITY, "the LSE of a dead row is " + std::to_string(lse));
    else
        expect(std::fabs(lse - (maximum + std::log(total))) <=
                   (exact ? 1e-4 : 0.2) + std::fabs(maximum) * 1e-5,
               "LSE " + std::to_string(lse) + ", expected " +
                   std::to_string(maximum + std::log(total)));
}

// --- the runtime's side

const OrtCustomOp* find_operator(ElementType dtype, const OrtSessionOptions& options) {
    for (const OrtCustomOp* op : options.domains.at(0)->operators)
        if (op->GetInputType(op, 0) == dtype &&
            std::strcmp(op->GetExecutionProviderType(op), "CPUExecutionProvider") == 0)
            return op;
    return nullptr;
}

void check_shapes(const OrtCustomOp* op, Choices& choices) {
    OrtShapeInferContext context;
    bool known = true;
    for (size_t i = 0; i < 3; ++i) {
        OrtTensorTypeAndShapeInfo info{kFloat32, {}, {}};
        size_t rank = choices.one_in(6) ? size_t(choices.below(6)) : 4;
        for (size_t d = 0; d < rank; ++d) {
            int64_t kind = choices.below(8);
            info.dims.push_back(kind < 4 ? -1 : kind);
            info.names.push_back(kind > 0 && kind < 4 ? "n" + std::to_string(kind) : "");
            bool used = i == 0 ? d < 3 : i == 2 && d == 3;
            if (used) known &= kind != 0;
        }
        if (i != 1) known &= rank == 4;
        context.inputs.push_back(std::move(info));
    }
    std::string message = take(op->InferOutputShapeFn(op, &context));
    if (!message.empty()) {
        expect(message == "injected", "shape inference says " + message);
        return;
    }
    expect(context.output.dims.empty() != known, "shape inference");
    if (known) {
        expect(context.output.dims[3] == context.inputs[2].dims[3] &&
                   context.output.names[0] == context.inputs[0].names[0],
               "the inferred shape");
    }
}

void describe(const Case& c) {
    static const char* const kNames[] = {"query", "key", "value", "mask", "sinks"};
    at_hand = c.recipe + ", " + c.mask_class + " " + std::to_string(c.left) + " " +
              std::to_string(c.right) + ", scale " + std::to_string(c.scale) + ", softcap " +
              std::to_string(c.softcap) + (c.dead_is_nan ? ", dead rows NaN" : "") +
              (c.wrong.empty() ? "" : ", wrong " + c.wrong);
    for (size_t i = 0; i < c.context.inputs.size(); ++i) {
        if (!c.has(i)) continue;
        at_hand += std::string(", ") + kNames[i] + " of type " +
                   std::to_string(int(c.input(i).info.dtype)) + " (";
        for (int64_t dim : c.input(i).info.dims) at_hand += std::to_string(dim) + " ";
        at_hand += ")";
    }
}

void run_case(Choices& choices, const OrtCustomOp* op, ElementType dtype) {
    Runtime& runtime = Runtime::get();
    Random random(choices.seed());
    static const int64_t kHeadDims[] = {0, 1, 7, 8, 16, 24, 32, 50, 64, 72, 80, 128, 256, 300};
    Case c;
    c.dtype = c.context.output_dtype = dtype;
    c.batch = choices.one_in(12) ? 0 : 1 + choices.below(2);
    c.kv_heads = 1 + choices.below(2);
    c.heads = c.kv_heads * (1 + choices.below(3));
    c.queries = choose_length(choices);
    c.keys = choices.one_in(3) ? c.queries : choose_length(choices);
    c.head_dim = choices.of(kHeadDims);
    c.value_dim = choices.one_in(3) ? choices.of(kHeadDims) : c.head_dim;
    choose_node(c, choices);
    choose_tensors(c, choices, random);
    c.context.output_count = choices.one_in(2) ? 1 : 2;
    int64_t spoil = choices.below(6);
    if (spoil == 0) spoil_node(c, choices);
    if (spoil == 1) spoil_tensors(c, choices, random);
    describe(c);
    runtime.has_memory = !choices.one_in(40);
    runtime.calls_until_failure = choices.one_in(8) ? choices.below(60) : -1;
    bool fails = runtime.calls_until_failure >= 0 || !runtime.has_memory;

    void* kernel = nullptr;
    std::string message = take(op->CreateKernelV2(op, api_base()->GetApi(1), &c.info, &kernel));
    if (kernel == nullptr) {
        expect(!message.empty(), "no kernel and no status");
        expect(message == "injected" || (is_sentence(message) && (c.wrong_node || fails)),
               "a kernel is refused: " + message);
        if (c.wrong_node && !fails)
            expect(message.find(c.wrong) != std::string::npos,
                   "wrong " + c.wrong + " is refused with: " + message);
        return;
    }
    expect(message.empty() && (!c.wrong_node || fails), "a wrong node passes: " + c.wrong);
    bool is_to_fail = runtime.calls_until_failure >= 0;
    message = take(op->KernelComputeV2(kernel, &c.context));
    op->KernelDestroy(kernel);
    if (is_to_fail && runtime.calls_until_failure < 0)
        expect(message == "injected", "a call that fails ends with status: " + message);
    if (fails) {
        expect(message.empty() || message == "injected" || is_sentence(message), message);
        return;
    }
    if (!c.wrong.empty()) {
        expect(is_sentence(message), "wrong " + c.wrong + " passes, with status: " + message);
        return;
    }
    expect(message.empty(), "a call is refused: " + message);
    if (c.nonfinite) return;
    bool exact = c.recipe == "exact" || c.head_dim > 256 || c.value_dim > 256;
    for (int tries = 0; tries < 3 && c.batch * c.queries > 0; ++tries)
        check_row(c, int64_t(random.bits() % uint64_t(c.batch)),
                  int64_t(random.bits() % uint64_t(c.heads)),
                  int64_t(random.bits() % uint64_t(c.queries)), exact);
}

// A runtime that is too old gets a sentence, and no operator.
void check_old_runtime(uint32_t version) {
    Runtime& runtime = Runtime::get();
    runtime.newest_version = version;
    runtime.version = "1.17.0";
    OrtSessionOptions options;
    void* status = RegisterCustomOps(&options, api_base());
    expect(options.domains.empty() && status != nullptr, "operators for an old runtime");
    // Version 0: not even a status of the runtime can be made.
    if (version == 0)
        expect(is_sentence(static_cast<char*>(status) + sizeof(OrtErrorCode)),
               "a failure in words");
    else {
        std::string message = take(static_cast<OrtStatus*>(status));
        expect(is_sentence(message) && message.find("1.17.0") != std::string::npos &&
                   message.find("1.21") != std::string::npos,
               "an old runtime is refused with: " + message);
    }
    runtime.newest_version = kApiVersion;
    runtime.version = "1.32.0";
}

}  // namespace
}  // namespace sage_ort

using namespace sage_ort;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Choices choices(data, size);
    Runtime& runtime = Runtime::get();
    if (choices.one_in(40)) check_old_runtime(uint32_t(choices.below(21)));
    OrtSessionOptions options;
    if (choices.one_in(40)) {
        runtime.calls_until_failure = choices.below(7);
        take(static_cast<OrtStatus*>(RegisterCustomOps(&options, api_base())));
        options.domains.clear();
    }
    runtime.calls_until_failure = -1;
    runtime.has_memory = true;
    expect(RegisterCustomOps(&options, api_base()) == nullptr, "no operators");
    runtime.parallel = Runtime::Parallel(choices.below(3));
    ElementType dtype = choices.of(kFloats);
    const OrtCustomOp* op = find_operator(dtype, options);
    expect(op != nullptr, "no operator for a dtype");
    expect(op->GetStartVersion(op) == 1 && op->GetEndVersion(op) == 1, "other versions");
    if (choices.one_in(4)) {
        runtime.calls_until_failure = choices.one_in(3) ? choices.below(12) : -1;
        check_shapes(op, choices);
    }
    run_case(choices, op, dtype);
    runtime.calls_until_failure = -1;
    expect(runtime.nothing_is_left(), "something of the runtime's is kept");
    return 0;
}
