// What a mask is in each tile, and which queries see a key through it and the band.
#pragma once

#include <sage/visibility.cuh>

namespace sage {

// A warp goes through every kWarps-th tile, a lane through two of its columns, and keeps a bit for
// each query.
template <int kBlockThreads>
struct MaskRows {
    using Params = MaskRowsParams;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kWords = kQueryBlock / 32;
    static constexpr int kSharedBytes = kWarps * 2 * kWords * sizeof(uint32_t);

    SAGE_DEVICE static void run(Params const& p) {
        int const warp = arch::thread_index() / 32, lane = arch::thread_index() % 32;
        Split const block(arch::block_index(), p.query_blocks);
        Split const head(block.outer, p.heads);
        HeadMask const mask(p.mask, head.outer, head.inner);
        int64_t const first_query = int64_t{block.inner} * kQueryBlock;
        uint8_t* const tiles = p.tiles + arch::block_index() * p.key_blocks;

        uint32_t seen[kWords] = {}, ordinary[kWords] = {};
        for (int64_t tile = warp; tile < p.key_blocks; tile += kWarps) {
            bool shows = false, differs = false;
            SAGE_UNROLL
            for (int word = 0; word < kWords; ++word) {
                for (int bit = 0; bit < 32; ++bit) {
                    int64_t const query = first_query + word * 32 + bit;
                    if (query >= p.query_length) break;
                    SAGE_UNROLL
                    for (int column = 0; column < kKeyBlock; column += 32) {
                        int64_t const key = tile * kKeyBlock + column + lane;
                        if (key >= p.key_length) continue;
                        float const bias = mask.bias(query, key);
                        shows |= sees(bias);
                        differs |= bias != 0.0f;
                        bool const inside = key - query >= p.lower && key - query <= p.upper;
                        seen[word] |= uint32_t{inside && sees(bias)} << bit;
                        ordinary[word] |= uint32_t{inside && is_ordinary(bias)} << bit;
                    }
                }
            }
            uint32_t const found = any_of_warp(uint32_t{shows} | uint32_t{differs} << 1);
            uint8_t const kind = !(found & 1) ? kHidesAll : found & 2 ? kMixed : kShowsAll;
            if (lane == 0) arch::store_global(tiles + tile, kind);
        }

        uint32_t* const shared = reinterpret_cast<uint32_t*>(arch::shared_memory());
        SAGE_UNROLL
        for (int word = 0; word < kWords; ++word) {
            uint32_t const of_warp[2] = {any_of_warp(seen[word]), any_of_warp(ordinary[word])};
            if (lane == 0) {
                uint32_t* const row = shared + warp * 2 * kWords + word;
                arch::store_shared(row, of_warp[0]);
                arch::store_shared(row + kWords, of_warp[1]);
            }
        }
        arch::barrier();
        int const row = arch::thread_index();
        int64_t const query = first_query + row;
        if (row >= kQueryBlock || query >= p.query_length) return;
        int64_t const index = block.outer * p.query_length + query;
        arch::store_global(p.live + index, any_warp(shared + row / 32, row % 32));
        arch::store_global(p.discerning + index, any_warp(shared + kWords + row / 32, row % 32));
    }

 private:
    SAGE_DEVICE static uint8_t any_warp(uint32_t const* words, int bit) {
        uint32_t all = 0;
        SAGE_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) {
            all |= arch::load_shared(words + warp * 2 * kWords);
        }
        return static_cast<uint8_t>(all >> bit & 1);
    }
};

}  // namespace sage
