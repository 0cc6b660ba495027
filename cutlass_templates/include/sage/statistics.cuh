// Sums of K and largest magnitudes of V, per channel, over chunks of the tokens that some query
// sees. The kernels that use them add up the chunks, in order: the result is the same in every run.
#pragma once

#include <sage/rotary.cuh>
#include <sage/varlen.cuh>

namespace sage {

// A task has a chunk, or of its channels one of kSlices: then more threads share the tokens of a
// channel, and are quicker through with it.
template <class Input, int kKeyDim, int kValueDim, class KeyReader = Plain, int kSlices = 1>
struct Statistics {
    using Params = typename KeyReader::template With<StatisticsParams>;
    static constexpr int kThreads = kQuantizerThreads;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = kQuantizerThreads * kChunk * sizeof(float);  // any dim
    static constexpr int kAtOnce = 4;  // tokens of a thread that are on their way together

    SAGE_DEVICE static void run(Params const& p) { run(p, arch::block_index()); }

    SAGE_DEVICE static void run(Params const& p, int64_t task) {
        if (task < p.key_tasks) {
            key(p, task);
        } else {
            value(p, task - p.key_tasks);
        }
    }

    // task = ((b * Hkv + h) * chunks + chunk) * kSlices + slice
    SAGE_DEVICE static void key(Params const& p, int64_t task) {
        reduce<kKeyDim, KeyReader>(
            p, task, p.key, p.key_sums,
            [](float sum, float x, uint8_t seen) { return seen & kCounts ? sum + x : sum; },
            [](float sum, float other) { return sum + other; });
    }

    SAGE_DEVICE static void value(Params const& p, int64_t task) {
        // Kept as floats of the same bits: NaN is the largest.
        reduce<kValueDim, Plain>(
            p, task, p.value, reinterpret_cast<float*>(p.value_amax),
            [](float amax, float x, uint8_t seen) {
                return arch::from_bits(larger_counted(arch::bits(amax), x, seen));
            },
            [](float amax, float other) {
                return arch::from_bits(larger(arch::bits(amax), arch::bits(other)));
            });
    }

    // As Varlen wants it.
    SAGE_DEVICE static int64_t narrow(Params& p, Sequences const& batch, int64_t block) {
        bool const of_value = block >= p.key_tasks;
        if (of_value) block -= p.key_tasks;
        Sequence const sequence = Sequence::with_chunk(batch, Split(block, p.heads).outer);
        int64_t const before = sequence.first_chunk() * p.heads;
        p.key_tasks = sequence.chunks() * p.heads;
        int64_t const task = sequence.task(block - before, p.key_tasks);
        if (task < 0) return task;
        skip<Input>(p.key, sequence.first_key_token());
        skip<Input>(p.value, sequence.first_key_token());
        p.key_sums += before * kKeyDim;
        p.value_amax += before * kValueDim;
        p.first_key = sequence.first_key();
        p.end_key = sequence.end_key();
        p.chunks = sequence.chunks();
        p.chunk_tokens = sequence.chunk_tokens();
        return of_value ? p.key_tasks + task : task;
    }

 private:
    // Adds the tokens of one chunk of one head, and joins what threads found, into `results` (B *
    // Hkv, chunks, D). Every kRows-th token is added to the same sum, by kSlices threads in turn,
    // so that the order is one for any number of slices.
    template <int kHeadDim, class Reader, class Add, class Join>
    SAGE_DEVICE static void reduce(Params const& p, int64_t task, Strided const& tensor,
                                   float* results, Add add, Join join) {
        constexpr int kRows = Position<kHeadDim>::kRows, kChannels = kHeadDim / kSlices;
        constexpr int kColumns = kChannels / kChunk;
        static_assert(kColumns > 0 && kColumns * kRows * kSlices == kThreads, "a chunk a thread");
        int const column = arch::thread_index() % kColumns;
        int const row = arch::thread_index() / kColumns % kRows;
        int const turn = arch::thread_index() / kColumns / kRows;
        Split const slice(task, kSlices);
        Split const chunk(slice.outer, p.chunks);
        Split const head(chunk.outer, p.heads);
        int const first_channel = slice.inner * kChannels;
        auto const tokens = Reader::template read<Input>(p, tensor, head);
        int64_t const first = p.first_key + chunk.inner * p.chunk_tokens;
        int64_t const all = first + p.chunk_tokens;
        int64_t const end = all < p.end_key ? all : p.end_key;
        Seen const seen(p.flags, head, first, end);

        float* const shared = reinterpret_cast<float*>(arch::shared_memory());  // (kRows, channels)
        float* const own = shared + row * kChannels + column * kChunk;
        float total[kChunk] = {};
        for (int64_t begin = first; begin < end; begin += kAtOnce * kRows * kSlices) {
            Batch<kAtOnce, Chunk<typename Reader::template Kept<Input>>> batch;
            batch.load(tokens, seen, begin + row + turn * kAtOnce * kRows, kRows,
                       first_channel + column * kChunk);
            for (int other = 0; other < kSlices; ++other) {
                if (turn == other) {
                    if (kSlices > 1 && (other > 0 || begin > first)) load_floats_shared(total, own);
                    SAGE_UNROLL
                    for (int t = 0; t < kAtOnce; ++t) {
                        float x[kChunk];
                        batch.chunks[t].unpack(x);
                        SAGE_UNROLL
                        for (int i = 0; i < kChunk; ++i) {
                            total[i] = add(total[i], x[i], batch.seen(t));
                        }
                    }
                    if (kSlices > 1) store_floats_shared(own, total);
                }
                if (kSlices > 1) arch::barrier();
            }
        }
        // Without tokens nobody has had a turn.
        if (kSlices == 1 || (first >= end && turn == 0)) store_floats_shared(own, total);
        arch::barrier();
        int const channel = arch::thread_index();
        if (channel >= kChannels) return;
        float result = 0.0f;
        SAGE_UNROLL
        for (int other = 0; other < kRows; ++other) {
            result = join(result, arch::load_shared(shared + other * kChannels + channel));
        }
        arch::store_global(results + int64_t{slice.outer} * kHeadDim + first_channel + channel,
                           result);
    }
};

}  // namespace sage
