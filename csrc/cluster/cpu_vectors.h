// SPDX-License-Identifier: Apache-2.0
// Building blocks of this family's CPU kernels: partial vectors, sums of many vectors at once, the offset that
// distances are measured from.
#pragma once

#include "../common/pack.h"
#include "math.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// The first `count` values at p, zeros behind them.
template <typename T>
inline Vec<Compute<T>> load_part(const T* p, int64_t count) {
  T part[kLanes<Compute<T>>] = {};
  __builtin_memcpy(part, p, count * sizeof(T));
  return load_wide(part);
}

// Values [begin, begin + lanes) of a row of n, zeros behind its end; and back.
template <typename T>
inline Vec<Compute<T>> load_upto(const T* row, int64_t begin, int64_t n) {
  if (begin + kLanes<Compute<T>> <= n) return load_wide(row + begin);
  return begin < n ? load_part(row + begin, n - begin) : Vec<Compute<T>>{};
}
template <typename T>
inline void store_upto(T* row, int64_t begin, int64_t n, Vec<Compute<T>> v) {
  if (begin + kLanes<Compute<T>> <= n) return store_narrow<T>(row + begin, v);
  for (int64_t i = begin; i < n; ++i) row[i] = from_float<T, Compute<T>>(v[i - begin]);
}

// One vector of pairs of 16-bit values; rows of odd length start at any 2-byte boundary.
inline Vec<uint32_t> load_pairs(const void* p) {
  Vec<uint32_t> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
// As load_upto; no row: zeros.
inline Vec<uint32_t> load_pairs_upto(const BFloat16* row, int64_t begin, int64_t n) {
  constexpr int64_t w = 2 * kLanes<uint32_t>;
  if (row == nullptr || begin >= n) return Vec<uint32_t>{};
  if (begin + w <= n) return load_pairs(row + begin);
  BFloat16 part[w] = {};
  __builtin_memcpy(part, row + begin, (n - begin) * sizeof(BFloat16));
  return load_pairs(part);
}

inline Vec<float> dot_lanes(Vec<float> acc, Vec<float> a, Vec<float> b) { return acc + a * b; }
inline Vec<double> dot_lanes(Vec<double> acc, Vec<double> a, Vec<double> b) { return acc + a * b; }

#if defined(__AVX512BF16__)
inline Vec<float> dot_lanes(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
// Weights rounded to bfloat16, and two tokens' weights as pairs (none: zeros).
inline void round_slots(float* slots, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<uint32_t> bits = (Vec<uint32_t>)load(slots + i);
    store(slots + i, (Vec<float>)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u));
  }
}
inline void join_slots(const float* first, const float* second, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<uint32_t> high = second == nullptr ? Vec<uint32_t>{} : (Vec<uint32_t>)load(second + i);
    store(out + i, (Vec<uint32_t>)load(first + i) >> 16 | high);
  }
}
// Two rows of 32 values -> pairs of them: low holds channels 0-3, 8-11, 16-19, 24-27, high the others.
inline void interleave_pairs(Vec<uint32_t> a, Vec<uint32_t> b, Vec<uint32_t>& low, Vec<uint32_t>& high) {
  low = (Vec<uint32_t>)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  high = (Vec<uint32_t>)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
// From that order of channels to the natural one, and back.
inline void from_interleaved(Vec<float>& low, Vec<float>& high) {
  using Mask = VecTypes<float>::integer;
  const Vec<float> a = low, b = high;
  low = __builtin_shuffle(a, b, Mask{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
  high = __builtin_shuffle(a, b, Mask{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
}
inline void to_interleaved(Vec<float>& low, Vec<float>& high) {
  using Mask = VecTypes<float>::integer;
  const Vec<float> a = low, b = high;
  low = __builtin_shuffle(a, b, Mask{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27});
  high = __builtin_shuffle(a, b, Mask{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}
#endif

// Lane i of the result is the sum of all lanes of rows[i].
template <typename C, int Step = kLanes<C> / 2>
inline Vec<C> reduce_square(const Vec<C>* rows) {
  if constexpr (Step == 0) {
    return rows[0];
  } else {
    const Vec<C> a = reduce_square<C, Step / 2>(rows), b = reduce_square<C, Step / 2>(rows + Step);
    return __builtin_shuffle(a, b, load_mask<C>(kLaneMasks<C, Step>.low)) +
           __builtin_shuffle(a, b, load_mask<C>(kLaneMasks<C, Step>.high));
  }
}

// The first `count` lanes, zeros behind them.
template <typename C>
inline Vec<C> keep_first(Vec<C> v, int64_t count) {
  typename VecTypes<C>::integer lane;
  for (int l = 0; l < kLanes<C>; ++l) lane[l] = l;
  return lane < static_cast<decltype(lane[0] + 0)>(count) ? v : Vec<C>{};
}

// n values in steps of 8: both sides have room for a whole last step.
template <typename U>
inline void copy_steps(const U* from, U* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) __builtin_memcpy(to + i, from + i, 8 * sizeof(U));
}

// A coarse mean of up to 64 rows. Distances do not change when it is taken from both sides, but their expanded form
// |a|^2 + |b|^2 - 2ab loses far fewer digits. Few bits: values on a coarse grid stay exact, so equal distances stay
// equal.
template <typename T, typename RowOf>
void coarse_mean(RowOf&& row_of, int64_t rows, int64_t channels, int64_t width, Compute<T>* out) {
  using C = Compute<T>;
  const int64_t used = rows < 64 ? rows : 64;
  for (int64_t c = 0; c < width; ++c) out[c] = 0;
  for (int64_t i = 0; i < used; ++i) {
    const T* row = row_of(i * rows / used);
    for (int64_t c = 0; c < channels; ++c) out[c] += to_float(row[c]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float mean = static_cast<float>(out[c] / C(used));
    const float coarse = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, mean) & 0xfff80000u);
    out[c] = coarse - coarse == 0 ? coarse : 0;  // one bad token must not spoil all distances
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
