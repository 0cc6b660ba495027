// Rotary embedding, applied where the quantizers read a token: of its first channels every pair is
// turned by an angle, whose cosine and sine are in two tables. In float32, each product and each
// sum rounded by itself, which is what torch computes of float32 tensors.
#pragma once

#include <sage/tokens.cuh>

namespace sage {

// Which of the R channels that are rotated make pair i: i and i + R / 2, or 2 i and 2 i + 1.
enum class RotaryPairs { kHalves, kInterleaved };

// As Head: the tokens of one head of a tensor, rotated.
template <class Input, RotaryPairs kPairs>
class RotatedHead {
 public:
    SAGE_DEVICE RotatedHead(Strided const& tensor, Rotary const& rotary, Split const& head)
        : tokens_(tensor, head),
          rotary_(rotary),
          head_(head),
          channels_(static_cast<int>(rotary.channels)),
          half_(channels_ / 2) {}

    // What is not present is not turned either: its row of a table may hold anything.
    SAGE_DEVICE Chunk<float> chunk(int64_t token, int channel, bool present) const {
        float x[kChunk];
        tokens_.chunk(token, channel, present).unpack(x);
        if (present && channel < channels_) {
            switch (rotary_.kind) {
                case MaskKind::kHalf:
                    turn<cutlass::half_t>(x, token, channel);
                    break;
                case MaskKind::kBfloat16:
                    turn<cutlass::bfloat16_t>(x, token, channel);
                    break;
                default:
                    turn<float>(x, token, channel);
            }
        }
        Chunk<float> rotated;
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) rotated.words[i] = arch::bits(x[i]);
        return rotated;
    }

 private:
    static constexpr bool kHalves = kPairs == RotaryPairs::kHalves;

    template <class Entry>
    SAGE_DEVICE void turn(float (&x)[kChunk], int64_t token, int channel) const {
        float partner[kChunk], cosine[kChunk], sine[kChunk];
        load_partners(partner, x, token, channel);
        load_row<Entry>(cosine, rotary_.cosine, token, channel);
        load_row<Entry>(sine, rotary_.sine, token, channel);
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            if (channel + i >= channels_) continue;
            float const other = is_second(channel + i) ? partner[i] : -partner[i];
            x[i] = arch::multiply(x[i], cosine[i]) + arch::multiply(other, sine[i]);
        }
    }

    SAGE_DEVICE bool is_second(int channel) const {
        return kHalves ? channel >= half_ : channel % 2 != 0;
    }

    // The other channels of the pairs. Those of the other half are in another thread, and come from
    // the L1 cache, which has just been given the whole token: an exchange between lanes would take
    // as many instructions, and does not exist for halves that are no whole chunks.
    SAGE_DEVICE void load_partners(float (&partner)[kChunk], float const (&x)[kChunk],
                                   int64_t token, int channel) const {
        if constexpr (!kHalves) {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) partner[i] = x[i ^ 1];
        } else if (half_ % kChunk == 0) {
            int const first = channel < half_ ? channel + half_ : channel - half_;
            tokens_.chunk(token, first, true).unpack(partner);
        } else {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                int const of = channel + i;
                partner[i] = of < channels_
                                 ? tokens_.element(token, of < half_ ? of + half_ : of - half_)
                                 : 0.0f;
            }
        }
    }

    // What a table has for the channels of a chunk, in 16 bytes at a time where it lies so.
    template <class Entry>
    SAGE_DEVICE void load_row(float (&row)[kChunk], RotaryTable const& table, int64_t token,
                              int channel) const {
        if constexpr (kHalves) {
            if (half_ % kChunk == 0) {
                int const second = channel >= half_;
                side<Entry>(table, second).chunk(token, channel - second * half_, true).unpack(row);
                return;
            }
        } else if (table.pair_stride == 2 * table.side_stride) {  // channels lie side by side
            Head<Entry>({table.data, table.batch_stride, table.head_stride, table.token_stride,
                         table.side_stride, channels_},
                        head_)
                .chunk(token, channel, true)
                .unpack(row);
            return;
        }
        Head<Entry> const first = side<Entry>(table, 0), second = side<Entry>(table, 1);
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) {
            int const of = channel + i;
            int const pair = kHalves ? (of < half_ ? of : of - half_) : of / 2;
            row[i] = of >= channels_ ? 0.0f
                     : is_second(of) ? second.element(token, pair)
                                     : first.element(token, pair);
        }
    }

    // The entries for the first or the second channels of all pairs.
    template <class Entry>
    SAGE_DEVICE Head<Entry> side(RotaryTable const& table, int second) const {
        return Head<Entry>(
            {static_cast<Entry const*>(table.data) + second * table.side_stride, table.batch_stride,
             table.head_stride, table.token_stride, table.pair_stride, half_},
            head_);
    }

    Head<Input> tokens_;
    Rotary const& rotary_;
    Split head_;
    int channels_, half_;
};

// How a quantizer reads its tensor. `Kept` is what a thread keeps of a channel.
struct Plain {
    template <class Params>
    using With = Params;
    template <class Input>
    using Kept = Input;

    template <class Input, class Params>
    SAGE_DEVICE static Head<Input> read(Params const&, Strided const& tensor, Split const& head) {
        return Head<Input>(tensor, head);
    }
};

template <RotaryPairs kPairs>
struct Rotated {
    template <class Params>
    using With = WithRotary<Params>;
    template <class Input>
    using Kept = float;

    template <class Input, class Params>
    SAGE_DEVICE static RotatedHead<Input, kPairs> read(Params const& p, Strided const& tensor,
                                                       Split const& head) {
        return RotatedHead<Input, kPairs>(tensor, p.rotary, head);
    }
};

}  // namespace sage
