// Q, K and V to the operands of the attention kernel, in one launch: the tasks of statistics.cuh,
// query.cuh, key.cuh and value.cuh, in an order that reads K and V of a head for the second time
// while they are still in the L2 cache, and that needs no launch between them.
//
// A block takes a ticket, and its number is the task. A unit is K or V of one head; the order is
//
//   what K needs of Q (INT4): with row terms the statistics of all K, and then Q
//   statistics of the first unit, and the next `ahead` tasks of statistics
//   for each unit: its conversion, from the last tokens to the first, and then as many tasks of
//     statistics as a unit has
//   conversions that are left: of a V without scales, of K where all its statistics came first
//   Q, if it was not before
//
// and a conversion waits for the statistics of its unit. These have lower tickets, so that the
// blocks which have them run or are done: nobody waits for a block that has not begun, however few
// run at a time. Sums are added up in the order of chunks, by whichever block of a unit's
// statistics comes last: the bits are those of separate launches.
//
// What was read last is read again first, so that of a unit which the cache does not hold it has
// the end still; and what is made of it, which nobody in the launch reads, is stored streaming, so
// that it takes no room of what is to be read again.
#pragma once

#include <sage/key.cuh>
#include <sage/query.cuh>
#include <sage/statistics.cuh>
#include <sage/value.cuh>

namespace sage {

// Of K and V, that one block takes the statistics of: enough blocks for a GPU with few heads.
constexpr int kSliceChannels = 32;

constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <class Input, class QkFormat, class PvFormat, int kKeyDim, int kValueDim,
          bool kHalfAccumulator, bool kPanels, bool kPackedHeads, class QueryReader = Plain,
          class KeyReader = Plain>
struct Quantize {
    static constexpr int kSlices = larger_of(kKeyDim, kValueDim) / kSliceChannels;
    using OfStatistics = Statistics<Input, kKeyDim, kValueDim, KeyReader, kSlices>;
    static constexpr bool kSmooths = QkFormat::kBits == 4;
    using OfQuery = QuantizeQuery<Input, QkFormat, kKeyDim, kPanels, kPackedHeads, QueryReader,
                                  kSmooths ? kQueryBlock : kQueryBlock / 2>;
    using OfKey = QuantizeKey<Input, QkFormat, kKeyDim, kPanels, KeyReader>;
    using OfValue = QuantizeValue<Input, PvFormat, kValueDim, kHalfAccumulator, kPanels>;

    using Params = QuantizeParams<typename OfStatistics::Params, typename OfQuery::Params,
                                  typename OfKey::Params>;

    static constexpr int kThreads = kQuantizerThreads;
    // As few registers as it takes for the loads of several blocks to be on their way at a time;
    // rotating takes more than those.
    static constexpr bool kRotates =
        !cute::is_same_v<QueryReader, Plain> || !cute::is_same_v<KeyReader, Plain>;
    static constexpr int kMinBlocks =
        kRotates || sizeof(Input) == 4 || kKeyDim > 128 || kValueDim > 128 ? 1
        : kSmooths                                                         ? 2
                                                                           : 3;
    static constexpr int kSlotBytes = 16;
    static constexpr int kTaskBytes =
        larger_of(larger_of(OfStatistics::kSharedBytes, OfQuery::kSharedBytes),
                  larger_of(OfKey::kSharedBytes, OfValue::kSharedBytes));
    static constexpr int kSharedBytes = kTaskBytes + kSlotBytes;

    // Means of Q blocks make a term of K. Else Q comes last, when nothing of K and V has to stay in
    // the cache any more.
    static constexpr bool kQueryFirst = kSmooths;

    // When all blocks have begun, the attention kernel may: none of these waits for one that has
    // not.
    SAGE_DEVICE static void run(Params const& p) {
        arch::launch_dependents();
        int64_t const ticket = to_all(
            arch::thread_index() == 0 ? arch::take_ticket(p.schedule.counters + kTickets) : 0);
        Task const task = task_of(p, ticket);
        switch (task.kind) {
            case Kind::kKeyStatistics:
                return reduce_key(p, task);
            case Kind::kValueStatistics:
                return reduce_value(p, task);
            case Kind::kQuery:
                return query(p, task);
            case Kind::kKey:
                return key(p, task);
            case Kind::kValue:
                return value(p, task);
        }
    }

