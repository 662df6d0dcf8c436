// SPDX-License-Identifier: Apache-2.0
// Softmax over many short rows, and its gradient. A row is a few lanes of a vector, or several vectors.
#pragma once

#include "../common/lanes.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// `rows` rows of n <= lanes values: get(offset of the first value, lanes) -> v, then put(offset, lanes, width of the
// groups of lanes, v). Whole groups where n is a power of two, otherwise one row at a time; then the next row is loaded
// before this one is stored, which a load right behind the store would have to wait for.
template <typename C, typename Get, typename Put>
inline void for_groups(int64_t rows, int64_t n, const Get& get, const Put& put) {
  constexpr int w = kLanes<C>;
  const bool whole = (n & (n - 1)) == 0;
  const int64_t step = whole ? w : n, width = whole ? n : w, total = rows * n;
  const auto lanes = [&](int64_t i) { return total - i < step ? total - i : step; };
  auto v = get(int64_t{0}, lanes(0));
  for (int64_t i = 0; i < total; i += step) {
    const auto now = v;
    if (i + step < total) v = get(i + step, lanes(i + step));
    put(i, lanes(i), width, now);
  }
}

// A whole vector; lanes beyond `lanes` become `fill`.
template <typename C>
inline Vec<C> load_filled(const C* p, int64_t lanes, C fill) {
  IntVec<C> lane;
  for (int l = 0; l < kLanes<C>; ++l) lane[l] = l;
  return lane < static_cast<Int<C>>(lanes) ? load(p) : splat<C>(fill);
}
template <typename C>
inline void store_lanes(C* p, Vec<C> v, int64_t lanes) {
  if (lanes == kLanes<C>) {
    store(p, v);
  } else {
    store_some<C>(p, v, lanes);  // not beyond: a load of the next row would wait for it
  }
}

template <typename C>
void softmax_long(C* x, int64_t n) {
  constexpr int w = kLanes<C>;
  const auto lanes = [&](int64_t i) { return n - i < w ? n - i : w; };
  Vec<C> most = splat<C>(kNegInf<C>), sums{};
  for (int64_t i = 0; i < n; i += w) most = vmax<C>(most, load_filled(x + i, lanes(i), kNegInf<C>));
  const C top = reduce_max<C>(most);
  for (int64_t i = 0; i < n; i += w) {
    const Vec<C> e = exp2v((load_filled(x + i, lanes(i), kNegInf<C>) - top) * static_cast<C>(kLog2E));
    store_lanes<C>(x + i, e, lanes(i));
    sums += e;
  }
  const C inverse = C(1) / reduce_add<C>(sums);
  for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
}

// In place; one vector behind the end must be readable.
template <typename C>
void softmax_rows(C* x, int64_t rows, int64_t n) {
  if (n > kLanes<C>) {
    for (int64_t r = 0; r < rows; ++r) softmax_long(x + r * n, n);
  } else if (rows * n > 0) {
    for_groups<C>(
        rows, n, [&](int64_t at, int64_t lanes) { return load_filled(x + at, lanes, kNegInf<C>); },
        [&](int64_t at, int64_t lanes, int64_t width, Vec<C> v) {
          const Vec<C> top = reduce_groups<C>(v, width, [](Vec<C> a, Vec<C> b) { return vmax<C>(a, b); });
          const Vec<C> e = exp2v((v - top) * static_cast<C>(kLog2E));
          store_lanes<C>(x + at, e / reduce_groups<C>(e, width, [](Vec<C> a, Vec<C> b) { return a + b; }), lanes);
        });
  }
}

// g becomes a * (g - a.g), the gradient of the logits, where a is the softmax and g its gradient.
template <typename C>
void softmax_backward_rows(const C* a, C* g, int64_t rows, int64_t n) {
  if (n > kLanes<C>) {
    for (int64_t r = 0; r < rows; ++r, a += n, g += n) {
      C dot = 0;
      for (int64_t j = 0; j < n; ++j) dot += a[j] * g[j];
      for (int64_t j = 0; j < n; ++j) g[j] = a[j] * (g[j] - dot);
    }
  } else if (rows * n > 0) {
    for_groups<C>(
        rows, n, [&](int64_t at, int64_t lanes) { return load_filled(g + at, lanes, C(0)); },
        [&](int64_t at, int64_t lanes, int64_t width, Vec<C> v) {
          const Vec<C> s = load_filled(a + at, lanes, C(0));
          const Vec<C> dot = reduce_groups<C>(s * v, width, [](Vec<C> x, Vec<C> y) { return x + y; });
          store_lanes<C>(g + at, s * (v - dot), lanes);
        });
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
