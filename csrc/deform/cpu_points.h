// SPDX-License-Identifier: Apache-2.0
// From the inputs to sampling points: pixel coordinates and weights of a run of queries of one head (stage_run), then
// where each point reads and with which corner weights (resolve_points). Both work on many points at once; one point
// after another would cost more than the sampling itself.
#pragma once

#include "cpu_kernels.h"
#include "cpu_lanes.h"
#include "math.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kRunPoints = 192;  // points per run: its arrays stay in the first-level cache

inline int64_t row_points(const DeformParams& p) { return p.levels * p.points; }
inline int64_t run_queries(const DeformParams& p, int64_t points_per_query) {
  return points_per_query == 0 || points_per_query > kRunPoints ? 1 : kRunPoints / points_per_query;
}

// One entry per point of a run, padded to whole vectors.
template <typename C>
struct PointArrays {
  C *xy, *weight;            // pixel coordinates, interleaved; attention weights
  C *width, *height;         // of the level
  C *w00, *w01, *w10, *w11;  // corner weights
  Int<C>*row, *corners;      // pixel of corner (y0, x0) within its level; bit c set: corner c is inside
  static int64_t bytes(int64_t points) { return 11 * (round_up(points, 16) + 2 * kLanes<C>)*sizeof(C) + 11 * 64; }
  static PointArrays take(Arena& arena, int64_t points) {
    const int64_t n = round_up(points, 16) + 2 * kLanes<C>;
    PointArrays a;
    a.xy = arena.take<C>(2 * n), a.weight = arena.take<C>(n), a.width = arena.take<C>(n), a.height = arena.take<C>(n);
    a.w00 = arena.take<C>(n), a.w01 = arena.take<C>(n), a.w10 = arena.take<C>(n), a.w11 = arena.take<C>(n);
    a.row = arena.take<Int<C>>(n), a.corners = arena.take<Int<C>>(n);
    return a;
  }
};

// What all heads of a list of queries share.
template <typename C>
struct QueryTables {
  C* size_xy;  // [levels * points, 2]: W and H of the point's level
  C* base;     // fused: [count, levels * points, 2] pixel coordinates of the reference
  C* scale;    // fused with boxes: [count, levels * points, 2] pixels per offset, otherwise null
  static int64_t bytes(const DeformParams& p, int64_t count) {
    const int64_t rows = !p.fused ? 1 : 1 + count * (p.reference_columns == 4 ? 2 : 1);
    return rows * (2 * row_points(p) * static_cast<int64_t>(sizeof(C)) + 64) + 64 * 16;
  }
};

template <typename C>
QueryTables<C> query_tables(const DeformParams& p, int64_t image, const int32_t* order, int64_t count, Arena& arena) {
  const int64_t n = row_points(p);
  QueryTables<C> t{};
  t.size_xy = arena.take<C>(2 * n + 16);
  for (int64_t j = 0; j < n; ++j) {
    t.size_xy[2 * j] = static_cast<C>(p.level[j / p.points].width);
    t.size_xy[2 * j + 1] = static_cast<C>(p.level[j / p.points].height);
  }
  if (!p.fused) return t;
  const bool boxes = p.reference_columns == 4;
  t.base = arena.take<C>(count * 2 * n + 16);
  if (boxes) t.scale = arena.take<C>(count * 2 * n + 16);
  const C inverse = C(1) / static_cast<C>(p.points);
  for (int64_t i = 0; i < count; ++i) {
    const C* reference = static_cast<const C*>(p.reference.data) + image * p.reference.batch_stride +
                         order[i] * p.reference.query_stride;
    for (int64_t l = 0; l < p.levels; ++l) {
      const C* r = reference + (p.reference_levels == 1 ? 0 : l) * p.reference_columns;
      const C w = static_cast<C>(p.level[l].width), h = static_cast<C>(p.level[l].height);
      C* base = t.base + (i * n + l * p.points) * 2;
      const C x = pixel_of_location(r[0], w), y = pixel_of_location(r[1], h);
      for (int64_t k = 0; k < p.points; ++k) base[2 * k] = x, base[2 * k + 1] = y;
      if (!boxes) continue;
      C* scale = t.scale + (i * n + l * p.points) * 2;
      const C sx = r[2] * C(0.5) * inverse * w, sy = r[3] * C(0.5) * inverse * h;
      for (int64_t k = 0; k < p.points; ++k) scale[2 * k] = sx, scale[2 * k + 1] = sy;
    }
  }
  return t;
}