 private:
    // The words of a head's counters: blocks that are done with K's and V's statistics, the last
    // one twice, and with Q.
    static constexpr int kTickets = 0, kKeyDone = 0, kValueDone = 1, kQueryDone = 2;

    SAGE_DEVICE static uint32_t* counters_of(Params const& p, int head) {
        return p.schedule.counters + (1 + head) * kCounters;
    }

    enum class Kind { kKeyStatistics, kValueStatistics, kQuery, kKey, kValue };
    struct Task {
        Kind kind;
        int64_t index;  // of the tasks of this kind
        int head;       // b * Hkv + h
    };

    SAGE_DEVICE static Task task_of(Params const& p, int64_t ticket) {
        int const heads = static_cast<int>(p.schedule.heads);
        int const statistics = static_cast<int>(p.statistics.chunks) * kSlices;  // of a unit
        int const blocks = static_cast<int>(p.key.key_blocks);
        int const queries =
            static_cast<int>(p.query.group * p.query.query_blocks) * OfQuery::kTasks;
        bool const key_first = kQueryFirst && p.query.row_term != nullptr;

        if (key_first) {
            int64_t const all = int64_t{heads} * statistics;
            if (ticket < all) return task(Kind::kKeyStatistics, ticket, statistics);
            ticket -= all;
        }
        if (kQueryFirst) {
            int64_t const all = int64_t{heads} * queries;
            if (ticket < all) return task(Kind::kQuery, ticket, queries);
            ticket -= all;
        }

        int const tensors = (key_first ? 0 : 1) + (OfValue::kScaled ? 1 : 0);
        int const units = heads * tensors, of_units = units * statistics;
        int const wanted = statistics + static_cast<int>(p.schedule.ahead);
        int const begin = wanted < of_units ? wanted : of_units;
        int64_t const end = int64_t{units} * (statistics + blocks);
        if (ticket < end) {
            // Of all statistics, and of all conversions.
            int const position = static_cast<int>(ticket) - begin;
            bool is_statistics = position < 0;
            int index = static_cast<int>(ticket);
            if (position >= 0) {
                int const period = blocks + statistics;
                Split const left(of_units - begin, statistics);  // the last ones are no whole unit
                Split const at(position, period);
                int const unit = at.outer < left.outer ? at.outer : left.outer;
                int const after = position - unit * period;
                int const between = unit < left.outer ? statistics : left.inner;
                is_statistics = after >= blocks && after < blocks + between;
                if (is_statistics) {
                    index = begin + unit * statistics + after - blocks;
                } else {
                    index = unit * blocks + after - (after < blocks ? 0 : between);
                }
            }
            Split const of_unit(index, is_statistics ? statistics : blocks);
            Split const of_head(of_unit.outer, tensors);
            bool const is_value = tensors == 2 ? of_head.inner == 1 : key_first;
            int64_t const of_kind =
                is_statistics ? int64_t{of_head.outer} * statistics + of_unit.inner
                              : int64_t{of_head.outer} * blocks + blocks - 1 - of_unit.inner;
            return {is_statistics ? (is_value ? Kind::kValueStatistics : Kind::kKeyStatistics)
                                  : (is_value ? Kind::kValue : Kind::kKey),
                    of_kind, of_head.outer};
        }
        ticket -= end;

        int64_t const all = int64_t{heads} * blocks;
        if (key_first) {
            if (ticket < all) return task(Kind::kKey, ticket, blocks);
            ticket -= all;
        }
        if (!OfValue::kScaled) {
            if (ticket < all) return task(Kind::kValue, ticket, blocks);
            ticket -= all;
        }
        return task(Kind::kQuery, ticket, queries);
    }

    SAGE_DEVICE static Task task(Kind kind, int64_t index, int of_head) {
        return {kind, index, Split(index, of_head).outer};
    }

    // What thread 0 has, for all: in shared memory that no task uses.
    SAGE_DEVICE static uint32_t to_all(uint32_t of_first) {
        uint32_t* const slot = reinterpret_cast<uint32_t*>(arch::shared_memory() + kTaskBytes);
        if (arch::thread_index() == 0) arch::store_shared(slot, of_first);
        arch::barrier();
        return arch::load_shared(slot);
    }

