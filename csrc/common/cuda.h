// SPDX-License-Identifier: Apache-2.0
// What every kernel.cuh is written with: types, shared memory, warp operations, PTX wrappers. No torch header.
//
// Each PTX instruction has a wrapper with two bodies: the instruction for the device, and a C++ body for the host model
// of the tests (TOKENPRUNE_HOST_MODEL, tests/csrc/host_model.h), which executes kernels without a GPU.
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
//   load_matrix_x4 / _x2 (+ _trans)           ldmatrix; every lane passes the address of one 16-byte row
//   copy_async<Bytes>(shared, global, valid)  cp.async of 4, 8 or 16 bytes; not valid: zero fill, global unread
//   copy_async_commit(), copy_async_wait<N>() as cp.async.commit_group, cp.async.wait_group
#pragma once

#include <cstdint>

#ifdef TOKENPRUNE_HOST_MODEL
#include "host_model.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
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

// ---- shared memory -------------------------------------------------------------------------------------------------

#ifdef TOKENPRUNE_HOST_MODEL
#define TP_SHARED(type, name, ...)         \
  alignas(16) static type name __VA_ARGS__; \
  ::tokenprune::host_model::enter_shared(&name, sizeof(name))
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(host_model::block_state().dynamic.get());
}
#else
#define TP_SHARED(type, name, ...) __shared__ alignas(16) type name __VA_ARGS__
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char tokenprune_dynamic_shared[];
  return reinterpret_cast<T*>(tokenprune_dynamic_shared);
}
#endif

// ---- warp operations -----------------------------------------------------------------------------------------------

#ifdef TOKENPRUNE_HOST_MODEL

namespace host_model {
template <typename T>
T shuffle(T v, int source, Where where) {
  static_assert(sizeof(T) <= 8);
  Deposit in{};
  std::memcpy(&in.words[0], &v, sizeof(T));
  in.words[1] = static_cast<uint64_t>(source);
  const Result out = collective(
      [](const Deposit* all, Result* results) {
        for (int l = 0; l < 32; ++l) results[l].words[0] = all[all[l].words[1] & 31].words[0];
      },
      in, where);
  std::memcpy(&v, &out.words[0], sizeof(T));
  return v;
}
inline int lane() { return static_cast<int>(linear_thread() % 32); }
}  // namespace host_model

template <typename T>
T warp_shuffle(T v, int lane, std::source_location where = std::source_location::current()) {
  return host_model::shuffle(v, lane, where);
}
template <typename T>
T warp_shuffle_xor(T v, int mask, std::source_location where = std::source_location::current()) {
  return host_model::shuffle(v, host_model::lane() ^ mask, where);
}
// Lane l gets the value of lane l - delta; the first delta lanes keep their own.
template <typename T>
T warp_shuffle_up(T v, int delta, std::source_location where = std::source_location::current()) {
  const int lane = host_model::lane();
  return host_model::shuffle(v, lane >= delta ? lane - delta : lane, where);
}
inline uint32_t warp_ballot(bool p, std::source_location where = std::source_location::current()) {
  host_model::Deposit in{};
  in.words[0] = p;
  const host_model::Result out = host_model::collective(
      [](const host_model::Deposit* all, host_model::Result* results) {
        uint64_t bits = 0;
        for (int l = 0; l < 32; ++l) bits |= all[l].words[0] << l;
        for (int l = 0; l < 32; ++l) results[l].words[0] = bits;
      },
      in, where);
  return static_cast<uint32_t>(out.words[0]);
}
inline void warp_sync(std::source_location where = std::source_location::current()) { host_model::sync_warp(where); }
inline int popcount(uint32_t v) { return __builtin_popcount(v); }
inline int lowest_bit(uint32_t v) { return __builtin_ctz(v); }
inline float exp2_fast(float v) { return std::exp2(v); }
inline double exp2_fast(double v) { return std::exp2(v); }
inline float rsqrt_of(float v) { return 1.0f / std::sqrt(v); }
inline double rsqrt_of(double v) { return 1.0 / std::sqrt(v); }

#else

