// A kernel pack, by its launch table: which kernels serve an attention, and their images.
// compiler/kernels/cuda/launch_table.py writes it and is its reference.
#pragma once

#include <stdint.h>

#include "array.hpp"
#include "error.hpp"
#include "sha256.hpp"

namespace sage_cuda {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32 };
enum class Recipe : int { kInt4Fp8, kInt4Fp16, kInt8Fp8, kInt8Fp16 };
constexpr int kRecipes = 4;

const char* name_of(Dtype dtype);
const char* name_of(Recipe recipe);

constexpr int kAbsent = -1;

struct Kernel {
    char arch[16];
    char symbol[128];
    int64_t threads, shared_bytes;  // of a block
    int64_t params_bytes;           // of its struct in sage/params.cuh
    int64_t image_bytes;
    char sha256[kDigestText + 1];
};

struct Arch {
    char name[16];
    int64_t major, minor;  // its compute capability
    Recipe recipes[kRecipes];
    int recipe_count;  // the device's default is the first
    // Kernels, or kAbsent.
    int64_t mask_rows, mask_keys, mask_counts, sinks;
};

// What tells the kernels of one attention from another's.
struct Choice {
    Dtype dtype;
    Recipe recipe;
    int64_t head_dim, value_head_dim;
    bool window, masked, softcap;
};

// The kernels of an attention, and the layout of what they hand on.
struct Plan {
    int arch;
    Dtype dtype;
    Recipe recipe;
    int64_t head_dim[2], value_head_dim[2];  // the least and the greatest
    int64_t window, masked, softcap;
    int64_t quantize, attend;  // kernels
    int64_t smooths_query, scales_value;
    int64_t copies_mask;           // attend takes MaskedAttendParams
    int64_t persistent;            // attend has a block for each multiprocessor at most
    int64_t dependent;             // attend waits itself for quantize
    int64_t query_tasks, slices;   // of a query block and of a chunk, of `quantize`
    int64_t padded, padded_value;  // channels of quantized operands
    int64_t query_tile_bytes;
    int64_t value_offset, scales_offset, tile_bytes;

    bool serves(int arch, const Choice& choice) const;
};

class Pack {
 public:
    // Reads the table of the pack in a folder, which nobody else may be able to write to.
    bool open(const char* folder, Error& error);

    const char* folder() const { return folder_; }
    const Array<Kernel>& kernels() const { return kernels_; }

    // The architecture with this compute capability, or null.
    const Arch* find_arch(int major, int minor) const;
    // The kernels for an attention, or null.
    const Plan* find(const Arch& arch, const Choice& choice) const;
    // Any plan for an architecture, a dtype and a recipe, or null.
    const Plan* find_any(const Arch& arch, Dtype dtype, Recipe recipe) const;

    // The capabilities that the pack has kernels for, as "8.0, 8.9".
    void list_capabilities(char* text, size_t bytes) const;

    // Reads the image of a kernel and checks it.
    bool read_image(const Kernel& kernel, Array<char>& image, Error& error) const;

 private:
    bool parse(char* text, size_t bytes, Error& error);
    bool parse_record(char** words, size_t count);

    char folder_[512] = "";
    Array<Arch> archs_;
    Array<Kernel> kernels_;
    Array<Plan> plans_;
};

}  // namespace sage_cuda
