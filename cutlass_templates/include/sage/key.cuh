// K: smoothed by its mean over all tokens that count, rounded with a scale for each group of tokens
// that one thread of the attention kernel holds. Where Q is smoothed, also what its block means
// contribute to the scores: delta = means . K', by TF32 tensor cores from K' before rounding, which
// exists in shared memory alone.
#pragma once

#include <sage/rotary.cuh>
#include <sage/varlen.cuh>

namespace sage {

// With kPanels, codes are in the order that wgmma reads.
template <class Input, class Format, int kHeadDim, bool kPanels = false, class Reader = Plain>
struct QuantizeKey {
    using Params = typename Reader::template With<KeyParams>;
    using At = Position<kHeadDim>;
    static constexpr int kTokens = kKeyBlock / At::kRows;  // of one thread
    static constexpr int kParts = At::kRows / kKeyGroups;  // rows of threads that share a group
    static constexpr int kRowFloats = kHeadDim + 4;        // padded against bank conflicts
    static constexpr bool kDelta = Format::kBits == 4;
    using Codes = Order<kPanels, kKeyBlock, kHeadDim * Format::kBits / 8>;

    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes =
        (At::kRows + (kDelta ? kKeyBlock * kRowFloats : 0)) * sizeof(float);

    SAGE_DEVICE static void run(Params const& p) { run(p, arch::block_index()); }

    SAGE_DEVICE static void run(Params const& p, int64_t task) {
        run(p, task, [] {});
    }

    // task = (b * Hkv + h) * N + block. `await` returns when there are sums, and means.
    template <class Await>
    SAGE_DEVICE static void run(Params const& p, int64_t task, Await await) {
        At const at;
        Split const block(task, p.key_blocks);
        int64_t const head = block.outer;
        int64_t const first = int64_t{block.inner} * kKeyBlock + at.row;
        Split const of_tensor(block.outer, p.heads);
        auto const tokens = Reader::template read<Input>(p, p.key, of_tensor);
        Seen const seen(p.flags, of_tensor, p.first_key, p.end_key);

        Batch<kTokens, Chunk<typename Reader::template Kept<Input>>> batch;
        batch.load(tokens, seen, first, At::kRows, at.channel);
        await();
        float mean[kChunk];
        mean_of_keys<kHeadDim>(mean, p.key_sums + head * p.chunks * kHeadDim, p.chunks, at.channel,
                               counted_keys(p.counts, head, p.first_key, p.end_key));
        float key[kTokens][kChunk];
        uint32_t largest = 0;
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            uint8_t const of_token = batch.seen(t);
            batch.chunks[t].unpack(key[t]);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                key[t][i] = of_token != 0 ? key[t][i] - mean[i] : 0.0f;
                largest = larger_counted(largest, key[t][i], of_token);
            }
        }

