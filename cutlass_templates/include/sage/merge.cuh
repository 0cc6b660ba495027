// Joins what the parts of a row's keys made of it, in their order, as the online softmax joins
// tiles: each part's sums, made relative to the maximum of all.
#pragma once

#include <sage/row_end.cuh>

namespace sage {

// kValueDim as padded_dim has it. A row of threads does a row, four channels each.
template <class Output, int kValueDim>
struct Merge {
    using Params = MergeParams;
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = 0;
    static constexpr int kChannels = 4;
    static constexpr int kColumns = kValueDim / kChannels;
    static constexpr int kRows = kThreads / kColumns;

    SAGE_DEVICE static void run(Params const& p) {
        arch::await_prerequisites();
        int64_t const row = arch::block_index() * kRows + arch::thread_index() / kColumns;
        int const channel = arch::thread_index() % kColumns * kChannels;
        if (row >= p.rows || channel >= p.channels) return;

        float const* const sums = p.part_sums + row * p.parts * 2;
        float maximum = -infinity();
        bool dead = true;
        for (int part = 0; part < p.parts; ++part) {
            float2 const of_part = load_sums(sums, part);
            maximum = arch::maximum(maximum, of_part.x);
            dead &= of_part.y == 0.0f;
        }
        // A NaN beside keys that are hidden leaves a maximum of -inf.
        float const origin = maximum == -infinity() ? 0.0f : maximum;

        float total = 0.0f, output[kChannels] = {};
        for (int part = 0; part < p.parts; ++part) {
            float2 const of_part = load_sums(sums, part);
            if (of_part.y == 0.0f) continue;  // it saw no key, and stored no output
            float const share = arch::exp2(of_part.x - origin);
            total = arch::fma(of_part.y, share, total);
            float4 const four = arch::load_written(reinterpret_cast<float4 const*>(
                p.part_outputs + (row * p.parts + part) * kValueDim + channel));
            output[0] = arch::fma(four.x, share, output[0]);
            output[1] = arch::fma(four.y, share, output[1]);
            output[2] = arch::fma(four.z, share, output[2]);
            output[3] = arch::fma(four.w, share, output[3]);
        }
        store(p, row, channel, output, maximum, total, dead);
    }

 private:
    // The maximum of a part's scores, and the sum of its P.
    SAGE_DEVICE static float2 load_sums(float const* sums, int part) {
        return arch::load_written(reinterpret_cast<float2 const*>(sums + 2 * part));
    }

    SAGE_DEVICE static void store(Params const& p, int64_t row, int channel,
                                  float const (&output)[kChannels], float maximum, float total,
                                  bool dead) {
        Split const query(row, p.query_length);
        Split const head(query.outer, p.heads);
        RowEnd end(maximum, total, p.log2_weight_factor, dead,
                   p.dead_is_nan ? arch::from_bits(kNanBits) : 0.0f);
        if (p.row_term != nullptr) end.add_row_term(arch::load_written(p.row_term + row));
        if (p.sinks != nullptr) end.add_sink(arch::load_global(p.sinks + head.inner));
        Output* const of_row = static_cast<Output*>(p.output) + head.outer * p.output_batch_stride +
                               head.inner * p.output_head_stride +
                               query.inner * p.output_token_stride;
        int64_t const kv_head = Split(query.outer, p.group).outer;  // G divides H
        float const* const scales =
            p.value_scales == nullptr ? nullptr : p.value_scales + kv_head * kValueDim + channel;
        float values[kChannels];
        SAGE_UNROLL
        for (int i = 0; i < kChannels; ++i) {
            float const scale = scales == nullptr ? 1.0f : arch::load_written(scales + i);
            values[i] = end.value(output[i], p.limit, scale);
        }
        bool const pairs = stores_pairs(of_row, p.channels);
        SAGE_UNROLL
        for (int i = 0; i < kChannels; i += 2) {
            if (channel + i >= p.channels) continue;
            if (pairs) {
                store_pair(of_row + channel + i, values[i], values[i + 1]);
            } else {
                store_one(of_row + channel + i, values[i]);
                if (channel + i + 1 < p.channels)
                    store_one(of_row + channel + i + 1, values[i + 1]);
            }
        }
        if (p.lse != nullptr && channel == 0) arch::store_global(p.lse + row, end.lse());
    }
};

}  // namespace sage
