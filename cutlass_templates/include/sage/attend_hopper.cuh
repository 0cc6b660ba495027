// Fused attention over quantized operands for Hopper, recipe int8_fp8: the products are wgmma's,
// and the threads of a block have roles. One producer copies tiles into a ring of shared memory;
// two warpgroups of consumers, with 64 queries each, compute. "Softmax, P and V" of
// docs/numerics.md has the formulas, docs/cuda-hopper.md the reasons.
//
// A consumer works on two tiles at once: while Q K^T of the next one and P V of the last one are in
// flight, it waits for the former alone, and computes its softmax beside the latter.
//
// A thread holds rows lane / 4 (+ 8) of its warp's 16 queries and columns 2 (lane % 4) (+ 1) of
// every 8 keys, as in attend.cuh: one scale of Q, one of K for every kKeyBlock keys; and its
// accumulators of Q K^T are, packed, its operand of P V.
#pragma once

#include <sage/arch/hopper.cuh>
#include <sage/hopper_mask.cuh>
#include <sage/hopper_memory.cuh>
#include <sage/hopper_producer.cuh>
#include <sage/hopper_scores.cuh>
#include <sage/hopper_task.cuh>
#include <sage/hopper_work.cuh>
#include <sage/numeric.cuh>
#include <sage/params.cuh>
#include <sage/row_end.cuh>
#include <sage/tokens.cuh>

namespace sage {

// Two warpgroups of consumers and one of the producer.
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2 * kWarpgroup;

// A block of a persistent grid. With kSequences the tasks are those of a packed batch.
template <class Output, int kHeadDim, int kValueDim, bool kWindow, bool kMasked, bool kSoftcap,
          bool kTileScales, bool kPackedHeads, bool kSplitKeys, int kTiles, int kStages,
          int kMaskPlaces = 0, bool kSequences = false>
class AttendHopper {
    static_assert(!kSequences || (!kPackedHeads && !kSplitKeys && !kMasked && !kTileScales),
                  "a sequence is cut into query blocks");
    // Whether tiles of a mask can be copied to shared memory.
    static constexpr bool kCopiesMask = kMaskPlaces > 0;
    static_assert(!kCopiesMask || (kMasked && !kPackedHeads), "the rows are queries of one head");
    using Task = HopperTask<kPackedHeads, kSplitKeys, kWindow, kMasked, kTiles>;
    struct Narrow {
        SAGE_DEVICE static void narrow(AttendParams& p, Sequences const& batch,
                                       Sequence const& sequence) {
            narrow_attend<Output, Memory::Query::kBytes, Memory::kPackedBytes,
                          padded_dim(kValueDim), false>(p, batch, sequence);
        }
    };
    using OfTask = cute::conditional_t<kCopiesMask, MaskedAttendParams, AttendParams>;
    using Work = cute::conditional_t<kSequences, WorkOfSequences<Narrow>, WorkOfCall<Task, OfTask>>;
    using Memory =
        HopperMemory<kHeadDim, kValueDim, kTileScales, kTiles, kStages, kMaskPlaces, Work::kWords>;
    using Producer = HopperProducer<Work, Task, Memory>;
    using Rows = typename Task::Rows;
    using Deal = HopperDeal;

 public:
    using Params = typename Work::Params;
    static constexpr int kThreads = kConsumers + kWarpgroup;
    static constexpr int kMinBlocks = 1;
    static constexpr int kSharedBytes = Memory::kBytes;

    SAGE_DEVICE static void run(Params const& p) {
        int const thread = arch::thread_index();
        if constexpr (kSplitKeys) arch::launch_dependents();  // Merge
        if (thread == kConsumers) Memory::make_mbarriers(kConsumers / 32);
        arch::barrier();
        if (thread >= kConsumers) {
            arch::registers_decrease<kProducerRegisters>();
            arch::await_prerequisites();
            if (thread == kConsumers) Producer::produce(p);
            if constexpr (kCopiesMask) {
                if (thread == kConsumers + 32) Producer::produce_masks(p);
            }
        } else {
            arch::registers_increase<kConsumerRegisters>();
            arch::await_prerequisites();
            consume(p);
        }
    }

