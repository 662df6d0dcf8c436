// SPDX-License-Identifier: Apache-2.0
// What every kernel.cuh is written with: types, shared memory, warp operations, PTX wrappers. No torch header.
//
// Each PTX instruction has a wrapper with two bodies: the instruction (cuda_device.h), and C++ for the host model of
// the tests (TOKENPRUNE_HOST_MODEL, tests/csrc/host_warp.h), which executes kernels without a GPU.
//
//   TP_SHARED(type, name, [N][M]);            static shared memory, 16-byte aligned; declare at the top of the kernel
//   dynamic_shared<T>()                       start of the dynamic shared memory (16-byte aligned)
//   Acc<T>, to_acc(v), from_acc<T>(a)         accumulator type of T (double for double, otherwise float), conversions
//   Pack<T, N>, load_pack<N>(p), store_pack   N values in one access; 16 bytes when sizeof(T) * N == 16
//   kPack<T>                                  values per 16 bytes; packable<T>(pointer, stride): rows may use them
//   warp_shuffle(v, lane), warp_shuffle_xor(v, mask), warp_shuffle_up(v, delta), warp_ballot(p), warp_any(p),
//   warp_sync()                               always by the full warp; the blocks are multiples of 32 threads
//   warp_sum(v), warp_max(v)                  all lanes get the result; fixed order: deterministic
//   popcount(bits), lowest_bit(bits)          lowest_bit: of a non-zero value
//   exp2_fast, rsqrt_of                       float: the hardware instruction; double: exact
//   mma_16x8x16<T>(c, a, b)                   c[4] += a[4] (16x16 row major) * b[2] (16x8 column major), T 16-bit
//   pack_pair<T>(low, high)                   two floats, rounded, as one register of such a fragment
//   load_matrix_x4 / _x2 (+ _trans)           ldmatrix; every lane passes the address of one 16-byte row
//   copy_async<Bytes>(shared, global, valid)  cp.async of 4, 8 or 16 bytes; not valid: zero fill, global unread
//   copy_async_commit(), copy_async_wait<N>() as cp.async.commit_group, cp.async.wait_group
//
// Fragments, with g = lane / 4 and t = lane % 4 (two 16-bit values per register, the lower index in the lower half):
//   a[0] (row g, columns 2t, 2t+1)  a[1] (row g+8)  a[2] (row g, columns 2t+8, 2t+9)  a[3] (row g+8, columns 2t+8,
//   2t+9) b[0] (rows 2t, 2t+1, column g)  b[1] (rows 2t+8, 2t+9, column g) c[0], c[1] (row g, columns 2t, 2t+1)  c[2],
//   c[3] (row g+8)
#pragma once

#include <cstdint>
#include <cstring>

#ifdef TOKENPRUNE_HOST_MODEL
#include "host_model.h"
#include "host_warp.h"
#else
#include "cuda_device.h"
#endif

namespace tokenprune {

// ---- types ---------------------------------------------------------------------------------------------------------

template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> a) {
  return a;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float a) {
  return __float2half(a);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float a) {
  return __float2bfloat16(a);
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};
template <typename T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, N>& pack) {
  if constexpr (sizeof(pack) == 16) {  // nvcc takes stores of computed 16-bit values apart; this keeps one access
    uint4 words;
    memcpy(&words, &pack, 16);
    *reinterpret_cast<uint4*>(p) = words;
  } else {
    *reinterpret_cast<Pack<T, N>*>(p) = pack;
  }
}
// Rows at p + i * stride may be read in packs of 16 bytes. A null pointer (an absent argument) fits.
template <typename T>
__host__ __device__ __forceinline__ bool packable(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kPack<T> == 0;
}

template <typename T>
__device__ __forceinline__ T at(const void* p, int64_t i) {
  return static_cast<const T*>(p)[i];
}

// ---- warp reductions ------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool warp_any(bool p) { return warp_ballot(p) != 0; }

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += warp_shuffle_xor(v, mask);
  return v;
}
template <typename T>
__device__ __forceinline__ T warp_max(T v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const T other = warp_shuffle_xor(v, mask);
    v = other > v ? other : v;
  }
  return v;
}

}  // namespace tokenprune
