// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set that this object is compiled for, through the compiler's vector extensions.
//
// Everything lives in an inline namespace named after the set (TOKENPRUNE_ISA): without it the linker may keep one
// set's copy of an inline function for all of them. No STL and no torch header may be included here for the same
// reason.
#pragma once

#include <stdint.h>

#include "half.h"

#if defined(__AVX512BF16__) || defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define TP_UNROLL _Pragma("GCC unroll 16")

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kTileVecs = 4;  // 6 x 4 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kTileVecs = 2;  // 6 x 2 of 16
#else
constexpr int kVecBytes = 16;
constexpr int kTileVecs = 2;
#endif
constexpr int kTileRows = 6;

template <typename T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef float loose __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef double loose __attribute__((vector_size(kVecBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecTypes<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(kVecBytes)));
  typedef uint32_t loose __attribute__((vector_size(kVecBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVecBytes)));
};

template <typename T>
using Vec = typename VecTypes<T>::type;
template <typename T>
constexpr int kLanes = kVecBytes / sizeof(T);

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::loose*>(p);
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::loose*>(p) = v;
}
template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}
inline Vec<float> splat(float x) {  // `x - 0` would turn -0 into 0; harmless, but this compiles to one broadcast
  return Vec<float>{} + x;
}
template <typename T>
inline Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
// Lane numbers for shuffles as constants: GCC 12 computes masks written as loops at run time. low + high: the sums of
// neighbouring groups of Step lanes of two rows, alternating.
template <typename C, int Step>
struct LaneMasks {
  using Int = decltype(typename VecTypes<C>::integer{}[0] + 0);
  Int low[kLanes<C>], high[kLanes<C>], swap[kLanes<C>];
  constexpr LaneMasks() : low(), high(), swap() {
    for (int l = 0; l < kLanes<C>; ++l) {
      low[l] = (l & Step) ? l - Step + kLanes<C> : l;
      high[l] = low[l] + Step;
      swap[l] = l ^ Step;
    }
  }
};
template <typename C, int Step>
inline constexpr LaneMasks<C, Step> kLaneMasks{};

template <typename C>
inline typename VecTypes<C>::integer load_mask(const typename LaneMasks<C, 1>::Int* lanes) {
  typename VecTypes<C>::integer mask;
  __builtin_memcpy(&mask, lanes, sizeof(mask));
  return mask;
}

// All lanes joined in log2 steps; v is a vector of T, or of integers as wide.
template <typename T, int Step = kLanes<T> / 2, typename V, typename Op>
inline auto fold_lanes(V v, Op&& op) {
  if constexpr (Step == 0) {
    return v[0] + 0;
  } else {
    return fold_lanes<T, Step / 2>(op(v, __builtin_shuffle(v, load_mask<T>(kLaneMasks<T, Step>.swap))), op);
  }
}
template <typename T>
inline T reduce_add(Vec<T> v) {
  return fold_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <typename T>
inline T reduce_max(Vec<T> v) {
  return fold_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return vmax<T>(a, b); });
}

// Whether any lane is larger than the limit.
template <typename T>
inline bool any_above(Vec<T> v, T limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_GT_OQ));
#endif
  return reduce_max<T>(v) > limit;
}

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
constexpr int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }

// ---- scalar conversions; loops over them vectorise

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) {
#if defined(__F16C__) || defined(__aarch64__)
  return static_cast<float>(__builtin_bit_cast(_Float16, x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shift into place and rescale by 2^112: exact for normal and subnormal numbers alike.
  const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | sign);
#endif
}

template <typename T>
inline T from_float(T x) {
  return x;
}
template <typename T, typename F>
inline T from_float(F x);
template <>
inline float from_float<float, float>(float x) {
  return x;
}
template <>
inline double from_float<double, double>(double x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16, float>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded)};
}
template <>
inline Half from_float<Half, float>(float x) {
#if defined(__F16C__) || defined(__aarch64__)
  return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds beyond 65504
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 puts the rounded bits at the end of the mantissa
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// The type that a storage type computes in.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeOf<T>::type;

// One vector of compute values from storage, and back (round to nearest even). Explicit for 16-bit types: the compiler
// does not find these conversions by itself everywhere.
template <typename T>
inline Vec<Compute<T>> load_wide(const T* p) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return load(p);
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (__is_same(T, Half)) return (Vec<float>)_mm512_cvtph_ps(bits);
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (__is_same(T, Half)) return (Vec<float>)_mm256_cvtph_ps(bits);
    return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
    Vec<float> v;
    for (int l = 0; l < kLanes<float>; ++l) v[l] = to_float(p[l]);
    return v;
#endif
  }
}

