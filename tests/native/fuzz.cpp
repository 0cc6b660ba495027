// A fuzz target for the native CPU attention: bytes become a call, valid or not.
//
// A valid call is compared with double precision (naive.hpp says how near it must be), must leave
// its inputs and the gaps of its output alone, and must repeat bit by bit with other threads. An
// invalid one must be refused by name before anything is written.
//
// fuzz_main.cpp makes a program of it, as `clang++ -fsanitize=fuzzer` does.

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <thread>

#include "naive.hpp"
#include "sage_cpu.h"
#include "tensor.hpp"

namespace fuzz {
namespace {

// --- hosts

using Body = void (*)(void* argument, int64_t index);

void run_backwards(void*, int64_t count, Body body, void* argument) {
    for (int64_t index = count; index-- > 0;) body(argument, index);
}

// One thread per index; context: unused.
void run_threads(void*, int64_t count, Body body, void* argument) {
    std::vector<std::thread> threads;
    for (int64_t index = 0; index < count; ++index)
        threads.emplace_back([=] { body(argument, index); });
    for (std::thread& thread : threads) thread.join();
}

using RangeBody = void (*)(int64_t begin, int64_t end, void* argument);

int32_t pool_in_halves(int64_t begin, int64_t end, int64_t, RangeBody body, void* argument) {
    int64_t middle = begin + (end - begin) / 2;
    std::thread other([=] { body(begin, middle, argument); });
    body(middle, end, argument);
    other.join();
    return 0;
}
int32_t pool_that_stops_halfway(int64_t begin, int64_t end, int64_t, RangeBody body,
                                void* argument) {
    body(begin + (end - begin) / 2, end, argument);
    return -1;
}
int32_t pool_that_fails(int64_t, int64_t, int64_t, RangeBody, void*) { return 1; }

sage_cpu_host host_of(int64_t kind, int64_t workers) {
    switch (kind) {
        case 0:
            return {nullptr, run_backwards, workers};
        case 1:
            return {reinterpret_cast<void*>(pool_in_halves), sage_cpu_parallel_for_ranges, workers};
        case 2:
            return {reinterpret_cast<void*>(pool_that_stops_halfway), sage_cpu_parallel_for_ranges,
                    workers};
        case 3:
            return {reinterpret_cast<void*>(pool_that_fails), sage_cpu_parallel_for_ranges,
                    workers};
    }
    return {nullptr, run_threads, workers};
}
constexpr int64_t kHosts = 6;  // threads twice

// Memory of exactly so many bytes, aligned, full of NaN. AddressSanitizer watches its ends;
// without, a page that nothing may touch follows it, for code that a sanitizer cannot see into.
class Memory {
 public:
    explicit Memory(int64_t bytes) : bytes_(bytes) {
#if defined(__SANITIZE_ADDRESS__)
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, size_t(bytes)) != 0) std::abort();
        data_ = static_cast<char*>(memory);
#else
        size_t page = size_t(sysconf(_SC_PAGESIZE)), used = (size_t(bytes) + 63) / 64 * 64;
        mapped_ = (used + page - 1) / page * page + page;
        void* memory =
            mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        pages_ = static_cast<char*>(memory);
        if (mprotect(pages_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
        data_ = pages_ + mapped_ - page - used;
#endif
        std::memset(data_, 0xff, size_t(bytes));
    }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
#if defined(__SANITIZE_ADDRESS__)
    ~Memory() { std::free(data_); }
#else
    ~Memory() { munmap(pages_, mapped_); }
#endif
    char* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

 private:
    int64_t bytes_;
    char* data_;
#if !defined(__SANITIZE_ADDRESS__)
    char* pages_;
    size_t mapped_;
#endif
};

// --- one call

enum class Entry { kAttention, kPacked };

// All that a call needs, with its memory.
struct Setup {
    sage_cpu_problem problem{};
    Entry entry = Entry::kAttention;
    bool extreme = false;  // values of any size: only memory is checked
    bool mask_given = false;
    Tensor query, key, value, output, mask;
    std::vector<float> sinks, lse;
};

[[noreturn]] void fail(const Setup& setup, const std::string& what) {
    const sage_cpu_problem& p = setup.problem;
    auto strides = [](const char* name, const sage_cpu_tensor& t) {
        std::fprintf(stderr, "  %-6s strides %lld %lld %lld %lld\n", name, (long long)t.stride[0],
                     (long long)t.stride[1], (long long)t.stride[2], (long long)t.stride[3]);
    };
    std::fprintf(stderr, "FAILED: %s\n  %s, isa %s, recipe %d, dtype %d\n", what.c_str(),
                 setup.entry == Entry::kPacked ? "packed" : "attention",
                 sage_cpu_isa_name(p.isa) == nullptr ? "?" : sage_cpu_isa_name(p.isa), p.recipe,
                 p.dtype);
    std::fprintf(stderr, "  B %lld H %lld Hkv %lld Lq %lld Lk %lld D %lld Dv %lld capacity %lld\n",
                 (long long)p.batch, (long long)p.heads, (long long)p.kv_heads,
                 (long long)p.query_length, (long long)p.key_length, (long long)p.head_dim,
                 (long long)p.value_head_dim, (long long)p.kv_capacity);
    std::fprintf(stderr, "  window %lld %lld diagonal %lld scale %g softcap %g dead %d\n",
                 (long long)p.window_left, (long long)p.window_right, (long long)p.diagonal,
                 double(p.scale), double(p.softcap), p.dead_rows);
    strides("query", p.query);
    strides("key", p.key);
    strides("value", p.value);
    strides("output", p.output);
    if (setup.mask_given) strides(p.mask_dtype == SAGE_CPU_BOOL ? "bool" : "mask", p.mask);
    std::fprintf(stderr, "  sinks %s, lse %s%s\n", p.sinks == nullptr ? "no" : "yes",
                 p.lse == nullptr ? "no" : "yes", setup.extreme ? ", extreme values" : "");
    std::abort();
}

void expect(const Setup& setup, bool condition, const std::string& what) {
    if (!condition) fail(setup, what);
}

std::string described(int32_t error) {
    return std::to_string(error) + " (" + sage_cpu_describe(error) + ")";
}

// Pack in pieces where the packed entry points are asked for; 0 or the first error.
int32_t call(const Setup& setup, Choices choices, const sage_cpu_host* host, int64_t workers) {
    const sage_cpu_problem& problem = setup.problem;
    int64_t bytes = 0;
    if (setup.entry == Entry::kAttention) {
        if (int32_t error = sage_cpu_workspace_size(&problem, workers, &bytes)) return error;
        Memory workspace(bytes);
        return sage_cpu_attention(&problem, host, workspace.data(), bytes);
    }
    if (int32_t error = sage_cpu_packed_size(&problem, &bytes)) return error;
    Memory packed(bytes);
    int64_t packed_tokens = 0;
    do {  // to append to a partial block, pack it again
        sage_cpu_problem piece = problem;
        int64_t first = packed_tokens / 256 * 256, rest = problem.key_length - packed_tokens;
        packed_tokens += choices.one_in(2) || rest == 0 ? rest : 1 + choices.below(rest);
        piece.key_length = packed_tokens;
        if (piece.kv_capacity == 0) piece.kv_capacity = problem.key_length;
        piece.key = setup.key.argument_from(first);
        piece.value = setup.value.argument_from(first);
        piece.query.data = piece.mask.data = piece.output.data = nullptr;
        if (int32_t error = sage_cpu_pack_kv(&piece, host, first, packed.data(), bytes))
            return error;
    } while (packed_tokens < problem.key_length);
    sage_cpu_problem attend = problem;
    attend.key.data = attend.value.data = nullptr;
    int64_t workspace_bytes = 0;
    if (int32_t error = sage_cpu_attend_workspace_size(&attend, workers, &workspace_bytes))
        return error;
    Memory workspace(workspace_bytes);
    return sage_cpu_attend(&attend, host, packed.data(), bytes, workspace.data(), workspace_bytes);
}

// --- valid calls

int64_t choose_length(Choices& choices) {
    switch (choices.below(8)) {
        case 0:
            return 1;
        case 1:
            return choices.one_in(4) ? 0 : 2;
        case 2:
            return 64 * (1 + choices.below(5)) + choices.below(3) - 1;  // beside a tile's edge
        case 3:
        case 4:
            return 1 + choices.below(40);
    }
    return 1 + choices.below(330);
}

int64_t choose_head_dim(Choices& choices) {
    static constexpr int64_t kUsual[] = {64, 128, 32, 96, 80, 256, 16, 24};
    return choices.one_in(2) ? 16 + 8 * choices.below(31) : choices.of(kUsual);
}

void choose_sizes(Choices& choices, sage_cpu_problem& p) {
    p.kv_heads = 1 + choices.below(3);
    p.heads = p.kv_heads * (1 + choices.below(4));
    p.batch = choices.one_in(40) ? 0 : 1 + choices.one_in(3);
    p.query_length = choose_length(choices);
    p.key_length = choose_length(choices);
    if (choices.one_in(8)) p.key_length += 300;
    p.head_dim = choose_head_dim(choices);
    p.value_head_dim = choices.one_in(3) ? choose_head_dim(choices) : p.head_dim;
    if (choices.one_in(20)) {  // many heads of few keys: of their own, or of one key/value head
        p.batch = 1 + choices.below(12);
        p.kv_heads = choices.one_in(2) ? 1 : 100;
        p.heads = 100;
        p.query_length = 1 + choices.below(3);
        p.key_length = 1 + choices.below(4);
        p.head_dim = p.value_head_dim = 16 + 8 * choices.below(2);
    }
    auto work = [&] {
        return p.batch * p.heads * p.query_length * p.key_length * (p.head_dim + p.value_head_dim);
    };
    constexpr int64_t kMostWork = 4'000'000;  // what the naive computation does in some 20 ms
    if (work() > kMostWork) p.batch = 1;
    while (work() > kMostWork && p.heads > p.kv_heads) p.heads -= p.kv_heads;
    if (work() > kMostWork) p.heads = p.kv_heads = 1;
    while (work() > kMostWork) p.query_length = p.query_length / 2;
}

void choose_band(Choices& choices, sage_cpu_problem& p) {
    p.window_left = p.window_right = -1;
    if (choices.one_in(2)) return;
    static constexpr int64_t kFar[] = {
        INT64_MAX,        INT64_MIN,           INT64_MAX - 1,    INT64_MIN + 1,
        int64_t(1) << 62, -(int64_t(1) << 62), int64_t(1) << 31, -300};
    if (choices.one_in(2)) p.window_right = 0;  // causal
    if (choices.one_in(2)) p.window_left = choices.below(100);
    if (choices.one_in(4)) p.window_right = choices.below(100);
    if (choices.one_in(2)) p.diagonal = p.key_length - p.query_length;
    if (choices.one_in(4)) p.diagonal = choices.below(400) - 200;
    if (choices.one_in(12)) p.window_left = choices.of(kFar);
    if (choices.one_in(12)) p.window_right = choices.of(kFar);
    if (choices.one_in(12)) p.diagonal = choices.of(kFar);
}

// Gaussian, in channels with offsets; or of any exponent.
void fill(Choices& choices, Random& random, Tensor& tensor, int64_t channels, double deviation,
          double offset, bool extreme) {
    std::vector<double> offsets(channels);
    for (double& channel : offsets) channel = offset * deviation * random.gaussian();
    int64_t outlier = choices.one_in(4) ? choices.below(channels) : -1;
    tensor.for_each([&](const int64_t (&at)[4]) {
        double x = deviation * random.gaussian() + offsets[at[3]];
        if (at[3] == outlier) x *= 10;
        if (extreme) x = std::ldexp(random.gaussian(), int(random.uniform() * 300) - 160);
        tensor.set(at, x);
    });
}

void fill_mask(Choices& choices, Random& random, Setup& setup) {
    sage_cpu_problem& p = setup.problem;
    bool is_bool = p.mask_dtype == SAGE_CPU_BOOL;
    double lowest = p.mask_dtype == SAGE_CPU_FLOAT16    ? -65504.0
                    : p.mask_dtype == SAGE_CPU_BFLOAT16 ? -0x1.fep127
                                                        : -std::numeric_limits<float>::max();
    static constexpr double kShown[] = {0.5, 0.0, 0.02, 0.98, 1.0};
    double shown = choices.of(kShown);
    int64_t hiding = choices.below(4);  // by -inf, finfo.min, -1e4, or any of them
    bool plain = choices.one_in(2), dead_rows = choices.one_in(3), infinite = choices.one_in(16);
    // Long stretches too, so that whole tiles are hidden and shown.
    double turning = choices.one_in(2) ? 0.02 : 1;
    bool show = true;
    setup.mask.for_each([&](const int64_t (&at)[4]) {
        if (random.uniform() < turning) show = random.uniform() < shown;
        double low[] = {-INFINITY, lowest, -1e4};
        double bias = show ? (plain ? 0.0 : 2 * random.gaussian())
                           : low[hiding == 3 ? random.bits() % 3 : hiding];
        if (dead_rows && at[2] % 3 == 1) bias = -INFINITY;
        if (infinite && random.uniform() < 0.001) bias = random.uniform() < 0.5 ? INFINITY : NAN;
        setup.mask.set(at, is_bool ? bias != -INFINITY && show : bias);
    });
}

// NaN and infinity into some tokens.
void plant(Random& random, Tensor& tensor, int64_t count, const int64_t (&size)[4]) {
    for (int64_t dim : size)
        if (dim == 0) return;
    for (int64_t i = 0; i < count; ++i) {
        static constexpr double kPlanted[] = {NAN, INFINITY, -INFINITY};
        int64_t at[4];
        for (int dim = 0; dim < 4; ++dim) at[dim] = int64_t(random.bits() % uint64_t(size[dim]));
        tensor.set(at, kPlanted[random.bits() % 3]);
    }
}

// NaN into what no query sees, as garbage in the unused slots of a cache may be.
void plant_unseen(Setup& setup, const Dense& bias) {
    const sage_cpu_problem& p = setup.problem;
    auto in_band = [&](int64_t i, int64_t j) {
        __int128 offset = __int128(j) - i - p.diagonal;
        return (p.window_left < 0 || offset >= -__int128(p.window_left)) &&
               (p.window_right < 0 || offset <= p.window_right);
    };
    std::vector<char> seen(p.key_length);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t h = 0; h < p.heads; ++h)
            for (int64_t i = 0; i < p.query_length; ++i)
                for (int64_t j = 0; j < p.key_length; ++j)
                    if (in_band(i, j) && bias.values[bias.index(b, h, i, j)] != -INFINITY)
                        seen[j] = 1;
    auto plant = [&](Tensor& tensor) {
        if (tensor.repeats_tokens()) return;
        tensor.for_each([&](const int64_t (&at)[4]) {
            if (!seen[at[2]]) tensor.set(at, NAN);
        });
    };
    plant(setup.key);
    plant(setup.value);
}

void set_up(Choices& choices, Setup& setup) {
    sage_cpu_problem& p = setup.problem;
    p.struct_size = sizeof p;
    std::vector<int32_t> isas;
    for (int32_t isa = SAGE_CPU_ISA_PORTABLE; isa <= SAGE_CPU_ISA_AVX512VNNI; ++isa)
        if (sage_cpu_isa_available(isa)) isas.push_back(isa);
    p.isa = choices.one_in(10) ? SAGE_CPU_ISA_AUTO : isas[choices.below(int64_t(isas.size()))];
    p.recipe = int32_t(choices.below(3));
    p.dtype = int32_t(choices.below(3));
    setup.entry = choices.one_in(3) ? Entry::kPacked : Entry::kAttention;
    choose_sizes(choices, p);
    choose_band(choices, p);
    if (choices.one_in(4)) p.kv_capacity = p.key_length + choices.below(300);
    p.dead_rows = int32_t(choices.below(2));
    setup.extreme = choices.one_in(16);

    Random random(choices.seed());
    int64_t q[] = {p.batch, p.heads, p.query_length, p.head_dim};
    int64_t k[] = {p.batch, p.kv_heads, p.key_length, p.head_dim};
    int64_t v[] = {p.batch, p.kv_heads, p.key_length, p.value_head_dim};
    int64_t o[] = {p.batch, p.heads, p.query_length, p.value_head_dim};
    setup.query.lay_out(choices, q, p.dtype, Tensor::Use::kInput);
    setup.key.lay_out(choices, k, p.dtype, Tensor::Use::kInput);
    setup.value.lay_out(choices, v, p.dtype, Tensor::Use::kInput);
    setup.output.lay_out(choices, o, p.dtype, Tensor::Use::kOutput);

    static constexpr double kDeviations[] = {1, 1e-3, 20}, kOffsets[] = {0, 0, 3, 20};
    static constexpr double kSharpness[] = {1, 0.3, 3, 8};
    double q_deviation = choices.of(kDeviations), k_deviation = choices.of(kDeviations);
    fill(choices, random, setup.query, p.head_dim, q_deviation, choices.one_in(3), setup.extreme);
    fill(choices, random, setup.key, p.head_dim, k_deviation, choices.of(kOffsets), setup.extreme);
    fill(choices, random, setup.value, p.value_head_dim, choices.of(kDeviations),
         choices.of(kOffsets), setup.extreme);
    p.scale =
        float(choices.of(kSharpness) / (q_deviation * k_deviation * std::sqrt(double(p.head_dim))));
    if (choices.one_in(20)) p.scale = choices.one_in(2) ? 0 : -p.scale;
    static constexpr float kSoftcaps[] = {30, 1, 5};
    if (choices.one_in(4)) p.softcap = choices.of(kSoftcaps);
    if (choices.one_in(10)) {
        int64_t count = 1 + choices.below(3);
        if (choices.one_in(3)) plant(random, setup.query, count, q);
        if (choices.one_in(3)) plant(random, setup.key, count, k);
        if (choices.one_in(3)) plant(random, setup.value, count, v);
    }

    if (choices.one_in(3)) {
        setup.mask_given = true;
        static constexpr int32_t kMasks[] = {SAGE_CPU_BOOL, SAGE_CPU_FLOAT32, SAGE_CPU_BFLOAT16,
                                             SAGE_CPU_FLOAT16};
        p.mask_dtype = choices.of(kMasks);
        int64_t size[] = {p.batch, p.heads, p.query_length, p.key_length};
        setup.mask.lay_out(choices, size, p.mask_dtype, Tensor::Use::kMask);
        fill_mask(choices, random, setup);
        p.mask = setup.mask.argument();
    }
    p.query = setup.query.argument();
    p.key = setup.key.argument();
    p.value = setup.value.argument();
    p.output = setup.output.argument();
    if (choices.one_in(4)) {
        bool odd = choices.one_in(3);
        static constexpr float kOdd[] = {-INFINITY, 12, -40, INFINITY, NAN};
        for (int64_t h = 0; h < p.heads; ++h)
            setup.sinks.push_back(odd ? kOdd[random.bits() % 5] : float(random.gaussian()));
        p.sinks = setup.sinks.data();
    }
    setup.lse.assign(size_t(p.batch * p.heads * p.query_length), -12345.0f);
    setup.lse.shrink_to_fit();
    if (!choices.one_in(3)) p.lse = setup.lse.data();
}

Dense bias_of(const Setup& setup) {
    const sage_cpu_problem& p = setup.problem;
    Dense bias(p.batch, p.heads, p.query_length, p.key_length);
    if (setup.mask_given) bias = setup.mask.dense();
    if (setup.mask_given && p.mask_dtype == SAGE_CPU_BOOL)
        for (double& x : bias.values) x = x != 0 ? 0 : -INFINITY;
    return bias;
}

void compare(const Setup& setup, const Expected& expected) {
    const sage_cpu_problem& p = setup.problem;
    auto check = [&](const char* name, double actual, const Dense& wanted, const Dense& tolerance,
                     const int64_t (&at)[4]) {
        size_t index = size_t(wanted.index(at[0], at[1], at[2], at[3]));
        double exact = wanted.values[index], allowed = tolerance.values[index];
        bool may_be_nan =
            expected.may_be_nan.values[expected.may_be_nan.index(at[0], at[1], at[2], 0)];
        bool fine = std::fabs(actual - exact) <= allowed || actual == exact;
        if (!std::isfinite(exact) && exact != -INFINITY) fine = !std::isfinite(actual);
        if (fine || (may_be_nan && std::isnan(actual))) return;
        char text[200];
        std::snprintf(text, sizeof text, "%s[%lld, %lld, %lld, %lld] is %.9g, not %.9g within %.3g",
                      name, (long long)at[0], (long long)at[1], (long long)at[2], (long long)at[3],
                      actual, exact, allowed);
        fail(setup, text);
    };
    setup.output.for_each([&](const int64_t (&at)[4]) {
        check("output", setup.output.get(at), expected.output, expected.output_tolerance, at);
    });
    if (p.lse == nullptr) return;
    for (int64_t row = 0; row < int64_t(setup.lse.size()); ++row) {
        int64_t head = row / p.query_length;
        check("lse", double(setup.lse[size_t(row)]), expected.lse, expected.lse_tolerance,
              {head / p.heads, head % p.heads, row % p.query_length, 0});
    }
}

// NaN does not equal itself, its bits do.
std::vector<uint32_t> bits_of(const std::vector<float>& floats) {
    std::vector<uint32_t> bits(floats.size());
    if (!bits.empty()) std::memcpy(bits.data(), floats.data(), floats.size() * sizeof(float));
    return bits;
}

void run_valid(Choices& choices, Setup& setup) {
    const sage_cpu_problem& p = setup.problem;
    Dense bias = bias_of(setup);
    if (setup.entry == Entry::kAttention && choices.one_in(4)) plant_unseen(setup, bias);

    std::vector<char> inputs[] = {setup.query.bytes(), setup.key.bytes(), setup.value.bytes(),
                                  setup.mask.bytes()};
    std::vector<char> before = setup.output.bytes(), gaps = setup.output.bytes_between();
    Choices pieces = choices;
    choices.seed();
    int64_t workers = 1 + choices.below(5);
    sage_cpu_host host = host_of(choices.below(kHosts), workers);
    int32_t error = call(setup, pieces, choices.one_in(6) ? nullptr : &host, workers);
    expect(setup, error == SAGE_CPU_OK, "refused: " + described(error));
    expect(setup, setup.output.bytes_between() == gaps, "the gaps of the output were written");
    if (!setup.extreme) {
        Call naive{p,
                   setup.query.dense(),
                   setup.key.dense(),
                   setup.value.dense(),
                   std::move(bias),
                   {},
                   setup.entry == Entry::kPacked,
                   p.query.stride[3] == 0 || p.key.stride[3] == 0};
        naive.sinks.assign(setup.sinks.begin(), setup.sinks.end());
        compare(setup, Naive(naive).result_);
    }

    std::vector<char> first = setup.output.bytes();
    std::vector<float> first_lse = setup.lse;
    setup.output.restore(before);
    int64_t others = 1 + choices.below(5);
    host = host_of(choices.below(kHosts), others);
    error = call(setup, pieces, &host, others);
    expect(setup, error == SAGE_CPU_OK, "refused the second time: " + described(error));
    expect(setup, setup.output.bytes() == first, "the output depends on the threads");
    expect(setup, bits_of(first_lse) == bits_of(setup.lse), "the LSE depends on the threads");
    expect(setup,
           inputs[0] == setup.query.bytes() && inputs[1] == setup.key.bytes() &&
               inputs[2] == setup.value.bytes() && inputs[3] == setup.mask.bytes(),
           "an input was written");
}

// --- invalid calls

struct Fault {
    int32_t error;
    std::function<void(sage_cpu_problem&, Choices&)> make;
};

const std::vector<Fault>& faults() {
    static const std::vector<Fault> faults = {
        {SAGE_CPU_BAD_STRUCT_SIZE,
         [](auto& p, Choices& c) { p.struct_size += c.one_in(2) ? 8 : -8; }},
        {SAGE_CPU_BAD_ISA,
         [](auto& p, Choices& c) { p.isa = c.one_in(2) ? -1 : 5 + int(c.below(99)); }},
        {SAGE_CPU_BAD_RECIPE, [](auto& p, Choices& c) { p.recipe = c.one_in(2) ? -1 : 3; }},
        {SAGE_CPU_BAD_DTYPE, [](auto& p, Choices& c) { p.dtype = c.one_in(2) ? -1 : 3; }},
        {SAGE_CPU_BAD_SIZES, [](auto& p, Choices& c) { p.batch = c.one_in(2) ? INT64_MIN : -1; }},
        {SAGE_CPU_BAD_SIZES, [](auto& p, Choices&) { p.query_length = -5; }},
        {SAGE_CPU_BAD_SIZES, [](auto& p, Choices&) { p.key_length = -1; }},
        {SAGE_CPU_BAD_HEADS, [](auto& p, Choices&) { p.kv_heads = p.heads + 1; }},
        {SAGE_CPU_BAD_HEADS, [](auto& p, Choices&) { p.kv_heads = 0; }},
        {SAGE_CPU_BAD_HEAD_DIM,
         [](auto& p, Choices& c) { p.head_dim = std::array{0, 8, 20, 264, -16, 17}[c.below(6)]; }},
        {SAGE_CPU_BAD_VALUE_HEAD_DIM,
         [](auto& p, Choices& c) {
             p.value_head_dim = std::array{0, 8, 20, 264, -16, 17}[c.below(6)];
         }},
        {SAGE_CPU_BAD_KV_CAPACITY, [](auto& p, Choices&) { p.kv_capacity = -1; }},
        {SAGE_CPU_BAD_SCALE, [](auto& p, Choices& c) { p.scale = c.one_in(2) ? INFINITY : NAN; }},
        {SAGE_CPU_BAD_SOFTCAP, [](auto& p, Choices& c) { p.softcap = c.one_in(2) ? -1.0f : NAN; }},
        {SAGE_CPU_BAD_DEAD_ROWS, [](auto& p, Choices& c) { p.dead_rows = c.one_in(2) ? -1 : 2; }},
    };
    return faults;
}

// Sizes that no memory has: refused or not, but without overflow on the way.
void ask_for_sizes(Choices& choices, sage_cpu_problem p) {
    static constexpr int64_t kHuge[] = {
        INT64_MAX, int64_t(1) << 62, int64_t(1) << 40, int64_t(1) << 33, 65537, 1, 0};
    for (int64_t* size : {&p.batch, &p.kv_heads, &p.query_length, &p.key_length})
        if (choices.one_in(2)) *size = choices.of(kHuge);
    p.heads = p.kv_heads;
    p.kv_capacity = choices.one_in(2) ? choices.of(kHuge) : 0;
    int64_t bytes = 0, workers = choices.one_in(2) ? choices.of(kHuge) : 1 + choices.below(9);
    sage_cpu_workspace_size(&p, workers, &bytes);
    sage_cpu_attend_workspace_size(&p, workers, &bytes);
    sage_cpu_packed_size(&p, &bytes);
}

void run_invalid(Choices& choices, Setup& setup) {
    const Fault& fault = faults()[choices.below(int64_t(faults().size()))];
    sage_cpu_problem p = setup.problem;
    ask_for_sizes(choices, p);
    int64_t bytes = 0, packed_bytes = 0;
    if (sage_cpu_workspace_size(&p, 2, &bytes) != 0) bytes = 0;
    if (sage_cpu_packed_size(&p, &packed_bytes) != 0) packed_bytes = 0;
    Memory workspace(bytes + 64), packed(packed_bytes + 64);
    std::vector<char> before = setup.output.bytes();
    sage_cpu_host host = host_of(4, 2);
    auto refused = [&](int32_t error, int32_t wanted, const char* by) {
        expect(setup, error == wanted,
               std::string(by) + " returned " + described(error) + ", not " + described(wanted));
    };
    bool empty = p.batch == 0 || p.query_length == 0;
    // Of the workspace: too little, none, not aligned; of the host: nothing to run it with.
    if (bytes > 0 && !empty) {
        refused(sage_cpu_attention(&p, &host, workspace.data(), bytes - 1), SAGE_CPU_BAD_WORKSPACE,
                "attention with a byte too few");
        refused(sage_cpu_attention(&p, &host, nullptr, bytes), SAGE_CPU_BAD_WORKSPACE,
                "attention without a workspace");
        refused(sage_cpu_attention(&p, &host, workspace.data() + 16, bytes), SAGE_CPU_BAD_WORKSPACE,
                "attention with a misaligned workspace");
        sage_cpu_host broken = {nullptr, nullptr, 2};
        refused(sage_cpu_attention(&p, &broken, workspace.data(), bytes), SAGE_CPU_BAD_HOST,
                "attention with a broken host");
        broken = {nullptr, run_threads, choices.below(2) - 1};
        refused(sage_cpu_attention(&p, &broken, workspace.data(), bytes), SAGE_CPU_BAD_HOST,
                "attention with no workers");
    }
    if (packed_bytes > 0 && p.key_length > 0) {
        refused(sage_cpu_pack_kv(&p, &host, 0, packed.data(), packed_bytes - 1),
                SAGE_CPU_BAD_PACKED, "pack_kv with a byte too few");
        refused(sage_cpu_pack_kv(&p, &host, 0, packed.data() + 8, packed_bytes),
                SAGE_CPU_BAD_PACKED, "pack_kv into misaligned memory");
        int64_t first = choices.one_in(2) ? -256 : 1 + choices.below(255);
        refused(sage_cpu_pack_kv(&p, &host, first, packed.data(), packed_bytes), SAGE_CPU_BAD_FIRST,
                "pack_kv inside a block");
    }
    fault.make(p, choices);
    refused(sage_cpu_attention(&p, &host, workspace.data(), bytes + 64), fault.error, "attention");
    expect(setup, setup.output.bytes() == before, "a call was refused, but the output was written");
}

void check_names() {
    for (int32_t error = -2; error < SAGE_CPU_ERROR_COUNT + 2; ++error)
        if (sage_cpu_describe(error) == nullptr) std::abort();
    for (int32_t isa = -2; isa < 9; ++isa) {
        bool known = isa > SAGE_CPU_ISA_AUTO && isa <= SAGE_CPU_ISA_AVX512VNNI;
        if (sage_cpu_isa_available(isa) && !known && isa != SAGE_CPU_ISA_AUTO) std::abort();
        if (known && sage_cpu_isa_name(isa) == nullptr) std::abort();
    }
    if (!sage_cpu_isa_available(SAGE_CPU_ISA_PORTABLE)) std::abort();
    if (sage_cpu_abi_version() != SAGE_CPU_ABI_VERSION) std::abort();
}

}  // namespace
}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const bool checked = (fuzz::check_names(), true);
    (void)checked;
    fuzz::Choices choices(data, size);
    bool valid = !choices.one_in(16);
    fuzz::Setup setup;
    fuzz::set_up(choices, setup);
    if (valid)
        fuzz::run_valid(choices, setup);
    else
        fuzz::run_invalid(choices, setup);
    return 0;
}
