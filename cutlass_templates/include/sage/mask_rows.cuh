// What a mask is in each tile, and which queries see a key through it and the band.
#pragma once

#include <sage/visibility.cuh>

namespace sage {

// A warp goes through every kWarps-th tile, a lane through two of its columns, and keeps a bit for
// each query. They are joined in shared memory: ptxas makes calls of shuffles after such loops.
template <int kBlockThreads>
struct MaskRows {
    using Params = MaskRowsParams;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kWords = kQueryBlock / 32;  // of bits, for each query
    static constexpr int kSharedBytes = 2 * kWords * kThreads * sizeof(uint32_t);

    SAGE_DEVICE static void run(Params const& p) {
        int const thread = arch::thread_index(), warp = thread / 32, lane = thread % 32;
        Split const block(arch::block_index(), p.query_blocks);
        Split const head(block.outer, p.heads);
        HeadMask const mask(p.mask, head.outer, head.inner);
        int64_t const first_query = int64_t{block.inner} * kQueryBlock;
        uint8_t* const tiles = p.tiles + arch::block_index() * p.key_blocks;
        uint32_t* const shared = reinterpret_cast<uint32_t*>(arch::shared_memory());

        uint32_t seen[kWords] = {}, ordinary[kWords] = {};
        // The same turns for all warps, whose last tile may be beyond the keys.
        for (int64_t first_tile = 0; first_tile < p.key_blocks; first_tile += kWarps) {
            int64_t const tile = first_tile + warp;
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
            arch::store_shared(shared + thread, uint32_t{shows} | uint32_t{differs} << 1);
            arch::barrier();
            if (lane == 0 && tile < p.key_blocks) {
                uint32_t const found = any_of<32>(shared + thread);
                uint8_t const kind = !(found & 1) ? kHidesAll : found & 2 ? kMixed : kShowsAll;
                arch::store_global(tiles + tile, kind);
            }
            arch::barrier();
        }

        // (words of seen and of ordinary, threads), and of these (words, warps).
        SAGE_UNROLL
        for (int word = 0; word < kWords; ++word) {
            arch::store_shared(shared + word * kThreads + thread, seen[word]);
            arch::store_shared(shared + (kWords + word) * kThreads + thread, ordinary[word]);
        }
        arch::barrier();
        bool const joins = thread < 2 * kWords * kWarps;
        uint32_t const joined = joins ? any_of<32>(shared + thread * 32) : 0;
        arch::barrier();
        if (joins) arch::store_shared(shared + thread, joined);
        arch::barrier();

        int64_t const query = first_query + thread;
        if (thread >= kQueryBlock || query >= p.query_length) return;
        int64_t const index = block.outer * p.query_length + query;
        arch::store_global(p.live + index, bit_of(shared, thread));
        arch::store_global(p.discerning + index, bit_of(shared + kWords * kWarps, thread));
    }

 private:
    // Whether any warp has the bit of a query of the block.
    SAGE_DEVICE static uint8_t bit_of(uint32_t const* words, int query) {
        uint32_t const found = any_of<kWarps>(words + query / 32 * kWarps);
        return static_cast<uint8_t>(found >> query % 32 & 1);
    }
};

}  // namespace sage
