// The arch layer on a CPU; sage/arch.cuh documents its functions. What a thread shares with others
// goes to the executor of the driver library (host/README.md), which checks it; arithmetic is here.
#pragma once

#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm89.hpp>
#include <sage/host/convert.hpp>
#include <sage/host/runtime.hpp>
#include <type_traits>

#define SAGE_DEVICE inline
#define SAGE_UNROLL
#define SAGE_ROLLED

extern "C" {
// Weak, so that every file of an image may define it.
__attribute__((weak, visibility("default"))) sage::host::Image sage_host_image = {sage::host::kAbi,
                                                                                  nullptr};
}

namespace sage::arch {

using host::Site;

// As a default argument, these are the place of the call.
#define SAGE_CALL_SITE {__builtin_FILE(), __builtin_LINE()}

inline host::Runtime const& runtime() { return *sage_host_image.runtime; }

inline int thread_index() { return runtime().thread_index(); }
inline int64_t block_index() { return runtime().block_index(); }
inline int64_t grid_size() { return runtime().grid_size(); }
inline char* shared_memory() { return runtime().shared_memory(); }
inline void barrier(Site site = SAGE_CALL_SITE) { runtime().barrier(site); }

template <class T>
inline T load(host::Access access, T const* from, Site site) {
    static_assert(std::is_trivially_copyable_v<T>, "memory holds plain values");
    static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1, 2, 4, 8 or 16 bytes");
    runtime().access(access, from, sizeof(T), site);
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}

template <class T>
inline void store(host::Access access, T* to, T const& value, Site site) {
    static_assert(std::is_trivially_copyable_v<T>, "memory holds plain values");
    static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "1, 2, 4, 8 or 16 bytes");
    runtime().access(access, to, sizeof(T), site);
    std::memcpy(to, &value, sizeof(T));
}

template <class T>
inline T load_global(T const* from, Site site = SAGE_CALL_SITE) {
    return load(host::Access::kLoadGlobal, from, site);
}

template <class T>
inline T load_written(T const* from, Site site = SAGE_CALL_SITE) {
    return load(host::Access::kLoadWritten, from, site);
}

template <class T>
inline T load_shared(T const* from, Site site = SAGE_CALL_SITE) {
    return load(host::Access::kLoadShared, from, site);
}

template <class T>
inline void store_global(T* to, T value, Site site = SAGE_CALL_SITE) {
    store(host::Access::kStoreGlobal, to, value, site);
}

template <class T>
inline void store_streaming(T* to, T value, Site site = SAGE_CALL_SITE) {
    store(host::Access::kStoreStreaming, to, value, site);
}

template <class T>
inline void store_shared(T* to, T value, Site site = SAGE_CALL_SITE) {
    store(host::Access::kStoreShared, to, value, site);
}

inline uint32_t take_ticket(uint32_t* counter, Site site = SAGE_CALL_SITE) {
    return runtime().take_ticket(counter, site);
}
inline uint32_t arrive(uint32_t* counter, Site site = SAGE_CALL_SITE) {
    return runtime().arrive(counter, site);
}
inline void await(uint32_t const* counter, uint32_t arrivals, Site site = SAGE_CALL_SITE) {
    runtime().await(counter, arrivals, site);
}

inline void await_prerequisites(Site site = SAGE_CALL_SITE) { runtime().await_prerequisites(site); }
// Launches run one after another anyway; that a dependent one may begin early, its checks assume.
inline void launch_dependents() {}

inline void copy_async(void* shared, void const* global, Site site = SAGE_CALL_SITE) {
    runtime().copy_async(shared, global, site);
}
inline void copy_async_commit() { runtime().copy_async_commit(); }
template <int N>
inline void copy_async_wait() {
    static_assert(N >= 0, "a number of groups");
    runtime().copy_async_wait(N);
}

inline int warp_uniform(int value) { return value; }
template <class T>
inline T shuffle_xor(T value, int lane_mask, Site site = SAGE_CALL_SITE) {
    static_assert(
        std::is_same_v<T, float> || std::is_same_v<T, int32_t> || std::is_same_v<T, uint32_t>,
        "float, int32_t or uint32_t");
    host::ShuffleXor argument{0, lane_mask};
    std::memcpy(&argument.value, &value, sizeof value);
    runtime().collective(host::Collective::kShuffleXor, &argument, site);
    std::memcpy(&value, &argument.value, sizeof value);
    return value;
}

inline void load_matrix_x4(uint32_t (&r)[4], void const* row, Site site = SAGE_CALL_SITE) {
    host::LoadMatrix argument{r, row};
    runtime().collective(host::Collective::kLoadMatrix, &argument, site);
}

