// mbarriers: phases, arrivals and bytes of copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <sage/host/runtime.hpp>
#include <string>

#include "shadow.hpp"
#include "tensor_map.hpp"

namespace sage::host {

// One object of 8 bytes in shared memory. A phase is complete when all arrivals have come, and all
// bytes that were expected.
struct Mbarrier {
    int index;               // in the order of their making
    int arrivals;            // of a phase
    int missing;             // arrivals still to come in this phase
    int64_t bytes = 0;       // still to come; below zero where copies were quicker than who expects
    int64_t on_the_way = 0;  // bytes of copies in flight
    int phase = 0;           // how many are complete
    Clock arrived = {};      // what those of this phase, and of all before, have done
    Clock complete = {};     // what those of complete phases have

    bool is_complete(int parity) const { return phase % 2 != parity; }
    bool completes() const { return missing == 0 && bytes == 0; }

    // The next phase begins.
    void complete_phase() {
        complete = arrived;
        missing = arrivals;
        ++phase;
    }

    std::string text() const {
        return std::to_string(missing) + " of " + std::to_string(arrivals) + " arrivals and " +
               std::to_string(bytes) + " bytes missing in phase " + std::to_string(phase);
    }
};

// A copy in flight; it lands whenever it pleases.
struct BulkCopy {
    char* to;
    char const* from;
    int bytes;
    size_t mbarrier;  // its offset
    int phase;        // in which it was issued
    Site site;
    std::shared_ptr<TensorBox const> box = nullptr;  // what it copies, in place of `from`
    char const* name() const { return box == nullptr ? "copy_bulk" : "copy_tensor"; }
};

}  // namespace sage::host
