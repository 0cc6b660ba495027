// One attention on a device: the kernels that serve it, its scratch memory, its launches.
//
// It does what Call of compiler/kernels/cuda/kernel.py does, with the same numbers, and what
// masks.py does with torch. Shapes: query (B, H, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk,
// Dv), output (B, H, Lq, Dv), lse (B, H, Lq), all dense.
#pragma once

#include <sage/params.cuh>

#include "device.hpp"

namespace sage_cuda {

constexpr int64_t kUnbounded = -1;

struct Attention {
    Dtype dtype;     // of query, key, value and output
    bool automatic;  // the device's default recipe
    Recipe recipe;   // if not that
    int64_t batch, heads, kv_heads, query_length, key_length, head_dim, value_head_dim;
    float scale;    // finite
    float softcap;  // 0: none
    bool dead_rows_are_nan;
    // Key j is visible to query i iff -left <= j - (i + diagonal) <= right; kUnbounded: no limit.
    int64_t left, right, diagonal;

    // On the device.
    const void *query, *key, *value;
    sage::Mask mask;            // a null pointer: none; strides of 0 where it broadcasts
    const void* sinks;          // null: none
    sage::MaskKind sinks_kind;  // their type; not kBool
    void* output;
    float* lse;  // null: not wanted
};

// What is known of an attention before it has memory.
class Work {
 public:
    // Finds the kernels and the sizes. Touches no device, and refuses what there are no kernels
    // for.
    bool plan(const Device& device, const Attention& attention, Error& error);

    // Scratch memory on the device, of any alignment; 0: none is needed.
    int64_t scratch_bytes() const { return scratch_bytes_; }

    // The recipe that serves it; only where there is something to attend to.
    Recipe recipe() const { return plan_->recipe; }

    // Starts the kernels on a stream of the device, and returns before they end. `attention` is the
    // one that was planned; `scratch` may be used again by what comes later on the stream.
    bool launch(Device& device, const Attention& attention, void* scratch, CUstream stream,
                Error& error) const;

 private:
    // Parts of the scratch memory, in this order.
    enum Part {
        kKeySums,
        kValueAmax,
        kQueryCodes,
        kQueryScales,
        kMeans,
        kRowTerm,
        kTiles,
        kValueScales,
        kDelta,
        kCounters,
        kKeyTotals,
        kValueTotals,
        kTaken,
        kMaskTiles,
        kMaskLive,
        kMaskDiscerning,
        kMaskKeys,
        kMaskCounts,
        kSinks,
        kParts,
    };

    // What the kernels take of a mask.
    struct Flags {
        sage::Flags tiles, live, keys;
        float* counts;
    };

    void see(const Attention& a);
    int64_t quantizing_blocks(const Attention& a) const;
    int64_t tasks_ahead(const Attention& a, int64_t multiprocessors) const;
    bool lay_out(const Attention& a, Error& error);
    Flags flags(const Attention& a, char* const (&parts)[kParts]) const;
    bool load(Device& device, const Attention& a, CUstream stream, Error& error) const;
    bool look_through_mask(const Device& device, const Attention& a, char* const (&parts)[kParts],
                           CUstream stream, Error& error) const;
    bool fill(Device& device, const Attention& a, CUstream stream, Error& error) const;
    bool spread_sinks(const Device& device, const Attention& a, float* out, int64_t count,
                      int64_t repeats, CUstream stream, Error& error) const;

    const Plan* plan_ = nullptr;  // null: there is nothing to attend to
    bool converts_sinks_ = false;
    int64_t group_ = 0, query_blocks_ = 0, key_blocks_ = 0;
    int64_t lower_ = 0, upper_ = 0;  // query i sees the keys i + lower to i + upper
    int64_t first_key_ = 0, end_key_ = 0, first_live_ = 0, end_live_ = 0;
    int64_t chunks_ = 0, chunk_tokens_ = 0;
    int64_t mask_batches_ = 0, mask_heads_ = 0, mask_kv_heads_ = 0;
    int64_t sizes_[kParts] = {};  // in bytes
    int64_t scratch_bytes_ = 0;
};

// Whether the pack has any kernel for a dtype and a recipe on a device; false, and why, if not.
bool check_recipe(const Device& device, Dtype dtype, bool automatic, Recipe recipe, Error& error);

}  // namespace sage_cuda