template <host::Collective Operation, class A, int Count, class CuteAtom>
struct MmaAtom {
    static constexpr host::Collective kOperation = Operation;
    static constexpr int kAccumulators = Count;
    using Accumulator = A;
    using Cute = CuteAtom;
};

using MmaS4 = MmaAtom<host::Collective::kMmaS4, uint32_t, 4, cute::SM80_16x8x64_S32S4S4S32_TN>;
using MmaS8 = MmaAtom<host::Collective::kMmaS8, uint32_t, 4, cute::SM80_16x8x32_S32S8S8S32_TN>;
using MmaE4m3 = MmaAtom<host::Collective::kMmaE4m3, float, 4, cute::SM89_16x8x32_F32E4M3E4M3F32_TN>;
using MmaE4m3Half =
    MmaAtom<host::Collective::kMmaE4m3Half, uint32_t, 2, cute::SM89_16x8x32_F16E4M3E4M3F16_TN>;
using MmaF16 = MmaAtom<host::Collective::kMmaF16, float, 4, cute::SM80_16x8x16_F32F16F16F32_TN>;
using MmaTf32 = MmaAtom<host::Collective::kMmaTf32, float, 4, cute::SM80_16x8x8_F32TF32TF32F32_TN>;

template <class Atom>
inline void mma(typename Atom::Accumulator (&c)[Atom::kAccumulators], uint32_t const (&a)[4],
                uint32_t const (&b)[2], Site site = SAGE_CALL_SITE) {
    host::Mma argument{c, a, b};
    runtime().collective(Atom::kOperation, &argument, site);
}

#undef SAGE_CALL_SITE

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float multiply(float a, float b) { return a * b; }

// The device's steps, with the best reciprocal that its instruction could give; subnormals are
// flushed there.
inline float divide(float a, float b) {
    float reciprocal = std::abs(b) < 0x1p-126f ? std::copysign(HUGE_VALF, b) : 1.0f / b;
    if (std::abs(reciprocal) < 0x1p-126f) reciprocal = std::copysign(0.0f, reciprocal);
    reciprocal = fma(fma(-b, reciprocal, 1.0f), reciprocal, reciprocal);
    float const quotient = a * reciprocal;
    return fma(fma(-b, quotient, a), reciprocal, quotient);
}
inline float maximum(float a, float b) { return std::fmax(a, b); }

// Beyond int32_t, the nearest int32_t.
inline int32_t round_to_int(float x) {
    if (std::isnan(x)) return 0;
    if (x >= 0x1p31f) return INT32_MAX;
    if (x <= -0x1p31f) return INT32_MIN;
    return static_cast<int32_t>(std::lrint(x));  // the rounding mode is the default, to even
}

using host::bits;
using host::from_bits;

inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    return host::float_to_e4m3(x0) | host::float_to_e4m3(x1) << 8 | host::float_to_e4m3(x2) << 16 |
           host::float_to_e4m3(x3) << 24;
}

inline uint32_t pack_half(float x0, float x1) {
    return host::float_to_half(x0) | host::float_to_half(x1) << 16;
}

inline uint32_t pack_bfloat16(float x0, float x1) {
    return host::float_to_bfloat16(x0) | host::float_to_bfloat16(x1) << 16;
}

inline float2 unpack_half(uint32_t pair) {
    return {host::half_to_float(pair & 0xffff), host::half_to_float(pair >> 16)};
}

inline float2 unpack_bfloat16(uint32_t pair) {
    return {host::bfloat16_to_float(pair & 0xffff), host::bfloat16_to_float(pair >> 16)};
}

inline uint32_t to_tf32(float x) { return host::float_to_tf32(x); }

}  // namespace sage::arch

namespace sage::host {

template <class Kernel>
constexpr Entry entry() {
    static_assert(Kernel::kThreads % 32 == 0 && Kernel::kThreads > 0 && Kernel::kThreads <= 1024,
                  "a block is 1 to 32 whole warps");
    static_assert(Kernel::kMinBlocks > 0, "blocks per multiprocessor");
    static_assert(std::is_trivially_copyable_v<typename Kernel::Params>, "passed by value");
    return {kEntryMark,
            [](void const* params) {
                Kernel::run(*static_cast<typename Kernel::Params const*>(params));
            },
            Kernel::kThreads, Kernel::kSharedBytes, sizeof(typename Kernel::Params)};
}

}  // namespace sage::host

#define SAGE_ENTRY(name, ...)                                                   \
    extern "C" {                                                                \
    extern __attribute__((visibility("default"))) sage::host::Entry const name; \
    sage::host::Entry const name = sage::host::entry<__VA_ARGS__>();            \
    }
