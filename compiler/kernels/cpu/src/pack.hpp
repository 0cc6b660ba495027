// Keys and values into packed blocks: smoothed, scaled and quantized (docs/numerics.md).
#pragma once

#include "convert.hpp"

namespace sage_cpu {
namespace {

constexpr float kSmallestMaximum = 1e-35f;  // below, 127 / maximum would not be finite: all zeros

SAGE_INLINE uint64_t low_bits(int64_t count) {
    return count >= 64 ? ~uint64_t(0) : count <= 0 ? 0 : (uint64_t(1) << count) - 1;
}

// Bits of keys [first, last) in the tile of 64 keys that starts at `start`.
SAGE_INLINE uint64_t interval_bits(Interval keys, int64_t start) {
    return low_bits(keys.last - start) & ~low_bits(keys.first - start);
}

template <class Body>
SAGE_INLINE void for_each_bit(uint64_t bits, Body body) {
    for (; bits != 0; bits &= bits - 1) body(int64_t(__builtin_ctzll(bits)));
}

// Which tokens of a block matter, a bit each.
struct Tokens {
    int64_t count, tiles;
    uint64_t reachable[kTilesPerBlock];  // some query sees it
    uint64_t counted[kTilesPerBlock];    // and it counts in statistics
    int64_t counted_tokens;
};

inline Tokens find_tokens(const PackTask& task) {
    const sage_cpu_problem& p = *task.problem;
    int64_t start = task.block * kBlockKeys;
    Tokens tokens{};
    tokens.count = min(kBlockKeys, p.key_length - start);
    tokens.tiles = ceil_div(tokens.count, kTileKeys);
    Interval band = task.everything ? Interval{0, p.key_length} : reachable_keys(p);
    for (int64_t t = 0; t < tokens.tiles; t++) {
        uint64_t bits = interval_bits(band, start + t * kTileKeys);
        bits &= low_bits(tokens.count - t * kTileKeys);
        tokens.reachable[t] = tokens.counted[t] = bits;
        if (task.map != nullptr) {
            int64_t word = task.map->bits(task.batch, task.kv_head) + start / kTileKeys + t;
            tokens.reachable[t] &= task.map->reachable[word];
            tokens.counted[t] &= task.map->counted[word];
        }
        tokens.counted_tokens += __builtin_popcountll(tokens.counted[t]);
    }
    if (tokens.counted_tokens == 0) {  // then what there is must do
        for (int64_t t = 0; t < tokens.tiles; t++) {
            tokens.counted[t] = tokens.reachable[t];
            tokens.counted_tokens += __builtin_popcountll(tokens.counted[t]);
        }
    }
    return tokens;
}

// One tile of K or V as floats, rows padded to whole vectors.
struct Rows {
    const float* data;
    int64_t stride;

    SAGE_INLINE const float* operator[](int64_t i) const { return data + i * stride; }
};

// Reads the tiles of one block of K or V; tokens that no query sees are zeros.
struct Source {
    const sage_cpu_tensor& tensor;
    const PackTask& task;
    const Tokens& tokens;
    int64_t channels, width;  // width: channels padded
    float* converted;         // (kTileKeys, width), for tiles that are not floats in rows already

    SAGE_INLINE const char* row(int64_t t, int64_t i) const {
        int64_t token = task.block * kBlockKeys + t * kTileKeys + i - task.first;
        return address(tensor, task.problem->dtype, task.batch, task.kv_head, token);
    }

    // Rows lie apart, which the hardware does not foresee: it is told one tile ahead.
    void prefetch(int64_t t) const {
        int64_t count = min(kTileKeys, tokens.count - t * kTileKeys);
        int64_t bytes = channels * element_size(task.problem->dtype);
        if (tensor.stride[3] != 1) return;
        for (int64_t i = 0; i < count; i++)
            for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row(t, i) + b);
    }

