// Runs the blocks of a kernel on the calling host thread, one fiber for each of their threads.
#pragma once

#include <cstdint>
#include <memory>
#include <sage/host/runtime.hpp>
#include <string>
#include <vector>

#include "traffic.hpp"

namespace sage::host {

// Global memory that kernels may touch.
struct Range {
    uintptr_t begin, end;
    bool writable;
};

struct Launch {
    Entry const& entry;
    void const* params;
    int64_t grid;
    uint64_t seed;  // of the order in which blocks and threads run
    void const* stream;
    bool dependent;  // on the launch before it in the stream, which may not have ended
    bool detect_races;
    std::shared_ptr<std::vector<Range> const> ranges;  // empty: all of memory
    Bytes* bytes;   // where to count global memory; null: not counted
    int64_t cache;  // bytes of the cache that is followed then
};

// Runs the launch; returns what failed, or "". Safe to call from several host threads at once.
std::string execute(Launch const& launch);

// What kernels call.
extern Runtime const kRuntime;

}  // namespace sage::host
