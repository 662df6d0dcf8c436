// SPDX-License-Identifier: Apache-2.0
// Moves between lanes, and blocks of channels: what vec.h does not have, for kernels that need it.
#pragma once

#include "pack.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

template <typename C>
using IntVec = typename VecTypes<C>::integer;
template <typename C>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <typename C>
using Int = typename IntOf<C>::type;

template <int... L>
struct LaneList {};
template <int N, int... L>
struct MakeLanes : MakeLanes<N - 1, N - 1, L...> {};
template <int... L>
struct MakeLanes<0, L...> {
  using type = LaneList<L...>;
};
template <typename C>
using Lanes = typename MakeLanes<kLanes<C>>::type;

// a0 a2 .. b0 b2 .., and a1 a3 .. b1 b3 ..
template <typename C, int... L>
inline Vec<C> even_lanes(Vec<C> a, Vec<C> b, LaneList<L...>) {
  return __builtin_shufflevector(a, b, (2 * L)...);
}
template <typename C, int... L>
inline Vec<C> odd_lanes(Vec<C> a, Vec<C> b, LaneList<L...>) {
  return __builtin_shufflevector(a, b, (2 * L + 1)...);
}
template <typename C>
inline Vec<C> even_lanes(Vec<C> a, Vec<C> b) {
  return even_lanes<C>(a, b, Lanes<C>{});
}
template <typename C>
inline Vec<C> odd_lanes(Vec<C> a, Vec<C> b) {
  return odd_lanes<C>(a, b, Lanes<C>{});
}
// a0 b0 a1 b1 .., from the first (Half = 0) or second half of a and b
template <typename C, int Half, int... L>
inline Vec<C> zip_lanes(Vec<C> a, Vec<C> b, LaneList<L...>) {
  constexpr int w = kLanes<C>;
  return __builtin_shufflevector(a, b, (Half * w / 2 + L / 2 + (L % 2) * w)...);
}
template <typename C, int Half>
inline Vec<C> zip_lanes(Vec<C> a, Vec<C> b) {
  return zip_lanes<C, Half>(a, b, Lanes<C>{});
}
template <typename C, int Step, int... L>
inline Vec<C> xor_lanes(Vec<C> v, LaneList<L...>) {
  return __builtin_shufflevector(v, v, (L ^ Step)...);
}
// f(a, b) over all lanes of each group of `width` (a power of two), the result in every lane of the group.
template <typename C, typename F>
inline Vec<C> reduce_groups(Vec<C> v, int64_t width, const F& f) {
  if (width > 1) v = f(v, xor_lanes<C, 1>(v, Lanes<C>{}));
  if constexpr (kLanes<C> > 2) {
    if (width > 2) v = f(v, xor_lanes<C, 2>(v, Lanes<C>{}));
  }
  if constexpr (kLanes<C> > 4) {
    if (width > 4) v = f(v, xor_lanes<C, 4>(v, Lanes<C>{}));
  }
  if constexpr (kLanes<C> > 8) {
    if (width > 8) v = f(v, xor_lanes<C, 8>(v, Lanes<C>{}));
  }
  return v;
}

// Sums of four vectors, to out[0, 4).
template <typename C>
inline void store_sums(Vec<C> a, Vec<C> b, Vec<C> c, Vec<C> d, C* out) {
  const Vec<C> ab = even_lanes<C>(a, b) + odd_lanes<C>(a, b), cd = even_lanes<C>(c, d) + odd_lanes<C>(c, d);
  if constexpr (kLanes<C> == 2) {
    store(out, ab), store(out + 2, cd);
  } else {
    Vec<C> sums = even_lanes<C>(ab, cd) + odd_lanes<C>(ab, cd);
    if constexpr (kLanes<C> > 4) sums = even_lanes<C>(sums, sums) + odd_lanes<C>(sums, sums);
    if constexpr (kLanes<C> > 8) sums = even_lanes<C>(sums, sums) + odd_lanes<C>(sums, sums);
    __builtin_memcpy(out, &sums, 4 * sizeof(C));
  }
}

// n < lanes values, zeros behind them. Never reads beyond.
template <typename T>
inline Vec<Compute<T>> load_some(const T* p, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (__is_same(T, float)) return (Vec<float>)_mm512_maskz_loadu_ps(mask, p);
  if constexpr (__is_same(T, Half)) return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
  if constexpr (__is_same(T, BFloat16)) {
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
  }
#endif
  Vec<Compute<T>> v{};
  for (int64_t l = 0; l < n; ++l) v[l] = to_float(p[l]);
  return v;
}

// The first n < lanes values of v.
template <typename C>
inline void store_some(C* p, Vec<C> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (__is_same(C, float)) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    return;
  }
#endif
  for (int64_t l = 0; l < n; ++l) p[l] = v[l];
}

// ---- channels go through the kernels in blocks of two vectors. For bfloat16 these are the even and the odd channels
// of the block (a shift and a mask instead of a conversion); load_block and store_block agree on it.

template <typename C>
struct Block {
  Vec<C> a, b;
};
template <typename T>
constexpr int kBlock = 2 * kLanes<Compute<T>>;

inline Block<float> split_words(Vec<uint32_t> words) {
  return {(Vec<float>)(words << 16), (Vec<float>)(words & 0xffff0000u)};
}
template <typename T>
inline Block<Compute<T>> load_block(const T* p) {
  if constexpr (__is_same(T, BFloat16)) {
    Vec<uint32_t> words;
    __builtin_memcpy(&words, p, sizeof(words));
    return split_words(words);
  } else {
    return {load_wide(p), load_wide(p + kLanes<Compute<T>>)};
  }
}
template <typename T>
inline void store_block(T* p, Block<Compute<T>> v) {
  constexpr int w = kLanes<Compute<T>>;
  if constexpr (__is_same(T, BFloat16)) {
    store_narrow<T>(p, zip_lanes<float, 0>(v.a, v.b));
    store_narrow<T>(p + w, zip_lanes<float, 1>(v.a, v.b));
  } else {
    store_narrow<T>(p, v.a);
    store_narrow<T>(p + w, v.b);
  }
}
// Past the caches where the CPU can; p aligned to whole vectors. stream_fence has to follow the last one.
template <typename T>
inline void stream_block(T* p, Block<Compute<T>> v) {
#if defined(__AVX512F__)
  if constexpr (__is_same(T, float)) {
    _mm512_stream_ps(p, (__m512)v.a), _mm512_stream_ps(p + kLanes<float>, (__m512)v.b);
    return;
  }
#endif
  store_block(p, v);
}
inline void stream_fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
// The first n <= block channels.
template <typename T>
inline Block<Compute<T>> load_block(const T* p, int64_t n) {
  constexpr int w = kLanes<Compute<T>>;
  if (n == kBlock<T>) return load_block(p);
  if constexpr (__is_same(T, BFloat16)) {
    T whole[kBlock<T>] = {};
    __builtin_memcpy(whole, p, n * sizeof(T));
    return load_block(whole);
  } else {
    if (n < w) return {load_some(p, n), Vec<Compute<T>>{}};
    return {load_wide(p), load_some(p + w, n - w)};
  }
}
template <typename T>
inline void store_block(T* p, Block<Compute<T>> v, int64_t n) {
  if (n == kBlock<T>) return store_block(p, v);
  T whole[kBlock<T>];
  store_block(whole, v);
  __builtin_memcpy(p, whole, n * sizeof(T));
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
