// Q, K and V to the operands of the attention kernel, in one launch: the tasks of statistics.cuh,
// query.cuh, key.cuh and value.cuh, in an order that reads K and V of a head for the second time
// while they are still in the L2 cache, and that needs no launch between them.
//
// A block takes a ticket, and its number is the task. The order is
//
//   statistics of the heads 0 .. ahead - 1
//   for each head h: statistics of head h + ahead, conversion of head h
//   what needs no statistics
//
// and a conversion waits for the statistics of its head. These have lower tickets, so that the
// blocks which have them run or are done: nobody waits for a block that has not begun, however few
// run at a time. Sums are added up in the order of chunks, by whichever block of a head's
// statistics comes last: the bits are those of separate launches.
#pragma once

#include <sage/key.cuh>
#include <sage/query.cuh>
#include <sage/statistics.cuh>
#include <sage/value.cuh>

namespace sage {

constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <class Input, class QkFormat, class PvFormat, int kKeyDim, int kValueDim,
          bool kHalfAccumulator, bool kPanels, class QueryReader = Plain, class KeyReader = Plain>
struct Quantize {
    using OfStatistics = Statistics<Input, kKeyDim, kValueDim, KeyReader>;
    static constexpr bool kSmooths = QkFormat::kBits == 4;
    using OfQuery = QuantizeQuery<Input, QkFormat, kKeyDim, kPanels, QueryReader,
                                  kSmooths ? kQueryBlock : kQueryBlock / 2>;
    using OfKey = QuantizeKey<Input, QkFormat, kKeyDim, kPanels, KeyReader>;
    using OfValue = QuantizeValue<Input, PvFormat, kValueDim, kHalfAccumulator, kPanels>;

    using Params = QuantizeParams<typename OfStatistics::Params, typename OfQuery::Params,
                                  typename OfKey::Params>;

    static constexpr int kThreads = kQuantizerThreads;
    // As few registers as it takes for the loads of several blocks to be on their way at a time.
    static constexpr int kMinBlocks = sizeof(Input) == 4 || kKeyDim > 128 || kValueDim > 128 ? 1
                                      : kSmooths                                             ? 2
                                                                                             : 3;
    static constexpr int kSlotBytes = 16;
    static constexpr int kTaskBytes =
        larger_of(larger_of(OfStatistics::kSharedBytes, OfQuery::kSharedBytes),
                  larger_of(OfKey::kSharedBytes, OfValue::kSharedBytes));
    static constexpr int kSharedBytes = kTaskBytes + kSlotBytes;

    // Means of Q blocks make a term of K, so that a head's Q comes before its K. Else Q comes last,
    // when nothing of K and V has to stay in the cache any more.
    static constexpr bool kQueryFirst = kSmooths;

    SAGE_DEVICE static void run(Params const& p) {
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
        int head;   // b * Hkv + h
        int index;  // of the tasks of this kind of a head; of Q, of the heads that share K and V
    };

    SAGE_DEVICE static Task task_of(Params const& p, int64_t ticket) {
        int const chunks = static_cast<int>(p.statistics.chunks);
        int const blocks = static_cast<int>(p.key.key_blocks);
        int const queries =
            static_cast<int>(p.query.group * p.query.query_blocks) * OfQuery::kTasks;
        int const heads = static_cast<int>(p.schedule.heads);
        int const ahead = static_cast<int>(p.schedule.ahead);
        int const of_statistics = OfValue::kScaled ? 2 * chunks : chunks;
        int const of_head = 2 * blocks + (kQueryFirst ? queries : 0);

        int const first = ahead * of_statistics;                        // before any conversion
        int const pairs = (heads - ahead) * (of_statistics + of_head);  // and with statistics
        int at = static_cast<int>(ticket), head = 0;
        bool is_statistics = true;
        if (at < first) {
            Split const split(at, of_statistics);
            head = split.outer;
            at = split.inner;
        } else if (at < first + pairs) {
            Split const split(at - first, of_statistics + of_head);
            is_statistics = split.inner < of_statistics;
            head = is_statistics ? split.outer + ahead : split.outer;
            at = is_statistics ? split.inner : split.inner - of_statistics;
        } else if (at < first + pairs + ahead * of_head) {
            Split const split(at - first - pairs, of_head);
            is_statistics = false;
            head = split.outer + heads - ahead;
            at = split.inner;
        } else {
            Split const split(at - first - pairs - ahead * of_head, queries);
            return {Kind::kQuery, split.outer, split.inner};
        }
        if (is_statistics) {
            if (at < chunks) return {Kind::kKeyStatistics, head, at};
            return {Kind::kValueStatistics, head, at - chunks};
        }
        if constexpr (kQueryFirst) {
            if (at < queries) return {Kind::kQuery, head, at};
            at -= queries;
        }
        if (at < blocks) return {Kind::kKey, head, at};
        return {Kind::kValue, head, at - blocks};
    }

