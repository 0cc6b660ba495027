// Fused attention over quantized operands, SageAttention2 (arXiv 2411.10958) on mma.sync: a block
// does kQueryBlock queries of one head, a warp kWarpRows of them, over tiles of kKeyBlock keys that
// come through a ring of shared memory. "Softmax, P and V" of docs/numerics.md has the formulas.
//
// A thread holds rows lane / 4 (+ 8) of every 16 queries and columns 2 (lane % 4) (+ 1) of every 8
// keys, so that it needs one scale of Q and one of K; and its accumulators of Q K^T are, packed,
// its operand of P V.
#pragma once

#include <sage/mask.cuh>
#include <sage/numeric.cuh>
#include <sage/params.cuh>
#include <sage/tile.cuh>
#include <sage/tokens.cuh>
#include <sage/varlen.cuh>

namespace sage {

template <class Output, class Qk, class Pv, int kHeadDim, int kValueDim, bool kWindow, bool kMasked,
          bool kSoftcap, bool kHalfAccumulator, int kWarpRows, int kStages>
class Attend {
 public:
    using Params = AttendParams;

 private:
    static_assert(kWarpRows == 16 || kWarpRows == kQueryWarp);
    static constexpr bool kDelta = Qk::kBits == 4;  // Q was smoothed
    using QueryTile = Tile<kQueryBlock, padded_dim(kHeadDim) * Qk::kBits / 8>;
    // A stage of the ring: a packed tile, see KeyValueTile, and delta's columns for it.
    using Packed = KeyValueTile<Qk, Pv, padded_dim(kHeadDim), padded_dim(kValueDim)>;
    using KeyTile = typename Packed::Key;
    using ValueTile = typename Packed::Value;
    static constexpr int kDeltaBytes = kDelta ? kKeyBlock * sizeof(float) : 0;
    static constexpr int kStageBytes = Packed::kBytes + kDeltaBytes;

    // The steps of Q K^T: what is beyond head_dim is zeros.
    static constexpr int kSteps = (kHeadDim * Qk::kBits / 8 + kStepBytes - 1) / kStepBytes;
    // A long Q moves to registers before the ring takes its place.
    static constexpr bool kKeepQuery = kHeadDim > 128;
    static constexpr int kRingOffset = kKeepQuery ? 0 : QueryTile::kBytes;
    static constexpr int kRingBytes = kStages * kStageBytes;

    static constexpr int kBands = kWarpRows / 16;  // 16 queries each, the rows of an atom
    static constexpr int kHalves = 2;              // rows lane / 4 and lane / 4 + 8 of a band
    static constexpr int kKeyAtoms = kKeyBlock / 8;
    static constexpr int kChannelAtoms = kValueDim / 8;
    static_assert(kHeadDim % 32 == 0 && kValueDim % 16 == 0);

    using PvAtom = cute::conditional_t<
        Pv::kBits == 16, arch::MmaF16,
        cute::conditional_t<kHalfAccumulator, arch::MmaE4m3Half, arch::MmaE4m3>>;
    using Scores = typename Qk::Atom::Accumulator[kBands][kKeyAtoms][4];
    using Weights = uint32_t[kBands][ValueTile::kSteps][4];

 public:
    static constexpr int kThreads = kQueryBlock / kWarpRows * 32;
    static constexpr int kMinBlocks = kWarpRows / 16;  // 8 warps, as far as registers go
    static constexpr int kSharedBytes =
        kKeepQuery && QueryTile::kBytes > kRingBytes ? QueryTile::kBytes : kRingOffset + kRingBytes;

    SAGE_DEVICE static void run(Params const& p) { run(p, arch::block_index()); }

    SAGE_DEVICE static void run(Params const& p, int64_t task) { Attend(p, task).run(); }

