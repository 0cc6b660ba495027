// What one block of a launch may load of what another one has stored: the release and acquire of
// counters in global memory.
#pragma once

#include <cstdint>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace sage::host {

// When a thread did something. Blocks run one after another, so that a serial number orders all
// that a launch does; epochs are the barriers that its block has passed.
struct Event {
    int64_t block = 0;
    int thread = 0;
    uint32_t epoch = 0;
    uint64_t serial = 0;
};

// Who has published what to whom. A thread that arrives at a counter publishes what it has stored,
// what others of its block have before a barrier, and what it had been told itself; one that awaits
// a counter is told, and so are others of its block after a barrier.
class Publications {
 public:
    void begin_launch() {
        counters_.clear();
        serial_ = 0;
    }

    void begin_block(int64_t block) {
        block_ = block;
        epoch_ = 0;
        told_.clear();
        heard_.clear();
    }

    void barrier() { ++epoch_; }

    Event now(int thread) { return {block_, thread, epoch_, ++serial_}; }

    void arrive(void const* counter, int thread) {
        Counter& published = counters_[counter];
        for (Told const& told : told_) {
            if (knows(told, thread)) published.add(told.what);
        }
        published.add(now(thread));
        published.ends.push_back(published.events.size());
    }

    // Counts, and publishes nothing.
    void take(void const* counter) {
        Counter& taken = counters_[counter];
        taken.ends.push_back(taken.events.size());
    }

    uint32_t count(void const* counter) {
        return static_cast<uint32_t>(counters_[counter].ends.size());
    }

    // Of so many arrivals: what came after them, a device need not have seen.
    void await(void const* counter, uint32_t arrivals, int thread) {
        Counter const& published = counters_[counter];
        size_t const end = arrivals == 0 ? 0 : published.ends[arrivals - 1];
        for (size_t i = 0; i < end; ++i) {
            Event const& event = published.events[i];
            if (heard_.insert({event.serial, thread}).second) {
                told_.push_back({event, thread, epoch_});
            }
        }
    }

    // Whether what was stored then is there for a thread of the block that runs.
    bool visible(Event const& stored, int thread) const {
        if (stored.block == block_) return before(stored, {block_, thread, epoch_, serial_ + 1});
        for (Told const& told : told_) {
            if (told.what.block == stored.block && before(stored, told.what) &&
                knows(told, thread)) {
                return true;
            }
        }
        return false;
    }

 private:
    struct Told {
        Event what;  // an arrival
        int thread;  // which awaited it
        uint32_t epoch;
    };

    struct Counter {
        std::vector<Event> events;
        std::vector<size_t> ends;  // of those that were published by each arrival
        std::unordered_set<uint64_t> serials;

        // What was published before is so for all that come later.
        void add(Event const& event) {
            if (serials.insert(event.serial).second) events.push_back(event);
        }
    };

    // Two events of one block, in order for a device too: by a thread's own order, or a barrier.
    static bool before(Event const& first, Event const& second) {
        return first.serial < second.serial &&
               (first.thread == second.thread || first.epoch < second.epoch);
    }

    bool knows(Told const& told, int thread) const {
        return told.thread == thread || told.epoch < epoch_;
    }

    int64_t block_ = 0;
    uint32_t epoch_ = 0;
    uint64_t serial_ = 0;
    std::vector<Told> told_;                    // to the block that runs
    std::set<std::pair<uint64_t, int>> heard_;  // serials of it, by threads that awaited them
    std::unordered_map<void const*, Counter> counters_;
};

}  // namespace sage::host
