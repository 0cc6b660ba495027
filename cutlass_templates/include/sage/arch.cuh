// Everything that a kernel asks of the hardware, behind one thin layer with two implementations:
// sage/arch/device.cuh on a GPU, and host/include/sage/arch/host.hpp, which executes kernels on a
// CPU. Kernels include this file alone and use nothing of CUDA directly, so that the very same
// source runs on both.
//
// The layer, all in namespace sage::arch:
//
//   int thread_index()              Of 1-D blocks: 0 .. threads - 1.
//   int64_t block_index()           Of a 1-D grid,
//   int64_t grid_size()             which has so many blocks.
//   char* shared_memory()           The dynamic shared memory of the block, 1024-byte aligned.
//   void barrier()                  All threads of the block.
//
//   T load_global(T const*)         sizeof(T) of 1, 2, 4, 8 or 16 bytes, naturally aligned; memory
//   void store_global(T*, T)        is touched in no other way than by these, copy_async and what
//                                   follows. What a launch stores, these do not load.
//   void store_streaming(T*, T)     As store_global, of what this launch does not load: a hint that
//                                   it leaves the caches first (st.global.cs).
//   T load_written(T const*)        As load_global, of what the same launch may have stored: by
//                                   this block before a barrier, or by another one before it
//                                   arrived at a counter that this one has awaited. Or what a
//                                   launch has that this one depends on.
//
//   Blocks order themselves by counters in global memory, zero before the launch, which touches
//   them in no other way:
//   uint32_t take_ticket(uint32_t*)         How many tickets were taken before. Blocks that take
//                                           theirs later run later or at the same time: a block may
//                                           wait for those with lower tickets, and no others.
//   uint32_t arrive(uint32_t*)              Adds one; returns how many had arrived. All that this
//                                           thread sees happens before: what it has stored, and
//                                           what others of the block have before a barrier.
//   void await(uint32_t const*, uint32_t)   Until so many have arrived. What happened before they
//                                           did, this thread sees, and others after a barrier.
//
//   From sm_90 on a launch may depend on the one before it in its stream, and begin before that
//   has ended: when each of its blocks has ended or called launch_dependents. So may the one
//   before it have begun, and so on, back to a launch that depends on none.
//   void await_prerequisites()      Until all of these have ended, and what they stored is there.
//                                   Before that a thread stores nothing to global memory, and loads
//                                   nothing that they may have stored; afterwards by load_written
//                                   or copies. Some thread of each block calls it. Of a launch that
//                                   depends on none, it returns at once.
//   void launch_dependents()        By some thread of a block, at any time: what depends on this
//                                   launch may begin, as far as the block is concerned.
//
//   T load_shared(T const*)
//   void store_shared(T*, T)
//
//   void copy_async(void* shared, void const* global)   16 bytes; lands by the matching wait.
//   void copy_async_commit()                            Closes a group of the thread's copies.
//   void copy_async_wait<N>()                           All but its newest N groups landed.
//
//   int warp_uniform(int)           A value that all active lanes of a warp have, so that the
//                                   compiler knows.
//   T shuffle_xor(T, int lane_mask)                     float, int32_t or uint32_t; all 32 lanes.
//   void load_matrix_x4(uint32_t (&r)[4], void const* row)
//                                   ldmatrix.x4: lane l gives the address of row l % 8 (16 bytes)
//                                   of matrix l / 8; r[i] are bytes 4 * (l % 4) .. of row l / 4 of
//                                   matrix i.
//   void mma<Atom>(Atom::Accumulator (&c)[Atom::kAccumulators], uint32_t const (&a)[4],
//                  uint32_t const (&b)[2])              c += A B, a warp's m16n8 product.
//
// The atoms, each a step of 32 bytes along the contracted dim: MmaS4 (k64) and MmaS8 (k32), whose
// accumulators are int32 held in uint32_t, as CuTe has them; MmaE4m3 (k32, float), MmaE4m3Half
// (k32, two halves in each of two uint32_t), MmaF16 (k16, float), MmaTf32 (k8, float, operands as
// bits). Their register layouts are PTX's, which CuTe's MMA_Traits of `Atom::Cute` state.
//
//   float exp2(float), log2(float)  Approximate on a device (MUFU).
//   float divide(float a, float b)  For b from 2^-126 to 2^126: correctly rounded where |a| is at
//                                   least 2^-100 and the quotient normal, else off by a bit, and
//                                   NaN beyond. Zero for larger b. No slow path on a device, so no
//                                   call.
//   float multiply(float, float)    Rounded by itself, never part of an FMA.
//   float fma(float, float, float)
//   float maximum(float, float)     A NaN loses against a number, as in fmaxf.
//   int32_t round_to_int(float)     Half to even; NaN becomes 0.
//   uint32_t bits(float), float from_bits(uint32_t)
//   uint32_t pack_e4m3(float, float, float, float)      The first in the lowest byte. Saturates;
//                                                       NaN stays NaN.
//   uint32_t pack_half(float, float), pack_bfloat16(float, float)
//   float2 unpack_half(uint32_t), unpack_bfloat16(uint32_t)
//   uint32_t to_tf32(float)         Nearest, ties away from zero.
//
// And three macros: SAGE_DEVICE qualifies a function; SAGE_UNROLL unrolls the loop that follows,
// and SAGE_ROLLED keeps the compiler from it, which takes registers.
#pragma once

#include <cute/tensor.hpp>

#if defined(SAGE_HOST)
#include <sage/arch/host.hpp>
#else
#include <sage/arch/device.cuh>
#endif

// Defines the entry point `name` of a kernel. `Kernel` has Params (passed by value), kThreads,
// kSharedBytes, kMinBlocks (per multiprocessor) and `static void run(Params const&)`. The numbers
// are what the launching side assumes; a difference does not compile.
#define SAGE_KERNEL(name, threads, shared_bytes, params_bytes, ...)                       \
    static_assert(__VA_ARGS__::kThreads == (threads), "threads of a block");              \
    static_assert(__VA_ARGS__::kSharedBytes == (shared_bytes), "bytes of shared memory"); \
    static_assert(sizeof(__VA_ARGS__::Params) == (params_bytes), "bytes of parameters");  \
    SAGE_ENTRY(name, __VA_ARGS__)