        int64_t const tile = task * p.tile_bytes;
        pack(at, key, largest, p.codes + tile, reinterpret_cast<float*>(p.scales + tile));
        if constexpr (kDelta) store_delta(p, head, block.inner);
    }

    // Rounds K' of a tile, of which `largest` is the largest magnitude that the thread has. With
    // kDelta K' is in smoothed() then.
    SAGE_DEVICE static void pack(At const& at, float const (&key)[kTokens][kChunk],
                                 uint32_t largest, char* codes, float* scales) {
        // Largest magnitudes: (groups, parts). A token's group is its index modulo 8, halved.
        uint32_t* const amax = reinterpret_cast<uint32_t*>(arch::shared_memory());
        int const group = at.row % 8 / 2, part = at.row / 8 * 2 + at.row % 2;
        largest = largest_of_token<kHeadDim>(largest);
        if (at.first_column()) arch::store_shared(amax + group * kParts + part, largest);
        if constexpr (kDelta) {
            SAGE_UNROLL
            for (int t = 0; t < kTokens; ++t) {
                int const token = t * At::kRows + at.row;
                store_floats_shared(smoothed() + token * kRowFloats + at.channel, key[t]);
            }
        }
        arch::barrier();

        SAGE_UNROLL
        for (int other = 0; other < kParts; ++other) {
            largest = larger(largest, arch::load_shared(amax + group * kParts + other));
        }
        float const scale = scale_of(largest, Format::kLimit);
        if (part == 0 && at.first_column()) arch::store_global(scales + group, scale);
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            store_codes<Format, Codes>(
                codes, t * At::kRows + at.row, at.channel, key[t], scale,
                [](auto* to, auto code) { arch::store_streaming(to, code); });
        }
    }

    SAGE_DEVICE static float* smoothed() {  // (tokens, D), in rows of kRowFloats
        return reinterpret_cast<float*>(arch::shared_memory()) + At::kRows;
    }

    // As Varlen wants it.
    SAGE_DEVICE static int64_t narrow(Params& p, Sequences const& batch, int64_t block) {
        Sequence const sequence = Sequence::with_key_block(batch, Split(block, p.heads).outer);
        int64_t const before = sequence.first_key_block() * p.heads;
        int64_t const task = sequence.task(block - before, sequence.key_blocks() * p.heads);
        if (task < 0) return task;
        skip<Input>(p.key, sequence.first_key_token());
        p.key_sums += sequence.first_chunk() * p.heads * kHeadDim;
        p.codes += before * p.tile_bytes;
        p.scales += before * p.tile_bytes;
        if constexpr (kDelta) {
            int64_t const rows = sequence.first_query_block() * p.heads * batch.group;
            p.means += rows * kHeadDim;
            p.delta += rows * batch.most_key_blocks * kKeyBlock;
        }
        p.key_blocks = sequence.key_blocks();
        p.mean_rows = batch.group * sequence.query_blocks();
        p.first_key = sequence.first_key();
        p.end_key = sequence.end_key();
        p.chunks = sequence.chunks();
        return task;
    }

    static constexpr int kUnits = kHeadDim / 16;  // 16 channels make two steps of the atom

    // delta (G * M, 64) of this key block, of what is in smoothed(). A warp has 8 keys, whose K' it
    // keeps in registers, and goes through all rows of means. The channels of a step may be any 8,
    // as long as both operands agree: so that a thread's loads are 16 bytes, step s of unit u has
    // channels 16 u + 4 t + 2 s
    // (+ 1).
    template <class WithMeans>
    SAGE_DEVICE static void store_delta(WithMeans const& p, int64_t head, int64_t block) {
        int const warp = arch::thread_index() / 32, lane = arch::thread_index() % 32;
        int const row_of_lane = lane / 4, t = lane % 4;

        uint32_t keys[kUnits][4];
        SAGE_UNROLL
        for (int u = 0; u < kUnits; ++u) {
            float4 const four = arch::load_shared(reinterpret_cast<float4 const*>(
                smoothed() + (warp * 8 + row_of_lane) * kRowFloats + 16 * u + 4 * t));
            to_tf32(keys[u], four);
        }

        int64_t const delta_width = p.key_blocks * kKeyBlock;
        float const* const means = p.means + head * p.mean_rows * kHeadDim;
        float* const delta =
            p.delta + head * p.mean_rows * delta_width + block * kKeyBlock + warp * 8 + 2 * t;
        for (int64_t first = 0; first < p.mean_rows; first += 16) {
            int64_t const low = first + row_of_lane, high = low + 8;
            float sums[4] = {};
            SAGE_UNROLL
            for (int u = 0; u < kUnits; ++u) {
                uint32_t of_low[4], of_high[4];
                load_means(of_low, means, low, p.mean_rows, 16 * u + 4 * t);
                load_means(of_high, means, high, p.mean_rows, 16 * u + 4 * t);
                SAGE_UNROLL
                for (int step = 0; step < 2; ++step) {
                    uint32_t const a[4] = {of_low[2 * step], of_high[2 * step],
                                           of_low[2 * step + 1], of_high[2 * step + 1]};
                    uint32_t const b[2] = {keys[u][2 * step], keys[u][2 * step + 1]};
                    arch::mma<arch::MmaTf32>(sums, a, b);
                }
            }
            if (low < p.mean_rows) {
                arch::store_streaming(reinterpret_cast<float2*>(delta + low * delta_width),
                                      make_float2(sums[0], sums[1]));
            }
            if (high < p.mean_rows) {
                arch::store_streaming(reinterpret_cast<float2*>(delta + high * delta_width),
                                      make_float2(sums[2], sums[3]));
            }
        }
    }

 private:
    SAGE_DEVICE static void load_means(uint32_t (&operand)[4], float const* means, int64_t row,
                                       int64_t rows, int channel) {
        float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < rows) {
            four = arch::load_written(
                reinterpret_cast<float4 const*>(means + row * kHeadDim + channel));
        }
        to_tf32(operand, four);
    }

    SAGE_DEVICE static void to_tf32(uint32_t (&operand)[4], float4 four) {
        operand[0] = arch::to_tf32(four.x);
        operand[1] = arch::to_tf32(four.y);
        operand[2] = arch::to_tf32(four.z);
        operand[3] = arch::to_tf32(four.w);
    }
};

}  // namespace sage