// ---- softmax over rows of n, in place

template <typename C>
void softmax_long(C* x, int64_t n) {
  constexpr int w = kLanes<C>;
  Vec<C> most = splat<C>(kNegInf<C>), sums{};
  const auto tail = [&](int64_t i, C fill) {
    Vec<C> v = splat<C>(fill);
    for (int64_t l = 0; l + i < n; ++l) v[l] = x[i + l];
    return v;
  };
  int64_t i = 0;
  for (; i + w <= n; i += w) most = vmax<C>(most, load(x + i));
  if (i < n) most = vmax<C>(most, tail(i, kNegInf<C>));
  const C top = reduce_max<C>(most);
  for (i = 0; i + w <= n; i += w) {
    const Vec<C> e = exp2v((load(x + i) - top) * static_cast<C>(kLog2E));
    store(x + i, e);
    sums += e;
  }
  if (i < n) {
    const Vec<C> e = exp2v((tail(i, kNegInf<C>) - top) * static_cast<C>(kLog2E));
    sums += e;
    for (int64_t l = 0; l + i < n; ++l) x[i + l] = e[l];
  }
  const C inverse = C(1) / reduce_add<C>(sums);
  for (i = 0; i < n; ++i) x[i] *= inverse;
}

template <typename C>
inline Vec<C> softmax_groups(Vec<C> v, int64_t width) {
  const Vec<C> top = reduce_groups<C>(v, width, [](Vec<C> a, Vec<C> b) { return vmax<C>(a, b); });
  const Vec<C> e = exp2v((v - top) * static_cast<C>(kLog2E));
  return e / reduce_groups<C>(e, width, [](Vec<C> a, Vec<C> b) { return a + b; });
}

// `rows` rows; x may be written up to one vector beyond its end.
template <typename C>
void softmax_rows(C* x, int64_t rows, int64_t n) {
  constexpr int w = kLanes<C>;
  if (n > w) {
    for (int64_t r = 0; r < rows; ++r) softmax_long(x + r * n, n);
  } else if (n > 0 && (n & (n - 1)) == 0) {  // whole groups of lanes: several rows at once
    for (int64_t i = 0; i < rows * n; i += w) store(x + i, softmax_groups<C>(load(x + i), n));
  } else if (n > 0) {
    IntVec<C> lane;
    for (int l = 0; l < w; ++l) lane[l] = l;
    const auto inside = lane < static_cast<Int<C>>(n);
    for (int64_t r = 0; r < rows; ++r) {  // ascending: what is written beyond a row is overwritten by the next
      const Vec<C> next = load(x + r * n);
      const Vec<C> v = softmax_groups<C>(inside ? next : splat<C>(kNegInf<C>), w);
      store(x + r * n, inside ? v : next);
    }
  }
}

// ---- staging

// to[0, n) = f(from, i); `to` may be written up to one vector beyond.
template <typename T, typename F>
inline void map_row(const T* from, int64_t n, Compute<T>* to, const F& f) {
  constexpr int w = kLanes<Compute<T>>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(to + i, f(load_wide(from + i), i));
  if (i < n) store(to + i, f(load_some(from + i, n - i), i));
}

// T: dtype of the values, O: of the offsets and logits. Pixel coordinates and weights of the queries order[0, count) of
// one head; `first` is the position of order[0] in the tables.
template <typename O, typename C>
void stage_run(const DeformParams& p, const QueryTables<C>& tables, int64_t image, int64_t head, const int32_t* order,
               int64_t first, int64_t count, C* xy, C* weight) {
  const int64_t n = row_points(p);
  const O* points = static_cast<const O*>(p.locations.data) + image * p.locations.batch_stride + head * 2 * n;
  const O* weights = static_cast<const O*>(p.weights.data) + image * p.weights.batch_stride + head * n;
  for (int64_t i = 0; i < count; ++i) {
    const O* from = points + order[i] * p.locations.query_stride;
    C* to = xy + i * 2 * n;
    if (!p.fused) {
      map_row(from, 2 * n, to, [&](Vec<C> v, int64_t j) {
        const Vec<C> size = load(tables.size_xy + j);
        return v * size - C(0.5);
      });
    } else if (tables.scale == nullptr) {
      const C* base = tables.base + (first + i) * 2 * n;
      map_row(from, 2 * n, to, [&](Vec<C> v, int64_t j) { return load(base + j) + v; });
    } else {
      const C *base = tables.base + (first + i) * 2 * n, *scale = tables.scale + (first + i) * 2 * n;
      map_row(from, 2 * n, to, [&](Vec<C> v, int64_t j) { return load(base + j) + v * load(scale + j); });
    }
    map_row(weights + order[i] * p.weights.query_stride, n, weight + i * n, [](Vec<C> v, int64_t) { return v; });
  }
  if (p.fused) softmax_rows(weight, count, n);
}