 private:
    using Stages = typename Memory::Stages;
    using Queries = typename Memory::Queries;
    using Masks = typename Memory::Masks;
    using Scores = HopperScores<kTiles>;
    using Words = typename Scores::Words;
    static constexpr int kKeys = kTiles * kKeyBlock;
    static constexpr int kStep = 32;  // bytes of a product
    static constexpr int kQueryKeySteps = (kHeadDim + kStep - 1) / kStep;
    static constexpr int kValueSteps = kKeys / kStep;
    static_assert(kHeadDim % 32 == 0 && kValueDim % 32 == 0);
    // Channels of P V at a time: what of it is in flight takes registers beside the output. It is
    // the most with which nothing is spilled, found by compiling every kind.
    static constexpr int channels_at_once() {
        if (kValueDim == 256) {
            return kMasked && kPackedHeads ? 16 : kMasked || kTileScales ? 32 : 64;
        }
        if (kValueDim == 192) return kMasked || kTileScales ? 64 : 96;
        return kValueDim == 128 && kMasked && kTileScales ? 64 : kValueDim;
    }
    static constexpr int kAtOnce = channels_at_once();
    static constexpr int kParts = kValueDim / kAtOnce;
    static_assert(kParts * kAtOnce == kValueDim);

    // Of a thread at launch: 65536 for 384 of them, in eights. The producer gives away all that it
    // can do without, and the consumers share it; it looks through masks itself, of packed heads
    // row by row.
    static constexpr int kRegisters = 168;
    static constexpr int kProducerRegisters = !kMasked       ? 24
                                              : kPackedHeads ? (kValueDim <= 128 ? 56 : 40)
                                              : kTiles == 2  ? 40
                                                             : 24;
    static constexpr int kConsumerRegisters = (3 * kRegisters - kProducerRegisters) / 2;

    OfTask const& p_;
    Task const* task_;
    int warpgroup_;
    int begin_of_whole_, end_of_whole_;  // keys that all queries of the warpgroup see
    float query_scales_[Rows::kScales];
    float row_term_[kHalves];  // under a softcap

    // The online softmax of the thread's rows: units of log 2, relative to the running maximum.
    float maximum_[kHalves];
    float total_[kHalves];  // of the thread's own columns
    float decay_[kHalves];  // by which sums decay before the tile in `weights_` is added
    uint32_t weights_[kValueSteps][4];
    float output_[kParts][kAtOnce / 2];

    SAGE_DEVICE static void consume(Params const& launch) {
        int const warpgroup = arch::warp_uniform(arch::thread_index() / kWarpgroup);
        Stages stages;
        Queries queries;
        Masks masks;
        if (warpgroup == 1) pass_turn(warpgroup);  // the other one is first
        for (;; queries.advance()) {
            arch::mbarrier_wait(Memory::query_full(queries.stage()), queries.parity());
            int const place = arch::warp_uniform(queries.stage());
            int const index = arch::warp_uniform(arch::load_shared(Memory::task(place)));
            if (index == Deal::kNone) break;
            Work work(launch, Memory::task_words(place));
            Task const task(work.params(), index);
            AttendHopper state(work.params(), task, warpgroup);
            stages.turn = arch::warp_uniform(stages.turn);
            if constexpr (kCopiesMask) masks.turn = arch::warp_uniform(masks.turn);
            state.attend(place, stages, masks);
            work.refresh(launch, Memory::task_words(place));
            state.end(place);
        }
        if (warpgroup == 0) take_turn(warpgroup);  // so that no turn is left over
    }