    // What thread 0 has, for all: in shared memory that no task uses.
    SAGE_DEVICE static uint32_t to_all(uint32_t of_first) {
        uint32_t* const slot = reinterpret_cast<uint32_t*>(arch::shared_memory() + kTaskBytes);
        if (arch::thread_index() == 0) arch::store_shared(slot, of_first);
        arch::barrier();
        return arch::load_shared(slot);
    }

    SAGE_DEVICE static void reduce_key(Params const& p, Task const& task) {
        int const chunks = static_cast<int>(p.statistics.chunks);
        int64_t const first = int64_t{task.head} * chunks;
        OfStatistics::key(p.statistics, first + task.index);
        join<kKeyDim>(counters_of(p, task.head) + kKeyDone, chunks,
                      p.statistics.key_sums + first * kKeyDim,
                      p.schedule.key_totals + int64_t{task.head} * kKeyDim,
                      [](float sum, float of_chunk) { return sum + of_chunk; });
    }

    SAGE_DEVICE static void reduce_value(Params const& p, Task const& task) {
        int const chunks = static_cast<int>(p.statistics.chunks);
        int64_t const first = int64_t{task.head} * chunks;
        OfStatistics::value(p.statistics, first + task.index);
        join<kValueDim>(counters_of(p, task.head) + kValueDone, chunks,
                        reinterpret_cast<float const*>(p.statistics.value_amax) + first * kValueDim,
                        p.schedule.value_totals + int64_t{task.head} * kValueDim,
                        [](float amax, float of_chunk) {
                            return arch::from_bits(larger(arch::bits(amax), arch::bits(of_chunk)));
                        });
    }

    // Of the blocks that come here with the chunks of a head, the last one joins what all found.
    template <int kHeadDim, class Join>
    SAGE_DEVICE static void join(uint32_t* counter, int chunks, float const* of_chunks,
                                 float* total, Join join) {
        arch::barrier();
        uint32_t const before = to_all(arch::thread_index() == 0 ? arch::arrive(counter) : 0);
        if (before + 1 != static_cast<uint32_t>(chunks)) return;
        int const channel = arch::thread_index();
        if (channel < kHeadDim) {
            float result = 0.0f;
            for (int first = 0; first < chunks; first += kMostChunks) {
                float x[kMostChunks];
                SAGE_UNROLL
                for (int i = 0; i < kMostChunks; ++i) {
                    x[i] = first + i < chunks
                               ? arch::load_written(of_chunks + (first + i) * kHeadDim + channel)
                               : 0.0f;
                }
                SAGE_UNROLL
                for (int i = 0; i < kMostChunks; ++i) result = join(result, x[i]);
            }
            arch::store_global(total + channel, result);
        }
        arch::barrier();
        if (arch::thread_index() == 0) arch::arrive(counter);
    }

    SAGE_DEVICE static void query(Params const& p, Task const& task) {
        uint32_t* const counters = counters_of(p, task.head);
        if (p.query.row_term != nullptr) await_statistics(p, counters + kKeyDone);
        OfQuery::run(p.query, task.head * p.query.group * p.query.query_blocks * OfQuery::kTasks +
                                  task.index);
        if constexpr (kQueryFirst) {  // means are stored before the last barrier of the task
            if (arch::thread_index() == 0) arch::arrive(counters + kQueryDone);
        }
    }

    SAGE_DEVICE static void key(Params const& p, Task const& task) {
        uint32_t* const counters = counters_of(p, task.head);
        OfKey::run(p.key, task.head * p.key.key_blocks + task.index, [&] {
            await_statistics(p, counters + kKeyDone);
            if constexpr (kQueryFirst) {
                await(counters + kQueryDone,
                      static_cast<int>(p.query.group * p.query.query_blocks));
            }
        });
    }

    SAGE_DEVICE static void value(Params const& p, Task const& task) {
        OfValue::run(p.value, task.head * p.value.key_blocks + task.index, [&] {
            if constexpr (OfValue::kScaled) {
                await_statistics(p, counters_of(p, task.head) + kValueDone);
            }
        });
    }

    SAGE_DEVICE static void await_statistics(Params const& p, uint32_t const* counter) {
        await(counter, static_cast<int>(p.statistics.chunks) + 1);
    }

    SAGE_DEVICE static void await(uint32_t const* counter, int arrivals) {
        if (arch::thread_index() == 0) arch::await(counter, arrivals);
        arch::barrier();
    }
};

}  // namespace sage
