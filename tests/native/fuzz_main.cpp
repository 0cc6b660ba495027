// Runs the fuzz target on random inputs, for compilers without -fsanitize=fuzzer:
//
//     fuzz [--runs N] [--seed S] [--seconds T] [--threads N]
//
// An input is a function of its seed: run 3 of seed 7 is run 0 of seed 10. A failure prints
// the seed that repeats it. With several threads, as many calls run at the same time, and one of
// several seeds it is.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "tensor.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
// What the sanitizers find ends in abort, so that the seed is printed.
extern "C" const char* __asan_default_options() { return "abort_on_error=1:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
extern "C" const char* __tsan_default_options() { return "abort_on_error=1:halt_on_error=1"; }

namespace {

constexpr uint64_t kMostThreads = 16;
constexpr uint64_t kIdle = UINT64_MAX;
std::atomic<uint64_t> seeds_at_hand[kMostThreads];

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

void on_signal(int) {
    for (const std::atomic<uint64_t>& seed : seeds_at_hand) {
        char text[80];
        int length = std::snprintf(text, sizeof text, "repeat it with: --runs 1 --seed %llu\n",
                                   (unsigned long long)seed.load());
        if (seed != kIdle) std::fwrite(text, 1, size_t(length), stderr);
    }
    std::_Exit(1);
}

void run(uint64_t seed) {
    fuzz::Random random(seed);
    std::vector<uint8_t> bytes(256);
    for (uint8_t& byte : bytes) byte = uint8_t(random.bits());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int count, char** arguments) {
    uint64_t runs = 1000, seed = 0, seconds = 3600, threads = 1;
    for (int i = 1; i < count; i += 2) {
        std::string name = arguments[i];
        uint64_t* option = name == "--runs"      ? &runs
                           : name == "--seed"    ? &seed
                           : name == "--seconds" ? &seconds
                           : name == "--threads" ? &threads
                                                 : nullptr;
        if (option == nullptr || i + 1 == count) {
            std::fprintf(stderr, "usage: fuzz [--runs N] [--seed S] [--seconds T] [--threads N]\n");
            return 2;
        }
        *option = std::strtoull(arguments[i + 1], nullptr, 10);
    }
    for (std::atomic<uint64_t>& seed_of_thread : seeds_at_hand) seed_of_thread = kIdle;
    for (int signal : {SIGABRT, SIGFPE, SIGILL}) std::signal(signal, on_signal);
    if (!kAddressSanitizer) std::signal(SIGSEGV, on_signal);  // it has a report of its own

    auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    std::atomic<uint64_t> next{0}, done{0};
    std::vector<std::thread> others;
    auto work = [&](uint64_t thread) {
        while (std::chrono::steady_clock::now() < end) {
            uint64_t number = next++;
            if (number >= runs) return;
            seeds_at_hand[thread] = seed + number;
            run(seed + number);
            seeds_at_hand[thread] = kIdle;
            ++done;
        }
    };
    threads = std::min(threads, kMostThreads);
    for (uint64_t i = 1; i < threads; ++i) others.emplace_back(work, i);
    work(0);
    for (std::thread& thread : others) thread.join();
    std::printf("%llu runs from seed %llu, no failure\n", (unsigned long long)done.load(),
                (unsigned long long)seed);
    return 0;
}
