// Fused attention over quantized operands, SageAttention2 (arXiv 2411.10958) on mma.sync: a block
// does kTileRows queries, a warp kWarpRows of them, over tiles of kKeyBlock keys that come through
// a ring of shared memory. "Softmax, P and V" of docs/numerics.md has the formulas.
//
// A thread holds rows lane / 4 (+ 8) of every 16 queries and columns 2 (lane % 4) (+ 1) of every 8
// keys, so that it needs one scale of Q and one of K; and its accumulators of Q K^T are, packed,
// its operand of P V.
//
// Which queries of which heads the rows are, query_rows.cuh says. With kSplitKeys the keys of a
// tile are divided among blocks, whose sums merge.cuh joins.
#pragma once

#include <sage/mask_row.cuh>
#include <sage/numeric.cuh>
#include <sage/params.cuh>
#include <sage/query_rows.cuh>
#include <sage/row_end.cuh>
#include <sage/tile.cuh>
#include <sage/tokens.cuh>
#include <sage/varlen.cuh>

namespace sage {

template <class Output, class Qk, class Pv, int kHeadDim, int kValueDim, bool kWindow, bool kMasked,
          bool kSoftcap, bool kHalfAccumulator, bool kTileScales, bool kPackedHeads,
          bool kSplitKeys, int kTileRows, int kWarpRows, int kStages>
class Attend {
 public:
    using Params = AttendParams;

 private:
    static_assert(kWarpRows == 16 || kWarpRows == kQueryWarp);
    static constexpr bool kDelta = Qk::kBits == 4;  // Q was smoothed
    using Rows = cute::conditional_t<kPackedHeads, PackedRows<kTileRows, kWarpRows>,
                                     HeadRows<kTileRows, kWarpRows>>;
    using QueryTile = Tile<kTileRows, padded_dim(kHeadDim) * Qk::kBits / 8>;
    // Scales of V are those of a head, in memory, or with kTileScales those of a tile, inside of
    // it, but none for a V that FP16 holds as it is.
    static constexpr bool kHalfOutput = cutlass::platform::is_same<Output, cutlass::half_t>::value;
    static constexpr bool kScaledProduct = kTileScales && !(Pv::kBits == 16 && kHalfOutput);
    // A stage of the ring: a packed tile, see KeyValueTile, and delta's columns for it where all
    // rows have the same.
    using Packed =
        KeyValueTile<Qk, Pv, padded_dim(kHeadDim), padded_dim(kValueDim), kScaledProduct>;
    using KeyTile = typename Packed::Key;
    using ValueTile = typename Packed::Value;
    static constexpr int kDeltaBytes = kDelta && !kPackedHeads ? kKeyBlock * sizeof(float) : 0;
    static constexpr int kStageBytes = Packed::kBytes + kDeltaBytes;

    // The steps of Q K^T: what is beyond head_dim is zeros.
    static constexpr int kSteps = (kHeadDim * Qk::kBits / 8 + kStepBytes - 1) / kStepBytes;
    // A long Q moves to registers before the ring takes its place.
    static constexpr bool kKeepQuery = kHeadDim > 128;
    static constexpr int kRingOffset = kKeepQuery ? 0 : QueryTile::kBytes;
    static constexpr int kRingBytes = kStages * kStageBytes;

    static constexpr int kBands = kWarpRows / 16;  // 16 queries each, the rows of an atom
    static constexpr int kKeyAtoms = kKeyBlock / 8;
    static constexpr int kChannelAtoms = kValueDim / 8;
    static_assert(kHeadDim % 32 == 0 && kValueDim % 16 == 0);

    using PvAtom = cute::conditional_t<
        Pv::kBits == 16, arch::MmaF16,
        cute::conditional_t<kHalfAccumulator, arch::MmaE4m3Half, arch::MmaE4m3>>;
    using Scores = typename Qk::Atom::Accumulator[kBands][kKeyAtoms][4];
    using Weights = uint32_t[kBands][ValueTile::kSteps][4];

    // A tile's mask is loaded before Q K^T, which hides how long that takes, where there are
    // registers for it; else in parts, each where it is applied.
    static constexpr bool kLoadsMaskAhead = kMasked && kHeadDim > 64 && kHeadDim <= 128;
    static constexpr int kMaskAtoms = kLoadsMaskAhead ? kKeyAtoms : 2;
    using MaskTile = MaskRow<kMaskAtoms>[kBands][kHalves];