    Rows tile(int64_t t) {
        const sage_cpu_problem& p = *task.problem;
        int64_t count = min(kTileKeys, tokens.count - t * kTileKeys);
        prefetch(t + 1);
        if (p.dtype == SAGE_CPU_FLOAT32 && tensor.stride[3] == 1 && channels == width &&
            tokens.reachable[t] == low_bits(count))
            return {reinterpret_cast<const float*>(row(t, 0)), tensor.stride[2]};
        if (tokens.reachable[t] != low_bits(count) || channels != width)
            __builtin_memset(converted, 0, size_t(count * width) * sizeof(float));
        for_each_bit(tokens.reachable[t], [&](int64_t i) SAGE_LAMBDA {
            load_row(row(t, i), p.dtype, tensor.stride[3], channels, converted + i * width);
        });
        return {converted, width};
    }
};

// --- quantized

constexpr int64_t kPanelWidth = Isa::kVectors * Isa::kLanes;  // keys, or columns of V

// Calls body.template operator()<n>(c) for all channels, n vectors at a time from channel c: sums
// of several vectors stay in registers while rows are read from end to end.
template <class Body>
SAGE_INLINE void for_channels(int64_t width, Body body) {
    int64_t c = 0;
    for (; c + 4 * Isa::kLanes <= width; c += 4 * Isa::kLanes) body.template operator()<4>(c);
    for (; c < width; c += Isa::kLanes) body.template operator()<1>(c);
}

// The mean over the tokens that count.
inline void find_key_mean(Source& source, const Tokens& tokens, float* mean) {
    for (int64_t c = 0; c < source.width; c++) mean[c] = 0.0f;
    // Each token's share is added, not the sum divided: the sum could overflow.
    Isa::Floats share = Isa::set(1.0f / float(max(1, tokens.counted_tokens)));
    for (int64_t t = 0; t < tokens.tiles; t++) {
        Rows rows = source.tile(t);
        for_channels(source.width, [&]<int N>(int64_t c) SAGE_LAMBDA {
            Isa::Floats sums[N];
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) sums[v] = Isa::load(mean + c + v * Isa::kLanes);
            for_each_bit(tokens.counted[t], [&](int64_t i) SAGE_LAMBDA {
#pragma GCC unroll 4
                for (int v = 0; v < N; v++)
                    sums[v] = Isa::fma(Isa::load(rows[i] + c + v * Isa::kLanes), share, sums[v]);
            });
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) Isa::store(mean + c + v * Isa::kLanes, sums[v]);
        });
    }
}

// One key less the mean as bytes; returns its scale, NaN for a key that is not finite.
inline float quantize_key(const float* row, const float* mean, int64_t width, uint8_t* bytes) {
    Isa::Floats largest = Isa::set(0.0f), nonfinite = Isa::set(0.0f);
    for (int64_t c = 0; c < width; c += Isa::kLanes) {
        Isa::Floats x = Isa::load(row + c) - Isa::load(mean + c);
        largest = Isa::max(largest, Isa::abs(x));
        nonfinite = Isa::fma(x, Isa::set(0.0f), nonfinite);  // NaN from NaN and infinity
    }
    float maximum = Isa::reduce_max(largest);
    bool bad = Isa::reduce_add(nonfinite) != 0.0f;
    if (bad || !(maximum > kSmallestMaximum)) {
        __builtin_memset(bytes, Isa::kKeyOffset, size_t(width));
        return bad ? __builtin_nanf("") : 0.0f;
    }
    Isa::Floats inverse = Isa::set(127.0f / maximum);
    for (int64_t c = 0; c < width; c += Isa::kLanes) {
        Isa::Floats x = Isa::load(row + c) - Isa::load(mean + c);
        Isa::store_bytes(bytes + c, Isa::add(Isa::round(x * inverse), Isa::set(Isa::kKeyOffset)));
    }
    return maximum / 127.0f;
}

inline void pack_keys(Source& source, const Tokens& tokens, int64_t head_dim, const Block& block) {
    find_key_mean(source, tokens, block.key_mean);
    block.header->nonfinite_keys = 0;
    alignas(64) uint8_t bytes[kMaxHeadDim], zeros[kMaxHeadDim];
    __builtin_memset(zeros, Isa::kKeyOffset, sizeof zeros);
    for (int64_t t = 0; t < tokens.tiles; t++) {
        Rows rows = source.tile(t);
        char* tile = block.key_data + t * kTileKeys * head_dim;
        float* scales = block.key_scale + t * kTileKeys;
        for (int64_t i = 0; i < kTileKeys; i++) {
            const uint8_t* key = zeros;
            scales[i] = 0.0f;
            if (tokens.reachable[t] >> i & 1) {
                scales[i] = quantize_key(rows[i], block.key_mean, source.width, bytes);
                if (scales[i] != scales[i]) block.header->nonfinite_keys = 1;
                key = bytes;
            }
            int64_t panel = i / kPanelWidth * kPanelWidth;
            char* place = tile + panel * head_dim + (i - panel) * 4;
            for (int64_t c = 0; c < head_dim; c += 4, place += kPanelWidth * 4)
                __builtin_memcpy(place, key + c, 4);
        }
    }
}

