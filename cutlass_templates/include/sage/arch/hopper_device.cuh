// Hopper's part of the arch layer on a GPU; sage/arch/hopper.cuh says what each function promises.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>

namespace sage::arch {

SAGE_DEVICE uint32_t shared_offset(void const* address) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}

SAGE_DEVICE void mbarrier_init(uint64_t* mbarrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_offset(mbarrier)),
                 "r"(arrivals)
                 : "memory");
}
SAGE_DEVICE void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SAGE_DEVICE void mbarrier_arrive(uint64_t* mbarrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_offset(mbarrier))
                 : "memory");
}
SAGE_DEVICE void mbarrier_arrive_warp(uint64_t* mbarrier) {
    __syncwarp();
    if (thread_index() % 32 == 0) mbarrier_arrive(mbarrier);
}
SAGE_DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_offset(mbarrier)),
        "r"(bytes)
        : "memory");
}
SAGE_DEVICE void mbarrier_wait(uint64_t* mbarrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@complete bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(shared_offset(mbarrier)),
        "r"(parity)
        : "memory");
}
SAGE_DEVICE void copy_bulk(void* shared, void const* global, int bytes, uint64_t* mbarrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_offset(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_offset(mbarrier))
        : "memory");
}
SAGE_DEVICE void copy_tensor(void* shared, TensorMap const& map, int4 at, uint64_t* mbarrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_offset(shared)),
        "l"(&map), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.w), "r"(shared_offset(mbarrier))
        : "memory");
}
SAGE_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kThreads>
SAGE_DEVICE void named_barrier_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <int kThreads>
SAGE_DEVICE void named_barrier_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

template <int kRegisters>
SAGE_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
SAGE_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
SAGE_DEVICE float from_int(uint32_t x) { return __int2float_rn(static_cast<int>(x)); }

template <int kN>
struct WgmmaAtoms;
#define SAGE_WGMMA_ATOMS(n)                                                 \
    template <>                                                             \
    struct WgmmaAtoms<n> {                                                  \
        using S8 = cute::SM90::GMMA::MMA_64x##n##x32_S32S8S8_SS_TN;         \
        using E4m3 = cute::SM90::GMMA::MMA_64x##n##x32_F32E4M3E4M3_RS_TN<>; \
    };
SAGE_WGMMA_ATOMS(16)
SAGE_WGMMA_ATOMS(32)
SAGE_WGMMA_ATOMS(64)
SAGE_WGMMA_ATOMS(96)
SAGE_WGMMA_ATOMS(128)
#undef SAGE_WGMMA_ATOMS

template <class Atom, int kCount, int... kIndex>
SAGE_DEVICE void wgmma_s8(uint32_t (&c)[kCount], uint64_t a, uint64_t b, bool accumulate,
                          cute::integer_sequence<int, kIndex...>) {
    Atom::fma(a, b, c[kIndex]...,
              accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <int kN>
SAGE_DEVICE void wgmma_s8(uint32_t (&c)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
    wgmma_s8<typename WgmmaAtoms<kN>::S8>(c, a, b, accumulate,
                                          cute::make_integer_sequence<int, kN / 2>{});
}

template <class Atom, int kCount, int... kIndex>
SAGE_DEVICE void wgmma_e4m3(float (&c)[kCount], uint32_t const (&a)[4], uint64_t b, bool accumulate,
                            cute::integer_sequence<int, kIndex...>) {
    Atom::fma(a[0], a[1], a[2], a[3], b, c[kIndex]...,
              accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}
template <int kN>
SAGE_DEVICE void wgmma_e4m3(float (&c)[kN / 2], uint32_t const (&a)[4], uint64_t b,
                            bool accumulate) {
    wgmma_e4m3<typename WgmmaAtoms<kN>::E4m3>(c, a, b, accumulate,
                                              cute::make_integer_sequence<int, kN / 2>{});
}

SAGE_DEVICE void wgmma_fence() { cute::warpgroup_arrive(); }
SAGE_DEVICE void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int kNewest>
SAGE_DEVICE void wgmma_wait() {
    cute::warpgroup_wait<kNewest>();
}
template <class T, int kCount>
SAGE_DEVICE void wgmma_hold(T (&registers)[kCount]) {
    SAGE_UNROLL
    for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(registers[i]);
}

}  // namespace sage::arch
