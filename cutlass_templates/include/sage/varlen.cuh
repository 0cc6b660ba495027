// Packed batches: sequences of different lengths, one after another along the lengths of a batch of
// 1. A block of a launch finds its sequence itself, from cumulative lengths on the device, which no
// host has to know; then it does for that sequence what it does for a call of its own.
//
// A sequence s whose tokens begin at `start` is given the tiles of `n` tokens from start / n + s
// on. That leaves every sequence at least as many as it needs, so that one binary search over the
// cumulative lengths finds the sequence of a tile, without sums over sequences before it and
// without a launch that makes a table of them; and a host that knows nothing but the sums of
// lengths and the number of sequences knows how many tiles there are at most. At most one tile for
// each sequence is left over, whose block leaves at once. In scratch memory, too, the sequence's
// part begins at that tile, once for all heads, and is laid out as that of a call of its own.
#pragma once

#include <sage/numeric.cuh>
#include <sage/params.cuh>

namespace sage {

// How the keys of a sequence are cut for their statistics; as sizes.py cuts those of a call, so
// that sums have the same order.
constexpr int kMostChunks = 32;
constexpr int kLeastChunk = 256;

constexpr int64_t kFar = 1 << 30;  // beyond any length, and twice of it within 32 bits

SAGE_DEVICE int clamped(int64_t x, int64_t low, int64_t high) {
    return static_cast<int>(x < low ? low : x < high ? x : high);
}

SAGE_DEVICE int tiles_of(int tokens, int of_tile) { return (tokens + of_tile - 1) / of_tile; }

// Cumulative lengths. Whatever is in memory, what they say lies within the batch.
class Offsets {
 public:
    SAGE_DEVICE Offsets(void const* data, int64_t bytes, int64_t total)
        : data_(data), wide_(bytes == sizeof(int64_t)), total_(total) {}

    SAGE_DEVICE int at(int index) const {
        if (wide_) {
            return clamped(arch::load_global(static_cast<int64_t const*>(data_) + index), 0,
                           total_);
        }
        return clamped(arch::load_global(static_cast<int32_t const*>(data_) + index), 0, total_);
    }

    SAGE_DEVICE int total() const { return static_cast<int>(total_); }

    // The sequence, of `count`, that has a tile of kTokens; `count` itself is what is behind them.
    template <int kTokens>
    SAGE_DEVICE int sequence_of(int tile, int count) const {
        int low = 0, high = count;
        while (low < high) {
            int const middle = (low + high + 1) / 2;
            if (at(middle) / kTokens + middle <= tile) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }

 private:
    void const* data_;
    bool wide_;
    int64_t total_;
};

// One of a packed batch: its tokens, and what its queries see. Queries behind the last sequence, of
// which a batch may have any number, are one without keys.
class Sequence {
 public:
    SAGE_DEVICE static Sequence with_query_block(Sequences const& batch, int tile) {
        return Sequence(batch, queries(batch).sequence_of<kQueryBlock>(tile, count(batch)));
    }
    SAGE_DEVICE static Sequence with_key_block(Sequences const& batch, int tile) {
        return Sequence(batch, keys(batch).sequence_of<kKeyBlock>(tile, count(batch)));
    }
    SAGE_DEVICE static Sequence with_chunk(Sequences const& batch, int tile) {
        return Sequence(batch, keys(batch).sequence_of<kLeastChunk>(tile, count(batch)));
    }

    // As words, for threads that need not look for it again.
    static constexpr int kWords = 5;
    SAGE_DEVICE void store_shared(int* words) const {
        int const own[kWords] = {index_, query_, query_length_, key_, key_length_};
        SAGE_UNROLL
        for (int i = 0; i < kWords; ++i) arch::store_shared(words + i, own[i]);
    }
    SAGE_DEVICE Sequence(Sequences const& batch, int const* words)
        : index_(word(words, 0)),
          query_(word(words, 1)),
          query_length_(word(words, 2)),
          key_(word(words, 3)),
          key_length_(word(words, 4)) {
        find_diagonal(batch);
    }