// Scale and offset of each channel, over the tokens that count; inverse is 0 where a channel has
// no range to speak of, and is all offset.
inline void find_value_scales(Source& source, const Tokens& tokens, const Block& block,
                              float* inverse) {
    constexpr float kInfinity = __builtin_inff();
    bool any = tokens.counted_tokens > 0;
    alignas(64) float low[kMaxHeadDim], high[kMaxHeadDim], bad[kMaxHeadDim];
    for (int64_t c = 0; c < source.width; c++) {
        low[c] = any ? kInfinity : 0.0f;
        high[c] = any ? -kInfinity : 0.0f;
        bad[c] = 0.0f;
    }
    for (int64_t t = 0; t < tokens.tiles; t++) {
        Rows rows = source.tile(t);
        for_channels(source.width, [&]<int N>(int64_t c) SAGE_LAMBDA {
            Isa::Floats least[N], most[N], nonfinite[N];
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) {
                least[v] = Isa::load(low + c + v * Isa::kLanes);
                most[v] = Isa::load(high + c + v * Isa::kLanes);
                nonfinite[v] = Isa::load(bad + c + v * Isa::kLanes);
            }
            for_each_bit(tokens.counted[t], [&](int64_t i) SAGE_LAMBDA {
#pragma GCC unroll 4
                for (int v = 0; v < N; v++) {
                    Isa::Floats x = Isa::load(rows[i] + c + v * Isa::kLanes);
                    least[v] = Isa::min(least[v], x);
                    most[v] = Isa::max(most[v], x);
                    nonfinite[v] = Isa::fma(x, Isa::set(0.0f), nonfinite[v]);
                }
            });
            for_each_bit(tokens.reachable[t] & ~tokens.counted[t], [&](int64_t i) SAGE_LAMBDA {
#pragma GCC unroll 4
                for (int v = 0; v < N; v++)
                    nonfinite[v] = Isa::fma(Isa::load(rows[i] + c + v * Isa::kLanes),
                                            Isa::set(0.0f), nonfinite[v]);
            });
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) {
                Isa::store(low + c + v * Isa::kLanes, least[v]);
                Isa::store(high + c + v * Isa::kLanes, most[v]);
                Isa::store(bad + c + v * Isa::kLanes, nonfinite[v]);
            }
        });
    }
    for (int64_t c = 0; c < source.width; c++) {
        // Halved first: the difference of two finite extremes may not be finite.
        float middle = high[c] * 0.5f + low[c] * 0.5f, range = high[c] * 0.5f - low[c] * 0.5f;
        bool usable = bad[c] == 0.0f && range > kSmallestMaximum;
        block.value_offset[c] = middle + bad[c];  // NaN where a token is not finite
        block.value_scale[c] = usable ? range / 127.0f : bad[c];
        inverse[c] = usable ? 127.0f / range : 0.0f;
    }
}

// The first `count` lanes.
SAGE_INLINE void store_some(char* place, Isa::Ints x, int64_t count) {
    if (count >= Isa::kLanes) return Isa::store(reinterpret_cast<int32_t*>(place), x);
    alignas(64) int32_t lanes[Isa::kLanes];
    Isa::store(lanes, x);
    __builtin_memcpy(place, lanes, size_t(count) * sizeof(int32_t));
}

