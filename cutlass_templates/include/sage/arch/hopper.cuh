// What only Hopper has (sm_90a), as sage/arch.cuh has the rest: products of warpgroups, copies that
// signal barriers in shared memory, and threads of different roles. Kernels for sm_90a include this
// file; on a CPU it is host/include/sage/arch/hopper_host.hpp.
//
// All in namespace sage::arch. An mbarrier is a uint64_t in shared memory, touched by these alone:
//
//   void mbarrier_init(uint64_t*, int arrivals)    By one thread; then mbarrier_init_fence() by it
//                                                  and barrier() by all.
//   void mbarrier_arrive(uint64_t*)                One of the phase's arrivals.
//   void mbarrier_arrive_warp(uint64_t*)           One for all lanes of a warp together.
//   void mbarrier_arrive_expect(uint64_t*, int bytes)   That, and the phase has these bytes too.
//   void mbarrier_wait(uint64_t*, int parity)      Until a phase of this parity is complete: the
//                                                  first one has 0; 1 returns at once before that.
//   void copy_bulk(void* shared, void const* global, int bytes, uint64_t*)
//                                   By one thread; 16-byte aligned, of whole 16 bytes. Lands
//                                   whenever it does, and then takes its bytes from the mbarrier's
//                                   phase.
//   void copy_tensor(void* shared, TensorMap const&, int4 at, uint64_t*)
//                                   The same of a box of a tensor of 4 dims, x of `at` the inner
//                                   one, that begins at these elements: swizzled by the address,
//                                   and zeros where the tensor is not. The map is a parameter of
//                                   the kernel, the address 128-byte aligned, and the bytes are
//                                   always those of the whole box.
//   void fence_async()              What this thread has stored to shared memory, wgmma sees after
//                                   the next barrier.
//
//   void named_barrier_sync<Threads>(int id)       Threads of whole warps, ids 1 to 15: waits for
//   void named_barrier_arrive<Threads>(int id)     all Threads; is one of them, without waiting.
//   void registers_decrease<N>(), registers_increase<N>()    setmaxnreg, by whole warpgroups.
//   float from_int(uint32_t)        Of an int32.
//
//   uint64_t matrix_rows<RowBytes>(void const*)
//                                   Rows of an operand, K-major and swizzled: see Panels of
//                                   order.cuh. The address may be any multiple of 32 bytes within
//                                   the first row.
//   void wgmma_s8<N>(uint32_t (&c)[N / 2], uint64_t a, uint64_t b, bool accumulate)
//                                   c (+)= A B: 64 rows of A and N of B in shared memory, 32 bytes
//                                   of each; int32.
//   void wgmma_e4m3<N>(float (&c)[N / 2], uint32_t const (&a)[4], uint64_t b, bool accumulate)
//                                   The same with A in registers, in E4M3 and float.
//   void wgmma_fence()              After anything else has touched registers of the products that
//   void wgmma_commit()             follow; closes a group of products.
//   void wgmma_wait<N>()            All but the newest N groups are done. Until then their
//   registers
//                                   must not be touched, nor what they read be overwritten.
//   void wgmma_hold(T (&registers)[N])     The compiler may not move their accesses across this.
//
// Warp w of a warpgroup has rows 16 w to 16 w + 15; of these a lane holds, in c and a, what
// mma.sync gives it: c[4 j + 2 h + i] is row lane / 4 + 8 h, column 8 j + 2 (lane % 4) + i.
#pragma once

#include <sage/arch.cuh>
#include <sage/arch/tensor_map.cuh>

#if defined(SAGE_HOST)
#include <sage/arch/hopper_host.hpp>
#else
#include <sage/arch/hopper_device.cuh>
#endif

namespace sage::arch {

// PTX, "Matrix-descriptor format", for rows of 128 or 64 bytes with the swizzle of that width:
// 8 rows behind one another, and the next 8 after them. Addresses count in 16 bytes.
template <int kRowBytes>
SAGE_DEVICE uint64_t matrix_rows(void const* start) {
    static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
    constexpr uint64_t kMode = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
    constexpr uint64_t kStride = 8 * kRowBytes / 16;
    constexpr uint64_t kLeading = 1;  // not used where there is a swizzle
    return kMode << 62 | kStride << 32 | kLeading << 16 | (shared_offset(start) & 0x3ffff) >> 4;
}

// The rows so many bytes after others, a multiple of 16, within a block's shared memory.
SAGE_DEVICE uint64_t rows_further(uint64_t descriptor, uint32_t bytes) {
    return descriptor + bytes / 16;
}

}  // namespace sage::arch
