// How the quantizers read a tensor: 8 channels a thread, a row of threads for each of
// kRows tokens at once, any strides.
#pragma once

#include <sage/numeric.cuh>
#include <sage/order.cuh>
#include <sage/params.cuh>

namespace sage {

constexpr int kQuantizerThreads = 256;
constexpr int kChunk = 8;  // channels that one thread has of a token: 16 bytes

// One chunk of a token, as it lies in memory.
template <class Input>
struct Chunk {
    static constexpr int kWords = kChunk * sizeof(Input) / sizeof(uint32_t);
    uint32_t words[kWords];

    SAGE_DEVICE void unpack(float (&x)[kChunk]) const {
        if constexpr (sizeof(Input) == sizeof(float)) {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) x[i] = arch::from_bits(words[i]);
        } else {
            SAGE_UNROLL
            for (int i = 0; i < kWords; ++i) {
                float2 const pair = Packed2<Input>::unpack(words[i]);
                x[2 * i] = pair.x;
                x[2 * i + 1] = pair.y;
            }
        }
    }

    // All types have their sign in the highest bit.
    SAGE_DEVICE void negate() {
        SAGE_UNROLL
        for (uint32_t& word : words) word ^= sizeof(Input) == 4 ? 0x80000000u : 0x80008000u;
    }
};

// The tokens of one head of a tensor.
template <class Input>
class Head {
 public:
    // `head` is that of the tensor: batch and head of it.
    SAGE_DEVICE Head(Strided const& tensor, Split const& head)
        : data_(static_cast<Bits const*>(tensor.data) + head.outer * tensor.batch_stride +
                head.inner * tensor.head_stride),
          token_stride_(tensor.token_stride),
          channel_stride_(tensor.channel_stride),
          channels_(static_cast<int>(tensor.channels)),
          whole_(channel_stride_ == 1 && token_stride_ * sizeof(Input) % sizeof(uint4) == 0 &&
                 reinterpret_cast<uintptr_t>(data_) % sizeof(uint4) == 0) {}

    // The chunk from `channel` on; zeros where the token is not `present`, or has no such channel.
    SAGE_DEVICE Chunk<Input> chunk(int64_t token, int channel, bool present) const {
        Chunk<Input> chunk = {};
        if (!present || channel >= channels_) return chunk;
        Bits const* const address = data_ + token * token_stride_ + channel * channel_stride_;
        if (whole_ && channel + kChunk <= channels_) {
            SAGE_UNROLL
            for (int i = 0; i < Chunk<Input>::kWords; i += 4) {
                constexpr int kPerWord = sizeof(uint32_t) / sizeof(Input);
                uint4 const four =
                    arch::load_global(reinterpret_cast<uint4 const*>(address + i * kPerWord));
                chunk.words[i] = four.x;
                chunk.words[i + 1] = four.y;
                chunk.words[i + 2] = four.z;
                chunk.words[i + 3] = four.w;
            }
        } else {
            SAGE_UNROLL
            for (int i = 0; i < kChunk; ++i) {
                if (channel + i < channels_) {
                    uint32_t const bits = arch::load_global(address + i * channel_stride_);
                    chunk.words[i * sizeof(Input) / 4] |= bits << (i * sizeof(Input) % 4 * 8);
                }
            }
        }
        return chunk;
    }

    // One channel, which the token has.
    SAGE_DEVICE float element(int64_t token, int channel) const {
        uint32_t const bits =
            arch::load_global(data_ + token * token_stride_ + channel * channel_stride_);
        if constexpr (sizeof(Input) == sizeof(float)) {
            return arch::from_bits(bits);
        } else {
            return Packed2<Input>::unpack(bits).x;
        }
    }

 private:
    using Bits = cute::conditional_t<sizeof(Input) == 4, uint32_t, uint16_t>;

    Bits const* data_;
    int64_t token_stride_, channel_stride_;
    int channels_;
    bool whole_;  // a chunk is aligned
};

// What is seen of the tokens of one head: those of a range, and of these what flags say.
class Seen {
 public:
    SAGE_DEVICE Seen(Flags const& flags, Split const& head, int64_t first, int64_t end)
        : data_(flags.data), stride_(flags.token_stride), first_(first), end_(end) {
        if (data_ != nullptr) {
            data_ += head.outer * flags.batch_stride + head.inner * flags.head_stride;
        }
    }

    SAGE_DEVICE uint8_t of(int64_t token) const {
        if (token < first_ || token >= end_) return 0;
        return data_ == nullptr ? kSeen | kCounts : arch::load_global(data_ + token * stride_);
    }

 private:
    uint8_t const* data_;
    int64_t stride_, first_, end_;
};

// The chunks that a thread has of several tokens. They are loaded before the first is looked at, so
// that all are on their way at once.
template <int kTokens, class Chunk>
struct Batch {
    Chunk chunks[kTokens];
    uint32_t flags;  // two bits a token, kSeen and kCounts
    static_assert(kTokens <= 16, "they fit");

