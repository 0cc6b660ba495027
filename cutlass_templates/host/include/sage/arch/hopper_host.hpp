// Hopper's part of the arch layer on a CPU; sage/arch/hopper.cuh documents its functions.
#pragma once

#include <sage/arch/host.hpp>

namespace sage::arch {

// As a default argument, these are the place of the call.
#define SAGE_CALL_SITE {__builtin_FILE(), __builtin_LINE()}

inline uint32_t shared_offset(void const* address) {
    return static_cast<uint32_t>(static_cast<char const*>(address) - shared_memory());
}

inline void mbarrier_init(uint64_t* mbarrier, int arrivals, Site site = SAGE_CALL_SITE) {
    runtime().mbarrier_init(mbarrier, arrivals, site);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* mbarrier, Site site = SAGE_CALL_SITE) {
    runtime().mbarrier_arrive(mbarrier, 0, site);
}
inline void mbarrier_arrive_warp(uint64_t* mbarrier, Site site = SAGE_CALL_SITE) {
    shuffle_xor(0u, 0, site);  // whatever orders the lanes
    if (thread_index() % 32 == 0) runtime().mbarrier_arrive(mbarrier, 0, site);
}
inline void mbarrier_arrive_expect(uint64_t* mbarrier, int bytes, Site site = SAGE_CALL_SITE) {
    runtime().mbarrier_arrive(mbarrier, bytes, site);
}
inline void mbarrier_wait(uint64_t* mbarrier, int parity, Site site = SAGE_CALL_SITE) {
    runtime().mbarrier_wait(mbarrier, parity, site);
}
inline void copy_bulk(void* shared, void const* global, int bytes, uint64_t* mbarrier,
                      Site site = SAGE_CALL_SITE) {
    runtime().copy_bulk(shared, global, bytes, mbarrier, site);
}
inline void copy_tensor(void* shared, TensorMap const& map, int4 at, uint64_t* mbarrier,
                        Site site = SAGE_CALL_SITE) {
    int const coordinates[] = {at.x, at.y, at.z, at.w};
    runtime().copy_tensor(shared, &map, coordinates, 4, mbarrier, site);
}
inline void fence_async(Site site = SAGE_CALL_SITE) { runtime().fence_async(site); }

template <int kThreads>
inline void named_barrier_sync(int id, Site site = SAGE_CALL_SITE) {
    runtime().named_barrier(id, kThreads, true, site);
}
template <int kThreads>
inline void named_barrier_arrive(int id, Site site = SAGE_CALL_SITE) {
    runtime().named_barrier(id, kThreads, false, site);
}

template <int kRegisters>
inline void registers_decrease(Site site = SAGE_CALL_SITE) {
    runtime().set_registers(kRegisters, site);
}
template <int kRegisters>
inline void registers_increase(Site site = SAGE_CALL_SITE) {
    runtime().set_registers(kRegisters, site);
}
inline float from_int(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }

template <int kN>
inline void wgmma_s8(uint32_t (&c)[kN / 2], uint64_t a, uint64_t b, bool accumulate,
                     Site site = SAGE_CALL_SITE) {
    host::Wgmma argument{true, accumulate, kN, c, nullptr, a, b};
    runtime().collective(host::Collective::kWgmma, &argument, site);
}
template <int kN>
inline void wgmma_e4m3(float (&c)[kN / 2], uint32_t const (&a)[4], uint64_t b, bool accumulate,
                       Site site = SAGE_CALL_SITE) {
    host::Wgmma argument{false, accumulate, kN, c, a, 0, b};
    runtime().collective(host::Collective::kWgmma, &argument, site);
}
inline void wgmma_fence(Site site = SAGE_CALL_SITE) {
    runtime().collective(host::Collective::kWgmmaFence, nullptr, site);
}
inline void wgmma_commit(Site site = SAGE_CALL_SITE) {
    runtime().collective(host::Collective::kWgmmaCommit, nullptr, site);
}
template <int kNewest>
inline void wgmma_wait(Site site = SAGE_CALL_SITE) {
    host::WgmmaWait argument{kNewest};
    runtime().collective(host::Collective::kWgmmaWait, &argument, site);
}
// Registers are memory here, and whatever may change them is a call.
template <class T, size_t kCount>
inline void wgmma_hold(T (&)[kCount]) {}

#undef SAGE_CALL_SITE

}  // namespace sage::arch
