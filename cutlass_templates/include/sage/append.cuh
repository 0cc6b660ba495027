// New tokens of a cache, packed into the tiles that change, as key.cuh and value.cuh pack those of
// one attention; but the mean of K is that of the first tokens, see kMeanTokens, and V has a scale
// for each channel of each tile, so that no tile depends on a later one. With kPanels, codes are in
// the order that wgmma reads.
#pragma once

#include <sage/key.cuh>
#include <sage/staged.cuh>
#include <sage/tile.cuh>
#include <sage/value.cuh>

namespace sage {

template <class Input, class Qk, class Pv, int kKeyDim, int kValueDim, bool kPanels>
struct Append {
    using Params = AppendParams;
    using Key = QuantizeKey<Input, Qk, kKeyDim, kPanels>;
    using Value = QuantizeValue<Input, Pv, kValueDim, false, kPanels>;
    using Packed = KeyValueTile<Qk, Pv, kKeyDim, kValueDim, Value::kScaled>;
    static constexpr int kValueBytes = Value::kSharedBytes + kValueDim * sizeof(float);

    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes =
        Key::kSharedBytes > kValueBytes ? Key::kSharedBytes : kValueBytes;

    SAGE_DEVICE static void run(Params const& p) {
        arch::await_prerequisites();
        int64_t const task = arch::block_index();
        if (task < p.key_tasks) {
            append_key(p, Place(p, task));
        } else {
            append_value(p, Place(p, task - p.key_tasks));
        }
    }

 private:
    // A tile that changes.
    struct Place {
        int head;       // b * Hkv + h
        int64_t first;  // token
        char* packed;

        SAGE_DEVICE Place(Params const& p, int64_t task) : Place(p, Split(task, p.changed_tiles)) {}

        SAGE_DEVICE Place(Params const& p, Split const& of_head)
            : head(of_head.outer),
              first((p.first_tile + of_head.inner) * kKeyBlock),
              packed(p.tiles +
                     (head * p.head_tiles + p.first_tile + of_head.inner) * Packed::kBytes) {}
    };

    SAGE_DEVICE static void append_key(Params const& p, Place const& place) {
        typename Key::At const at;
        Appended<Input, kKeyDim> const tokens(p.key, p.staged_key, place.head, p.heads, p.length,
                                              p.end);
        float mean[kChunk];
        load_floats(mean, p.key_mean + int64_t{place.head} * kKeyDim + at.channel);
        float key[Key::kTokens][kChunk];
        uint32_t largest = 0;
        SAGE_UNROLL
        for (int t = 0; t < Key::kTokens; ++t) {
            int64_t const token = place.first + t * Key::At::kRows + at.row;
            Chunk<Input> const chunk = tokens.chunk(token, at.channel);
            tokens.stage(token, at.channel, chunk);
            chunk.unpack(key[t]);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                key[t][i] = token < p.end ? key[t][i] - mean[i] : 0.0f;
                largest = larger(largest, magnitude_bits(key[t][i]));
            }
        }
        Key::pack(at, key, largest, place.packed,
                  reinterpret_cast<float*>(place.packed + Packed::kScalesOffset));
    }

    SAGE_DEVICE static void append_value(Params const& p, Place const& place) {
        typename Value::At const at;
        Appended<Input, kValueDim> const tokens(p.value, p.staged_value, place.head, p.heads,
                                                p.length, p.end);
        float value[Value::kTokens][kChunk];
        SAGE_UNROLL
        for (int t = 0; t < Value::kTokens; ++t) {
            int64_t const token = place.first + t * Value::At::kRows + at.row;
            Chunk<Input> const chunk = tokens.chunk(token, at.channel);
            tokens.stage(token, at.channel, chunk);
            chunk.unpack(value[t]);
        }
        if constexpr (Value::kScaled) scale_channels(at, value, place.packed);
        float* const shared = reinterpret_cast<float*>(arch::shared_memory());  // (tokens, D)
        SAGE_UNROLL
        for (int t = 0; t < Value::kTokens; ++t) {
            int const token = t * Value::At::kRows + at.row;
            store_floats_shared(shared + token * Value::kRowFloats + at.channel, value[t]);
        }
        arch::barrier();
        Value::store_transposed(place.packed + Packed::kValueOffset, shared);
    }

    // Divides V by the scales of its channels in the tile, and stores these.
    SAGE_DEVICE static void scale_channels(typename Value::At const& at,
                                           float (&value)[Value::kTokens][kChunk], char* packed) {
        float largest[kChunk];
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            uint32_t bits = 0;
            SAGE_UNROLL
            for (int t = 0; t < Value::kTokens; ++t)
                bits = larger(bits, magnitude_bits(value[t][i]));
            largest[i] = arch::from_bits(bits);
        }
        float* const of_rows = reinterpret_cast<float*>(arch::shared_memory());  // (kRows, D)
        float* const scales = of_rows + kKeyBlock * Value::kRowFloats;           // (D)
        store_floats_shared(of_rows + at.row * kValueDim + at.channel, largest);
        arch::barrier();
        int const channel = arch::thread_index();
        if (channel < kValueDim) {
            uint32_t amax = 0;
            SAGE_UNROLL
            for (int row = 0; row < Value::At::kRows; ++row) {
                amax = larger(amax,
                              arch::bits(arch::load_shared(of_rows + row * kValueDim + channel)));
            }
            float const scale =
                Pv::kBits == 8 ? scale_of(amax, Value::kLimit) : power_of_two_scale_of(amax);
            arch::store_shared(scales + channel, scale);
            float* const stored = reinterpret_cast<float*>(packed + Packed::kValueScalesOffset);
            arch::store_global(stored + channel, scale);
        }
        arch::barrier();
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            float const scale = arch::load_shared(scales + at.channel + i);
            SAGE_UNROLL
            for (int t = 0; t < Value::kTokens; ++t) {
                value[t][i] = quotient_within(value[t][i], scale, Value::kLimit);
            }
        }
    }
};

}  // namespace sage
