// The arch layer on a GPU; sage/arch.cuh says what each function promises.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm89.hpp>

#define SAGE_DEVICE __device__ __forceinline__
#define SAGE_UNROLL _Pragma("unroll")
#define SAGE_ROLLED _Pragma("unroll 1")
#define SAGE_ENTRY(name, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, __VA_ARGS__::kMinBlocks) \
        name(const __grid_constant__ __VA_ARGS__::Params params) {                               \
        __VA_ARGS__::run(params);                                                                \
    }

namespace sage::arch {

SAGE_DEVICE int thread_index() {
    int index;
    asm("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}
SAGE_DEVICE int64_t block_index() { return blockIdx.x; }
SAGE_DEVICE int64_t grid_size() { return gridDim.x; }

SAGE_DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

SAGE_DEVICE void barrier() { __syncthreads(); }

template <class T>
SAGE_DEVICE T load_global(T const* address) {
    return __ldg(address);
}
// Not by __ldg, whose cache is not kept coherent.
template <class T>
SAGE_DEVICE T load_written(T const* address) {
    return *address;
}
template <class T>
SAGE_DEVICE void store_global(T* address, T value) {
    *address = value;
}
template <class T>
SAGE_DEVICE void store_streaming(T* address, T value) {
    __stcs(address, value);
}
template <class T>
SAGE_DEVICE T load_shared(T const* address) {
    return *address;
}
template <class T>
SAGE_DEVICE void store_shared(T* address, T value) {
    *address = value;
}

SAGE_DEVICE uint32_t take_ticket(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return before;
}
SAGE_DEVICE uint32_t arrive(uint32_t* counter) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
    return before;
}
SAGE_DEVICE void await(uint32_t const* counter, uint32_t arrivals) {
    for (;;) {
        uint32_t arrived;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(__cvta_generic_to_global(counter))
                     : "memory");
        if (arrived >= arrivals) return;
        __nanosleep(64);
    }
}

// A kernel for older GPUs is never launched dependent on another one.
SAGE_DEVICE void await_prerequisites() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
SAGE_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

SAGE_DEVICE void copy_async(void* shared, void const* global) {
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(
        *static_cast<cute::uint128_t const*>(global), *static_cast<cute::uint128_t*>(shared));
}
SAGE_DEVICE void copy_async_commit() { cute::cp_async_fence(); }
template <int kNewest>
SAGE_DEVICE void copy_async_wait() {
    cute::cp_async_wait<kNewest>();
}

SAGE_DEVICE int warp_uniform(int value) {
    return static_cast<int>(__reduce_or_sync(__activemask(), static_cast<unsigned>(value)));
}

template <class T>
SAGE_DEVICE T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

SAGE_DEVICE void load_matrix_x4(uint32_t (&r)[4], void const* row) {
    cute::SM75_U32x4_LDSM_N::copy(*static_cast<cute::uint128_t const*>(row), r[0], r[1], r[2],
                                  r[3]);
}

struct MmaS4 {
    using Cute = cute::SM80_16x8x64_S32S4S4S32_TN;
    using Accumulator = uint32_t;
    static constexpr int kAccumulators = 4;
};
struct MmaS8 {
    using Cute = cute::SM80_16x8x32_S32S8S8S32_TN;
    using Accumulator = uint32_t;
    static constexpr int kAccumulators = 4;
};
struct MmaE4m3 {
    using Cute = cute::SM89_16x8x32_F32E4M3E4M3F32_TN;
    using Accumulator = float;
    static constexpr int kAccumulators = 4;
};
struct MmaE4m3Half {
    using Cute = cute::SM89_16x8x32_F16E4M3E4M3F16_TN;
    using Accumulator = uint32_t;
    static constexpr int kAccumulators = 2;
};
struct MmaF16 {
    using Cute = cute::SM80_16x8x16_F32F16F16F32_TN;
    using Accumulator = float;
    static constexpr int kAccumulators = 4;
};
struct MmaTf32 {
    using Cute = cute::SM80_16x8x8_F32TF32TF32F32_TN;
    using Accumulator = float;
    static constexpr int kAccumulators = 4;
};

template <class Atom>
SAGE_DEVICE void mma(typename Atom::Accumulator (&c)[Atom::kAccumulators], uint32_t const (&a)[4],
                     uint32_t const (&b)[2]) {
    if constexpr (Atom::kAccumulators == 4) {
        Atom::Cute::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1],
                        c[2], c[3]);
    } else {
        Atom::Cute::fma(c[0], c[1], a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1]);
    }
}

SAGE_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
SAGE_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }
SAGE_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

SAGE_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
SAGE_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

SAGE_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

SAGE_DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Markstein: a reciprocal good to the last bit, and a quotient corrected by its own remainder. A
// plain `/` is a call of a slow path.
SAGE_DEVICE float divide(float a, float b) {
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
    reciprocal = fma(fma(-b, reciprocal, 1.0f), reciprocal, reciprocal);
    float const quotient = __fmul_rn(a, reciprocal);
    return fma(fma(-b, quotient, a), reciprocal, quotient);
}

SAGE_DEVICE int32_t round_to_int(float x) { return __float2int_rn(x); }

// From sm_89 on.
SAGE_DEVICE uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    uint32_t packed;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}

SAGE_DEVICE uint32_t pack_half(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

SAGE_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

SAGE_DEVICE float2 unpack_half(uint32_t packed) {
    float2 x;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}\n"
        : "=f"(x.x), "=f"(x.y)
        : "r"(packed));
    return x;
}

SAGE_DEVICE float2 unpack_bfloat16(uint32_t packed) {
    return {from_bits(packed << 16), from_bits(packed & 0xffff0000u)};
}

SAGE_DEVICE uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

}  // namespace sage::arch