    SAGE_DEVICE int64_t index() const { return index_; }

    SAGE_DEVICE int64_t first_query_token() const { return query_; }
    SAGE_DEVICE int64_t first_key_token() const { return key_; }
    SAGE_DEVICE int query_length() const { return query_length_; }
    SAGE_DEVICE int key_length() const { return key_length_; }

    // Query i of the sequence sees the keys i + lower <= j <= i + upper.
    SAGE_DEVICE int lower() const { return lower_; }
    SAGE_DEVICE int upper() const { return upper_; }
    // The keys that some query sees, and the queries that see a key.
    SAGE_DEVICE int first_key() const { return clamped(lower_, 0, key_length_); }
    SAGE_DEVICE int end_key() const {
        return clamped(query_length_ + upper_, first_key(), key_length_);
    }
    SAGE_DEVICE int first_live() const { return clamped(-upper_, 0, query_length_); }
    SAGE_DEVICE int end_live() const {
        return clamped(key_length_ - lower_, first_live(), query_length_);
    }

    SAGE_DEVICE int query_blocks() const { return tiles_of(query_length_, kQueryBlock); }
    SAGE_DEVICE int key_blocks() const { return tiles_of(key_length_, kKeyBlock); }
    SAGE_DEVICE int chunk_tokens() const {
        int const tokens = tiles_of(key_length_, kMostChunks);
        return tokens > kLeastChunk ? tokens : kLeastChunk;
    }
    SAGE_DEVICE int chunks() const {
        return Split(key_length_ + chunk_tokens() - 1, chunk_tokens()).outer;
    }
    // Where they begin, in the order of the whole batch.
    SAGE_DEVICE int64_t first_query_block() const { return query_ / kQueryBlock + index_; }
    SAGE_DEVICE int64_t first_key_block() const { return key_ / kKeyBlock + index_; }
    SAGE_DEVICE int64_t first_chunk() const { return key_ / kLeastChunk + index_; }

    // `task` where it is one of `count` and there is an attention to compute, else -1.
    SAGE_DEVICE int64_t task(int64_t task, int64_t count) const {
        return query_length_ > 0 && key_length_ > 0 ? within(task, count) : -1;
    }
    // The same of queries that have no keys, either.
    SAGE_DEVICE int64_t task_of_queries(int64_t task, int64_t heads) const {
        return within(task, query_blocks() * heads);
    }

 private:
    int index_;
    int query_, query_length_;
    int key_, key_length_;
    int lower_, upper_;

    SAGE_DEVICE Sequence(Sequences const& batch, int index) : index_(index) {
        bool const is_one = index < count(batch);
        Offsets const of_queries = queries(batch), of_keys = keys(batch);
        query_ = of_queries.at(index);
        key_ = of_keys.at(index);
        query_length_ = (is_one ? of_queries.at(index + 1) : of_queries.total()) - query_;
        key_length_ = (is_one ? of_keys.at(index + 1) : key_) - key_;
        if (query_length_ < 0) query_length_ = 0;
        if (key_length_ < 0) key_length_ = 0;
        find_diagonal(batch);
    }

    SAGE_DEVICE static int word(int const* words, int index) {
        return arch::warp_uniform(arch::load_shared(words + index));
    }

    SAGE_DEVICE void find_diagonal(Sequences const& batch) {
        int64_t const diagonal = batch.bottom_right != 0 ? key_length_ - query_length_ : 0;
        lower_ = clamped(diagonal - batch.left, -kFar, kFar);
        upper_ = clamped(diagonal + batch.right, -kFar, kFar);
    }

    SAGE_DEVICE static int count(Sequences const& batch) { return static_cast<int>(batch.count); }
    SAGE_DEVICE static Offsets queries(Sequences const& batch) {
        return {batch.query_offsets, batch.query_offset_bytes, batch.queries};
    }
    SAGE_DEVICE static Offsets keys(Sequences const& batch) {
        return {batch.key_offsets, batch.key_offset_bytes, batch.keys};
    }

