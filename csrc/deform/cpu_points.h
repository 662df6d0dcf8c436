// SPDX-License-Identifier: Apache-2.0
// From the inputs to sampling points: pixel coordinates and weights of a run of queries, all heads (stage), then where
// each point reads and with which corner weights (resolve_points). Both work on whole vectors of points; one point
// after another would cost more than the sampling itself.
#pragma once

#include "../common/lanes.h"
#include "cpu_kernels.h"
#include "cpu_softmax.h"
#include "math.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kRunPoints = 288;  // points per run: its arrays stay in the first-level cache

inline int64_t head_points(const DeformParams& p) { return p.levels * p.points; }
// All points of a query, head by head.
inline int64_t query_points(const DeformParams& p) { return p.heads * head_points(p); }
inline int64_t run_queries(const DeformParams& p) {
  const int64_t n = query_points(p);
  return n == 0 || n > kRunPoints ? 1 : kRunPoints / n;
}

// f(queries of this run) for the runs of a range.
template <typename F>
inline void for_runs(const DeformParams& p, QueryRange range, const F& f) {
  const int64_t step = run_queries(p), end = range.begin + range.count;
  for (QueryRange run = range; run.begin < end; run.begin += step) {
    run.count = end - run.begin < step ? end - run.begin : step;
    f(run);
  }
}
// f(first point, level) for every (query, head, level) of a run.
template <typename F>
inline void for_levels(const DeformParams& p, int64_t queries, const F& f) {
  int64_t k = 0;
  for (int64_t i = 0; i < queries * p.heads; ++i) {
    for (int64_t l = 0; l < p.levels; ++l, k += p.points) f(k, l);
  }
}

// One entry per point of a run, padded to whole vectors.
template <typename C>
struct PointArrays {
  C *xy, *weight;            // pixel coordinates, interleaved; attention weights
  C* size;                   // W and H of the level, interleaved
  C *w00, *w01, *w10, *w11;  // corner weights
  Int<C>*row, *corners;      // pixel of corner (y0, x0) within its level; bit c set: corner c is inside
};
constexpr int64_t padded_points(int64_t points) { return round_up(points, 16) + 32; }
inline int64_t run_scratch(const DeformParams& p) {  // enough for doubles
  return 8 * 11 * padded_points(run_queries(p) * query_points(p)) + 11 * 64;
}

template <typename C>
inline void fill_pairs(C* to, int64_t count, C x, C y) {
  const C pair[2] = {x, y};
  for (int64_t k = 0; k < count; ++k) __builtin_memcpy(to + 2 * k, pair, sizeof(pair));
}
template <typename C>
inline C level_width(const DeformParams& p, int64_t l) {
  return static_cast<C>(p.level[l].width);
}
template <typename C>
inline C level_height(const DeformParams& p, int64_t l) {
  return static_cast<C>(p.level[l].height);
}