    SAGE_DEVICE static void reduce_key(Params const& p, Task const& task) {
        OfStatistics::key(p.statistics, task.index);
        join<kKeyDim>(p, counters_of(p, task.head) + kKeyDone, task.head, p.statistics.key_sums,
                      p.schedule.key_totals,
                      [](float sum, float of_chunk) { return sum + of_chunk; });
    }

    SAGE_DEVICE static void reduce_value(Params const& p, Task const& task) {
        OfStatistics::value(p.statistics, task.index);
        join<kValueDim>(p, counters_of(p, task.head) + kValueDone, task.head,
                        reinterpret_cast<float const*>(p.statistics.value_amax),
                        p.schedule.value_totals, [](float amax, float of_chunk) {
                            return arch::from_bits(larger(arch::bits(amax), arch::bits(of_chunk)));
                        });
    }

    // Of the blocks that come here with the chunks of a head, the last one joins what all found:
    // of_chunks (B * Hkv, chunks, D) to totals (B * Hkv, D).
    template <int kHeadDim, class Join>
    SAGE_DEVICE static void join(Params const& p, uint32_t* counter, int head,
                                 float const* of_chunks, float* totals, Join join) {
        arch::barrier();
        uint32_t const before = to_all(arch::thread_index() == 0 ? arch::arrive(counter) : 0);
        if (before + 1 != arrivals(p)) return;
        int const channel = arch::thread_index();
        if (channel < kHeadDim) {
            int const chunks = static_cast<int>(p.statistics.chunks);
            float const* const of_channel = of_chunks + int64_t{head} * chunks * kHeadDim + channel;
            float result = 0.0f;
            for (int first = 0; first < chunks; first += kMostChunks) {
                float x[kMostChunks];
                SAGE_UNROLL
                for (int i = 0; i < kMostChunks; ++i) {
                    x[i] = first + i < chunks
                               ? arch::load_written(of_channel + (first + i) * kHeadDim)
                               : 0.0f;
                }
                SAGE_UNROLL
                for (int i = 0; i < kMostChunks; ++i) result = join(result, x[i]);
            }
            arch::store_global(totals + int64_t{head} * kHeadDim + channel, result);
        }
        arch::barrier();
        if (arch::thread_index() == 0) arch::arrive(counter);
    }

    SAGE_DEVICE static void query(Params const& p, Task const& task) {
        uint32_t* const counters = counters_of(p, task.head);
        if (p.query.row_term != nullptr) await_statistics(p, counters + kKeyDone);
        OfQuery::run(p.query, task.index);
        if constexpr (kQueryFirst) {  // means are stored before the last barrier of the task
            if (arch::thread_index() == 0) arch::arrive(counters + kQueryDone);
        }
    }

    SAGE_DEVICE static void key(Params const& p, Task const& task) {
        uint32_t* const counters = counters_of(p, task.head);
        OfKey::run(p.key, task.index, [&] {
            await_statistics(p, counters + kKeyDone);
            if constexpr (kQueryFirst) {
                await(counters + kQueryDone,
                      static_cast<uint32_t>(p.query.group * p.query.query_blocks));
            }
        });
    }

    SAGE_DEVICE static void value(Params const& p, Task const& task) {
        OfValue::run(p.value, task.index, [&] {
            if constexpr (OfValue::kScaled) {
                await_statistics(p, counters_of(p, task.head) + kValueDone);
            }
        });
    }

    // Of blocks with a unit's statistics, but for the last one, which comes twice.
    SAGE_DEVICE static uint32_t arrivals(Params const& p) {
        return static_cast<uint32_t>(p.statistics.chunks) * kSlices;
    }

    SAGE_DEVICE static void await_statistics(Params const& p, uint32_t const* counter) {
        await(counter, arrivals(p) + 1);
    }

    SAGE_DEVICE static void await(uint32_t const* counter, uint32_t arrivals) {
        if (arch::thread_index() == 0) arch::await(counter, arrivals);
        arch::barrier();
    }
};

}  // namespace sage
