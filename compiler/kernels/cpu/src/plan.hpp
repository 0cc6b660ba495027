// Sizes, memory layouts and the tasks that the scheduler hands to an instruction set's kernels.
//
// This header is compiled into every object, each with other compiler flags. No function in it or
// in the headers beside it may have external linkage: of an inline function the linker keeps one
// copy, and could keep one that a machine cannot run. Hence `static`, SAGE_INLINE on members, and
// nothing of the standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "sage_cpu.h"

#define SAGE_INLINE __attribute__((always_inline)) inline
#define SAGE_LAMBDA __attribute__((always_inline))

namespace sage_cpu {

constexpr int64_t kBlockKeys = 256;  // keys that share a K mean, V scales and row maxima
constexpr int64_t kTileKeys = 64;    // keys of one step of the loops, and the unit of skipping
constexpr int64_t kTilesPerBlock = kBlockKeys / kTileKeys;
constexpr int64_t kChannelMultiple = 16;  // channels are padded to the longest vector
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kGroupRows = 6;      // query rows that share the loads of K and V
constexpr int64_t kTaskRows = 96;      // query rows of one task at most; a multiple of kGroupRows
constexpr int64_t kMaskRows = 64;      // query rows that share an entry of the mask map, at least
constexpr int64_t kMapShare = 32;      // states take at most this part of K and V in bytes
constexpr int64_t kWorkerKeys = 1024;  // each worker may have memory for as many packed keys
constexpr int64_t kAlignment = 64;

static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out consecutive aligned pieces of memory; with a null base it only counts.
struct Carver {
    char* base;
    int64_t used = 0;

    template <class T>
    SAGE_INLINE T* take(int64_t count) {
        T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
        used += round_up(count * int64_t(sizeof(T)), kAlignment);
        return piece;
    }
};

// One block of packed keys and values. Its places depend on the capacity alone, not on how many
// keys it holds so far; the last block has room for whole tiles only.
//
//   K: per tile, panels of the instruction set's width: [head_dim / 4][keys of the panel][4] bytes
//   V: panels of columns: [keys / 4][columns of the panel][4] bytes, the keys of a tile in the
//      order in which P is stored. Rows of P times V read the last columns as a whole vector, so
//      that beyond them they see the next step's first, or after the last step what follows.
//
// With the float recipe the elements are floats, and groups of one instead of four.
struct BlockHeader {
    int32_t nonfinite_keys;  // some key_scale is NaN: scores must be checked
};

struct Block {
    BlockHeader* header;
    float* key_mean;      // (head_dim padded)
    float* value_scale;   // (value_head_dim padded)
    float* value_offset;  // (value_head_dim padded)
    float* key_scale;     // (keys)
    char* key_data;
    char* value_data;
    int64_t keys;  // that there is room for
};

// The layout of one head's packed keys and values; the same for every instruction set.
struct PackedLayout {
    int64_t head_dim, value_head_dim;
    int64_t padded_head_dim, padded_value_head_dim;
    int64_t element_bytes;
    int64_t capacity;     // keys
    int64_t block_bytes;  // of a full block
    int64_t head_bytes;   // of all blocks

    SAGE_INLINE static PackedLayout of(const sage_cpu_problem& p) {
        PackedLayout layout;
        layout.head_dim = p.head_dim;
        layout.padded_head_dim = round_up(p.head_dim, kChannelMultiple);
        layout.value_head_dim = p.value_head_dim;
        layout.padded_value_head_dim = round_up(p.value_head_dim, kChannelMultiple);
        layout.element_bytes = p.recipe == SAGE_CPU_FLOAT ? sizeof(float) : 1;
        int64_t capacity = p.kv_capacity == 0 ? p.key_length : p.kv_capacity;
        layout.capacity = capacity;
        layout.block_bytes = layout.measure(kBlockKeys);
        layout.head_bytes = layout.bytes_of(capacity);
        return layout;
    }

    // Of a head that has room for so many keys.
    SAGE_INLINE int64_t bytes_of(int64_t keys) const {
        int64_t rest = round_up(keys % kBlockKeys, kTileKeys);
        return keys / kBlockKeys * block_bytes + (rest == 0 ? 0 : measure(rest));
    }

    SAGE_INLINE Block block(char* head, int64_t index) const {
        Carver carver{head + index * block_bytes};
        return carve(carver, round_up(min(kBlockKeys, capacity - index * kBlockKeys), kTileKeys));
    }

 private:
    SAGE_INLINE int64_t measure(int64_t keys) const {
        Carver carver{nullptr};
        carve(carver, keys);
        return carver.used;
    }