    SAGE_DEVICE static int64_t within(int64_t task, int64_t count) {
        return task >= 0 && task < count ? task : -1;
    }
};

// The tensor from a token on.
template <class Input>
SAGE_DEVICE void skip(Strided& tensor, int64_t tokens) {
    tensor.data = static_cast<char const*>(tensor.data) +
                  tokens * tensor.token_stride * static_cast<int64_t>(sizeof(Input));
}

// A kernel over a packed batch. `Kernel` has besides what any kernel has
//
//   void run(Params const& p, int64_t task)      What block `task` does for a call of its own.
//   int64_t narrow(Params& p, Sequences const& batch, int64_t block)
//       Makes of the parameters of a batch those of the sequence that a block of its launch has,
//       and returns which task of the sequence it is; negative: none, and `p` means nothing.
template <class Kernel>
struct Varlen {
    struct Params {
        typename Kernel::Params call;
        Sequences sequences;
    };
    static constexpr int kThreads = Kernel::kThreads;
    static constexpr int kMinBlocks = Kernel::kMinBlocks;
    static constexpr int kSharedBytes = Kernel::kSharedBytes;

    SAGE_DEVICE static void run(Params const& p) {
        arch::launch_dependents();
        typename Kernel::Params of_sequence = p.call;
        int64_t const task = Kernel::narrow(of_sequence, p.sequences, arch::block_index());
        arch::await_prerequisites();
        if (task >= 0) Kernel::run(of_sequence, task);
    }
};

// Of an attention kernel, one block per (query block, head): the sequence of a block, and which of
// its tasks the block has; negative: none.
SAGE_DEVICE Sequence attended_sequence(AttendParams const& p, Sequences const& batch,
                                       int64_t block) {
    return Sequence::with_query_block(batch, Split(block, p.heads).outer);
}
SAGE_DEVICE int64_t attended_task(AttendParams const& p, Sequence const& sequence, int64_t block) {
    return sequence.task_of_queries(block - sequence.first_query_block() * p.heads, p.heads);
}

// Makes of its parameters those of a sequence. Known of the kernel: the bytes of a query block's
// codes, those of a packed tile, the channels that V's scales have, and whether Q was smoothed.
template <class Output, int kQueryBytes, int kTileBytes, int kValueDim, bool kDelta>
SAGE_DEVICE void narrow_attend(AttendParams& p, Sequences const& batch, Sequence const& sequence) {
    int64_t const before = sequence.first_query_block() * p.heads;
    int64_t const kv_heads = Split(p.heads, p.group).outer;
    p.query_codes = static_cast<char const*>(p.query_codes) + before * kQueryBytes;
    p.query_scales += before * (kQueryBlock / kQueryWarp * kQueryGroups);
    p.key_value_tiles = static_cast<char const*>(p.key_value_tiles) +
                        sequence.first_key_block() * kv_heads * kTileBytes;
    p.value_scales += sequence.index() * kv_heads * kValueDim;
    if constexpr (kDelta) p.delta += before * batch.most_key_blocks * kKeyBlock;
    if (p.row_term != nullptr) p.row_term += sequence.first_query_token() * p.heads;
    p.output =
        static_cast<Output*>(p.output) + sequence.first_query_token() * p.output_token_stride;
    if (p.lse != nullptr) p.lse += sequence.first_query_token();
    p.query_length = sequence.query_length();
    p.key_length = sequence.key_length();
    p.query_blocks = sequence.query_blocks();
    p.key_blocks = p.head_tiles = sequence.key_blocks();
    p.lower = sequence.lower();
    p.upper = sequence.upper();
    if (p.key_length == 0) p.dead_value = 0.0f;  // whatever rows without keys are elsewhere
}

}  // namespace sage
