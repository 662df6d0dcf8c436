// SPDX-License-Identifier: Apache-2.0
// The packed linear kernel, compiled once per instruction set.
//
// A strip of at most 60 input rows is normalised and packed once; it stays in the second-level cache while the weight
// panels stream past it. Each block of the result is finished (bias, activation, scale, residual) while it is hot.
#include "../common/norm.h"
#include "../common/pack.h"
#include "cpu_kernels.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

template <typename T>
constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;  // values per unit
template <typename T>
constexpr int64_t kPanel = kTileVecs * kLanes<typename Packed<T>::type>;  // columns
constexpr int64_t kDepth = 1024;  // units of a panel that stay in the second-level cache for all rows of a strip

template <typename T>
int64_t units_of(int64_t k) {
  return ceil_div(k, kPer<T>);
}

// ---- activations

// gelu(x) = x Phi(x), Phi(x) = 1/2 + x p(x^2) / q(x^2): the best quotient (1.4e-8) for |x| <= 5.5, beyond which Phi is
// 0 or 1. As exact as 1 + erf(x / sqrt(2)) in float32, at a quarter of the instructions.
inline Vec<float> gelu(Vec<float> x) {
  constexpr float kEnd = 5.5f;
  Vec<float> z = x < splat(-kEnd) ? splat(-kEnd) : x;  // this order keeps NaN
  z = z > splat(kEnd) ? splat(kEnd) : z;
  const Vec<float> t = z * z;
  Vec<float> p = splat(2.27493135e-8f), q = splat(1.19750041e-6f);
  p = p * t + 6.35209017e-6f, q = q * t + 7.36471266e-5f;
  p = p * t + 1.68824889e-4f, q = q * t + 1.88444078e-3f;
  p = p * t + 4.67725610e-3f, q = q * t + 2.86458377e-2f;
  p = p * t + 3.38525921e-2f, q = q * t + 2.51521796e-1f;
  p = p * t + 3.98942232e-1f, q = q * t + 1.0f;
  const Vec<float> phi = z * p / q + 0.5f;
  return x * (x < splat(-kEnd) ? Vec<float>{} : phi);
}
inline Vec<double> gelu(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] *= 0.5 * __builtin_erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <typename C>
Vec<C> times_sigmoid(Vec<C> x, Vec<C> u) {  // x / (1 + exp(-u)) without overflow
  const Vec<C> e = exp2v((u < Vec<C>{} ? u : -u) * static_cast<C>(kLog2E));
  const Vec<C> s = C(1) / (C(1) + e);
  return x * (u < Vec<C>{} ? e * s : s);
}

template <int64_t Act, typename C>
Vec<C> activate(Vec<C> x) {
  if constexpr (Act == kGelu) return gelu(x);
  if constexpr (Act == kGeluTanh) return times_sigmoid<C>(x, C(1.5957691216057307) * (x + C(0.044715) * x * x * x));
  if constexpr (Act == kQuickGelu) return times_sigmoid<C>(x, C(1.702) * x);
  return x;
}

// ---- input rows

// Rows [begin, begin + n) -> units [n, stride]; LayerNorm on the way.
template <typename T>
void pack_input(const PackedLinearParams& p, int64_t begin, int64_t n, int64_t stride, typename Packed<T>::type* out) {
  const RowView<T> rows{static_cast<const T*>(p.x), p.x_stride, 0, p.x_rows, p.indices};
  const int64_t k = p.in_features, units = units_of<T>(k);
  if (!p.norm) {
    for (int64_t i = 0; i < n; ++i) pack_units<T>(rows, begin + i, 1, k, units, out + i * stride);
    return;
  }
  using S = typename PackedValue<T>::type;
  const T* weight = static_cast<const T*>(p.norm_weight);
  const T* bias = static_cast<const T*>(p.norm_bias);
  for (int64_t i = 0; i < n; ++i) {
    S* to = reinterpret_cast<S*>(out + i * stride);
    const T* x = rows(begin + i);
    if (x == nullptr) {
      __builtin_memset(to, 0, units * sizeof(*out));
      continue;
    }
    NormedRow<T>(x, k, weight, bias, p.norm_eps).write(to, k);
    if (kUsesPairs<T> && (k & 1)) to[k] = S{};
  }
}

// ---- results

// Finish `n` rows of columns [j, j + width) from the block c (row stride kPanel).
template <typename T, int64_t Act>
void finish_as(const PackedLinearParams& p, int64_t row, int64_t n, int64_t j, int64_t width, const Compute<T>* c) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const T* bias = static_cast<const T*>(p.bias);
  const T* scale = static_cast<const T*>(p.scale);
  for (int64_t i = 0; i < n; ++i) {
    T* y = static_cast<T*>(p.y) + (row + i) * p.out_features + j;
    const T* residual =
        p.residual == nullptr ? nullptr : static_cast<const T*>(p.residual) + (row + i) * p.residual_stride + j;
    const C* from = c + i * kPanel<T>;
    int64_t d = 0;
    for (; d + w <= width; d += w) {
      Vec<C> v = load(from + d);
      if (bias != nullptr) v += load_wide(bias + j + d);
      v = activate<Act, C>(v);
      if (scale != nullptr) v *= load_wide(scale + j + d);
      if (residual != nullptr) v += load_wide(residual + d);
      store_narrow<T>(y + d, v);
    }
    if (d == width) continue;
    C tail[w] = {};
    for (int64_t l = 0; d + l < width; ++l) {
      tail[l] = from[d + l] + (bias == nullptr ? C(0) : C(to_float(bias[j + d + l])));
    }
    store(tail, activate<Act, C>(load(tail)));
    for (int64_t l = 0; d + l < width; ++l) {
      C v = tail[l];
      if (scale != nullptr) v *= to_float(scale[j + d + l]);
      if (residual != nullptr) v += to_float(residual[d + l]);
      y[d + l] = from_float<T, C>(v);
    }
  }
}