    // Both warpgroups issue their products in turns, one's softmax beside the other's products:
    // they have as many steps as each other, of every task.
    SAGE_DEVICE static void take_turn(int warpgroup) {
        arch::named_barrier_sync<kConsumers>(1 + warpgroup);
    }
    SAGE_DEVICE static void pass_turn(int warpgroup) {
        arch::named_barrier_arrive<kConsumers>(2 - warpgroup);
    }

    SAGE_DEVICE AttendHopper(OfTask const& p, Task const& task, int warpgroup)
        : p_(p), task_(&task), warpgroup_(warpgroup) {
        begin_of_whole_ = arch::warp_uniform(task.first_key(task.last_query(warpgroup)));
        end_of_whole_ = arch::warp_uniform(task.end_key(task.first_query(warpgroup)));
        task.rows().load_scales(query_scales_);
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            maximum_[half] = -infinity();
            total_[half] = 0.0f;
            row_term_[half] = kSoftcap ? row_term_of(half) : 0.0f;
        }
        SAGE_UNROLL
        for (int part = 0; part < kParts; ++part) {
            SAGE_UNROLL
            for (int i = 0; i < kAtOnce / 2; ++i) output_[part][i] = 0.0f;
        }
    }

    SAGE_DEVICE int query(int half) const { return task_->rows().query(0, half); }
    SAGE_DEVICE int head(int half) const { return task_->rows().head(0, half); }
    SAGE_DEVICE bool exists(int half) const { return task_->rows().exists(0, half); }
    // Of a row in (B, H, Lq).
    SAGE_DEVICE int64_t index_of(int half) const {
        return head(half) * p_.query_length + query(half);
    }
    SAGE_DEVICE static int first_column() { return Scores::first_column(); }

    // Q is at `query`, K and V of the first step at `place`, and what of the mask is copied first
    // at `masks`, which become those of the next task.
    SAGE_DEVICE void attend(int query, Stages& place, Masks& masks) {
        int tile = task_->first_step();
        if (task_->is_step(tile)) {
            Words scores;
            float product[kAtOnce / 2];
            float key_scales[kTiles];

            begin_scores(scores, key_scales, query, place);
            pass_turn(warpgroup_);
            arch::wgmma_wait<0>();
            arch::wgmma_hold(scores);
            arch::mbarrier_arrive_warp(Memory::key_empty(place.stage()));
            float remaining[Rows::kScales][kTiles];
            scale(scores, remaining, key_scales, tile, masks);
            SAGE_UNROLL
            for (int half = 0; half < kHalves; ++half) {
                softmax(scores, half, remaining);
                pack(scores, half);
            }
            place.advance();
            for (tile = task_->step_after(tile); task_->is_step(tile);
                 tile = task_->step_after(tile)) {
                begin_scores(scores, key_scales, query, place);
                begin_product(product, 0, place.before());
                pass_turn(warpgroup_);
                arch::wgmma_wait<1>();
                arch::wgmma_hold(scores);
                arch::mbarrier_arrive_warp(Memory::key_empty(place.stage()));
                float const decay[kHalves] = {decay_[0], decay_[1]};
                scale(scores, remaining, key_scales, tile, masks);
                softmax(scores, 0, remaining);
                end_product(product, decay, place.before());
                pack(scores, 0);
                softmax(scores, 1, remaining);
                pack(scores, 1);
                place.advance();
            }
            begin_product(product, 0, place.before());
            end_product(product, decay_, place.before());
        }
    }

    // What the task is, is read again: registers are full while it is worked on.
    SAGE_DEVICE void end(int query) {
        Task const task(p_, arch::load_shared(Memory::task(query)));
        arch::mbarrier_arrive_warp(Memory::query_empty(query));
        task_ = &task;
        sum_up_totals();
        if constexpr (kSplitKeys) {
            store_part();
        } else {
            store();
        }
    }

