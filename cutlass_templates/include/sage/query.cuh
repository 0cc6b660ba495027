// Q: smoothed by the mean of its block where the format is INT4, rounded with a scale for each
// group of tokens that one thread of the attention kernel holds; and the row term, which gives the
// LSE back what smoothing K took from it.
#pragma once

#include <sage/rotary.cuh>
#include <sage/varlen.cuh>

namespace sage {

// With kPanels, codes are in the order that wgmma reads; with kPackedHeads besides those of a tile
// of PackedRows, see query_rows.cuh. A task is a block, or without smoothing any part of one that
// has whole warps: fewer tokens take fewer registers.
template <class Input, class Format, int kHeadDim, bool kPanels, bool kPackedHeads,
          class Reader = Plain, int kTaskTokens = kQueryBlock>
struct QuantizeQuery {
    static_assert(kPanels || !kPackedHeads,
                  "rows that lie one by one are packed when they are read");
    using Params = typename Reader::template With<QueryParams>;
    using Kept = Chunk<typename Reader::template Kept<Input>>;
    using At = Position<kHeadDim>;
    static constexpr int kTasks = kQueryBlock / kTaskTokens;  // of a block
    static constexpr int kTokens = kTaskTokens / At::kRows;   // of one thread
    static constexpr int kParts = At::kRows / kQueryGroups;   // rows of threads that share a group
    static constexpr int kGroups = kQueryBlock / kQueryWarp * kQueryGroups;
    static constexpr int kTokensOfWarp = kQueryWarp / At::kRows;
    static constexpr bool kSmooth = Format::kBits == 4;
    using Codes = Order<kPanels, kQueryBlock, kHeadDim * Format::kBits / 8>;
    static_assert(kTaskTokens % kQueryWarp == 0 && (kTasks == 1 || !kSmooth), "whole groups");

    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = (At::kRows * kHeadDim + kGroups * kParts) * sizeof(float);

    SAGE_DEVICE static void run(Params const& p) {
        arch::launch_dependents();  // the attention to a cache
        run(p, arch::block_index());
    }

    // task = ((b * H + h) * M + block) * kTasks + part
    SAGE_DEVICE static void run(Params const& p, int64_t task) {
        Place const place(p, Split(task, kTasks));
        auto const tokens = Reader::template read<Input>(p, p.query, Split(place.head, p.heads));
        Kept query[kTokens];
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            query[t] = tokens.chunk(place.token(t), place.at.channel, place.live(t));
            // A scale of scores must be positive: it is applied after their maximum is found.
            if (p.scale < 0.0f) query[t].negate();
        }
        if (p.row_term != nullptr) store_row_terms(p, place, query);
        if (p.taken != nullptr && task == 0 && arch::thread_index() == 0) {
            arch::store_global(p.taken, 0u);
        }

        float mean[kChunk] = {};
        if constexpr (kSmooth) mean_of_block(p, place, query, mean);
        store_quantized(p, place, query, mean);
    }

    // As Varlen wants it.
    SAGE_DEVICE static int64_t narrow(Params& p, Sequences const& batch, int64_t block) {
        Sequence const sequence = Sequence::with_query_block(batch, Split(block, p.heads).outer);
        int64_t const before = sequence.first_query_block() * p.heads;
        int64_t const task = sequence.task(block - before, sequence.query_blocks() * p.heads);
        if (task < 0) return task;
        int64_t const kv_heads = Split(p.heads, p.group).outer;
        skip<Input>(p.query, sequence.first_query_token());
        p.key_sums += sequence.first_chunk() * kv_heads * kHeadDim;
        p.codes = static_cast<char*>(p.codes) + before * kQueryBlock * kHeadDim * Format::kBits / 8;
        p.scales += before * kGroups;
        if constexpr (kSmooth) p.means += before * kHeadDim;
        if (p.row_term != nullptr) p.row_term += sequence.first_query_token() * p.heads;
        p.query_length = sequence.query_length();
        p.query_blocks = sequence.query_blocks();
        p.first_live = sequence.first_live();
        p.end_live = sequence.end_live();
        p.first_key = sequence.first_key();
        p.end_key = sequence.end_key();
        p.chunks = sequence.chunks();
        return task;
    }

 private:
    // What a thread does: of a task of `head`, the tokens at.row + t * kRows.
    struct Place {
        At at;
        int64_t block;   // (b * H + h) * M + that of the head
        int part;        // of the block
        int head;        // b * H + h
        int64_t first;   // token of the task
        Seen seen;       // queries that see a key
        uint32_t lives;  // bit t: the thread's token t is one

        SAGE_DEVICE Place(Params const& p, Split const& task)
            : Place(p, task, Split(task.outer, p.query_blocks)) {}

        SAGE_DEVICE Place(Params const& p, Split const& task, Split const& block)
            : block(task.outer),
              part(task.inner),
              head(block.outer),
              first(int64_t{block.inner} * kQueryBlock + task.inner * kTaskTokens),
              seen(p.flags, Split(block.outer, p.heads), p.first_live, p.end_live),
              lives(0) {
            SAGE_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                lives |= static_cast<uint32_t>(seen.of(token(t)) != 0) << t;
            }
        }

        // The thread's token t, in the block and in the sequence.
        SAGE_DEVICE int in_block(int t) const { return part * kTaskTokens + in_task(t); }
        SAGE_DEVICE int64_t token(int t) const { return first + in_task(t); }
        SAGE_DEVICE bool live(int t) const { return lives >> t & 1; }

        SAGE_DEVICE int in_task(int t) const { return at.row + t * At::kRows; }

