#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "schedule.hpp"

namespace sage_cpu {
namespace {

// --- instruction sets

struct IsaEntry {
    const char* name;
    const Kernels* kernels;  // null: this build lacks it
    bool (*supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
struct CpuId {
    uint32_t a, b, c, d;
};
CpuId cpuid(uint32_t leaf, uint32_t subleaf) {
    CpuId id{leaf, 0, subleaf, 0};
    asm volatile("cpuid" : "+a"(id.a), "=b"(id.b), "+c"(id.c), "=d"(id.d));
    return id;
}
bool has_avx2() {  // not every compiler has a name for F16C: leaf 1, ECX bit 29
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           (cpuid(1, 0).c >> 29 & 1) != 0;
}
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && has_avx2();
}
// Leaf 7, subleaf 1, EAX bit 4; GCC 12 has no name for it. The operating system saves what it needs
// where it does for AVX2.
bool has_avxvnni() {
    return has_avx2() && cpuid(0, 0).a >= 7 && cpuid(7, 0).a >= 1 && (cpuid(7, 1).a >> 4 & 1) != 0;
}
#else
bool has_avx2() { return false; }
bool has_avx512vnni() { return false; }
bool has_avxvnni() { return false; }
#endif

#if defined(__x86_64__) && !defined(SAGE_CPU_WITHOUT_AVX2)
#define SAGE_AVX2 &kAvx2
#else
#define SAGE_AVX2 nullptr
#endif
#if defined(__x86_64__) && !defined(SAGE_CPU_WITHOUT_AVXVNNI)
#define SAGE_AVXVNNI &kAvxVnni
#else
#define SAGE_AVXVNNI nullptr
#endif
#if defined(__x86_64__) && !defined(SAGE_CPU_WITHOUT_AVX512VNNI)
#define SAGE_AVX512VNNI &kAvx512Vnni
#else
#define SAGE_AVX512VNNI nullptr
#endif

const IsaEntry kIsas[] = {
    {"auto", nullptr, always},
    {"portable", &kPortable, always},
    {"avx2", SAGE_AVX2, has_avx2},
    {"avxvnni", SAGE_AVXVNNI, has_avxvnni},
    {"avx512vnni", SAGE_AVX512VNNI, has_avx512vnni},
};
constexpr int32_t kIsaCount = sizeof kIsas / sizeof kIsas[0];

// A bit for each that this machine and this build have. Asked once: in a virtual machine CPUID
// takes microseconds. Threads that race find the same.
uint32_t available_isas() {
    static uint32_t found = 0;
    uint32_t bits = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (bits != 0) return bits;
    for (int32_t isa = SAGE_CPU_ISA_PORTABLE; isa < kIsaCount; isa++)
        if (kIsas[isa].kernels != nullptr && kIsas[isa].supported()) bits |= 1u << isa;
    __atomic_store_n(&found, bits, __ATOMIC_RELAXED);
    return bits;
}

bool available(int32_t isa) {
    return isa > SAGE_CPU_ISA_AUTO && isa < kIsaCount && (available_isas() >> isa & 1) != 0;
}

int32_t choose_isa() {
    const char* name = getenv("SAGE_CPU_ISA");
    if (name == nullptr || name[0] == '\0') {
        int32_t best = kIsaCount - 1;
        while (!available(best)) best--;
        return best;
    }
    for (int32_t isa = SAGE_CPU_ISA_PORTABLE; isa < kIsaCount; isa++)
        if (strcmp(name, kIsas[isa].name) == 0) return available(isa) ? isa : -1;
    return -1;
}

// The environment is read once: a choice that changed between calls could not be reasoned about.
int32_t automatic_isa() {
    static int32_t chosen = 0;  // 0: not yet; racing threads choose the same
    int32_t isa = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
    if (isa == 0) {
        isa = choose_isa();
        __atomic_store_n(&chosen, isa, __ATOMIC_RELAXED);
    }
    return isa;
}

const Kernels* kernels_for(int32_t isa) {
    if (isa == SAGE_CPU_ISA_AUTO) isa = automatic_isa();
    return available(isa) ? kIsas[isa].kernels : nullptr;
}

// --- checks

constexpr int64_t kMaxLength = int64_t(1) << 40;  // of a dim
constexpr float kSmallestSoftcap = 0x1p-126f;     // its inverse is finite
constexpr int64_t kMaxWorkers = int64_t(1) << 16;
constexpr int64_t kLargestRowBytes = 4096;  // more than what a query row takes anywhere
constexpr int64_t kLargestKeyBytes = 8192;  // and what a packed key takes, as floats

bool is_length(int64_t x) { return x >= 0 && x <= kMaxLength; }
bool is_head_dim(int64_t x) { return x >= 16 && x <= kMaxHeadDim && x % 8 == 0; }
bool is_finite(float x) { return x - x == 0.0f; }

int32_t check_sizes(const sage_cpu_problem* p) {
    if (p == nullptr || p->struct_size != int32_t(sizeof(sage_cpu_problem)))
        return SAGE_CPU_BAD_STRUCT_SIZE;
    if (kernels_for(p->isa) == nullptr) return SAGE_CPU_BAD_ISA;
    if (p->recipe < SAGE_CPU_INT8_INT8 || p->recipe > SAGE_CPU_FLOAT) return SAGE_CPU_BAD_RECIPE;
    if (p->dtype < SAGE_CPU_FLOAT32 || p->dtype > SAGE_CPU_FLOAT16) return SAGE_CPU_BAD_DTYPE;
    if (!is_length(p->batch) || !is_length(p->heads) || !is_length(p->kv_heads) ||
        !is_length(p->query_length) || !is_length(p->key_length))
        return SAGE_CPU_BAD_SIZES;
    if (p->heads != 0 && (p->kv_heads == 0 || p->heads % p->kv_heads != 0))
        return SAGE_CPU_BAD_HEADS;
    if (!is_head_dim(p->head_dim)) return SAGE_CPU_BAD_HEAD_DIM;
    if (!is_head_dim(p->value_head_dim)) return SAGE_CPU_BAD_VALUE_HEAD_DIM;
    if (p->kv_capacity != 0 && (p->kv_capacity < p->key_length || !is_length(p->kv_capacity)))
        return SAGE_CPU_BAD_KV_CAPACITY;
    // Rows of a group, tiles of a mask and packed bytes are counted in 64 bits.
    int64_t planes, kv_planes, rows, keys;
    int64_t capacity = p->kv_capacity == 0 ? p->key_length : p->kv_capacity;
    bool fits = !__builtin_mul_overflow(p->batch, p->heads, &planes) &&
                !__builtin_mul_overflow(p->batch, p->kv_heads, &kv_planes) &&
                !__builtin_mul_overflow(planes, p->query_length, &rows) &&
                !__builtin_mul_overflow(kv_planes, capacity + kBlockKeys, &keys) &&
                rows <= INT64_MAX / kLargestRowBytes && keys <= INT64_MAX / kLargestKeyBytes;
    if (p->mask.data != nullptr && fits)
        fits = rows / kMaskRows + planes <= INT64_MAX / 2 / (p->key_length / kTileKeys + 1);
    return fits ? SAGE_CPU_OK : SAGE_CPU_BAD_SIZES;
}

int32_t check_semantics(const sage_cpu_problem& p) {
    if (!is_finite(p.scale)) return SAGE_CPU_BAD_SCALE;
    if (!is_finite(p.softcap) || (p.softcap != 0.0f && p.softcap < kSmallestSoftcap))
        return SAGE_CPU_BAD_SOFTCAP;
    if (p.dead_rows != SAGE_CPU_DEAD_ZERO && p.dead_rows != SAGE_CPU_DEAD_NAN)
        return SAGE_CPU_BAD_DEAD_ROWS;
    if (p.mask.data != nullptr && (p.mask_dtype < SAGE_CPU_FLOAT32 || p.mask_dtype > SAGE_CPU_BOOL))
        return SAGE_CPU_BAD_MASK_DTYPE;
    return SAGE_CPU_OK;
}

bool nothing_to_do(const sage_cpu_problem& p) {
    return p.batch == 0 || p.heads == 0 || p.query_length == 0;
}

int32_t check_pointers(const sage_cpu_problem& p, bool attends, bool packs) {
    bool keys = p.batch != 0 && p.kv_heads != 0 && p.key_length != 0;
    if (packs && keys && p.key.data == nullptr) return SAGE_CPU_BAD_KEY;
    if (packs && keys && p.value.data == nullptr) return SAGE_CPU_BAD_VALUE;
    if (attends && !nothing_to_do(p) && p.query.data == nullptr) return SAGE_CPU_BAD_QUERY;
    if (attends && !nothing_to_do(p) && p.output.data == nullptr) return SAGE_CPU_BAD_OUTPUT;
    return SAGE_CPU_OK;
}

int32_t check_host(const sage_cpu_host* host) {
    if (host != nullptr &&
        (host->workers < 1 || (host->workers > 1 && host->parallel_for == nullptr)))
        return SAGE_CPU_BAD_HOST;
    return SAGE_CPU_OK;
}

bool fits(const void* memory, int64_t bytes, int64_t needed) {
    return needed == 0 ||
           (memory != nullptr && uintptr_t(memory) % kAlignment == 0 && bytes >= needed);
}

// --- calls

int64_t packed_bytes(const sage_cpu_problem& p) {
    return PackedLayout::of(p).head_bytes * p.batch * p.kv_heads;
}

// Lays out the workspace of a call; with null memory it only measures. Returns the bytes.
int64_t prepare(Call& call, const sage_cpu_problem& p, void* memory, int64_t workers, bool packs,
                bool attends) {
    call = Call{};
    call.problem = &p;
    call.kernels = kernels_for(p.isa);
    call.layout = PackedLayout::of(p);
    call.packs = packs;
    call.attends = attends;
    call.has_map = attends && p.mask.data != nullptr && p.key_length != 0;
    Carver carver{static_cast<char*>(memory)};
    if (call.has_map) {
        call.map = MaskMap::of(p);
        call.map.carve(carver);
    }
    if (packs && attends) {
        // Many heads of few keys, rounded up to tiles, would take more than docs/cpu-kernel.md
        // says.
        int64_t all = packed_bytes(p), of_workers = workers * call.layout.bytes_of(kWorkerKeys);
        int64_t elements = p.batch * p.kv_heads * p.key_length * (p.head_dim + p.value_head_dim);
        int64_t most = elements * call.layout.element_bytes / 10 * 13 + of_workers;
        call.head_by_head = p.key_length <= kWorkerKeys && carver.used + all > most;
        call.packed = carver.take<char>(call.head_by_head ? call.layout.head_bytes * workers : all);
    }
    call.scratch_bytes = round_up(call.kernels->scratch_bytes(p), kAlignment);
    call.scratch = carver.take<char>(call.scratch_bytes * workers);
    return carver.used;
}

void clear_map(const Call& call) {
    if (!call.has_map) return;
    if (call.map.is_mixed) memset(call.map.state, kMaskMixed, size_t(call.map.state_bytes()));
    size_t bytes = size_t(call.map.bit_words()) * sizeof(uint64_t);
    memset(call.map.reachable, 0, bytes);
    memset(call.map.counted, 0, bytes);
}

int64_t workers_of(const sage_cpu_host* host) { return host == nullptr ? 1 : host->workers; }

}  // namespace
}  // namespace sage_cpu

using namespace sage_cpu;

// Returns the error of an expression from the calling function.
#define SAGE_CHECK(expression) \
    if (int32_t error = (expression)) return error

extern "C" {

int32_t sage_cpu_abi_version(void) { return SAGE_CPU_ABI_VERSION; }

const char* sage_cpu_describe(int32_t error) {
    static const char* const kWords[SAGE_CPU_ERROR_COUNT] = {
        "no error",
        "struct_size: it must be sizeof(sage_cpu_problem) of this library",
        "isa: an instruction set that this machine and this build have is needed",
        "recipe: it must be int8_int8, int8_int16 or float",
        "dtype: it must be float32, bfloat16 or float16",
        "sizes: batch, heads, kv_heads, query_length and key_length must be 0 or more, and what "
        "they "
        "describe must fit in memory",
        "heads: it must be a multiple of kv_heads",
        "head_dim: it must be a multiple of 8 from 16 to 256",
        "value_head_dim: it must be a multiple of 8 from 16 to 256",
        "kv_capacity: it must be 0, or at least key_length",
        "scale: it must be finite",
        "softcap: it must be finite and at least 2^-126, or 0 for none",
        "dead_rows: it must be zero or nan",
        "mask_dtype: it must be bool, float32, bfloat16 or float16",
        "query: its data is missing",
        "key: its data is missing",
        "value: its data is missing",
        "output: its data is missing",
        "first: it must be a multiple of 256, from 0 to key_length",
        "host: workers must be from 1 to 65536, and more than one need parallel_for",
        "packed: too small, missing, or not aligned to 64 bytes",
        "workspace: too small, missing, or not aligned to 64 bytes",
    };
    if (error < 0 || error >= SAGE_CPU_ERROR_COUNT) return "unknown error code";
    return kWords[error];
}

int32_t sage_cpu_isa(void) { return automatic_isa(); }
int32_t sage_cpu_isa_available(int32_t isa) { return available(isa) ? 1 : 0; }
const char* sage_cpu_isa_name(int32_t isa) {
    return isa >= 0 && isa < kIsaCount ? kIsas[isa].name : nullptr;
}

void sage_cpu_parallel_for_ranges(void* range_pool, int64_t count,
                                  void (*body)(void* argument, int64_t index), void* argument) {
    struct Ranges {
        void (*body)(void* argument, int64_t index);
        void* argument;
    } ranges{body, argument};
    auto run_range = [](int64_t begin, int64_t end, void* context) {
        const Ranges& r = *static_cast<Ranges*>(context);
        for (int64_t i = begin; i < end; i++) r.body(r.argument, i);
    };
    sage_cpu_range_pool pool;
    memcpy(&pool, &range_pool, sizeof pool);
    // A worker that started has done, or will do, its share; the first takes what nobody takes.
    if (pool(0, count, 1, run_range, &ranges) != 0) body(argument, 0);
}

int32_t sage_cpu_workspace_size(const sage_cpu_problem* problem, int64_t workers, int64_t* bytes) {
    SAGE_CHECK(check_sizes(problem));
    SAGE_CHECK(check_semantics(*problem));
    if (workers < 1 || workers > kMaxWorkers) return SAGE_CPU_BAD_HOST;
    Call call;
    *bytes = nothing_to_do(*problem) ? 0 : prepare(call, *problem, nullptr, workers, true, true);
    return SAGE_CPU_OK;
}

int32_t sage_cpu_attention(const sage_cpu_problem* problem, const sage_cpu_host* host,
                           void* workspace, int64_t bytes) {
    int64_t needed;
    SAGE_CHECK(check_host(host));
    SAGE_CHECK(sage_cpu_workspace_size(problem, workers_of(host), &needed));
    SAGE_CHECK(check_pointers(*problem, true, true));
    if (!fits(workspace, bytes, needed)) return SAGE_CPU_BAD_WORKSPACE;
    if (nothing_to_do(*problem)) return SAGE_CPU_OK;
    Call call;
    prepare(call, *problem, workspace, workers_of(host), true, true);
    clear_map(call);
    run(call, host);
    return SAGE_CPU_OK;
}

int32_t sage_cpu_packed_size(const sage_cpu_problem* problem, int64_t* bytes) {
    SAGE_CHECK(check_sizes(problem));
    *bytes = packed_bytes(*problem);
    return SAGE_CPU_OK;
}

int32_t sage_cpu_pack_kv(const sage_cpu_problem* problem, const sage_cpu_host* host, int64_t first,
                         void* packed, int64_t bytes) {
    SAGE_CHECK(check_host(host));
    SAGE_CHECK(check_sizes(problem));
    SAGE_CHECK(check_pointers(*problem, false, true));
    if (first < 0 || first > problem->key_length || first % kBlockKeys != 0)
        return SAGE_CPU_BAD_FIRST;
    if (!fits(packed, bytes, packed_bytes(*problem))) return SAGE_CPU_BAD_PACKED;
    Call call{};
    call.problem = problem;
    call.kernels = kernels_for(problem->isa);
    call.layout = PackedLayout::of(*problem);
    call.packed = static_cast<char*>(packed);
    call.first = first;
    call.everything = true;  // what later queries will see is not known
    call.packs = true;
    run(call, host);
    return SAGE_CPU_OK;
}

int32_t sage_cpu_attend_workspace_size(const sage_cpu_problem* problem, int64_t workers,
                                       int64_t* bytes) {
    SAGE_CHECK(check_sizes(problem));
    SAGE_CHECK(check_semantics(*problem));
    if (workers < 1 || workers > kMaxWorkers) return SAGE_CPU_BAD_HOST;
    Call call;
    *bytes = nothing_to_do(*problem) ? 0 : prepare(call, *problem, nullptr, workers, false, true);
    return SAGE_CPU_OK;
}

int32_t sage_cpu_attend(const sage_cpu_problem* problem, const sage_cpu_host* host,
                        const void* packed, int64_t packed_size, void* workspace, int64_t bytes) {
    int64_t needed;
    SAGE_CHECK(check_host(host));
    SAGE_CHECK(sage_cpu_attend_workspace_size(problem, workers_of(host), &needed));
    SAGE_CHECK(check_pointers(*problem, true, false));
    if (!fits(packed, packed_size, packed_bytes(*problem))) return SAGE_CPU_BAD_PACKED;
    if (!fits(workspace, bytes, needed)) return SAGE_CPU_BAD_WORKSPACE;
    if (nothing_to_do(*problem)) return SAGE_CPU_OK;
    Call call;
    prepare(call, *problem, workspace, workers_of(host), false, true);
    call.packed = const_cast<char*>(static_cast<const char*>(packed));
    clear_map(call);
    run(call, host);
    return SAGE_CPU_OK;
}

}  // extern "C"