    // Begins Q K^T of a stage, when K is there and it is the warpgroup's turn.
    SAGE_DEVICE void begin_scores(Words& scores, float (&key_scales)[kTiles], int query_place,
                                  Stages const& place) const {
        arch::mbarrier_wait(Memory::key_full(place.stage()), place.parity());
        SAGE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            key_scales[i] =
                arch::load_shared(reinterpret_cast<float const*>(Memory::scales(place.stage(), i)) +
                                  first_column() / 2);
        }
        using Query = typename Memory::Query;
        using Key = typename Memory::Key;
        uint64_t const query = arch::rows_further(
            arch::matrix_rows<Query::kWidth>(Memory::query(0)),
            query_place * Query::kBytes + warpgroup_ * (kQueryBlock / 2 * Query::kWidth));
        uint64_t const key = arch::matrix_rows<Key::kWidth>(Memory::key(place.stage()));
        take_turn(warpgroup_);
        arch::wgmma_hold(scores);
        arch::wgmma_fence();
        SAGE_UNROLL
        for (int step = 0; step < kQueryKeySteps; ++step) {
            int const panel = step * kStep / Query::kWidth, byte = step * kStep % Query::kWidth;
            arch::wgmma_s8<kKeys>(
                scores, arch::rows_further(query, panel * Query::kPanelBytes + byte),
                arch::rows_further(key, panel * Key::kPanelBytes + byte), step > 0);
        }
        arch::wgmma_commit();
    }

    // Begins P V of a stage, when V is there, for one part of the channels.
    SAGE_DEVICE void begin_product(float (&product)[kAtOnce / 2], int part, Stages const& place) {
        if (part == 0) arch::mbarrier_wait(Memory::value_full(place.stage()), place.parity());
        uint64_t const value = arch::matrix_rows<kKeyBlock>(Memory::value(place.stage(), 0));
        arch::wgmma_hold(product);
        arch::wgmma_fence();
        SAGE_UNROLL
        for (int step = 0; step < kValueSteps; ++step) {
            constexpr int kStepsOfTile = kKeyBlock / kStep;
            int const bytes = step / kStepsOfTile * Memory::ValueOfTile::kBytes +
                              part * kAtOnce * kKeyBlock + step % kStepsOfTile * kStep;
            arch::wgmma_e4m3<kAtOnce>(product, weights_[step], arch::rows_further(value, bytes),
                                      step > 0);
        }
        arch::wgmma_commit();
    }

    // output = output * decay + P V, of all parts; the first one is in flight. E4M3 tensor cores
    // keep fewer bits of an accumulator than a float has, so each tile's product has its own.
    //
    // Beside scales of V it is the output that is multiplied on its own, which waits for nothing.
    // Were it P V, the compiler would put off the sums to the end, with all parts in registers.
    SAGE_DEVICE void end_product(float (&product)[kAtOnce / 2], float const (&decay)[kHalves],
                                 Stages const& place) {
        SAGE_UNROLL
        for (int part = 0; part < kParts; ++part) {
            if (part > 0) begin_product(product, part, place);
            float2 scales[kAtOnce / 8];  // asked for while the product is on its way
            if constexpr (kTileScales) load_scales(scales, part, place);
            arch::wgmma_wait<0>();
            arch::wgmma_hold(product);
            SAGE_UNROLL
            for (int i = 0; i < kAtOnce / 2; ++i) {
                float& sum = output_[part][i];
                if constexpr (kTileScales) {
                    float const scale = i % 2 == 0 ? scales[i / 4].x : scales[i / 4].y;
                    sum = arch::fma(product[i], scale, arch::multiply(sum, decay[i / 2 % 2]));
                } else {
                    sum = arch::fma(sum, decay[i / 2 % 2], product[i]);
                }
            }
        }
        arch::mbarrier_arrive_warp(Memory::value_empty(place.stage()));
    }

    // The scales that V has in its tile, for the thread's two channels of every eight.
    SAGE_DEVICE static void load_scales(float2 (&scales)[kAtOnce / 8], int part,
                                        Stages const& place) {
        float const* const of_part =
            reinterpret_cast<float const*>(Memory::value_scales(place.stage())) + part * kAtOnce;
        SAGE_UNROLL
        for (int atom = 0; atom < kAtOnce / 8; ++atom) {
            scales[atom] = arch::load_shared(
                reinterpret_cast<float2 const*>(of_part + atom * 8 + first_column()));
        }
    }

    static constexpr float kLargeScore = 4096.0f;  // its last bit is worth 2^-11

    // Scores of the keys from `tile` on, as bits of floats in the place of integers, which are
    // still to be multiplied by `remaining`.
    SAGE_DEVICE void scale(Words& scores, float (&remaining)[Rows::kScales][kTiles],
                           float const (&key_scales)[kTiles], int tile, Masks& masks) {
        // Some of the warpgroup's queries do not see some of these keys, or there are none.
        int const first = tile * kKeyBlock;
        bool const masked = first + kKeys > end_of_whole_ || first < begin_of_whole_;
        // With a softcap or mask the scale must come first; else it can wait, and then it
        // multiplies -inf too, so it may not be zero.
        constexpr bool kScaled = kSoftcap || kMasked;
        SAGE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            float scale[Rows::kScales];
            SAGE_UNROLL
            for (int of = 0; of < Rows::kScales; ++of) {
                scale[of] = query_scales_[of] * key_scales[i];
                remaining[of][i] = kScaled ? 1.0f : scale[of] == 0.0f ? kSmallestScale : scale[of];
            }
            SAGE_UNROLL
            for (int word = i * Scores::kTileAtoms * 4; word < (i + 1) * Scores::kTileAtoms * 4;
                 ++word) {
                float x = arch::from_int(scores[word]);
                if constexpr (kScaled) x *= scale[Rows::scale_of(0, word / 2 % 2)];
                if constexpr (kSoftcap) x = capped(x + row_term_[word / 2 % 2]);
                scores[word] = arch::bits(x);
            }
        }
        if constexpr (kMasked) {
            HopperMask<OfTask, Task, Memory> const mask(p_, *task_);
            SAGE_UNROLL
            for (int i = 0; i < kTiles; ++i) mask.apply(scores, i, tile + i, masks);
        }
        if (masked) hide(scores, first);
    }

    // P of a row half, as bits of floats in the place of the scores, and by what its sums so far
    // decay.
    SAGE_DEVICE void softmax(Words& scores, int half,
                             float const (&remaining)[Rows::kScales][kTiles]) {
        float const(&of_row)[kTiles] = remaining[Rows::scale_of(0, half)];
        float highest = -infinity();
        SAGE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            float of_tile = -infinity();
            SAGE_UNROLL
            for (int atom = 0; atom < Scores::kTileAtoms; ++atom) {
                float const low = arch::from_bits(scores[Scores::at(i, half, atom, 0)]);
                float const high = arch::from_bits(scores[Scores::at(i, half, atom, 1)]);
                of_tile = arch::maximum(of_tile, arch::maximum(low, high));
            }
            highest = arch::maximum(highest, arch::multiply(of_tile, of_row[i]));
        }
        highest = arch::maximum(highest, arch::shuffle_xor(highest, 1));
        highest = arch::maximum(highest, arch::shuffle_xor(highest, 2));
        highest = arch::maximum(highest, maximum_[half]);
        // Nothing seen yet: -inf - -inf must not arise.
        float const origin = highest == -infinity() ? 0.0f : highest;
        decay_[half] = arch::exp2(maximum_[half] - origin);
        maximum_[half] = highest;

        // The factor of P costs nothing: it is part of what is subtracted. But where a score's
        // last bit is worth much, it would be lost there, and the rounding of the maximum would
        // show against unrounded scores: then first subtract, in the same rounding.
        bool const large = origin > kLargeScore || origin < -kLargeScore;
        float const shift = E4m3::kLog2WeightFactor - (large ? 0.0f : origin);
        if (large) subtract(scores, half, of_row, origin);
        float total = 0.0f;
        SAGE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            float const factor = large ? 1.0f : of_row[i];
            SAGE_UNROLL
            for (int atom = 0; atom < Scores::kTileAtoms; ++atom) {
                SAGE_UNROLL
                for (int j = 0; j < 2; ++j) {
                    uint32_t& word = scores[Scores::at(i, half, atom, j)];
                    float const x = arch::exp2(arch::fma(arch::from_bits(word), factor, shift));
                    total += x;
                    word = arch::bits(x);
                }
            }
        }
        total_[half] = arch::fma(total_[half], decay_[half], total);
    }

    SAGE_DEVICE static void subtract(Words& scores, int half, float const (&remaining)[kTiles],
                                     float origin) {
        SAGE_UNROLL
        for (int i = 0; i < kTiles; ++i) {
            SAGE_UNROLL
            for (int atom = 0; atom < Scores::kTileAtoms; ++atom) {
                SAGE_UNROLL
                for (int j = 0; j < 2; ++j) {
                    uint32_t& word = scores[Scores::at(i, half, atom, j)];
                    float const x = arch::from_bits(word);
                    word = arch::bits(arch::multiply(x, remaining[i]) - origin);
                }
            }
        }
    }

    // Hides the keys from `first` on that a row does not see.
    SAGE_DEVICE void hide(Words& scores, int first) const {
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            int const begin = task_->first_key(query(half)) - first - first_column();
            int const end = task_->end_key(query(half)) - first - first_column();
            SAGE_UNROLL
            for (int atom = 0; atom < kKeys / 8; ++atom) {
                SAGE_UNROLL
                for (int i = 0; i < 2; ++i) {
                    int const key = atom * 8 + i;
                    if (key < begin || key >= end) {
                        scores[Scores::at(0, half, atom, i)] = arch::bits(-infinity());
                    }
                }
            }
        }
    }

    // softcap * tanh(score / softcap), from natural units to those of log 2.
    SAGE_DEVICE float capped(float score) const {
        return hyperbolic_tangent(arch::divide(score, p_.softcap)) * (p_.softcap * kLog2E);
    }

    // What K's smoothing took from the scores of a row; of rows that do not exist, nothing.
    SAGE_DEVICE float row_term_of(int half) const {
        if (!exists(half)) return 0.0f;
        return arch::load_written(p_.row_term + index_of(half));
    }

    // The accumulators' columns as the operand's: register r of a step has row half r % 2, and of
    // the step's 32 tokens the first 16 for r < 2, in the order of value.cuh.
    SAGE_DEVICE void pack(Words const& scores, int half) {
        SAGE_UNROLL
        for (int step = 0; step < kValueSteps; ++step) {
            SAGE_UNROLL
            for (int r = half; r < 4; r += kHalves) {
                int const atom = 4 * step + r / 2 * 2;
                weights_[step][r] =
                    arch::pack_e4m3(arch::from_bits(scores[Scores::at(0, half, atom, 0)]),
                                    arch::from_bits(scores[Scores::at(0, half, atom, 1)]),
                                    arch::from_bits(scores[Scores::at(0, half, atom + 1, 0)]),
                                    arch::from_bits(scores[Scores::at(0, half, atom + 1, 1)]));
            }
        }
    }

    // Over the columns of all threads that hold a row.
    SAGE_DEVICE void sum_up_totals() {
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            total_[half] += arch::shuffle_xor(total_[half], 1);
            total_[half] += arch::shuffle_xor(total_[half], 2);
        }
    }

    // Of the eight channels of an atom, the two sums of a row that the thread holds.
    SAGE_DEVICE float2 sums_of(int half, int atom) const {
        int const i = atom * 4 + half * 2;
        float const* const sums = &output_[i / (kAtOnce / 2)][i % (kAtOnce / 2)];
        return make_float2(sums[0], sums[1]);
    }

    // What the block's keys make of each row, for Merge. Where it sees none of them, no output.
    SAGE_DEVICE void store_part() const {
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            if (!exists(half)) continue;
            int64_t const part = index_of(half) * p_.parts + task_->part();
            // Scales that are not finite leave NaN in a row without keys.
            bool const dead = !sees_a_key(half);
            float const total = dead ? 0.0f : total_[half];
            if (first_column() == 0) {
                float const maximum = dead ? -infinity() : maximum_[half];
                arch::store_global(reinterpret_cast<float2*>(p_.part_sums + 2 * part),
                                   make_float2(maximum, total));
            }
            if (total == 0.0f) continue;
            float* const of_row = p_.part_outputs + part * padded_dim(kValueDim);
            SAGE_UNROLL
            for (int atom = 0; atom < kValueDim / 8; ++atom) {
                arch::store_global(reinterpret_cast<float2*>(of_row + atom * 8 + first_column()),
                                   sums_of(half, atom));
            }
        }
    }

    SAGE_DEVICE void store() const {
        float const* const value_scales =
            kTileScales
                ? nullptr
                : p_.value_scales + int64_t{task_->rows().kv_head()} * padded_dim(kValueDim);
        // With the scales of tiles a sum has the size of V itself, whose type the output has too.
        constexpr bool kHalfOutput = cutlass::platform::is_same<Output, cutlass::half_t>::value;
        float const limit = !kTileScales ? E4m3::kLimit : kHalfOutput ? Half::kLimit : infinity();
        SAGE_UNROLL
        for (int half = 0; half < kHalves; ++half) {
            if (!exists(half)) continue;
            Split const head(this->head(half), p_.heads);
            RowEnd end(maximum_[half], total_[half], E4m3::kLog2WeightFactor, !sees_a_key(half),
                       p_.dead_value);
            if (!kSoftcap && (p_.lse != nullptr || p_.sinks != nullptr)) {
                end.add_row_term(row_term_of(half));
            }
            if (p_.sinks != nullptr) end.add_sink(arch::load_global(p_.sinks + head.inner));
            Output* const of_row =
                static_cast<Output*>(p_.output) + head.outer * p_.output_batch_stride +
                head.inner * p_.output_head_stride + query(half) * p_.output_token_stride;
            // Of every eight channels, the two that the thread holds: as a pair, or one by one.
            bool const pairs = stores_pairs(of_row, p_.channels);
            SAGE_UNROLL
            for (int atom = 0; atom < kValueDim / 8; ++atom) {
                int const channel = atom * 8 + first_column();
                if (channel >= p_.channels) continue;
                float2 scale = make_float2(1.0f, 1.0f);
                if constexpr (!kTileScales) {
                    scale =
                        arch::load_written(reinterpret_cast<float2 const*>(value_scales + channel));
                }
                float2 const sums = sums_of(half, atom);
                float const low = end.value(sums.x, limit, scale.x);
                float const high = end.value(sums.y, limit, scale.y);
                if (pairs) {
                    store_pair(of_row + channel, low, high);
                } else {
                    store_one(of_row + channel, low);
                    if (channel + 1 < p_.channels) store_one(of_row + channel + 1, high);
                }
            }
            if (p_.lse != nullptr && first_column() == 0) {
                int64_t const index = this->head(half) * p_.lse_head_stride;
                arch::store_global(p_.lse + index + query(half), end.lse());
            }
        }
    }

    SAGE_DEVICE bool sees_a_key(int half) const {
        if (task_->end_key(query(half)) <= task_->first_key(query(half))) return false;
        if constexpr (!kMasked) return true;
        Split const head(this->head(half), p_.heads);
        return Seen(p_.live, head, 0, p_.query_length).of(query(half)) != 0;
    }
};

}  // namespace sage
