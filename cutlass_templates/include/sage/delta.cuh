// What the block means of a smoothed Q contribute to the scores with the keys of a cache: delta =
// means . K', as key.cuh has it, but of K' as the codes have it, since nothing else of it is left.
#pragma once

#include <sage/key.cuh>

namespace sage {

template <int kHeadDim>
struct Delta {
    using Params = DeltaParams;
    using Key = QuantizeKey<float, Int4, kHeadDim>;  // of K' in floats
    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = Key::kSharedBytes;

    SAGE_DEVICE static void run(Params const& p) {
        typename Key::At const at;
        Split const block(arch::block_index(), p.key_blocks);
        int64_t const tile = (block.outer * p.head_tiles + block.inner) * p.tile_bytes;
        float const* const scales = reinterpret_cast<float const*>(p.scales + tile);
        float const scale = arch::load_global(scales + at.row % 8 / 2);
        SAGE_UNROLL
        for (int t = 0; t < Key::kTokens; ++t) {
            int const token = t * Key::At::kRows + at.row;
            uint32_t const codes = arch::load_global(reinterpret_cast<uint32_t const*>(
                p.codes + tile + (token * kHeadDim + at.channel) * Int4::kBits / 8));
            float key[kChunk];
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                // Up to the sign, and back with it.
                int32_t const code = static_cast<int32_t>(codes << (28 - 4 * i)) >> 28;
                key[i] = static_cast<float>(code) * scale;
            }
            store_floats_shared(Key::smoothed() + token * Key::kRowFloats + at.channel, key);
        }
        arch::barrier();
        Key::store_delta(p, block.outer, block.inner);
    }
};

}  // namespace sage
