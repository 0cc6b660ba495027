// What a session lends a call: its threads, and memory from its allocator.
#pragma once

#include "ort_abi.hpp"
#include "sage_cpu.h"

namespace sage_ort {

// The CPUs that this process may run on.
int64_t cpu_count();

// The session's threads as sage_cpu.h wants them. The runtime does not say how many there are, so
// `workers` may be more: indices that find nothing left to do cost next to nothing.
class Threads {
 public:
    Threads(const OrtApi& api, const OrtKernelContext* context, int64_t workers)
        : api_(api), context_(context), host_{this, parallel_for, workers} {}
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;
    ~Threads();

    const sage_cpu_host* host() const { return &host_; }
    int64_t workers() const { return host_.workers; }

    // body(argument, index) once for every index below count, on these threads. Once the runtime
    // has failed to run something, this does nothing: take_failure says so.
    void run(int64_t count, void (*body)(void* argument, int64_t index), void* argument);

    // Why something was not run, handed over; null if all was.
    OrtStatus* take_failure();

 private:
    static void parallel_for(void* threads, int64_t count,
                             void (*body)(void* argument, int64_t index), void* argument);

    const OrtApi& api_;
    const OrtKernelContext* context_;
    sage_cpu_host host_;
    OrtStatus* failure_ = nullptr;
};

// Memory of a call, aligned to 64 bytes, returned at its end. The CPU allocator of a session is an
// arena, so that pages stay mapped from call to call.
class Scratch {
 public:
    explicit Scratch(OrtAllocator* allocator) : allocator_(allocator) {}
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Null where there is no memory; once for each object.
    char* allocate(int64_t bytes);

 private:
    OrtAllocator* allocator_;
    void* memory_ = nullptr;
};

}  // namespace sage_ort
