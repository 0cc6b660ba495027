// The tokens that one append to a cache packs: new ones, as the caller has them, and those before
// them in the same tiles, which were staged when they came.
#pragma once

#include <sage/tokens.cuh>

namespace sage {

template <class Input, int kHeadDim>
class Appended {
 public:
    // Of `head`, which is b * Hkv + h.
    SAGE_DEVICE Appended(Strided const& added, Staged const& staged, int head, int64_t heads,
                         int64_t length, int64_t end)
        : added_(added, Split(head, heads)),
          staged_(static_cast<char*>(staged.data) +
                  head * staged.places * kKeyBlock * kHeadDim * int64_t{sizeof(Input)}),
          place_before_(staged.place_before),
          place_after_(staged.place_after),
          length_(length),
          end_(end) {}

    // The chunk from `channel` on; zeros from the end on.
    SAGE_DEVICE Chunk<Input> chunk(int64_t token, int channel) const {
        if (token >= length_) return added_.chunk(token - length_, channel, token < end_);
        Chunk<Input> chunk;
        uint4 const* const from = address(token, channel, length_, place_before_);
        SAGE_UNROLL
        for (int i = 0; i < Chunk<Input>::kWords; i += 4) {
            uint4 const four = arch::load_global(from + i / 4);
            chunk.words[i] = four.x;
            chunk.words[i + 1] = four.y;
            chunk.words[i + 2] = four.z;
            chunk.words[i + 3] = four.w;
        }
        return chunk;
    }

    // Stages a new token, if it will be packed again.
    SAGE_DEVICE void stage(int64_t token, int channel, Chunk<Input> const& chunk) const {
        bool const is_new = token >= length_ && token < end_;
        if (!is_new || (end_ >= kMeanTokens && token < end_ / kKeyBlock * kKeyBlock)) return;
        uint4* const to = address(token, channel, end_, place_after_);
        SAGE_UNROLL
        for (int i = 0; i < Chunk<Input>::kWords; i += 4) {
            arch::store_global(to + i / 4, make_uint4(chunk.words[i], chunk.words[i + 1],
                                                      chunk.words[i + 2], chunk.words[i + 3]));
        }
    }

 private:
    // Where a token is staged while there are `tokens` of them.
    SAGE_DEVICE uint4* address(int64_t token, int channel, int64_t tokens, int64_t place) const {
        int64_t const tile = tokens < kMeanTokens ? token / kKeyBlock : place;
        int64_t const row = tile * kKeyBlock + token % kKeyBlock;
        return reinterpret_cast<uint4*>(staged_ + (row * kHeadDim + channel) * sizeof(Input));
    }

    Head<Input> added_;
    char* staged_;
    int64_t place_before_, place_after_, length_, end_;
};

}  // namespace sage