template <typename T>
inline void store_narrow(T* p, Vec<Compute<T>> v) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    store(p, v);
  } else {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(T, BFloat16)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
      return;
    }
#endif
#if defined(__AVX512F__)
    if constexpr (__is_same(T, Half)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#elif defined(__AVX2__)
    if constexpr (__is_same(T, Half)) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
    for (int l = 0; l < kLanes<float>; ++l) p[l] = from_float<T, float>(v[l]);
  }
}

template <typename T>
inline void widen(const T* in, Compute<T>* out, int64_t n) {
  constexpr int w = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(out + i, load_wide(in + i));
  for (; i < n; ++i) out[i] = to_float(in[i]);
}
template <typename T>
inline void narrow(const Compute<T>* in, T* out, int64_t n, Compute<T> factor = 1) {
  constexpr int w = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store_narrow<T>(out + i, load(in + i) * factor);
  for (; i < n; ++i) out[i] = from_float<T, Compute<T>>(in[i] * factor);
}

// ---- exp2, for arguments below 128 (softmax after subtracting about the maximum); -inf gives 0

inline Vec<float> exp2_fraction(Vec<float> f) {  // minimax polynomial of 2^f on [-0.5, 0.5], relative error 1e-7
  Vec<float> p = splat(1.326472615e-3f);
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  return p * f + 1.0f;
}

#if defined(__AVX512F__)
alignas(64) constexpr float kExp2Steps[32] = {
    // 2^(i / 32)
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f,
};
#endif

inline Vec<float> exp2v(Vec<float> x) {
#if defined(__AVX512F__)
  // 2^(i / 32) from the table times 2^f, |f| <= 1/64, in three multiplications. What rounding leaves is 0 for
  // infinities; scalef takes the whole part and underflows to 0 by itself.
  const __m512 f = _mm512_reduce_ps((__m512)x, 5 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 steps = (__m512)x - f;
  const __m512i i = (__m512i)(steps + _mm512_set1_ps(0x1.8p18f));  // the number of steps in its lowest bits
  const __m512 power = _mm512_permutex2var_ps(_mm512_loadu_ps(kExp2Steps), i, _mm512_loadu_ps(kExp2Steps + 16));
  const __m512 slope = _mm512_fmadd_ps(f, _mm512_set1_ps(0.240226507f), _mm512_set1_ps(0.693157345f));
  return (Vec<float>)_mm512_scalef_ps(_mm512_fmadd_ps(power * f, slope, power), steps);
#else
  using Int = VecTypes<float>::integer;
  const Vec<float> magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  x = x < splat(-126.f) ? splat(-126.f) : x;   // this order keeps NaN
  const Vec<float> shifted = x + magic;
  const Int exponent = ((Int)shifted - (Int)magic) << 23;
  const Vec<float> result = (Vec<float>)((Int)exp2_fraction(x - (shifted - magic)) + exponent);
  return x <= splat(-126.f) ? Vec<float>{} : result;
#endif
}
inline Vec<double> exp2v(Vec<double> x) {
  Vec<double> out;
  for (int i = 0; i < kLanes<double>; ++i) out[i] = __builtin_exp2(x[i]);
  return out;
}
inline float exp2s(float x) { return __builtin_exp2f(x); }
inline double exp2s(double x) { return __builtin_exp2(x); }
inline float ceils(float x) { return __builtin_ceilf(x); }
inline double ceils(double x) { return __builtin_ceil(x); }
inline float log2s(float x) { return __builtin_log2f(x); }
inline double log2s(double x) { return __builtin_log2(x); }
template <typename T>
constexpr T kNegInf = -__builtin_inf();
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