    // As Varlen wants it.
    SAGE_DEVICE static int64_t narrow(Params& p, Sequences const& batch, int64_t block) {
        Sequence const sequence = Sequence::with_query_block(batch, Split(block, p.heads).outer);
        int64_t const before = sequence.first_query_block() * p.heads;
        int64_t const task = sequence.task_of_queries(block - before, p.heads);
        if (task < 0) return task;
        int64_t const kv_heads = Split(p.heads, p.group).outer;
        p.query_codes = static_cast<char const*>(p.query_codes) + before * QueryTile::kBytes;
        p.query_scales += before * (kQueryBlock / kQueryWarp * kQueryGroups);
        p.key_value_tiles = static_cast<char const*>(p.key_value_tiles) +
                            sequence.first_key_block() * kv_heads * Packed::kBytes;
        p.value_scales += sequence.index() * kv_heads * padded_dim(kValueDim);
        if constexpr (kDelta) p.delta += before * batch.most_key_blocks * kKeyBlock;
        if (p.row_term != nullptr) p.row_term += sequence.first_query_token() * p.heads;
        p.output =
            static_cast<Output*>(p.output) + sequence.first_query_token() * p.output_token_stride;
        if (p.lse != nullptr) p.lse += sequence.first_query_token();
        p.query_length = sequence.query_length();
        p.key_length = sequence.key_length();
        p.query_blocks = sequence.query_blocks();
        p.key_blocks = sequence.key_blocks();
        p.lower = sequence.lower();
        p.upper = sequence.upper();
        if (p.key_length == 0) p.dead_value = 0.0f;  // whatever rows without keys are elsewhere
        return task;
    }

 private:
    Params const& p_;
    int query_block_, head_, kv_head_;  // head_ = b * H + h, kv_head_ = b * Hkv + h / G
    int first_tile_, end_tile_;         // of keys that the block sees
    char* const shared_;
    uint32_t query_[kKeepQuery ? kSteps : 1][kBands][4];

    // The online softmax of the thread's rows: units of log 2, relative to the running maximum.
    float maximum_[kBands][kHalves];
    float total_[kBands][kHalves];  // of the thread's own columns
    float output_[kBands][kChannelAtoms][4];