template <typename T>
__device__ __forceinline__ T warp_shuffle(T v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}
template <typename T>
__device__ __forceinline__ T warp_shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <typename T>
__device__ __forceinline__ T warp_shuffle_up(T v, int delta) {
  return __shfl_up_sync(0xffffffffu, v, delta);
}
__device__ __forceinline__ uint32_t warp_ballot(bool p) { return __ballot_sync(0xffffffffu, p); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ int popcount(uint32_t v) { return __popc(v); }
__device__ __forceinline__ int lowest_bit(uint32_t v) { return __ffs(static_cast<int>(v)) - 1; }
__device__ __forceinline__ float exp2_fast(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ double exp2_fast(double v) { return exp2(v); }
__device__ __forceinline__ float rsqrt_of(float v) { return rsqrtf(v); }
__device__ __forceinline__ double rsqrt_of(double v) { return rsqrt(v); }

#endif

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

// ---- matrix instructions -------------------------------------------------------------------------------------------
// Fragments, with g = lane / 4 and t = lane % 4 (two 16-bit values per register, the lower index in the lower half):
//   a[0] (row g, columns 2t, 2t+1)  a[1] (row g+8)  a[2] (row g, columns 2t+8, 2t+9)  a[3] (row g+8, columns 2t+8, 2t+9)
//   b[0] (rows 2t, 2t+1, column g)  b[1] (rows 2t+8, 2t+9, column g)
//   c[0], c[1] (row g, columns 2t, 2t+1)  c[2], c[3] (row g+8)

#ifdef TOKENPRUNE_HOST_MODEL

namespace host_model {
template <typename T>
float half_of(uint64_t word, int i) {  // the i-th 16-bit value
  return to_acc(T{static_cast<uint16_t>(word >> (16 * i))});
}
template <typename T>
void mma_for_all(const Deposit* in, Result* out) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const int owner = row % 8 * 4 + column / 2, slot = row / 8 * 2 + column % 2;
      float sum;
      std::memcpy(&sum, reinterpret_cast<const char*>(&in[owner].words[3]) + 4 * slot, 4);
      for (int k = 0; k < 16; ++k) {
        const int t = k % 8 / 2, a_register = row / 8 + 2 * (k / 8);
        const uint64_t a = in[row % 8 * 4 + t].words[a_register / 2] >> (32 * (a_register % 2));
        const uint64_t b = in[column * 4 + t].words[2] >> (32 * (k / 8));
        sum += half_of<T>(a, k % 2) * half_of<T>(b, k % 2);
      }
      std::memcpy(reinterpret_cast<char*>(&out[owner].words[0]) + 4 * slot, &sum, 4);
    }
  }
}
// Every lane reads its own row (an ordinary access, seen by the sanitizers), then the warp exchanges.
template <int Count, bool Transposed>
void load_matrix(uint32_t* r, const void* row, Where where) {
  Deposit in{};
  if (lane() < 8 * Count) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fatal("misaligned row of load_matrix", where);
    std::memcpy(&in.words[0], row, 16);
  }
  const Result out = collective(
      [](const Deposit* all, Result* results) {
        for (int l = 0; l < 32; ++l) {
          for (int m = 0; m < Count; ++m) {
            for (int i = 0; i < 2; ++i) {
              const int line = Transposed ? l % 4 * 2 + i : l / 4, column = Transposed ? l / 4 : l % 4 * 2 + i;
              std::memcpy(reinterpret_cast<char*>(&results[l].words[0]) + 4 * m + 2 * i,
                          reinterpret_cast<const char*>(&all[8 * m + line].words[0]) + 2 * column, 2);
            }
          }
        }
      },
      in, where);
  std::memcpy(r, &out.words[0], 4 * Count);
}
}  // namespace host_model

template <typename T>
void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b,
                 std::source_location where = std::source_location::current()) {
  host_model::Deposit in{};
  std::memcpy(&in.words[0], a, 16);
  std::memcpy(&in.words[2], b, 8);
  std::memcpy(&in.words[3], c, 16);
  const host_model::Result out = host_model::collective(&host_model::mma_for_all<T>, in, where);
  std::memcpy(c, &out.words[0], 16);
}
inline void load_matrix_x4(uint32_t* r, const void* row, std::source_location w = std::source_location::current()) {
  host_model::load_matrix<4, false>(r, row, w);
}
inline void load_matrix_x4_trans(uint32_t* r, const void* row,
                                 std::source_location w = std::source_location::current()) {
  host_model::load_matrix<4, true>(r, row, w);
}
inline void load_matrix_x2(uint32_t* r, const void* row, std::source_location w = std::source_location::current()) {
  host_model::load_matrix<2, false>(r, row, w);
}
inline void load_matrix_x2_trans(uint32_t* r, const void* row,
                                 std::source_location w = std::source_location::current()) {
  host_model::load_matrix<2, true>(r, row, w);
}

template <int Bytes>
void copy_async(void* shared, const void* global, bool valid,
                std::source_location where = std::source_location::current()) {
  host_model::copy_async(shared, global, Bytes, valid ? Bytes : 0, where);
}
inline void copy_async_commit() { host_model::copy_commit(); }
template <int Pending>
void copy_async_wait() {
  host_model::copy_wait(Pending);
}

#else

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b);
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float* c, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float* c, const uint32_t* a, const uint32_t* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// The memory clobber keeps the compiler from moving the reads across the stores to shared memory that precede them.
__device__ __forceinline__ void load_matrix_x4(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrix_x2_trans(uint32_t* r, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const int bytes = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {  // 16 bytes may bypass L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(Bytes), "r"(bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

#endif

}  // namespace tokenprune

// ---- attention: two accumulators to one register of a 16-bit fragment ---------------------------------------------

namespace tokenprune {

#ifdef TOKENPRUNE_HOST_MODEL
template <typename T>
uint32_t pack_pair(float low, float high) {
  return from_acc<T>(low).bits | static_cast<uint32_t>(from_acc<T>(high).bits) << 16;
}
#else
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#endif

}  // namespace tokenprune
