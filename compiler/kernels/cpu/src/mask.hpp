// Explicit masks: read in tiles, never materialized, and looked through once before packing.
#pragma once

#include "math.hpp"
#include "pack.hpp"

namespace sage_cpu {
namespace {

// A key with this bias or less is padding in disguise (masks use -1e4 or finfo.min). It stays an
// additive term but does not count in statistics, unless its whole row lies this low.
constexpr float kNegligibleBias = -5000.0f;

// Which keys of a tile a bool mask shows, a bit each.
inline uint64_t mask_bits(const char* row, int64_t stride, int64_t key, int64_t count) {
    const uint8_t* mask = reinterpret_cast<const uint8_t*>(row) + key * stride;
    if (stride == 1 && count == kTileKeys) return Isa::nonzero_bytes(mask);
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; i++) bits |= uint64_t(mask[i * stride] != 0) << i;
    return bits;
}

// A float mask's tile, in its place if it is a row of floats, else in the buffer; zero beyond
// `count`.
inline const float* mask_bias(const char* row, const sage_cpu_problem& p, int64_t key,
                              int64_t count, float* buffer) {
    int64_t stride = p.mask.stride[3];
    const char* tile = row + key * stride * element_size(p.mask_dtype);
    if (p.mask_dtype == SAGE_CPU_FLOAT32 && stride == 1 && count == kTileKeys)
        return reinterpret_cast<const float*>(tile);
    load_row(tile, p.mask_dtype, stride, count, buffer);
    for (int64_t i = count; i < kTileKeys; i++) buffer[i] = 0.0f;
    return buffer;
}

// One tile of one row of the mask, within the band.
struct MaskTile {
    uint64_t seen;      // a bit for each key that is shown
    uint64_t ordinary;  // shown with a bias that is not negligible
    bool plain;         // all that the band shows is shown with a bias of zero
};

inline MaskTile look_at(const sage_cpu_problem& p, const char* row, int64_t key, uint64_t band) {
    int64_t count = min(kTileKeys, p.key_length - key);
    if (p.mask_dtype == SAGE_CPU_BOOL) {
        uint64_t seen = mask_bits(row, p.mask.stride[3], key, count) & band;
        return {seen, seen, seen == band};
    }
    alignas(64) float buffer[kTileKeys];
    const float* bias = mask_bias(row, p, key, count, buffer);
    Isa::Floats negligible = Isa::set(kNegligibleBias), zero = Isa::set(0.0f);
    Isa::Floats infinity = Isa::set(__builtin_inff()), hidden = zero - infinity;
    constexpr uint32_t kAll = uint32_t((uint64_t(1) << Isa::kLanes) - 1);
    if (~band == 0) {  // most tiles: everything is shown, nothing is negligible
        Isa::Floats least = infinity;
        Isa::Ints bits = Isa::set(0);
        for (int64_t i = 0; i < kTileKeys; i += Isa::kLanes) {
            Isa::Floats x = Isa::load(bias + i);
            least = Isa::min(x, least);  // in this order a NaN, which is ordinary, drops out
            bits = Isa::bit_or(bits, Isa::as_int(x));
        }
        if (Isa::less(negligible, least) == kAll)
            return {band, band, Isa::equal(Isa::as_float(bits), zero) == kAll};
    }
    MaskTile tile{};
    uint64_t plain = 0;
    for (int64_t i = 0; i < kTileKeys; i += Isa::kLanes) {
        Isa::Floats x = Isa::load(bias + i);
        // As negations, so that a NaN is seen and counts.
        uint32_t seen = ~Isa::equal(x, hidden) & kAll;
        uint32_t ordinary = ~(Isa::less(x, negligible) | Isa::equal(x, negligible)) & kAll;
        tile.seen |= uint64_t(seen) << i;
        tile.ordinary |= uint64_t(ordinary) << i;
        plain |= uint64_t(Isa::equal(x, zero)) << i;
    }
    return {tile.seen & band, tile.ordinary & band, (plain & band) == band};
}

SAGE_INLINE void set_bits(uint64_t* word, uint64_t bits) {
    // Several workers may find the same keys; the union does not depend on their order.
    if ((__atomic_load_n(word, __ATOMIC_RELAXED) & bits) != bits)
        __atomic_fetch_or(word, bits, __ATOMIC_RELAXED);
}

// Fill in one row block of the mask map, and its share of the bits of keys.
inline void scan(const ScanTask& task) {
    const sage_cpu_problem& p = *task.problem;
    const MaskMap& map = *task.map;
    int64_t first = task.row_block * map.rows_per_state;
    int64_t last = min(first + map.rows_per_state, map.rows);
    uint8_t* states = nullptr;
    if (!map.is_mixed) {
        states =
            map.state +
            ((task.batch * map.heads + task.head) * map.row_blocks + task.row_block) * map.tiles;
        __builtin_memset(states, 0, size_t(map.tiles));
    }
    int64_t group = p.heads / p.kv_heads;
    int64_t bits = map.bits(task.batch, map.kv_heads == 1 ? 0 : task.head / group);

    constexpr uint8_t kSeen = 1, kNotPlain = 2;
    for (int64_t query = first; query < last; query++) {
        const char* row = address(p.mask, p.mask_dtype, task.batch, task.head, query);
        Interval keys = visible_keys(p, query);
        int64_t begin = keys.first / kTileKeys, end = ceil_div(keys.last, kTileKeys);
        uint64_t seen = 0, ordinary = 0;  // in any tile
        for (int64_t t = begin; t < end; t++) {
            MaskTile tile = look_at(p, row, t * kTileKeys, interval_bits(keys, t * kTileKeys));
            seen |= tile.seen;
            ordinary |= tile.ordinary;
            set_bits(&map.reachable[bits + t], tile.seen);
            set_bits(&map.counted[bits + t], tile.ordinary);
            if (states == nullptr) continue;
            if (tile.seen != 0) states[t] |= kSeen;
            if (!tile.plain) states[t] |= kNotPlain;
        }
        if (ordinary != 0 || seen == 0) continue;
        // All that this row sees is negligible: then it counts.
        for (int64_t t = begin; t < end; t++)
            set_bits(&map.counted[bits + t],
                     look_at(p, row, t * kTileKeys, interval_bits(keys, t * kTileKeys)).seen);
    }
    for (int64_t t = 0; states != nullptr && t < map.tiles; t++)
        states[t] = (states[t] & kSeen) == 0       ? kMaskNone
                    : (states[t] & kNotPlain) != 0 ? kMaskMixed
                                                   : kMaskPlain;
}

}  // namespace
}  // namespace sage_cpu
