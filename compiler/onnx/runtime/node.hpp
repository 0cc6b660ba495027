// A node's attributes: what it computes besides its tensors. compiler/semantics.py defines the
// words; all checks that need no tensor are made here, when a session is made.
#pragma once

#include "ort_abi.hpp"

namespace sage_ort {

enum class Recipe {
    kAuto,
    kExact,
    kInt4Fp8,
    kInt4Fp16,
    kInt8Fp8,
    kInt8Fp16,
    kInt8Int8,
    kInt8Int16,
};
enum class MaskClass { kNone, kCausal, kCausalBottomRight, kWindow, kWindowBottomRight };
enum class DeadRows { kZero, kNan };

// Key j is visible to query i iff -left <= j - (i + diagonal) <= right; a negative side has no
// limit.
struct Band {
    int64_t left, right, diagonal;
};

struct Node {
    Recipe recipe;
    MaskClass mask_class;
    DeadRows dead_rows;
    float scale;
    float softcap;  // 0: none
    int64_t window_left, window_right;

    Band band(int64_t query_length, int64_t key_length) const;
};

// Fills a node from its attributes. Refuses unknown words, values out of range, values that
// contradict each other and attributes of another type.
OrtStatus* read_node(const OrtApi& api, const OrtKernelInfo* info, Node* node);

// The recipe of a name; false for an unknown one.
bool parse_recipe(const char* name, Recipe* recipe);

}  // namespace sage_ort
