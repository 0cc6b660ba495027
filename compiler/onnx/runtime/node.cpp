#include "node.hpp"

#include <float.h>
#include <stdio.h>
#include <string.h>

#include "status.hpp"

namespace sage_ort {
namespace {

constexpr size_t kLongestWord = 64;  // no word that is known is longer
constexpr int64_t kUnbounded = -1;
constexpr int64_t kFar = int64_t(1) << 40;  // beyond any length: such a side has no limit either

// Words in the order of their enums.
const char* const kRecipes[] = {"auto",     "exact",     "int4_fp8",  "int4_fp16",
                                "int8_fp8", "int8_fp16", "int8_int8", "int8_int16"};
const char* const kMaskClasses[] = {"none", "causal", "causal_bottom_right", "window",
                                    "window_bottom_right"};
const char* const kDeadRows[] = {"zero", "nan"};

bool finite(float x) { return x - x == 0.0f; }

template <size_t Count>
int find(const char* const (&words)[Count], const char* word) {
    for (size_t i = 0; i < Count; i++)
        if (strcmp(words[i], word) == 0) return int(i);
    return -1;
}

// Reads a node's attributes one by one. The runtime does not say whether one is missing or of
// another type; it is missing if no getter finds it.
class Attributes {
 public:
    Attributes(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

    OrtStatus* number(const char* name, float* value, bool required = false) const {
        if (succeeded(api_.KernelInfoGetAttribute_float(info_, name, value))) return nullptr;
        return missing(name, "a float", required);
    }

    OrtStatus* integer(const char* name, int64_t* value) const {
        if (succeeded(api_.KernelInfoGetAttribute_int64(info_, name, value))) return nullptr;
        return missing(name, "an int", false);
    }

    template <class Enum, size_t Count>
    OrtStatus* word(const char* name, const char* const (&words)[Count], Enum* value) const {
        char text[kLongestWord + 1];
        size_t bytes = 0;
        if (!succeeded(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &bytes)))
            return missing(name, "a string", false);
        if (bytes > sizeof text) return unknown(name, "a longer word", words, Count);
        SAGE_ORT_TRY(api_.KernelInfoGetAttribute_string(info_, name, text, &bytes));
        if (strlen(text) + 1 != bytes) return unknown(name, "a word and a zero", words, Count);
        int found = find(words, text);
        if (found < 0) return unknown(name, text, words, Count);
        *value = Enum(found);
        return nullptr;
    }

 private:
    bool succeeded(OrtStatus* status) const {
        if (status == nullptr) return true;
        api_.ReleaseStatus(status);
        return false;
    }

    // The getters for lists do not tell one kind of list from another.
    bool has_list(const char* name) const {
        size_t floats = 0, integers = 0;
        return succeeded(api_.KernelInfoGetAttributeArray_float(info_, name, nullptr, &floats)) ||
               succeeded(api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &integers));
    }

    OrtStatus* missing(const char* name, const char* needed, bool required) const {
        float number;
        int64_t integer;
        size_t size = 0;
        const char* found = nullptr;
        if (succeeded(api_.KernelInfoGetAttribute_float(info_, name, &number)))
            found = "a float";
        else if (succeeded(api_.KernelInfoGetAttribute_int64(info_, name, &integer)))
            found = "an int";
        else if (succeeded(api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size)))
            found = "a string";
        else if (has_list(name))
            found = "a list";
        if (found != nullptr)
            return refuse(api_, ORT_INVALID_GRAPH, "attribute %s is %s; it must be %s", name, found,
                          needed);
        if (!required) return nullptr;
        return refuse(api_, ORT_INVALID_GRAPH, "attribute %s is missing; it must be %s", name,
                      needed);
    }

    OrtStatus* unknown(const char* name, const char* text, const char* const* words,
                       size_t count) const {
        char known[256] = "";
        for (size_t i = 0; i < count; i++) {
            size_t used = strlen(known);
            snprintf(known + used, sizeof known - used, "%s%s", i == 0 ? "" : ", ", words[i]);
        }
        return refuse(api_, ORT_INVALID_GRAPH, "attribute %s is \"%s\"; known: %s", name, text,
                      known);
    }

    const OrtApi& api_;
    const OrtKernelInfo* info_;
};

}  // namespace

Band Node::band(int64_t query_length, int64_t key_length) const {
    int64_t bottom_right = key_length - query_length;
    switch (mask_class) {
        case MaskClass::kCausal:
            return {kUnbounded, 0, 0};
        case MaskClass::kCausalBottomRight:
            return {kUnbounded, 0, bottom_right};
        case MaskClass::kWindow:
            return {window_left, window_right, 0};
        case MaskClass::kWindowBottomRight:
            return {window_left, window_right, bottom_right};
        case MaskClass::kNone:
            break;
    }
    return {kUnbounded, kUnbounded, 0};
}

bool parse_recipe(const char* name, Recipe* recipe) {
    int found = find(kRecipes, name);
    if (found < 0) return false;
    *recipe = Recipe(found);
    return true;
}

OrtStatus* read_node(const OrtApi& api, const OrtKernelInfo* info, Node* node) {
    *node = {Recipe::kAuto, MaskClass::kNone, DeadRows::kZero, 0.0f, 0.0f, kUnbounded, kUnbounded};
    Attributes attributes(api, info);
    SAGE_ORT_TRY(attributes.word("recipe", kRecipes, &node->recipe));
    SAGE_ORT_TRY(attributes.word("mask_class", kMaskClasses, &node->mask_class));
    SAGE_ORT_TRY(attributes.word("dead_rows", kDeadRows, &node->dead_rows));
    SAGE_ORT_TRY(attributes.number("scale", &node->scale, true));
    SAGE_ORT_TRY(attributes.number("softcap", &node->softcap));
    SAGE_ORT_TRY(attributes.integer("window_left", &node->window_left));
    SAGE_ORT_TRY(attributes.integer("window_right", &node->window_right));

    if (!finite(node->scale))
        return refuse(api, ORT_INVALID_GRAPH, "scale is %g; it must be finite",
                      double(node->scale));
    if (!finite(node->softcap) || node->softcap < 0.0f)
        return refuse(api, ORT_INVALID_GRAPH,
                      "softcap is %g; it must be positive and finite, or 0 for none",
                      double(node->softcap));
    // The inverse of a smaller one is not finite, and zero would mean none.
    if (node->softcap > 0.0f && node->softcap < FLT_MIN) node->softcap = FLT_MIN;

    if (node->window_left < kUnbounded || node->window_right < kUnbounded)
        return refuse(api, ORT_INVALID_GRAPH,
                      "window_left and window_right are %lld and %lld; each counts keys, -1 means "
                      "no limit",
                      static_cast<long long>(node->window_left),
                      static_cast<long long>(node->window_right));
    bool windowed =
        node->mask_class == MaskClass::kWindow || node->mask_class == MaskClass::kWindowBottomRight;
    if (!windowed && (node->window_left != kUnbounded || node->window_right != kUnbounded))
        return refuse(api, ORT_INVALID_GRAPH,
                      "window_left and window_right are %lld and %lld with mask_class \"%s\"; use "
                      "window or window_bottom_right, or leave them out",
                      static_cast<long long>(node->window_left),
                      static_cast<long long>(node->window_right),
                      kMaskClasses[int(node->mask_class)]);
    // Positions are computed in 64 bits.
    if (node->window_left > kFar) node->window_left = kFar;
    if (node->window_right > kFar) node->window_right = kFar;
    return nullptr;
}

}  // namespace sage_ort