template <typename C>
PointArrays<C> take_points(const DeformParams& p, Arena& arena) {
  const int64_t run = run_queries(p), n = padded_points(run * query_points(p));
  PointArrays<C> a;
  a.xy = arena.take<C>(2 * n), a.weight = arena.take<C>(n), a.size = arena.take<C>(2 * n);
  a.w00 = arena.take<C>(n), a.w01 = arena.take<C>(n), a.w10 = arena.take<C>(n), a.w11 = arena.take<C>(n);
  a.row = arena.take<Int<C>>(n), a.corners = arena.take<Int<C>>(n);
  for_levels(p, run, [&](int64_t k, int64_t l) {
    fill_pairs(a.size + 2 * k, p.points, level_width<C>(p, l), level_height<C>(p, l));
  });
  const int64_t used = run * query_points(p);
  fill_pairs(a.size + 2 * used, n - used, C(0), C(0));  // the lanes behind the last point read nothing
  return a;
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

template <typename T>
inline const T* query_row(const QueryRows& rows, int64_t image, int64_t query) {
  return static_cast<const T*>(rows.data) + image * rows.batch_stride + query * rows.query_stride;
}
template <typename C>
inline const C* reference_row(const DeformParams& p, int64_t image, int64_t query, int64_t l) {
  return query_row<C>(p.reference, image, query) + (p.reference_levels == 1 ? 0 : l) * p.reference_columns;
}

// Pixel coordinates of one query from its reference and offsets.
template <typename O, typename C>
inline void stage_offsets(const DeformParams& p, int64_t image, int64_t query, C* xy) {
  const O* offsets = query_row<O>(p.locations, image, query);
  const C inverse = C(1) / static_cast<C>(p.points);
  for_levels(p, 1, [&](int64_t k, int64_t l) {
    const C *r = reference_row<C>(p, image, query, l), width = level_width<C>(p, l), height = level_height<C>(p, l);
    if (p.reference_columns == 2) {
      fill_pairs(xy + 2 * k, p.points, pixel_of_location(r[0], width), pixel_of_location(r[1], height));
      return;
    }
    for (int64_t i = k; i < k + p.points; ++i) {
      xy[2 * i] = pixel_of_box_offset(r[0], r[2], C(to_float(offsets[2 * i])), inverse, width);
      xy[2 * i + 1] = pixel_of_box_offset(r[1], r[3], C(to_float(offsets[2 * i + 1])), inverse, height);
    }
  });
  if (p.reference_columns == 2) {
    map_row(offsets, 2 * query_points(p), xy, [&](Vec<C> v, int64_t j) { return load(xy + j) + v; });
  }
}

// O: dtype of the locations and weights (offsets and logits).
template <typename O, typename C>
void stage_run(const DeformParams& p, QueryRange run, const PointArrays<C>& a) {
  const int64_t n = query_points(p);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t query = run.query(i);
    C* xy = a.xy + i * 2 * n;
    if (p.fused) {
      stage_offsets<O, C>(p, run.image, query, xy);
    } else {
      map_row(query_row<O>(p.locations, run.image, query), 2 * n, xy,
              [&](Vec<C> v, int64_t j) { return v * load(a.size + j) - C(0.5); });
    }
    map_row(query_row<O>(p.weights, run.image, query), n, a.weight + i * n, [](Vec<C> v, int64_t) { return v; });
  }
  if (p.fused) softmax_rows(a.weight, run.count * p.heads, head_points(p));
}

// Pixel coordinates and weights of a run.
template <typename T, typename C>
inline void stage(const DeformParams& p, QueryRange run, const PointArrays<C>& a) {
  if (p.fused && p.offsets_are_values) {
    stage_run<T, C>(p, run, a);
  } else {
    stage_run<C, C>(p, run, a);
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
// From interleaved coordinates and sizes.
template <typename C>
inline Resolved<C> resolve_pairs(const C* xy, const C* size) {
  constexpr int w = kLanes<C>;
  const Vec<C> a = load(xy), b = load(xy + w), c = load(size), d = load(size + w);
  return resolve<C>(even_lanes<C>(a, b), odd_lanes<C>(a, b), even_lanes<C>(c, d), odd_lanes<C>(c, d));
}

template <typename C>
inline void store_ints(Int<C>* to, IntVec<C> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}
template <typename C>
inline IntVec<C> load_ints(const Int<C>* from) {
  IntVec<C> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
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

// xy, weight, size -> row, corners, corner weights
template <typename C>
void resolve_points(const DeformParams& p, QueryRange run, const PointArrays<C>& a) {
  const int64_t n = run.count * query_points(p);
  for (int64_t k = 0; k < n; k += kLanes<C>) {
    const Resolved<C> r = resolve_pairs(a.xy + 2 * k, a.size + 2 * k);
    const CornerWeights<Vec<C>> c = corner_weights<Vec<C>>(r.fx, r.fy, load(a.weight + k));
    store(a.w00 + k, c.w00), store(a.w01 + k, c.w01), store(a.w10 + k, c.w10), store(a.w11 + k, c.w11);
    store_ints<C>(a.row + k, r.row), store_ints<C>(a.corners + k, r.corners);
  }
  if (p.mask == nullptr) return;
  for_levels(p, run.count, [&](int64_t k, int64_t l) {
    const bool* mask = p.mask + run.image * p.tokens + p.level[l].start;
    for (int64_t i = k; i < k + p.points; ++i) {
      a.corners[i] = unmasked_corners(a.corners[i], mask, a.row[i], p.level[l].width);
    }
  });
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
