#include "host.hpp"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#endif

namespace sage_ort {
namespace {

constexpr uintptr_t kAlignment = 64;

int64_t count_cpus() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : online;
}

}  // namespace

int64_t cpu_count() {
    static int64_t counted = 0;  // threads that race count the same
    int64_t count = __atomic_load_n(&counted, __ATOMIC_RELAXED);
    if (count == 0) {
        count = count_cpus();
        __atomic_store_n(&counted, count, __ATOMIC_RELAXED);
    }
    return count;
}

Threads::~Threads() {
    if (failure_ != nullptr) api_.ReleaseStatus(failure_);
}

void Threads::parallel_for(void* threads, int64_t count,
                           void (*body)(void* argument, int64_t index), void* argument) {
    static_cast<Threads*>(threads)->run(count, body, argument);
}

void Threads::run(int64_t count, void (*body)(void* argument, int64_t index), void* argument) {
    if (failure_ != nullptr) return;
    struct Work {
        void (*body)(void* argument, int64_t index);
        void* argument;
    } work{body, argument};
    auto run_one = [](void* context, size_t index) {
        const Work& w = *static_cast<Work*>(context);
        w.body(w.argument, int64_t(index));
    };
    failure_ = api_.KernelContext_ParallelFor(context_, run_one, size_t(count), 0, &work);
}

OrtStatus* Threads::take_failure() {
    OrtStatus* taken = failure_;
    failure_ = nullptr;
    return taken;
}

Scratch::~Scratch() {
    if (memory_ != nullptr) allocator_->Free(allocator_, memory_);
}

char* Scratch::allocate(int64_t bytes) {
    memory_ = allocator_->Alloc(allocator_, size_t(bytes) + kAlignment);
    if (memory_ == nullptr) return nullptr;
    return reinterpret_cast<char*>((uintptr_t(memory_) + kAlignment - 1) & ~(kAlignment - 1));
}

}  // namespace sage_ort
