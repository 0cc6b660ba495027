// V: scaled per channel into the range of its format, and transposed, so that 32 bytes of a channel
// are one step of P @ V. For E4M3 the tokens of each 32 are reordered, so that the accumulators of
// Q K^T are P's operand as they lie.
#pragma once

#include <sage/tokens.cuh>
#include <sage/varlen.cuh>

namespace sage {

// With kPanels, codes are in the order that wgmma reads.
template <class Input, class Format, int kHeadDim, bool kHalfAccumulator, bool kPanels = false>
struct QuantizeValue {
    using Params = ValueParams;
    using At = Position<kHeadDim>;
    static constexpr int kTokens = kKeyBlock / At::kRows;
    static constexpr int kRowFloats = kHeadDim + 4;  // padded against bank conflicts
    using Codes = Order<kPanels, kHeadDim, kKeyBlock * Format::kBits / 8>;
    static constexpr float kLimit = kHalfAccumulator ? kHalfAccumulatorLimit : Format::kLimit;
    // A V in FP16 is taken as it is.
    static constexpr bool kScaled =
        Format::kBits == 8 || !cutlass::platform::is_same<Input, cutlass::half_t>::value;
    static_assert(!kHalfAccumulator || Format::kBits == 8, "a mode of E4M3");

    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kKeyBlock * kRowFloats * sizeof(float);

    SAGE_DEVICE static void run(Params const& p) { run(p, arch::block_index()); }

    SAGE_DEVICE static void run(Params const& p, int64_t task) {
        run(p, task, [] {});
    }

    // task = (b * Hkv + h) * N + block. `await` returns when there are magnitudes.
    template <class Await>
    SAGE_DEVICE static void run(Params const& p, int64_t task, Await await) {
        At const at;
        Split const block(task, p.key_blocks);
        int64_t const head = block.outer;
        int64_t const first = int64_t{block.inner} * kKeyBlock + at.row;
        Split const of_tensor(block.outer, p.heads);
        Head<Input> const tokens(p.value, of_tensor);
        Seen const seen(p.flags, of_tensor, p.first_key, p.end_key);
        float* const shared = reinterpret_cast<float*>(arch::shared_memory());  // (tokens, D)

        Batch<kTokens, Chunk<Input>> batch;
        batch.load(tokens, seen, first, At::kRows, at.channel);
        await();
        float scale[kChunk];
        scales_of_channels(p, at, head, scale);
        if (block.inner == 0 && at.row == 0) {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                arch::store_global(p.scales + head * kHeadDim + at.channel + i, scale[i]);
            }
        }
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            float x[kChunk];
            batch.chunks[t].unpack(x);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                if (batch.seen(t) != 0 && kScaled) x[i] = quotient_within(x[i], scale[i], kLimit);
            }
            store_floats_shared(shared + (t * At::kRows + at.row) * kRowFloats + at.channel, x);
        }
        arch::barrier();
        store_transposed(p.codes + task * p.tile_bytes, shared);
    }

    // As Varlen wants it.
    SAGE_DEVICE static int64_t narrow(Params& p, Sequences const& batch, int64_t block) {
        Sequence const sequence = Sequence::with_key_block(batch, Split(block, p.heads).outer);
        int64_t const before = sequence.first_key_block() * p.heads;
        int64_t const task = sequence.task(block - before, sequence.key_blocks() * p.heads);
        if (task < 0) return task;
        skip<Input>(p.value, sequence.first_key_token());
        p.value_amax += sequence.first_chunk() * p.heads * kHeadDim;
        p.codes += before * p.tile_bytes;
        p.scales += sequence.index() * p.heads * kHeadDim;
        p.key_blocks = sequence.key_blocks();
        p.first_key = sequence.first_key();
        p.end_key = sequence.end_key();
        p.chunks = sequence.chunks();
        return task;
    }

 private:
    SAGE_DEVICE static void scales_of_channels(Params const& p, At const& at, int64_t head,
                                               float (&scale)[kChunk]) {
        if constexpr (!kScaled) {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) scale[i] = 1.0f;
            return;
        }
        uint32_t amax[kChunk] = {};
        float const* const partial =
            reinterpret_cast<float const*>(p.value_amax) + head * p.chunks * kHeadDim + at.channel;
        for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
            float of_chunk[kChunk];
            load_floats(of_chunk, partial + chunk * kHeadDim);
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) amax[i] = larger(amax[i], arch::bits(of_chunk[i]));
        }
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            scale[i] =
                Format::kBits == 8 ? scale_of(amax[i], kLimit) : power_of_two_scale_of(amax[i]);
        }
    }

 public:
    // Rounds scaled tokens (tokens, D), in rows of kRowFloats: 16 bytes a thread and turn, 16
    // tokens of a channel in E4M3, 8 in FP16.
    SAGE_DEVICE static void store_transposed(char* codes, float const* shared) {
        constexpr int kTokensAtOnce = 128 / Format::kBits;
        constexpr int kParts = kKeyBlock / kTokensAtOnce;
        SAGE_UNROLL
        for (int unit = 0; unit < kHeadDim * kParts; unit += kThreads) {
            int const index = unit + arch::thread_index();
            int const channel = index % kHeadDim, part = index / kHeadDim;
            uint32_t packed[4];
            SAGE_UNROLL
            for (int word = 0; word < 4; ++word) {
                float const* const column = shared + channel;
                if constexpr (Format::kBits == 8) {
                    // Position 16 h + 4 t + j of 32 is token 8 (2 h + j / 2) + 2 t + j % 2.
                    int const token = part / 2 * 32 + part % 2 * 16 + 2 * word;
                    packed[word] =
                        arch::pack_e4m3(at_token(column, token), at_token(column, token + 1),
                                        at_token(column, token + 8), at_token(column, token + 9));
                } else {
                    int const token = part * 8 + 2 * word;
                    packed[word] =
                        arch::pack_half(at_token(column, token), at_token(column, token + 1));
                }
            }
            arch::store_streaming(
                reinterpret_cast<uint4*>(codes + Codes::offset(channel, part * 16)),
                make_uint4(packed[0], packed[1], packed[2], packed[3]));
        }
    }

 private:
    SAGE_DEVICE static float at_token(float const* column, int token) {
        return arch::load_shared(column + token * kRowFloats);
    }
};

}  // namespace sage