 public:
    static constexpr int kThreads = kTileRows / kWarpRows * 32;
    static constexpr int kMinBlocks = 256 / kThreads;  // 8 warps, as far as registers go
    static constexpr int kSharedBytes =
        kKeepQuery && QueryTile::kBytes > kRingBytes ? QueryTile::kBytes : kRingOffset + kRingBytes;

    SAGE_DEVICE static void run(Params const& p) {
        if constexpr (kSplitKeys) arch::launch_dependents();  // Merge
        arch::await_prerequisites();
        run(p, arch::block_index());
    }

    SAGE_DEVICE static void run(Params const& p, int64_t task) { Attend(p, task).run(); }

    // As Varlen wants it.
    SAGE_DEVICE static int64_t narrow(Params& p, Sequences const& batch, int64_t block) {
        static_assert(!kPackedHeads && !kSplitKeys, "a sequence is cut into query blocks");
        Sequence const sequence = attended_sequence(p, batch, block);
        int64_t const task = attended_task(p, sequence, block);
        if (task >= 0) {
            narrow_attend<Output, QueryTile::kBytes, Packed::kBytes, padded_dim(kValueDim), kDelta>(
                p, batch, sequence);
        }
        return task;
    }

 private:
    Params const& p_;
    Rows const rows_;
    int const part_;             // of the keys, of p.parts
    int first_tile_, end_tile_;  // of keys that the block sees
    bool const mask_pairs_;
    char* const shared_;
    uint32_t query_[kKeepQuery ? kSteps : 1][kBands][4];

    // The online softmax of the thread's rows: units of log 2, relative to the running maximum.
    float maximum_[kBands][kHalves];
    float total_[kBands][kHalves];  // of the thread's own columns
    float output_[kBands][kChannelAtoms][4];

    SAGE_DEVICE Attend(Params const& p, int64_t task)
        : Attend(p, Split(task, kSplitKeys ? p.parts : 1)) {}

