// Q: smoothed by the mean of its block where the format is INT4, rounded with a scale for each
// group of tokens that one thread of the attention kernel holds; and the row term, which gives the
// LSE back what smoothing K took from it.
#pragma once

#include <sage/tokens.cuh>

namespace sage {

template <class Input, class Format, int kHeadDim>
struct QuantizeQuery {
    using Params = QueryParams;
    using At = Position<kHeadDim>;
    static constexpr int kTokens = kQueryBlock / At::kRows;  // of one thread
    static constexpr int kParts = At::kRows / kQueryGroups;  // rows of threads that share a group
    static constexpr int kGroups = kQueryBlock / kQueryWarp * kQueryGroups;
    static constexpr int kTokensOfWarp = kQueryWarp / At::kRows;
    static constexpr bool kSmooth = Format::kBits == 4;

    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = (At::kRows * kHeadDim + kGroups * kParts) * sizeof(float);

    SAGE_DEVICE static void run(Params const& p) {
        At const at;
        int64_t const task = arch::block_index();  // (b * H + h) * M + block
        int64_t const head = task / p.query_blocks;
        int64_t const first = task % p.query_blocks * kQueryBlock + at.row;
        Head const tokens(p.query, head / p.heads, head % p.heads);

        Chunk query[kTokens];
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            query[t] = tokens.chunk(first + t * At::kRows, at.channel, live(p, at, t));
            // A scale of scores must be positive: it is applied after their maximum is found.
            if (p.scale < 0.0f) query[t].negate();
        }
        if (p.row_term != nullptr) store_row_terms(p, at, query, head, first);

        float mean[kChunk] = {};
        if constexpr (kSmooth) mean_of_block(p, at, query, task, mean);
        store_quantized(p, at, query, mean, task);
    }

 private:
    // Whether the thread's token t sees a key.
    SAGE_DEVICE static bool live(Params const& p, At const& at, int t) {
        int64_t const block = arch::block_index() % p.query_blocks;
        int64_t const token = block * kQueryBlock + at.row + t * At::kRows;
        return token >= p.first_live && token < p.query_length;
    }

    SAGE_DEVICE static void store_row_terms(Params const& p, At const& at,
                                            Chunk const (&query)[kTokens], int64_t head,
                                            int64_t first) {
        int64_t const kv_head = head / p.heads * (p.heads / p.group) + head % p.heads / p.group;
        float key_mean[kChunk];
        mean_of_keys<kHeadDim>(key_mean, p.key_sums + kv_head * p.chunks * kHeadDim, p.chunks,
                               at.channel, p.counted_keys);
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            float x[kChunk];
            query[t].template unpack<Input>(x);
            float product = 0.0f;
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) product = arch::fma(x[i], key_mean[i], product);
            SAGE_UNROLL
            for (int mask = 1; mask < At::kColumns; mask *= 2) {
                product += arch::shuffle_xor(product, mask);
            }
            int64_t const token = first + t * At::kRows;
            if (at.first_column() && token < p.query_length) {
                float const scale = p.scale < 0.0f ? -p.scale : p.scale;
                arch::store_global(p.row_term + head * p.query_length + token, product * scale);
            }
        }
    }

    // The mean over the live tokens of the block, for the thread's channels.
    SAGE_DEVICE static void mean_of_block(Params const& p, At const& at,
                                          Chunk const (&query)[kTokens], int64_t task,
                                          float (&mean)[kChunk]) {
        float* const sums = reinterpret_cast<float*>(arch::shared_memory());  // (kRows, D)
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            float x[kChunk];
            query[t].template unpack<Input>(x);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) mean[i] += x[i];
        }
        store_floats_shared(sums + at.row * kHeadDim + at.channel, mean);
        arch::barrier();

        int const channel = arch::thread_index();
        if (channel < kHeadDim) {
            float sum = 0.0f;
            SAGE_UNROLL
            for (int row = 0; row < At::kRows; ++row) {
                sum += arch::load_shared(sums + row * kHeadDim + channel);
            }
            float const of_channel = arch::divide(sum, live_tokens(p, task % p.query_blocks));
            // Nobody else has read or will read this column's sums.
            arch::store_shared(sums + channel, of_channel);
            arch::store_global(p.means + task * kHeadDim + channel, of_channel * p.score_factor);
        }
        arch::barrier();
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) mean[i] = arch::load_shared(sums + at.channel + i);
    }

    // How many tokens of a block see a key; 1 where none does.
    SAGE_DEVICE static float live_tokens(Params const& p, int64_t block) {
        int64_t const begin = block * kQueryBlock, end = begin + kQueryBlock;
        int64_t const from = begin > p.first_live ? begin : p.first_live;
        int64_t const to = end < p.query_length ? end : p.query_length;
        return static_cast<float>(to - from > 1 ? to - from : 1);
    }

    SAGE_DEVICE static void store_quantized(Params const& p, At const& at,
                                            Chunk const (&query)[kTokens],
                                            float const (&mean)[kChunk], int64_t task) {
        // Largest magnitudes: (groups, parts).
        uint32_t* const amax = reinterpret_cast<uint32_t*>(arch::shared_memory() +
                                                           At::kRows * kHeadDim * sizeof(float));
        int const group = at.row % kQueryGroups, part = at.row / kQueryGroups;
        SAGE_UNROLL
        for (int t = 0; t < kTokens; t += kTokensOfWarp) {
            uint32_t largest = 0;
            SAGE_UNROLL
            for (int of_warp = 0; of_warp < kTokensOfWarp; ++of_warp) {
                float x[kChunk];
                smoothed(x, query[t + of_warp], mean, live(p, at, t + of_warp));
                SAGE_UNROLL
                for (int i = 0; i < kChunk; ++i) largest = larger(largest, magnitude_bits(x[i]));
            }
            largest = largest_of_token<kHeadDim>(largest);
            int const warp = t / kTokensOfWarp;
            if (at.first_column()) {
                arch::store_shared(amax + (warp * kQueryGroups + group) * kParts + part, largest);
            }
        }
        arch::barrier();

        int64_t const tokens = task * kQueryBlock + at.row;
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            int const warp = t / kTokensOfWarp;
            uint32_t largest = 0;
            SAGE_UNROLL
            for (int other = 0; other < kParts; ++other) {
                int const index = (warp * kQueryGroups + group) * kParts + other;
                largest = larger(largest, arch::load_shared(amax + index));
            }
            float const scale = scale_of(largest, Format::kLimit);
            float x[kChunk];
            smoothed(x, query[t], mean, live(p, at, t));
            store_codes<Format, kHeadDim>(p.codes, tokens + t * At::kRows, at.channel, x, scale);
            if (t % kTokensOfWarp == 0 && part == 0 && at.first_column()) {
                int64_t const index = task * kGroups + warp * kQueryGroups + group;
                arch::store_global(p.scales + index, scale * p.score_factor);
            }
        }
    }

    SAGE_DEVICE static void smoothed(float (&x)[kChunk], Chunk const& query,
                                     float const (&mean)[kChunk], bool live) {
        query.template unpack<Input>(x);
        if constexpr (kSmooth) {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) x[i] = live ? x[i] - mean[i] : 0.0f;
        }
    }
};

}  // namespace sage