template <typename T>
void finish(const PackedLinearParams& p, int64_t row, int64_t n, int64_t j, int64_t width, const Compute<T>* c) {
  switch (p.act) {
    case kGelu: return finish_as<T, kGelu>(p, row, n, j, width, c);
    case kGeluTanh: return finish_as<T, kGeluTanh>(p, row, n, j, width, c);
    case kQuickGelu: return finish_as<T, kQuickGelu>(p, row, n, j, width, c);
    default: return finish_as<T, kNoActivation>(p, row, n, j, width, c);
  }
}

// Asks for the part of the weights that comes next, a little at every step of a tile: hardware prefetchers stop at
// every page and leave most of main memory's latency to be waited for.
struct WeightsAhead : StoreOnly {
  const char* part;
  int64_t rate;  // bytes per step, times 64

  __attribute__((always_inline)) void step(int64_t i) const { __builtin_prefetch(part + (i * rate >> 6), 0, 2); }
};

template <typename T>
void linear_item(const PackedLinearParams& p, int64_t item, int64_t chunks, char* scratch) {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  const int64_t k = units_of<T>(p.in_features), stride = k + kLanes<U>;  // rows must not share cache sets
  const int64_t begin = item / chunks * p.strip, rows = p.rows - begin < p.strip ? p.rows - begin : p.strip;
  const int64_t panels = ceil_div(p.out_features, kPanel<T>), chunk = item % chunks;
  Arena arena{scratch};
  U* input = arena.take<U>(p.strip * stride);
  C* block = arena.take<C>(p.strip * kPanel<T>);
  pack_input<T>(p, begin, rows, stride, input);
  const U* weights = static_cast<const U*>(p.packed);
  for (int64_t panel = panels * chunk / chunks; panel < panels * (chunk + 1) / chunks; ++panel) {
    const int64_t j = panel * kPanel<T>, width = p.out_features - j < kPanel<T> ? p.out_features - j : kPanel<T>;
    const int64_t padded = round_up(width, kLanes<U>), rate = padded * sizeof(U) * 64 / ceil_div(rows, kTileRows);
    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kDepth) {  // no inputs: zeros, once
      const int64_t depth = k - k0 < kDepth ? k - k0 : kDepth;
      const U* part = weights + j * k + k0 * padded;
      const char* next = reinterpret_cast<const char*>(part + depth * padded);
      for (int64_t i = 0; i < rows; i += kTileRows) {
        const int64_t r = rows - i < kTileRows ? rows - i : kTileRows;
        const WeightsAhead ahead{{}, next + (i / kTileRows * depth * rate >> 6), rate};
        Gemm<U>::template pick<WeightsAhead>(r, padded / kLanes<U>)(input + i * stride + k0, stride, 1, part, padded,
                                                                    block + i * kPanel<T>, kPanel<T>, depth, k0 > 0,
                                                                    ahead, i, j);
      }
    }
    finish<T>(p, begin, rows, j, width, block);
  }
}

// ---- weights

template <typename T>
void pack_panels(const void* weight, int64_t n, int64_t k, int64_t begin, int64_t end, void* out, char* scratch) {
  using U = typename Packed<T>::type;
  const int64_t units = units_of<T>(k);
  const RowView<T> rows{static_cast<const T*>(weight), k, 0, n, nullptr};
  U* staged = reinterpret_cast<U*>(scratch);
  for (int64_t j = begin; j < end; j += kPanel<T>) {
    const int64_t width = end - j < kPanel<T> ? end - j : kPanel<T>;
    pack_units<T>(rows, j, width, k, units, staged);
    pack_columns<U>([&](int64_t i) { return staged + i * units; }, width, units, static_cast<U*>(out) + j * units);
  }
}

int64_t packed_bytes(Dtype dtype, int64_t n, int64_t k) {
  int64_t bytes = 0;
  visit(dtype, [&]<typename T>() {
    using U = typename Packed<T>::type;
    bytes = round_up(n, kLanes<U>) * units_of<T>(k) * static_cast<int64_t>(sizeof(U));
  });
  return bytes;
}
int64_t panel_width(Dtype dtype) {
  int64_t width = 1;
  visit(dtype, [&]<typename T>() { width = kPanel<T>; });
  return width;
}
bool pack(Dtype dtype, const void* weight, int64_t n, int64_t k, int64_t begin, int64_t end, void* out, char* scratch) {
  return visit(dtype, [&]<typename T>() { pack_panels<T>(weight, n, k, begin, end, out, scratch); });
}
int64_t pack_scratch(int64_t k) { return 64 * round_up(k, 2) * 8 + 4096; }
bool linear(Dtype dtype, const PackedLinearParams& p, int64_t item, int64_t chunks, char* scratch) {
  return visit(dtype, [&]<typename T>() { linear_item<T>(p, item, chunks, scratch); });
}
int64_t linear_scratch(const PackedLinearParams& p) { return 8 * p.strip * (p.in_features + 2 * 64) + 4096; }

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const PackedKernels TP_TABLE(packed_kernels) = {packed_bytes, pack,   pack_scratch,
                                                       panel_width,  linear, linear_scratch};

}  // namespace tokenprune