template <typename T, typename C>
inline void stage(const DeformParams& p, const QueryTables<C>& tables, int64_t image, int64_t head,
                  const int32_t* order, int64_t first, int64_t count, C* xy, C* weight) {
  if (p.fused && p.offsets_are_values) {
    stage_run<T, C>(p, tables, image, head, order, first, count, xy, weight);
  } else {
    stage_run<C, C>(p, tables, image, head, order, first, count, xy, weight);
  }
}

// ---- resolving

// floor of a finite value within the range of Int
template <typename C>
inline IntVec<C> floor_int(Vec<C> v) {
  const IntVec<C> t = __builtin_convertvector(v, IntVec<C>);  // towards zero
  return t + (__builtin_convertvector(t, Vec<C>) > v);        // a true comparison is -1
}

// Where a vector of points reads. A point that touches nothing (or is NaN) has no corners and finite fractions.
template <typename C>
struct Resolved {
  Vec<C> fx, fy;
  IntVec<C> row, y0, corners;
};
template <typename C>
inline Resolved<C> resolve(Vec<C> x, Vec<C> y, Vec<C> width, Vec<C> height) {
  using I = IntVec<C>;
  const I reads = (x > C(-1)) & (y > C(-1)) & (x < width) & (y < height);
  x = reads ? x : Vec<C>{}, y = reads ? y : Vec<C>{};
  const I x0 = floor_int<C>(x), y0 = floor_int<C>(y);
  const I w = __builtin_convertvector(width, I), h = __builtin_convertvector(height, I);
  const I left = x0 >= 0, right = x0 < w - 1, up = y0 >= 0, down = y0 < h - 1;
  Resolved<C> r;
  r.fx = x - __builtin_convertvector(x0, Vec<C>), r.fy = y - __builtin_convertvector(y0, Vec<C>);
  r.row = y0 * w + x0, r.y0 = y0;
  r.corners = reads & ((up & left & 1) | (up & right & 2) | (down & left & 4) | (down & right & 8));
  return r;
}

template <typename C>
inline void store_ints(Int<C>* to, IntVec<C> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// xy, weight, width, height -> row, corners, corner weights
template <typename C>
void resolve_points(const PointArrays<C>& a, int64_t n) {
  constexpr int w = kLanes<C>;
  for (int64_t k = 0; k < n; k += w) {
    const Vec<C> first = load(a.xy + 2 * k), second = load(a.xy + 2 * k + w);
    const Resolved<C> r =
        resolve<C>(even_lanes<C>(first, second), odd_lanes<C>(first, second), load(a.width + k), load(a.height + k));
    const CornerWeights<Vec<C>> c = corner_weights<Vec<C>>(r.fx, r.fy, load(a.weight + k));
    store(a.w00 + k, c.w00), store(a.w01 + k, c.w01), store(a.w10 + k, c.w10), store(a.w11 + k, c.w11);
    store_ints<C>(a.row + k, r.row), store_ints<C>(a.corners + k, r.corners);
  }
}

// Takes away the corners whose pixels are padding; `mask` begins at the level.
template <typename I>
inline I unmasked_corners(I corners, const bool* mask, int64_t row, int64_t width) {
  if (corners & 1 && mask[row]) corners &= ~1;
  if (corners & 2 && mask[row + 1]) corners &= ~2;
  if (corners & 4 && mask[row + width]) corners &= ~4;
  if (corners & 8 && mask[row + width + 1]) corners &= ~8;
  return corners;
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
