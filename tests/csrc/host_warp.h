// SPDX-License-Identifier: Apache-2.0
// The host side of csrc/common/cuda.h: shared memory, warp operations and PTX instructions on the host model.
#pragma once

#include "host_model.h"

#define TP_SHARED(type, name, ...)          \
  alignas(16) static type name __VA_ARGS__; \
  ::tokenprune::host_model::enter_shared(&name, sizeof(name))

namespace tokenprune {

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(host_model::block_state().dynamic.get());
}

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

// ---- matrix instructions and asynchronous copies
// ---------------------------------------------------------------------

namespace host_model {
inline float widened(__half v) { return __half2float(v); }
inline float widened(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
float half_of(uint64_t word, int i) {  // the i-th 16-bit value
  return widened(T{static_cast<uint16_t>(word >> (16 * i))});
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
uint32_t pack_pair(float low, float high) {
  const auto bits = [](float v) -> uint32_t {
    if constexpr (std::is_same_v<T, __half>) return __float2half(v).bits;
    return __float2bfloat16(v).bits;
  };
  return bits(low) | bits(high) << 16;
}
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

}  // namespace tokenprune
