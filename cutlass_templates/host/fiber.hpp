// Fibers: threads of execution on one host thread that switch by a call.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace sage::host {

// Where a fiber, or the host thread that runs them, is when it does not run.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t state = {};
#endif
};

// Makes `context` start with a call of `entry`, which must not return, on the stack that ends at
// `stack_top`.
void prepare(Context& context, char* stack_low, char* stack_top, void (*entry)());

// Leaves the running context, to which a later switch comes back, for another one.
void switch_context(Context& from, Context& to);

// Stacks, each behind an inaccessible page. A stack takes memory as it is touched.
class Stacks {
 public:
    Stacks() = default;
    Stacks(Stacks const&) = delete;
    Stacks& operator=(Stacks const&) = delete;
    ~Stacks();

    // Makes sure that there are `count`; throws std::bad_alloc.
    void reserve(int count);
    char* low(int index) const;
    char* top(int index) const;

 private:
    char* memory_ = nullptr;
    int count_ = 0;
};

}  // namespace sage::host