    SAGE_INLINE Block carve(Carver& carver, int64_t keys) const {
        Block block;
        block.keys = keys;
        block.header = carver.take<BlockHeader>(1);
        block.key_mean = carver.take<float>(padded_head_dim);
        block.value_scale = carver.take<float>(padded_value_head_dim);
        block.value_offset = carver.take<float>(padded_value_head_dim);
        block.key_scale = carver.take<float>(keys);
        block.key_data = carver.take<char>(keys * head_dim * element_bytes);
        int64_t read_beyond = (padded_value_head_dim - value_head_dim) * 4;
        block.value_data = carver.take<char>(keys * value_head_dim * element_bytes + read_beyond);
        return block;
    }
};

// Keys [first, last) that the band shows to query i; empty when first >= last.
struct Interval {
    int64_t first, last;
};

[[maybe_unused]] static Interval visible_keys(const sage_cpu_problem& p, int64_t query) {
    // Sides and diagonal may be any numbers: their sums need more than 64 bits.
    __int128 diagonal = __int128(p.diagonal) + query;
    __int128 first = p.window_left < 0 ? 0 : diagonal - p.window_left;
    __int128 last = p.window_right < 0 ? p.key_length : diagonal + p.window_right + 1;
    auto clamp = [&p](__int128 key) SAGE_LAMBDA {
        return key < 0 ? 0 : key > p.key_length ? p.key_length : int64_t(key);
    };
    return {clamp(first), clamp(last)};
}

// Keys that the band shows to some query. The intervals move right by one per query.
[[maybe_unused]] static Interval reachable_keys(const sage_cpu_problem& p) {
    return {visible_keys(p, 0).first, visible_keys(p, p.query_length - 1).last};
}

// What an explicit mask shows, found by one pass over it before anything is packed.
enum MaskState : uint8_t {
    kMaskNone = 0,   // hides every key of the tile from every row
    kMaskPlain = 1,  // shows all that the band shows, with a bias of zero
    kMaskMixed = 2,
};

struct MaskMap {
    int64_t batches, heads, kv_heads;  // 1 where the mask broadcasts
    int64_t rows;                      // 1 where one row stands for all
    int64_t rows_per_state;
    int64_t row_blocks, tiles;
    bool is_mixed;        // too large for states of its own: one stands for all, mixed
    uint8_t* state;       // MaskState of (batches, heads, row_blocks, tiles)
    uint64_t* reachable;  // bits of (batches, kv_heads, tiles): some query sees the key
    uint64_t* counted;    // same: and it counts in statistics (docs/numerics.md)

    SAGE_INLINE static MaskMap of(const sage_cpu_problem& p) {
        MaskMap map{};
        map.tiles = ceil_div(p.key_length, kTileKeys);
        map.batches = p.mask.stride[0] == 0 ? 1 : p.batch;
        map.heads = p.mask.stride[1] == 0 ? 1 : p.heads;
        map.kv_heads = p.mask.stride[1] == 0 ? 1 : p.kv_heads;
        bool one_row = p.mask.stride[2] == 0 && p.window_left < 0 && p.window_right < 0;
        map.rows = one_row ? 1 : p.query_length;
        // Beside long queries a finer map would outgrow the packed keys.
        int64_t keys = p.batch * p.kv_heads * min(kTileKeys, p.key_length);  // of a tile
        int64_t most = keys * (p.head_dim + p.value_head_dim) / kMapShare;
        map.rows_per_state = kMaskRows;
        while (map.rows_per_state < map.rows &&
               map.planes() * ceil_div(map.rows, map.rows_per_state) > most)
            map.rows_per_state *= 2;
        map.row_blocks = ceil_div(map.rows, map.rows_per_state);
        map.is_mixed = map.planes() * map.row_blocks > most;
        return map;
    }

    SAGE_INLINE int64_t planes() const { return batches * heads; }
    SAGE_INLINE int64_t bit_words() const { return batches * kv_heads * tiles; }

    SAGE_INLINE int64_t state_bytes() const {
        return (is_mixed ? 1 : planes() * row_blocks) * tiles;
    }

    SAGE_INLINE void carve(Carver& carver) {
        state = carver.take<uint8_t>(state_bytes());
        reachable = carver.take<uint64_t>(bit_words());
        counted = carver.take<uint64_t>(bit_words());
    }

    SAGE_INLINE const uint8_t* states(int64_t batch, int64_t head, int64_t query) const {
        if (is_mixed) return state;
        int64_t plane = (batches == 1 ? 0 : batch) * heads + (heads == 1 ? 0 : head);
        int64_t block = rows == 1 ? 0 : query / rows_per_state;
        return state + (plane * row_blocks + block) * tiles;
    }

    SAGE_INLINE int64_t bits(int64_t batch, int64_t kv_head) const {
        return ((batches == 1 ? 0 : batch) * kv_heads + (kv_heads == 1 ? 0 : kv_head)) * tiles;
    }
};

// --- tasks

struct ScanTask {
    const sage_cpu_problem* problem;
    const MaskMap* map;
    int64_t batch, head, row_block;  // in the map
};

struct PackTask {
    const sage_cpu_problem* problem;
    const PackedLayout* layout;
    const MaskMap* map;  // null: without a mask
    int64_t batch, kv_head, block;
    int64_t first;    // the token that key.data and value.data point at
    bool everything;  // no token is hidden: pack as if every query saw every key
    char* head;       // this head's packed memory
};

struct AttendTask {
    const sage_cpu_problem* problem;
    const PackedLayout* layout;
    const MaskMap* map;
    int64_t batch, kv_head;
    int64_t first_row, rows;  // of the (heads per key/value head) * query_length rows of the group
    const char* head;
    char* scratch;
};

// One instruction set's kernels. Scratch sizes depend on the problem alone.
struct Kernels {
    void (*scan)(const ScanTask&);
    void (*pack)(const PackTask&);
    void (*attend)(const AttendTask&);
    int64_t (*scratch_bytes)(const sage_cpu_problem&);  // of attend
};

// Defined by one object each, for the machines and compilers that have the instruction set.
extern const Kernels kPortable, kAvx2, kAvxVnni, kAvx512Vnni;

}  // namespace sage_cpu