    SAGE_DEVICE Attend(Params const& p, Split const& task)
        : p_(p),
          rows_(p, task.outer),
          part_(task.inner),
          mask_pairs_(kMasked && has_pairs(p.mask)),
          shared_(arch::shared_memory()) {
        first_tile_ = first_key(rows_.first_query()) / kKeyBlock;
        end_tile_ = (end_key(rows_.last_query()) + kKeyBlock - 1) / kKeyBlock;
        if constexpr (kSplitKeys) take_part();

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

    // Whole tiles, the first parts one more than the last ones where they do not come out even;
    // none where there are fewer tiles than parts.
    SAGE_DEVICE void take_part() {
        Split const share(end_tile_ > first_tile_ ? end_tile_ - first_tile_ : 0, p_.parts);
        first_tile_ += share.outer * part_ + (part_ < share.inner ? part_ : share.inner);
        end_tile_ = first_tile_ + share.outer + (part_ < share.inner);
    }

    // A query sees the keys from the one on, and before the other. Lengths, lower and upper are
    // below 2^30 in magnitude.
    SAGE_DEVICE int first_key(int query) const {
        if constexpr (!kWindow) return 0;
        return within_keys(query + static_cast<int>(p_.lower));
    }
    SAGE_DEVICE int end_key(int query) const {
        return within_keys(query + static_cast<int>(p_.upper) + 1);
    }
    SAGE_DEVICE int within_keys(int key) const {
        int const end = static_cast<int>(p_.key_length);
        return key < 0 ? 0 : key < end ? key : end;
    }

    // The first column, of every eight, that it holds.
    SAGE_DEVICE static int first_column() { return arch::thread_index() % 4 * 2; }

    SAGE_DEVICE char* stage(int index) const { return shared_ + kRingOffset + index * kStageBytes; }

    SAGE_DEVICE void run() {
        rows_.template copy_codes_async<QueryTile, kThreads>(shared_);
        if constexpr (kKeepQuery) keep_query();
        uint32_t shown = first_shown();
        SAGE_UNROLL
        for (int place = 0; place < kStages - 1; ++place) {
            int const tile = first_tile_ + place;
            if (tile < end_tile_ && shows(shown, place)) copy_stage(place, tile);
            arch::copy_async_commit();
        }
        float query_scales[Rows::kScales];
        rows_.load_scales(query_scales);

        int now = 0, next = kStages - 1;  // places in the ring
        for (int tile = first_tile_; tile < end_tile_; ++tile) {
            arch::copy_async_wait<kStages - 2>();
            // Now the tile is there for all threads, and the place of the tile before it is free.
            arch::barrier();
            if (tile + kStages - 1 < end_tile_ && shows(shown, kStages - 1)) {
                copy_stage(next, tile + kStages - 1);
            }
            arch::copy_async_commit();

            uint32_t const further = next_shown(tile);
            if (shows(shown, 0)) {
                bool const mixed = kMasked && (shown & 3) == kMixed;
                MaskTile mask;
                if (kLoadsMaskAhead && mixed) {
                    SAGE_UNROLL
                    for (int band = 0; band < kBands; ++band) {
                        SAGE_UNROLL
                        for (int half = 0; half < kHalves; ++half) {
                            load_mask(mask[band][half], band, half, tile * kKeyBlock);
                        }
                    }
                }
                Scores scores;
                multiply_query_key(scores, stage(now));
                Weights weights;
                float decay[kBands][kHalves];
                softmax(weights, decay, scores, query_scales, tile, mixed, mask, stage(now));
                multiply_weights_value(weights, decay, stage(now));
            }
            shown = (shown | further) >> 2;

            now = now + 1 == kStages ? 0 : now + 1;
            next = next + 1 == kStages ? 0 : next + 1;
        }
        arch::copy_async_wait<0>();
        sum_up_totals();
        if constexpr (kSplitKeys) {
            store_part();
        } else {
            store();
        }
    }

    // What the mask shows of tiles, two bits each: the lowest are of the one in turn, those above
    // of the ones behind it. Each is loaded a turn before it decides what is copied.
    static_assert(kHidesAll < 4 && kShowsAll < 4 && kMixed < 4 && kStages < 16);
    SAGE_DEVICE uint32_t first_shown() const {
        uint32_t shown = 0;
        if constexpr (kMasked) {
            SAGE_UNROLL
            for (int i = 0; i < kStages; ++i) shown |= shown_of(first_tile_ + i) << 2 * i;
        }
        return shown;
    }
    SAGE_DEVICE uint32_t next_shown(int tile) const {
        return kMasked ? shown_of(tile + kStages) << 2 * kStages : 0;
    }
    SAGE_DEVICE uint32_t shown_of(int tile) const {
        return tile < end_tile_ ? rows_.shown(tile) : kHidesAll;
    }
    SAGE_DEVICE static bool shows(uint32_t shown, int i) {
        return !kMasked || (shown >> 2 * i & 3) != kHidesAll;
    }

    SAGE_DEVICE void load_mask(MaskRow<kMaskAtoms>& mask, int band, int half, int first) const {
        mask.load(p_.mask, rows_.mask_row(band, half), first + first_column(), p_.key_length,
                  mask_pairs_);
    }

    SAGE_DEVICE void apply_mask(float (&x)[kKeyAtoms][2], MaskRow<kMaskAtoms> const& ahead,
                                int band, int half, int tile) const {
        if constexpr (kLoadsMaskAhead) {
            ahead.apply(x, p_.mask.kind);
        } else {
            SAGE_UNROLL
            for (int atom = 0; atom < kKeyAtoms; atom += kMaskAtoms) {
                MaskRow<kMaskAtoms> part;
                load_mask(part, band, half, tile * kKeyBlock + atom * 8);
                part.apply(x + atom, p_.mask.kind);
            }
        }
    }

    SAGE_DEVICE void copy_stage(int place, int tile) const {
        char const* const packed = static_cast<char const*>(p_.key_value_tiles) +
                                   (rows_.kv_head() * p_.head_tiles + tile) * Packed::kBytes;
        char* const to = stage(place);
        KeyTile::template copy_async<kThreads>(to, packed);
        ValueTile::template copy_async<kThreads, kValueDim>(to + Packed::kValueOffset,
                                                            packed + Packed::kValueOffset);
        if (arch::thread_index() == 0) {
            arch::copy_async(to + Packed::kScalesOffset, packed + Packed::kScalesOffset);
        }
        if constexpr (kScaledProduct) {
            int const byte = arch::thread_index() * kAccessBytes;
            if (byte < Packed::kValueScalesBytes) {
                arch::copy_async(to + Packed::kValueScalesOffset + byte,
                                 packed + Packed::kValueScalesOffset + byte);
            }
        }
        if constexpr (kDeltaBytes > 0) {
            int const byte = arch::thread_index() * kAccessBytes;
            if (byte < kDeltaBytes) {
                arch::copy_async(to + Packed::kBytes + byte,
                                 reinterpret_cast<char const*>(rows_.delta(tile)) + byte);
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
        constexpr int kBytesOfWarp = kWarpRows * (QueryTile::kBytes / kTileRows);
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
                             Scores const& scores, float const (&query_scales)[Rows::kScales],
                             int tile, bool mixed, MaskTile const& mask, char const* stage) {
        // Some of the block's queries do not see some of these keys, or there are none.
        int const first = tile * kKeyBlock;
        bool const masked = first + kKeyBlock > end_key(rows_.first_query()) ||
                            first < first_key(rows_.last_query());
        int const column = first_column();
        float const* const key_scales =
            reinterpret_cast<float const*>(stage + Packed::kScalesOffset);
        float const key_scale = arch::load_shared(key_scales + column / 2);
        // With a term of its own in each column, or a softcap, the scale must come first; else it
        // can wait, and then it multiplies -inf too, so it may not be zero.
        constexpr bool kScaled = kDelta || kSoftcap || kMasked;

        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                float x[kKeyAtoms][2];
                float const scale = query_scales[Rows::scale_of(band, half)] * key_scale;
                float const remaining = kScaled ? 1.0f : scale == 0.0f ? kSmallestScale : scale;
                float const row_term = kSoftcap ? row_term_of(band, half) : 0.0f;
                SAGE_UNROLL
                for (int atom = 0; atom < kKeyAtoms; ++atom) {
                    SAGE_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        x[atom][i] = arch::from_bits(scores[band][atom][2 * half + i]) - kBias;
                    }
                    if constexpr (kDelta) {
                        float2 const of_keys = delta_of(stage, tile, band, half, atom * 8 + column);
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
                    if (mixed) apply_mask(x, mask[band][half], band, half, tile);
                }
                if (masked) {
                    int const query = rows_.query(band, half);
                    int const begin = first_key(query) - first - column;
                    int const end = end_key(query) - first - column;
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
        if (!rows_.exists(band, half)) return 0.0f;
        return arch::load_written(p_.row_term + index_of(band, half));
    }

    // Of a row in (B, H, Lq).
    SAGE_DEVICE int64_t index_of(int band, int half) const {
        return rows_.head(band, half) * p_.query_length + rows_.query(band, half);
    }

    // What the mean of Q contributes to the scores of a row in two columns.
    SAGE_DEVICE float2 delta_of(char const* stage, int tile, int band, int half, int column) const {
        if constexpr (kPackedHeads) {
            return arch::load_global(
                reinterpret_cast<float2 const*>(rows_.delta(tile, band, half) + column));
        } else {
            float const* const delta = reinterpret_cast<float const*>(stage + Packed::kBytes);
            return arch::load_shared(reinterpret_cast<float2 const*>(delta + column));
        }
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
    // float has, so there the product of a tile has one of its own, as where its V has scales.
    SAGE_DEVICE void multiply_weights_value(Weights const& weights,
                                            float const (&decay)[kBands][kHalves],
                                            char const* stage) {
        char const* const value_tile = stage + Packed::kValueOffset;
        int const of_lane = ValueTile::of_lane();
        SAGE_UNROLL
        for (int pair = 0; pair < kChannelAtoms / 2; ++pair) {
            if constexpr (Pv::kBits == 16 && !kScaledProduct) {
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
                decay_output(decay, pair, product, stage);
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
                                  Product const& product, char const* stage) {
        SAGE_UNROLL
        for (int of_pair = 0; of_pair < 2; ++of_pair) {
            float2 scale;
            if constexpr (kScaledProduct) scale = scale_of_tile(stage, 2 * pair + of_pair);
            SAGE_UNROLL
            for (int band = 0; band < kBands; ++band) {
                SAGE_UNROLL
                for (int half = 0; half < kHalves; ++half) {
                    float2 sum = in_float(product[band][of_pair], half);
                    if constexpr (kScaledProduct) {
                        sum = make_float2(sum.x * scale.x, sum.y * scale.y);
                    }
                    float* const of_row = output_[band][2 * pair + of_pair] + 2 * half;
                    of_row[0] = arch::fma(of_row[0], decay[band][half], sum.x);
                    of_row[1] = arch::fma(of_row[1], decay[band][half], sum.y);
                }
            }
        }
    }

    // V's scales of the tile, for the thread's two channels of every eight.
    SAGE_DEVICE static float2 scale_of_tile(char const* stage, int atom) {
        float const* const scales =
            reinterpret_cast<float const*>(stage + Packed::kValueScalesOffset);
        return arch::load_shared(
            reinterpret_cast<float2 const*>(scales + atom * 8 + first_column()));
    }

    SAGE_DEVICE static float2 in_float(float const (&product)[4], int half) {
        return make_float2(product[2 * half], product[2 * half + 1]);
    }
    SAGE_DEVICE static float2 in_float(uint32_t const (&product)[2], int half) {
        return arch::unpack_half(product[half]);
    }

    // Over the columns of all threads that hold a row.
    SAGE_DEVICE void sum_up_totals() {
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
    }

    // What the block's keys make of each row, for Merge. Where it sees none of them, no output.
    SAGE_DEVICE void store_part() const {
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                if (!rows_.exists(band, half)) continue;
                int64_t const part = index_of(band, half) * p_.parts + part_;
                // Scales that are not finite leave NaN in a row without keys.
                bool const dead = !sees_a_key(band, half);
                float const total = dead ? 0.0f : total_[band][half];
                if (first_column() == 0) {
                    float const maximum = dead ? -infinity() : maximum_[band][half];
                    arch::store_global(reinterpret_cast<float2*>(p_.part_sums + 2 * part),
                                       make_float2(maximum, total));
                }
                if (total == 0.0f) continue;
                float* const of_row = p_.part_outputs + part * padded_dim(kValueDim);
                SAGE_UNROLL
                for (int atom = 0; atom < kChannelAtoms; ++atom) {
                    float const* const sums = output_[band][atom] + 2 * half;
                    arch::store_global(
                        reinterpret_cast<float2*>(of_row + atom * 8 + first_column()),
                        make_float2(sums[0], sums[1]));
                }
            }
        }
    }

    SAGE_DEVICE void store() const {
        float const* const value_scales =
            kTileScales ? nullptr
                        : p_.value_scales + int64_t{rows_.kv_head()} * padded_dim(kValueDim);
        // With the scales of tiles a sum has the size of V itself, whose type the output has too.
        constexpr bool kIsBounded = !kTileScales || (kScaledProduct && kHalfOutput);
        float const limit = !kIsBounded   ? infinity()
                            : kTileScales ? Half::kLimit
                                          : value_limit<Pv, kHalfAccumulator>();
        SAGE_UNROLL
        for (int band = 0; band < kBands; ++band) {
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                if (!rows_.exists(band, half)) continue;
                Split const head(rows_.head(band, half), p_.heads);
                RowEnd end(maximum_[band][half], total_[band][half], Pv::kLog2WeightFactor,
                           !sees_a_key(band, half), p_.dead_value);
                if (!kSoftcap && (p_.lse != nullptr || p_.sinks != nullptr)) {
                    end.add_row_term(row_term_of(band, half));
                }
                if (p_.sinks != nullptr) end.add_sink(arch::load_global(p_.sinks + head.inner));
                Output* const of_row = static_cast<Output*>(p_.output) +
                                       head.outer * p_.output_batch_stride +
                                       head.inner * p_.output_head_stride +
                                       rows_.query(band, half) * p_.output_token_stride;
                // Of every eight channels, the two that the thread holds: as a pair, or one by one.
                bool const pairs = stores_pairs(of_row, p_.channels);
                SAGE_UNROLL
                for (int atom = 0; atom < kChannelAtoms; ++atom) {
                    int const channel = atom * 8 + first_column();
                    if (channel >= p_.channels) continue;
                    float2 scale = make_float2(1.0f, 1.0f);
                    if constexpr (!kTileScales) {
                        scale = arch::load_written(
                            reinterpret_cast<float2 const*>(value_scales + channel));
                    }
                    float const* const sums = output_[band][atom] + 2 * half;
                    float const low = end.value(sums[0], limit, scale.x);
                    float const high = end.value(sums[1], limit, scale.y);
                    if (pairs) {
                        store_pair(of_row + channel, low, high);
                    } else {
                        store_one(of_row + channel, low);
                        if (channel + 1 < p_.channels) store_one(of_row + channel + 1, high);
                    }
                }
                if (p_.lse != nullptr && first_column() == 0) {
                    int64_t const index = rows_.head(band, half) * p_.lse_head_stride;
                    arch::store_global(p_.lse + index + rows_.query(band, half), end.lse());
                }
            }
        }
    }

    SAGE_DEVICE bool sees_a_key(int band, int half) const {
        int const query = rows_.query(band, half);
        if (end_key(query) <= first_key(query)) return false;
        if constexpr (!kMasked) return true;
        Split const head(rows_.head(band, half), p_.heads);
        return Seen(p_.live, head, 0, p_.query_length).of(query) != 0;
    }
};

}  // namespace sage
