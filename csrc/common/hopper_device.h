// SPDX-License-Identifier: Apache-2.0
// The device side of hopper.cuh: the instructions as CUTLASS wraps them. Compiled for sm_90a only.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <utility>

namespace tokenprune::hopper {

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

using Transaction = cutlass::arch::ClusterTransactionBarrier;
__device__ __forceinline__ void barrier_init(Barrier* b, int arrivals) { Transaction::init(b, arrivals); }
__device__ __forceinline__ void barrier_init_fence() { cutlass::arch::fence_barrier_init(); }
__device__ __forceinline__ void barrier_arrive(Barrier* b) { cutlass::arch::ClusterBarrier::arrive(b); }
__device__ __forceinline__ void barrier_expect(Barrier* b, int bytes) { Transaction::arrive_and_expect_tx(b, bytes); }
__device__ __forceinline__ void barrier_wait(Barrier* b, int parity) { Transaction::wait(b, parity); }

__device__ __forceinline__ void copy_tile(const TensorMap* map, Barrier* b, void* to, int c0, int c1, int c2) {
  cute::SM90_TMA_LOAD_3D::copy(map, b, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, c0, c1, c2);
}
__device__ __forceinline__ void store_unit(void* to, const uint4& v) { *static_cast<uint4*>(to) = v; }
__device__ __forceinline__ void copy_unit(void* to, const void* from, bool valid) { copy_async<16>(to, from, valid); }
__device__ __forceinline__ void fence_async_shared() { cutlass::arch::fence_view_async_shared(); }

__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  cute::warpgroup_wait<Pending>();
}

template <typename T>
struct ElementOf;
template <>
struct ElementOf<__nv_bfloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<__half> {
  using type = cutlass::half_t;
};
template <Order O>
constexpr cute::SM90::GMMA::Major kMajor = O == Order::kRows ? cute::SM90::GMMA::Major::K : cute::SM90::GMMA::Major::MN;
template <int N>
using Shape = cute::Shape<cute::Int<kGroupRows>, cute::Int<N>, cute::Int<kStep>>;

template <typename T, int N, Order O>
__device__ __forceinline__ void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  using E = typename ElementOf<T>::type;
  using Op = decltype(cute::SM90::GMMA::ss_op_selector<E, E, float, Shape<N>, cute::SM90::GMMA::Major::K, kMajor<O>>());
  [&]<size_t... I>(std::index_sequence<I...>) {
    Op::fma(a, b, d[I]..., add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }(std::make_index_sequence<N / 2>{});
}
template <typename T, int N, Order O>
__device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  using E = typename ElementOf<T>::type;
  using Op = decltype(cute::SM90::GMMA::rs_op_selector<E, E, float, Shape<N>, cute::SM90::GMMA::Major::K, kMajor<O>>());
  [&]<size_t... I>(std::index_sequence<I...>) {
    Op::fma(a[0], a[1], a[2], a[3], b, d[I]...,
            add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }(std::make_index_sequence<N / 2>{});
}

template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(registers[i]);
}

__device__ __forceinline__ void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N>
__device__ __forceinline__ void registers_down() {
  cutlass::arch::warpgroup_reg_dealloc<N>();
}
template <int N>
__device__ __forceinline__ void registers_up() {
  cutlass::arch::warpgroup_reg_alloc<N>();
}

}  // namespace tokenprune::hopper