    SAGE_DEVICE Attend(Params const& p, int64_t task) : p_(p), shared_(arch::shared_memory()) {
        // The last blocks first: under a causal mask they have the most to do.
        Split const block(task, p.query_blocks);
        query_block_ = static_cast<int>(p.query_blocks) - 1 - block.inner;
        head_ = block.outer;
        kv_head_ = Split(head_, p.group).outer;  // G divides H
        int const first = query_block_ * kQueryBlock;
        first_tile_ = first_key(first) / kKeyBlock;
        end_tile_ = (end_key(first + kQueryBlock - 1) + kKeyBlock - 1) / kKeyBlock;

        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                maximum_[band][half] = -infinity();
                total_[band][half] = 0.0f;
            }
            SAGE_UNROLL
            for (int atom = 0; atom < kChannelAtoms; ++atom) {
                SAGE_UNROLL
                for (int i = 0; i < 4; ++i) output_[band][atom][i] = 0.0f;
            }
        }
    }

    // Query `row` sees the keys from the one on, and before the other. Lengths, lower and upper are
    // below 2^30 in magnitude.
    SAGE_DEVICE int first_key(int row) const {
        if constexpr (!kWindow) return 0;
        return within_keys(row + static_cast<int>(p_.lower));
    }
    SAGE_DEVICE int end_key(int row) const {
        return within_keys(row + static_cast<int>(p_.upper) + 1);
    }
    SAGE_DEVICE int within_keys(int key) const {
        int const end = static_cast<int>(p_.key_length);
        return key < 0 ? 0 : key < end ? key : end;
    }

    // The first row of the warp's queries that the thread holds.
    SAGE_DEVICE int first_row() const {
        int const thread = arch::thread_index();
        return query_block_ * kQueryBlock + thread / 32 * kWarpRows + thread % 32 / 4;
    }
    // The first column, of every eight, that it holds.
    SAGE_DEVICE static int first_column() { return arch::thread_index() % 4 * 2; }

    SAGE_DEVICE char* stage(int index) const { return shared_ + kRingOffset + index * kStageBytes; }

    SAGE_DEVICE void run() {
        int64_t const query = head_ * p_.query_blocks + query_block_;
        QueryTile::template copy_async<kThreads>(
            shared_, static_cast<char const*>(p_.query_codes) + query * QueryTile::kBytes);
        if constexpr (kKeepQuery) keep_query();
        SAGE_UNROLL
        for (int place = 0; place < kStages - 1; ++place) {
            if (first_tile_ + place < end_tile_) copy_shown(place, first_tile_ + place);
            arch::copy_async_commit();
        }
        // All rows that the thread holds share a scale, as all its columns of a tile do.
        int const thread = arch::thread_index();
        int const group = thread / 32 * kWarpRows / kQueryWarp * kQueryGroups + thread % 32 / 4;
        float const query_scale = arch::load_global(
            p_.query_scales + query * (kQueryBlock / kQueryWarp * kQueryGroups) + group);

        int now = 0, next = kStages - 1;  // places in the ring
        for (int tile = first_tile_; tile < end_tile_; ++tile) {
            arch::copy_async_wait<kStages - 2>();
            // Now the tile is there for all threads, and the place of the tile before it is free.
            arch::barrier();
            if (tile + kStages - 1 < end_tile_) copy_shown(next, tile + kStages - 1);
            arch::copy_async_commit();

            uint8_t const shown = shown_of(tile);
            if (shown != kHidesAll) {
                Scores scores;
                multiply_query_key(scores, stage(now));
                Weights weights;
                float decay[kBands][kHalves];
                softmax(weights, decay, scores, query_scale, tile, shown, stage(now));
                multiply_weights_value(weights, decay, stage(now) + Packed::kValueOffset);
            }

            now = now + 1 == kStages ? 0 : now + 1;
            next = next + 1 == kStages ? 0 : next + 1;
        }
        arch::copy_async_wait<0>();
        store();
    }

    // What the mask shows of a tile.
    SAGE_DEVICE uint8_t shown_of(int tile) const {
        if constexpr (!kMasked) return kShowsAll;
        Split const head(head_, p_.heads);
        return arch::load_global(p_.tiles.data + head.outer * p_.tiles.batch_stride +
                                 head.inner * p_.tiles.head_stride +
                                 query_block_ * p_.tiles.token_stride + tile);
    }

    // Hides what a bool mask hides, and adds a float one, to scores in units of log 2: x are those
    // of a row, from `first_column` on two of every eight.
    SAGE_DEVICE void apply_mask(float (&x)[kKeyAtoms][2], int band, int half,
                                int first_column) const {
        int const row = first_row() + band * 16 + half * 8;
        if (row >= p_.query_length) return;
        Split const head(head_, p_.heads);
        int64_t const of_row = head.outer * p_.mask.batch_stride +
                               head.inner * p_.mask.head_stride + row * p_.mask.query_stride;
        SAGE_UNROLL
        for (int atom = 0; atom < kKeyAtoms; ++atom) {
            SAGE_UNROLL
            for (int i = 0; i < 2; ++i) {
                int const key = first_column + atom * 8 + i;
                if (key >= p_.key_length) continue;
                float const added = bias(p_.mask, of_row + key * p_.mask.key_stride);
                x[atom][i] = added == -infinity() ? added : x[atom][i] + added;
            }
        }
    }

    SAGE_DEVICE void copy_shown(int place, int tile) const {
        if (shown_of(tile) != kHidesAll) copy_stage(place, tile);
    }

    SAGE_DEVICE void copy_stage(int place, int tile) const {
        char const* const packed = static_cast<char const*>(p_.key_value_tiles) +
                                   (kv_head_ * p_.key_blocks + tile) * Packed::kBytes;
        char* const to = stage(place);
        KeyTile::template copy_async<kThreads>(to, packed);
        ValueTile::template copy_async<kThreads, kValueDim>(to + Packed::kValueOffset,
                                                            packed + Packed::kValueOffset);
        if (arch::thread_index() == 0) {
            arch::copy_async(to + Packed::kScalesOffset, packed + Packed::kScalesOffset);
        }
        if constexpr (kDelta) {
            int const byte = arch::thread_index() * kAccessBytes;
            if (byte < kDeltaBytes) {
                int64_t const row = head_ * p_.query_blocks + query_block_;
                float const* const delta = p_.delta + (row * p_.key_blocks + tile) * kKeyBlock;
                arch::copy_async(to + Packed::kBytes + byte,
                                 reinterpret_cast<char const*>(delta) + byte);
            }
        }
    }

    // Integers as floats without a conversion, which has a quarter of the rate: accumulators begin
    // at the bits of 1.5 * 2^23, where a float's last bit is worth 1. |Q K^T| is at most 127^2 *
    // 256, which is less than the 2^22 of room.
    static constexpr uint32_t kBiasBits = 0x4b400000u;
    static constexpr float kBias = 12582912.0f;
    static_assert(Qk::kLimit * Qk::kLimit * kHeadDim < 4194304.0f);

    SAGE_DEVICE void multiply_query_key(Scores& scores, char const* key_tile) const {
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int atom = 0; atom < kKeyAtoms; ++atom) {
                SAGE_UNROLL
                for (int i = 0; i < 4; ++i) scores[band][atom][i] = kBiasBits;
            }
        }
        int const of_lane = KeyTile::of_lane();
        SAGE_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            uint32_t query[kBands][4];
            SAGE_UNROLL
            for (int band = 0; band < kBands; ++band) {
                if constexpr (kKeepQuery) {
                    SAGE_UNROLL
                    for (int i = 0; i < 4; ++i) query[band][i] = query_[step][band][i];
                } else {
                    load_query(query[band], band, step);
                }
            }
            SAGE_UNROLL
            for (int pair = 0; pair < kKeyAtoms / 2; ++pair) {
                uint32_t key[4];
                KeyTile::load(key, key_tile, of_lane, pair * 16, step);
                SAGE_UNROLL
                for (int of_pair = 0; of_pair < 2; ++of_pair) {
                    uint32_t const b[2] = {key[of_pair], key[of_pair + 2]};
                    SAGE_UNROLL
                    for (int band = 0; band < kBands; ++band) {
                        arch::mma<typename Qk::Atom>(scores[band][2 * pair + of_pair], query[band],
                                                     b);
                    }
                }
            }
        }
    }

    SAGE_DEVICE void load_query(uint32_t (&operand)[4], int band, int step) const {
        constexpr int kBytesOfWarp = kWarpRows * (QueryTile::kBytes / kQueryBlock);
        QueryTile::load(operand, shared_ + arch::thread_index() / 32 * kBytesOfWarp,
                        QueryTile::of_lane(), band * 16, step);
    }

    SAGE_DEVICE void keep_query() {
        arch::copy_async_commit();
        arch::copy_async_wait<0>();
        arch::barrier();
        SAGE_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            SAGE_UNROLL
            for (int band = 0; band < kBands; ++band) load_query(query_[step][band], band, step);
        }
        arch::barrier();
    }

    static constexpr float kLargeScore = 4096.0f;  // its last bit is worth 2^-11

    // P of a tile, packed as an operand, and by what the sums so far decay.
    SAGE_DEVICE void softmax(Weights& weights, float (&decay)[kBands][kHalves],
                             Scores const& scores, float query_scale, int tile, uint8_t shown,
                             char const* stage) {
        // Some of the block's queries do not see some of these keys, or there are none.
        int const first = tile * kKeyBlock;
        int const block = query_block_ * kQueryBlock;
        bool const masked =
            first + kKeyBlock > end_key(block) || first < first_key(block + kQueryBlock - 1);
        int const column = first_column();
        float const* const key_scales =
            reinterpret_cast<float const*>(stage + Packed::kScalesOffset);
        float const scale = query_scale * arch::load_shared(key_scales + column / 2);
        float const* const delta = reinterpret_cast<float const*>(stage + Packed::kBytes);
        // With a term of its own in each column, or a softcap, the scale must come first; else it
        // can wait, and then it multiplies -inf too, so it may not be zero.
        constexpr bool kScaled = kDelta || kSoftcap || kMasked;
        float const remaining = kScaled ? 1.0f : scale == 0.0f ? kSmallestScale : scale;

        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                float x[kKeyAtoms][2];
                float const row_term = kSoftcap ? row_term_of(band, half) : 0.0f;
                SAGE_UNROLL
                for (int atom = 0; atom < kKeyAtoms; ++atom) {
                    SAGE_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        x[atom][i] = arch::from_bits(scores[band][atom][2 * half + i]) - kBias;
                    }
                    if constexpr (kDelta) {
                        float2 const of_keys = arch::load_shared(
                            reinterpret_cast<float2 const*>(delta + atom * 8 + column));
                        x[atom][0] = arch::fma(x[atom][0], scale, of_keys.x);
                        x[atom][1] = arch::fma(x[atom][1], scale, of_keys.y);
                    }
                    if constexpr (kSoftcap) {
                        SAGE_UNROLL
                        for (int i = 0; i < 2; ++i) {
                            if (!kDelta) x[atom][i] *= scale;
                            x[atom][i] = capped(x[atom][i] + row_term);
                        }
                    } else if constexpr (kMasked && !kDelta) {
                        SAGE_UNROLL
                        for (int i = 0; i < 2; ++i) x[atom][i] *= scale;
                    }
                }
                if constexpr (kMasked) {
                    if (shown == kMixed) apply_mask(x, band, half, first + column);
                }
                if (masked) {
                    int const row = first_row() + band * 16 + half * 8;
                    int const begin = first_key(row) - first - column;
                    int const end = end_key(row) - first - column;
                    SAGE_UNROLL
                    for (int atom = 0; atom < kKeyAtoms; ++atom) {
                        SAGE_UNROLL
                        for (int i = 0; i < 2; ++i) {
                            int const key = atom * 8 + i;
                            if (key < begin || key >= end) x[atom][i] = -infinity();
                        }
                    }
                }

                float highest = -infinity();
                SAGE_UNROLL
                for (int atom = 0; atom < kKeyAtoms; ++atom) {
                    highest = arch::maximum(highest, arch::maximum(x[atom][0], x[atom][1]));
                }
                highest = arch::multiply(highest, remaining);
                highest = arch::maximum(highest, arch::shuffle_xor(highest, 1));
                highest = arch::maximum(highest, arch::shuffle_xor(highest, 2));
                highest = arch::maximum(highest, maximum_[band][half]);
                // Nothing seen yet: -inf - -inf must not arise.
                float const origin = highest == -infinity() ? 0.0f : highest;
                decay[band][half] = arch::exp2(maximum_[band][half] - origin);
                maximum_[band][half] = highest;

                // The factor of P costs nothing: it is part of what is subtracted. But where a
                // score's last bit is worth much, it would be lost there, and the rounding of the
                // maximum would show against unrounded scores: then first subtract, in the same
                // rounding.
                bool const large = origin > kLargeScore || origin < -kLargeScore;
                float const factor = large ? 1.0f : remaining;
                float const shift = Pv::kLog2WeightFactor - (large ? 0.0f : origin);
                if (large) {
                    SAGE_UNROLL
                    for (int atom = 0; atom < kKeyAtoms; ++atom) {
                        SAGE_UNROLL
                        for (int i = 0; i < 2; ++i) {
                            x[atom][i] = arch::multiply(x[atom][i], remaining) - origin;
                        }
                    }
                }
                float total = 0.0f;
                SAGE_UNROLL
                for (int atom = 0; atom < kKeyAtoms; ++atom) {
                    SAGE_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        x[atom][i] = arch::exp2(arch::fma(x[atom][i], factor, shift));
                        total += x[atom][i];
                    }
                }
                total_[band][half] = arch::fma(total_[band][half], decay[band][half], total);
                pack(weights[band], x, half);
            }
        }
    }

    // What K's smoothing took from the scores of a row; of rows that do not exist, nothing.
    SAGE_DEVICE float row_term_of(int band, int half) const {
        int const row = first_row() + band * 16 + half * 8;
        if (row >= p_.query_length) return 0.0f;
        return arch::load_global(p_.row_term + head_ * p_.query_length + row);
    }

    // softcap * tanh(score / softcap), from natural units to those of log 2.
    SAGE_DEVICE float capped(float score) const {
        return hyperbolic_tangent(arch::divide(score, p_.softcap)) * (p_.softcap * kLog2E);
    }

    // The accumulators' columns as the operand's: register r of a step has row half r % 2, and of
    // the step's 32 bytes the first 16 for r < 2.
    SAGE_DEVICE static void pack(uint32_t (&weights)[ValueTile::kSteps][4],
                                 float const (&x)[kKeyAtoms][2], int half) {
        SAGE_UNROLL
        for (int step = 0; step < ValueTile::kSteps; ++step) {
            SAGE_UNROLL
            for (int part = 0; part < 2; ++part) {
                uint32_t& packed = weights[step][2 * part + half];
                if constexpr (Pv::kBits == 8) {
                    int const atom = 4 * step + 2 * part;
                    packed =
                        arch::pack_e4m3(x[atom][0], x[atom][1], x[atom + 1][0], x[atom + 1][1]);
                } else {
                    int const atom = 2 * step + part;
                    packed = arch::pack_half(x[atom][0], x[atom][1]);
                }
            }
        }
    }

    // output = output * decay + P V. E4M3 tensor cores keep fewer bits of an accumulator than a
    // float has, so there the product of a tile has one of its own.
    SAGE_DEVICE void multiply_weights_value(Weights const& weights,
                                            float const (&decay)[kBands][kHalves],
                                            char const* value_tile) {
        int const of_lane = ValueTile::of_lane();
        SAGE_UNROLL
        for (int pair = 0; pair < kChannelAtoms / 2; ++pair) {
            if constexpr (Pv::kBits == 16) {
                decay_output(decay, pair);
                SAGE_UNROLL
                for (int step = 0; step < ValueTile::kSteps; ++step) {
                    add_product(output_, 2 * pair, weights, value_tile, of_lane, pair, step);
                }
            } else {
                typename PvAtom::Accumulator product[kBands][2][PvAtom::kAccumulators] = {};
                SAGE_UNROLL
                for (int step = 0; step < ValueTile::kSteps; ++step) {
                    add_product(product, 0, weights, value_tile, of_lane, pair, step);
                }
                decay_output(decay, pair, product);
            }
        }
    }

    // Adds one step of P V, for 16 channels, to the two atoms of each band from `first` on.
    template <class Sums>
    SAGE_DEVICE static void add_product(Sums& sums, int first, Weights const& weights,
                                        char const* value_tile, int of_lane, int pair, int step) {
        uint32_t value[4];
        ValueTile::load(value, value_tile, of_lane, pair * 16, step);
        SAGE_UNROLL
        for (int of_pair = 0; of_pair < 2; ++of_pair) {
            uint32_t const b[2] = {value[of_pair], value[of_pair + 2]};
            SAGE_UNROLL
            for (int band = 0; band < kBands; ++band) {
                arch::mma<PvAtom>(sums[band][first + of_pair], weights[band][step], b);
            }
        }
    }

    SAGE_DEVICE void decay_output(float const (&decay)[kBands][kHalves], int pair) {
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int i = 0; i < 8; ++i) {
                output_[band][2 * pair + i / 4][i % 4] *= decay[band][i % 4 / 2];
            }
        }
    }

    template <class Product>
    SAGE_DEVICE void decay_output(float const (&decay)[kBands][kHalves], int pair,
                                  Product const& product) {
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int of_pair = 0; of_pair < 2; ++of_pair) {
                SAGE_UNROLL
                for (int half = 0; half < kHalves; ++half) {
                    float2 const sum = in_float(product[band][of_pair], half);
                    float* const of_row = output_[band][2 * pair + of_pair] + 2 * half;
                    of_row[0] = arch::fma(of_row[0], decay[band][half], sum.x);
                    of_row[1] = arch::fma(of_row[1], decay[band][half], sum.y);
                }
            }
        }
    }

    SAGE_DEVICE static float2 in_float(float const (&product)[4], int half) {
        return make_float2(product[2 * half], product[2 * half + 1]);
    }
    SAGE_DEVICE static float2 in_float(uint32_t const (&product)[2], int half) {
        return arch::unpack_half(product[half]);
    }

    SAGE_DEVICE void store() {
        Split const head(head_, p_.heads);
        Output* const output = static_cast<Output*>(p_.output) +
                               head.outer * p_.output_batch_stride +
                               head.inner * p_.output_head_stride;
        float const* const value_scales =
            p_.value_scales + int64_t{kv_head_} * padded_dim(kValueDim);
        // Of every eight channels, the two that the thread holds: as a pair, or one by one.
        bool const pairs = p_.channels % 2 == 0 && p_.output_token_stride % 2 == 0 &&
                           reinterpret_cast<uintptr_t>(output) % (2 * sizeof(Output)) == 0;
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                float total = total_[band][half];
                total += arch::shuffle_xor(total, 1);
                total += arch::shuffle_xor(total, 2);
                total_[band][half] = total;
            }
        }
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                int const row = first_row() + band * 16 + half * 8;
                if (row >= p_.query_length) continue;
                bool const dead = !sees_a_key(row);
                float factor = arch::divide(1.0f, total_[band][half]);
                float lse = 0.0f;
                if (p_.lse != nullptr || p_.sinks != nullptr) {
                    lse = dead ? -infinity() : lse_of_keys(band, half);
                }
                if (p_.sinks != nullptr) {
                    float const of_keys = lse;
                    lse = with_sink(lse, arch::load_global(p_.sinks + head.inner));
                    factor *= arch::exp2((of_keys - lse) * kLog2E);  // the keys' share
                }
                // A sink makes a row without keys one of zeros, or of NaN where it is +inf.
                bool const sunk = dead && p_.sinks != nullptr && lse != -infinity();
                float const of_dead = sunk ? 0.0f * lse : p_.dead_value;
                Output* const of_row = output + row * p_.output_token_stride;
                SAGE_UNROLL
                for (int atom = 0; atom < kChannelAtoms; ++atom) {
                    int const channel = atom * 8 + first_column();
                    if (channel >= p_.channels) continue;
                    float2 const scale =
                        arch::load_global(reinterpret_cast<float2 const*>(value_scales + channel));
                    float const* const sums = output_[band][atom] + 2 * half;
                    float const low = dead ? of_dead : bounded(sums[0] * factor, scale.x);
                    float const high = dead ? of_dead : bounded(sums[1] * factor, scale.y);
                    if (pairs) {
                        store_pair(of_row + channel, low, high);
                    } else {
                        store_one(of_row + channel, low);
                        if (channel + 1 < p_.channels) store_one(of_row + channel + 1, high);
                    }
                }
                if (p_.lse != nullptr && first_column() == 0) {
                    arch::store_global(p_.lse + head_ * p_.lse_head_stride + row, lse);
                }
            }
        }
    }

    // An average of V, with its scale back. The rounded P may sum to a little more than 1, which
    // may not make an infinity of a V near the top of its range.
    SAGE_DEVICE static float bounded(float average, float scale) {
        if constexpr (Pv::kBits == 8) {
            constexpr float kLimit = kHalfAccumulator ? kHalfAccumulatorLimit : Pv::kLimit;
            average = average > kLimit ? kLimit : average < -kLimit ? -kLimit : average;
        }
        return average * scale;
    }

    SAGE_DEVICE bool sees_a_key(int row) const {
        if (end_key(row) <= first_key(row)) return false;
        if constexpr (!kMasked) return true;
        return Seen(p_.live, Split(head_, p_.heads), 0, p_.query_length).of(row) != 0;
    }

    SAGE_DEVICE static void store_pair(Output* address, float low, float high) {
        if constexpr (sizeof(Output) == sizeof(float)) {
            arch::store_global(reinterpret_cast<float2*>(address), make_float2(low, high));
        } else {
            arch::store_global(reinterpret_cast<uint32_t*>(address),
                               Packed2<Output>::pack(low, high));
        }
    }

    SAGE_DEVICE static void store_one(Output* address, float x) {
        if constexpr (sizeof(Output) == sizeof(float)) {
            arch::store_global(reinterpret_cast<float*>(address), x);
        } else {
            uint16_t const bits = static_cast<uint16_t>(Packed2<Output>::pack(x, 0.0f));
            arch::store_global(reinterpret_cast<uint16_t*>(address), bits);
        }
    }

    // Natural logarithm, over the keys alone, of a row that sees one.
    SAGE_DEVICE float lse_of_keys(int band, int half) const {
        float const log2_total = arch::log2(total_[band][half]) - Pv::kLog2WeightFactor;
        float const lse = (maximum_[band][half] + log2_total) * kLn2;
        // With a softcap the scores have it already.
        return kSoftcap ? lse : lse + row_term_of(band, half);
    }

    // log(exp(lse) + exp(sink)); a sink of +inf gives NaN, as NaN does.
    SAGE_DEVICE static float with_sink(float lse, float sink) {
        if (sink == infinity() || sink != sink) return sink - sink;
        if (lse != lse) return lse;
        float const larger = arch::maximum(lse, sink);
        if (larger == -infinity()) return larger;
        float const sum =
            arch::exp2((lse - larger) * kLog2E) + arch::exp2((sink - larger) * kLog2E);
        return larger + arch::log2(sum) * kLn2;
    }
};

}  // namespace sage
