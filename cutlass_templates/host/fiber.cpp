#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace sage::host {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 << 10;
constexpr size_t kStride = kStack + kPage;

}  // namespace

#if defined(__x86_64__)

// Registers that a call preserves are on the stack of what does not run; MXCSR and the x87 control
// word are the same everywhere. 12 ns where ucontext, which saves the signal mask, takes 230.
extern "C" void sage_switch_stack(void** from, void* to);
asm(R"(
    .text
    .type sage_switch_stack, @function
sage_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size sage_switch_stack, . - sage_switch_stack
)");

void prepare(Context& context, char*, char* stack_top, void (*entry)()) {
    // Six registers, the address to return to, and the return address of `entry`: none.
    void* frame[8] = {
        nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, reinterpret_cast<void*>(entry),
        nullptr};
    static_assert(sizeof frame % 16 == 0, "a called function finds rsp 8 below a multiple of 16");
    context.stack_pointer = stack_top - sizeof frame;
    std::memcpy(context.stack_pointer, frame, sizeof frame);
}

void switch_context(Context& from, Context& to) {
    sage_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(Context& context, char* stack_low, char* stack_top, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack_low;
    context.state.uc_stack.ss_size = static_cast<size_t>(stack_top - stack_low);
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

Stacks::~Stacks() {
    if (memory_ != nullptr) munmap(memory_, static_cast<size_t>(count_) * kStride);
}

void Stacks::reserve(int count) {
    if (count <= count_) return;
    size_t const bytes = static_cast<size_t>(count) * kStride;
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (memory_ != nullptr) munmap(memory_, static_cast<size_t>(count_) * kStride);
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (int index = 0; index < count; ++index) {
        mprotect(low(index) - kPage, kPage, PROT_NONE);
    }
}

char* Stacks::low(int index) const {
    return memory_ + static_cast<size_t>(index) * kStride + kPage;
}

// Tops differ in the address bits that choose a cache's set: the same frames of all fibers would
// otherwise evict each other.
char* Stacks::top(int index) const { return low(index) + kStack - index * 5 % 64 * 64; }

}  // namespace sage::host