inline void pack_values(Source& source, const Tokens& tokens, const Block& block) {
    alignas(64) float inverse[kMaxHeadDim];
    find_value_scales(source, tokens, block, inverse);
    Isa::Floats limit = Isa::set(127.0f), lower_limit = Isa::set(-127.0f);
    for (int64_t t = 0; t < tokens.tiles; t++) {
        Rows rows = source.tile(t);
        uint64_t reachable = tokens.reachable[t];
        for (int64_t c = 0; c < source.channels; c += Isa::kLanes) {
            Isa::Floats middle = Isa::load(block.value_offset + c);
            Isa::Floats factor = Isa::load(inverse + c);
            uint32_t unusable = Isa::equal(factor, Isa::set(0.0f));
            int64_t panel = c / kPanelWidth * kPanelWidth;
            int64_t columns = min(kPanelWidth, source.channels - panel);
            int64_t stored = min(Isa::kLanes, source.channels - c);
            char* place =
                block.value_data + panel * block.keys + t * kTileKeys * columns + (c - panel) * 4;
            auto quantized = [&](int64_t key) SAGE_LAMBDA {
                if ((reachable >> key & 1) == 0) return Isa::set(0);
                Isa::Floats x = (Isa::load(rows[key] + c) - middle) * factor;
                x = Isa::select(unusable, Isa::set(0.0f), x);
                // Only tokens that do not count reach beyond the limits.
                Isa::Ints q = Isa::round(Isa::max(Isa::min(x, limit), lower_limit));
                return Isa::bit_and(q, Isa::set(255));
            };
            for (int64_t slot = 0; slot < kTileKeys; slot += 4, place += columns * 4) {
                int64_t key = Isa::slot_key(slot);
                Isa::Ints low = Isa::bit_or(quantized(key), Isa::shift_left<8>(quantized(key + 1)));
                Isa::Ints high =
                    Isa::bit_or(quantized(key + 2), Isa::shift_left<8>(quantized(key + 3)));
                store_some(place, Isa::bit_or(low, Isa::shift_left<16>(high)), stored);
            }
        }
    }
}

// --- without quantization: the same places, floats, groups of one

inline void pack_float_keys(Source& source, const Tokens& tokens, int64_t head_dim,
                            const Block& block) {
    float* data = reinterpret_cast<float*>(block.key_data);
    Isa::Floats nonfinite = Isa::set(0.0f);
    for (int64_t t = 0; t < tokens.tiles; t++) {
        Rows rows = source.tile(t);
        for (int64_t i = 0; i < kTileKeys; i++) {
            int64_t panel = i / kPanelWidth * kPanelWidth;
            float* place = data + (t * kTileKeys + panel) * head_dim + (i - panel);
            bool reachable = tokens.reachable[t] >> i & 1;
            for (int64_t c = 0; c < head_dim; c++, place += kPanelWidth)
                *place = reachable ? rows[i][c] : 0.0f;
            for (int64_t c = 0; reachable && c < source.width; c += Isa::kLanes)
                nonfinite = Isa::fma(Isa::load(rows[i] + c), Isa::set(0.0f), nonfinite);
        }
    }
    block.header->nonfinite_keys = Isa::reduce_add(nonfinite) != 0.0f ? 1 : 0;
}

inline void pack_float_values(Source& source, const Tokens& tokens, const Block& block) {
    float* data = reinterpret_cast<float*>(block.value_data);
    for (int64_t t = 0; t < tokens.tiles; t++) {
        Rows rows = source.tile(t);
        for (int64_t panel = 0; panel < source.channels; panel += kPanelWidth) {
            int64_t columns = min(kPanelWidth, source.channels - panel);
            float* place = data + panel * block.keys + t * kTileKeys * columns;
            for (int64_t i = 0; i < kTileKeys; i++, place += columns) {
                bool reachable = tokens.reachable[t] >> i & 1;
                for (int64_t c = 0; c < columns; c += Isa::kLanes)
                    store_some(
                        reinterpret_cast<char*>(place + c),
                        Isa::as_int(reachable ? Isa::load(rows[i] + panel + c) : Isa::set(0.0f)),
                        min(Isa::kLanes, columns - c));
            }
        }
    }
}

inline void pack(const PackTask& task) {
    const sage_cpu_problem& p = *task.problem;
    int64_t start = task.block * kBlockKeys;
    Interval band = reachable_keys(p);
    if (!task.everything && (band.first >= start + kBlockKeys || band.last <= start)) return;
    Tokens tokens = find_tokens(task);
    Block block = task.layout->block(task.head, task.block);
    alignas(64) float converted[kTileKeys * kMaxHeadDim];
    auto source = [&](const sage_cpu_tensor& tensor, int64_t channels) {
        return Source{tensor,   task, tokens, channels, round_up(channels, kChannelMultiple),
                      converted};
    };
    Source keys = source(p.key, p.head_dim), values = source(p.value, p.value_head_dim);
    keys.prefetch(0);
    values.prefetch(0);
    if (p.recipe == SAGE_CPU_FLOAT) {
        pack_float_keys(keys, tokens, p.head_dim, block);
        pack_float_values(values, tokens, block);
    } else {
        pack_keys(keys, tokens, p.head_dim, block);
        pack_values(values, tokens, block);
    }
}

}  // namespace
}  // namespace sage_cpu