        // How many queries of the block see a key.
        SAGE_DEVICE float live_queries() const {
            int count = 0;
            for (int token = 0; token < kQueryBlock; ++token) {
                count += seen.of(first + token) != 0;
            }
            return static_cast<float>(count);
        }
    };

    SAGE_DEVICE static void store_row_terms(Params const& p, Place const& place,
                                            Kept const (&query)[kTokens]) {
        int64_t const kv_head = Split(place.head, p.group).outer;  // G divides H
        float key_mean[kChunk];
        mean_of_keys<kHeadDim>(key_mean, p.key_sums + kv_head * p.chunks * kHeadDim, p.chunks,
                               place.at.channel,
                               counted_keys(p.counts, kv_head, p.first_key, p.end_key));
        float const scale = p.scale < 0.0f ? -p.scale : p.scale;
        float terms[kTokens] = {};
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            float x[kChunk];
            query[t].unpack(x);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) terms[t] = arch::fma(x[i], key_mean[i], terms[t]);
            SAGE_UNROLL
            for (int mask = 1; mask < At::kColumns; mask *= 2) {
                terms[t] += arch::shuffle_xor(terms[t], mask);
            }
        }
        // After all shuffles: between them, a branch would make each of them a call.
        if (!place.at.first_column()) return;
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            if (place.token(t) < p.query_length) {
                int64_t const index = place.head * p.query_length + place.token(t);
                arch::store_global(p.row_term + index, terms[t] * scale);
            }
        }
    }

    // The mean over the live tokens of the block, for the thread's channels.
    SAGE_DEVICE static void mean_of_block(Params const& p, Place const& place,
                                          Kept const (&query)[kTokens], float (&mean)[kChunk]) {
        float* const sums = reinterpret_cast<float*>(arch::shared_memory());  // (kRows, D)
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            float x[kChunk];
            query[t].unpack(x);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) mean[i] += x[i];
        }
        store_floats_shared(sums + place.at.row * kHeadDim + place.at.channel, mean);
        arch::barrier();
        int const channel = arch::thread_index();
        if (channel < kHeadDim) {
            float sum = 0.0f;
            SAGE_UNROLL
            for (int row = 0; row < At::kRows; ++row) {
                sum += arch::load_shared(sums + row * kHeadDim + channel);
            }
            float const of_channel = arch::divide(sum, arch::maximum(place.live_queries(), 1.0f));
            // Nobody else has read or will read this column's sums.
            arch::store_shared(sums + channel, of_channel);
            arch::store_global(p.means + place.block * kHeadDim + channel,
                               of_channel * p.score_factor);
        }
        arch::barrier();
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            mean[i] = arch::load_shared(sums + place.at.channel + i);
        }
    }

    SAGE_DEVICE static void store_quantized(Params const& p, Place const& place,
                                            Kept const (&query)[kTokens],
                                            float const (&mean)[kChunk]) {
        // Largest magnitudes: (groups, parts).
        uint32_t* const amax = reinterpret_cast<uint32_t*>(arch::shared_memory() +
                                                           At::kRows * kHeadDim * sizeof(float));
        int const group = place.at.row % kQueryGroups, part = place.at.row / kQueryGroups;
        uint32_t largest_of_warp[kTokens / kTokensOfWarp] = {};
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            float x[kChunk];
            smoothed(x, query[t], mean, place.live(t));
            uint32_t& largest = largest_of_warp[t / kTokensOfWarp];
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) largest = larger(largest, magnitude_bits(x[i]));
        }
        SAGE_UNROLL
        for (uint32_t& largest : largest_of_warp) largest = largest_of_token<kHeadDim>(largest);
        if (place.at.first_column()) {
            SAGE_UNROLL
            for (int warp = 0; warp < kTokens / kTokensOfWarp; ++warp) {
                int const index = (warp * kQueryGroups + group) * kParts + part;
                arch::store_shared(amax + index, largest_of_warp[warp]);
            }
        }
        arch::barrier();

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
            smoothed(x, query[t], mean, place.live(t));
            store_row(p, place, t, x, scale);
            if (t % kTokensOfWarp == 0 && part == 0 && place.at.first_column()) {
                int const of_block = place.part * (kGroups / kTasks) + warp * kQueryGroups + group;
                int64_t const index = place.block * kGroups + of_block;
                arch::store_global(p.scales + index, scale * p.score_factor);
            }
        }
    }

    SAGE_DEVICE static void store_row(Params const& p, Place const& place, int t,
                                      float const (&x)[kChunk], float scale) {
        int64_t block = place.block;
        int row = place.in_block(t);
        if constexpr (kPackedHeads) {
            // Rows of the tile that no query has are computed of whatever is there, for nobody.
            if (place.token(t) >= p.query_length) return;
            Split const head(place.head, p.group);
            Split const packed(place.token(t) * p.group + head.inner, kQueryBlock);
            block = head.outer * tiles_of(static_cast<int>(p.group * p.query_length), kQueryBlock) +
                    packed.outer;
            row = packed.inner;
        }
        store_codes<Format, Codes>(static_cast<char*>(p.codes) + block * Codes::kBytes, row,
                                   place.at.channel, x, scale,
                                   [](auto* to, auto code) { arch::store_global(to, code); });
    }

    SAGE_DEVICE static void smoothed(float (&x)[kChunk], Kept const& query,
                                     float const (&mean)[kChunk], bool live) {
        query.unpack(x);
        if constexpr (kSmooth) {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) x[i] = live ? x[i] - mean[i] : 0.0f;
        }
    }
};

}  // namespace sage