    // Of the tokens first, first + stride, ...; `tokens` is a Head, or a rotated one.
    template <class Tokens>
    SAGE_DEVICE void load(Tokens const& tokens, Seen const& of, int64_t first, int stride,
                          int channel) {
        flags = 0;
        SAGE_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            int64_t const token = first + t * stride;
            uint32_t const of_token = of.of(token);
            flags |= of_token << 2 * t;
            chunks[t] = tokens.chunk(token, channel, of_token != 0);
        }
    }

    SAGE_DEVICE uint8_t seen(int t) const { return flags >> 2 * t & (kSeen | kCounts); }
};

// The largest magnitude so far, with one more value: of a token that does not count only whether it
// is finite, since no scale may hide what is not.
SAGE_DEVICE uint32_t larger_counted(uint32_t amax_bits, float x, uint8_t seen) {
    uint32_t const bits = magnitude_bits(x);
    return larger(amax_bits, seen & kCounts ? bits : bits >= kInfinityBits ? kNanBits : 0);
}

// Where a thread stands in a block of kQuantizerThreads: thread = row * kColumns + column.
template <int kHeadDim>
struct Position {
    static constexpr int kColumns = kHeadDim / kChunk;
    static constexpr int kRows = kQuantizerThreads / kColumns;
    static_assert(kColumns <= 32 && 32 % kColumns == 0, "a token's chunks are lanes of one warp");
    static_assert(kRows % kQueryGroups == 0, "a thread's tokens have one index modulo 8");

    int row, channel;

    SAGE_DEVICE Position()
        : row(arch::thread_index() / kColumns), channel(arch::thread_index() % kColumns * kChunk) {}

    SAGE_DEVICE bool first_column() const { return channel == 0; }
};

// The largest magnitude among the chunks of each token.
template <int kHeadDim>
SAGE_DEVICE uint32_t largest_of_token(uint32_t amax_bits) {
    SAGE_UNROLL
    for (int mask = 1; mask < Position<kHeadDim>::kColumns; mask *= 2) {
        amax_bits = larger(amax_bits, arch::shuffle_xor(amax_bits, mask));
    }
    return amax_bits;
}

// Eight floats, as two accesses of 16 bytes. Quantizers made them, perhaps in the same launch.
SAGE_DEVICE void load_floats(float (&x)[kChunk], float const* address) {
    SAGE_UNROLL
    for (int i = 0; i < kChunk; i += 4) {
        float4 const four = arch::load_written(reinterpret_cast<float4 const*>(address + i));
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
    }
}

SAGE_DEVICE void store_floats_shared(float* address, float const (&x)[kChunk]) {
    SAGE_UNROLL
    for (int i = 0; i < kChunk; i += 4) {
        arch::store_shared(reinterpret_cast<float4*>(address + i),
                           make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
    }
}

SAGE_DEVICE void load_floats_shared(float (&x)[kChunk], float const* address) {
    SAGE_UNROLL
    for (int i = 0; i < kChunk; i += 4) {
        float4 const four = arch::load_shared(reinterpret_cast<float4 const*>(address + i));
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
    }
}

// How many keys of a head count.
SAGE_DEVICE float counted_keys(float const* counts, int64_t head, int64_t first, int64_t end) {
    return counts == nullptr ? static_cast<float>(end - first) : arch::load_global(counts + head);
}

// mean K of 8 channels, from the sums of the chunks of its tokens: key_sums (chunks, D).
template <int kHeadDim>
SAGE_DEVICE void mean_of_keys(float (&mean)[kChunk], float const* key_sums, int64_t chunks,
                              int channel, float keys) {
    SAGE_UNROLL
    for (int i = 0; i < kChunk; ++i) mean[i] = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        float sums[kChunk];
        load_floats(sums, key_sums + chunk * kHeadDim + channel);
        SAGE_UNROLL
        for (int i = 0; i < kChunk; ++i) mean[i] += sums[i];
    }
    float const count = arch::maximum(keys, 1.0f);
    SAGE_UNROLL
    for (int i = 0; i < kChunk; ++i) mean[i] = arch::divide(mean[i], count);
}

// Rounds 8 channels to the integers of Format, as `token`'s codes of a (tokens, D) matrix in an
// order of order.cuh, and stores them by `store(address, word or two)`.
template <class Format, class Order, class Store>
SAGE_DEVICE void store_codes(char* codes, int token, int channel, float const (&x)[kChunk],
                             float scale, Store store) {
    uint32_t packed[2] = {0, 0};
    constexpr uint32_t kMask = (1u << Format::kBits) - 1;
    constexpr int kPerWord = 32 / Format::kBits;
    SAGE_UNROLL
    for (int i = 0; i < kChunk; ++i) {
        float const quotient = quotient_within(x[i], scale, Format::kLimit);
        uint32_t const code = static_cast<uint32_t>(arch::round_to_int(quotient)) & kMask;
        packed[i / kPerWord] |= code << (i % kPerWord * Format::kBits);
    }
    char* const address = codes + Order::offset(token, channel * Format::kBits / 8);
    if constexpr (Format::kBits == 8) {
        store(reinterpret_cast<uint2*>(address), make_uint2(packed[0], packed[1]));
    } else {
        store(reinterpret_cast<uint32_t*>(address), packed[0]);
    }
}

}  // namespace sage
