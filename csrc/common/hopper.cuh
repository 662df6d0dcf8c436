// SPDX-License-Identifier: Apache-2.0
// What the sm_90a kernels are written with: tiles in shared memory as the tensor copy engine writes and wgmma reads
// them, and one-line wrappers around the instructions. Each wrapper has two bodies: CUTLASS's (hopper_device.h), and
// C++ for the host model of the tests (tests/csrc/host_hopper.h), which executes the kernels without a GPU.
//
//   Barrier                                    64-bit mbarrier in shared memory
//   barrier_init(b, arrivals)                  by one thread; barrier_init_fence() and a block barrier behind it
//   barrier_arrive(b), barrier_expect(b, n)    one arrival; one arrival that also announces n bytes of copies
//   barrier_wait(b, parity)                    until the phase of that parity is over; a fresh barrier passes parity 1
//   copy_tile(map, b, to, c0, c1, c2)          one box of a tensor map, c0 counting along the contiguous dimension
//   store_unit(to, v), copy_unit(to, from, ok) an ordinary store, a cp.async, of 16 bytes that wgmma will read
//   fence_async_shared()                       these, once landed, before what wgmma does behind the next barrier
//   wgmma_fence(), wgmma_commit(), wgmma_wait<N>()
//   wgmma_shared<T, N, kRows|kColumns>(d, a, b, add)     d[64 x N] (+)= A B, both from shared memory
//   wgmma_registers<T, N, kRows|kColumns>(d, a, b, add)  A from registers: the fragment a[4] of mma_16x8x16 per warp
//   pin(registers)                             keeps the compiler from moving accesses to accumulators past this point
//   group_sync(id, threads)                    barrier of some warps of the block; id 1 to 7
//   registers_down<N>(), registers_up<N>()     setmaxnreg
//
// wgmma belongs to a warpgroup: 4 warps, 128 threads. Warp w of it owns rows 16 w to 16 w + 15, and within a warp the
// accumulators are those of mma_16x8x16: d[4 j + 2 i + e] is row g + 8 i, column 8 j + 2 t + e (g = lane / 4, t = lane
// % 4).
#pragma once

#include "cuda.h"
#include "hopper_tile.h"

namespace tokenprune::hopper {

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int group() { return static_cast<int>(threadIdx.x) / kGroupThreads; }
__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16; }
__device__ __forceinline__ int row_of(int i) { return sum_row(static_cast<int>(threadIdx.x) % kGroupThreads, i); }
__device__ __forceinline__ int column_of(int j, int e) { return sum_column(static_cast<int>(threadIdx.x), j, e); }

}  // namespace tokenprune::hopper

#ifdef TOKENPRUNE_HOST_MODEL
#include "host_hopper.h"
#else
#include "hopper_device.h"
#endif
