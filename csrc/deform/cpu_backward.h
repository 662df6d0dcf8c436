// SPDX-License-Identifier: Apache-2.0
// Backward with respect to the points: dot products of the output's gradient with the four corners, query by query as
// in the forward, and from them the gradients of locations and weights, or of references, offsets and logits. The
// points are written down in streams for the gradient of the values (cpu_scatter.h).
#pragma once

#include "cpu_fetch.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// Where the streams hold the points of the query at a position of the order.
inline int64_t stream_at(const DeformParams& p, const PointStreams& s, int64_t image, int64_t head, int64_t level,
                         int64_t position) {
  return ((((image - s.first_image) * p.heads + head) * p.levels + level) * p.queries + position) * p.points;
}

template <typename C>
void write_streams(const DeformParams& p, const PointStreams& s, QueryRange run, const PointArrays<C>& a) {
  const C *from_xy = a.xy, *from_weight = a.weight;
  for (int64_t position = run.begin; position < run.begin + run.count; ++position) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t l = 0; l < p.levels; ++l) {
        const int64_t at = stream_at(p, s, run.image, head, l, position);
        C *xy = static_cast<C*>(s.xy) + 2 * at, *weight = static_cast<C*>(s.weight) + at;
        for (int64_t k = 0; k < 2 * p.points; ++k) xy[k] = *from_xy++;
        for (int64_t k = 0; k < p.points; ++k) weight[k] = *from_weight++;
      }
    }
  }
}

// One row of the output's gradient, one head, as blocks; zeros beyond its channels.
template <typename T>
inline void load_grad(const T* from, int64_t dim, Compute<T>* to) {
  using C = Compute<T>;
  for (int64_t d = 0; d < dim; d += kBlock<T>) {
    const Block<C> g = dim - d >= kBlock<T> ? load_block(from + d) : load_block(from + d, dim - d);
    store(to + d, g.a), store(to + d + kLanes<C>, g.b);
  }
}

// Lane by lane dot product. Blocks: of channels, 0 when that is not whole or unusual.
template <typename T, int Blocks>
inline Vec<Compute<T>> corner_dot(const T* value, const Compute<T>* grad, int64_t dim) {
  using C = Compute<T>;
  Vec<C> a{}, b{};
  const int64_t whole = Blocks > 0 ? Blocks : dim / kBlock<T>;
  TP_UNROLL
  for (int64_t j = 0; j < whole; ++j) {
    const Block<C> v = load_block(value + j * kBlock<T>);
    a += v.a * load(grad + j * kBlock<T>), b += v.b * load(grad + j * kBlock<T> + kLanes<C>);
  }
  if (Blocks == 0 && whole * kBlock<T> < dim) {
    const int64_t d = whole * kBlock<T>;
    const Block<C> v = load_block(value + d, dim - d);
    a += v.a * load(grad + d), b += v.b * load(grad + d + kLanes<C>);
  }
  return a + b;
}

// dots[4 * k + c] of the points k.. of one (query, head).
template <typename T, int Blocks>
inline void head_dots(const DeformParams& p, const T* base, const PointArrays<Compute<T>>& a, int64_t k,
                      const Compute<T>* grad, Compute<T>* dots) {
  using C = Compute<T>;
  const int64_t right = p.value_token;
  for (int64_t l = 0; l < p.levels; ++l) {
    const T* level = base + p.level[l].start * right;
    const int64_t down = p.level[l].width * right;
    for (int64_t i = 0; i < p.points; ++i, ++k) {
      const int64_t at = static_cast<int64_t>(a.row[k]) * right;  // outside for a corner that is
      const Int<C> corners = p.dim == 0 ? 0 : a.corners[k];
      const auto dot = [&](int64_t offset) { return corner_dot<T, Blocks>(level + offset, grad, p.dim); };
      Vec<C> d[4] = {};
      if (__builtin_expect(corners == 15, 1)) {
        d[0] = dot(at), d[1] = dot(at + right), d[2] = dot(at + down), d[3] = dot(at + down + right);
      } else {
        if (corners & 1) d[0] = dot(at);
        if (corners & 2) d[1] = dot(at + right);
        if (corners & 4) d[2] = dot(at + down);
        if (corners & 8) d[3] = dot(at + down + right);
      }
      store_sums<C>(d[0], d[1], d[2], d[3], dots + 4 * k);
    }
  }
}

// Gradients of the pixel coordinates and the weights of a run. A point without corners has none, whatever its weight.
template <typename C>
void finish_points(const PointArrays<C>& a, int64_t n, const C* dots, C* grad_xy, C* grad_weight) {
  constexpr int w = kLanes<C>;
  const Vec<C> zero{};
  for (int64_t k = 0; k < n; k += w) {
    const C* d = dots + 4 * k;
    const Vec<C> v0 = load(d), v1 = load(d + w), v2 = load(d + 2 * w), v3 = load(d + 3 * w);
    const Vec<C> e0 = even_lanes<C>(v0, v1), e1 = even_lanes<C>(v2, v3);
    const Vec<C> o0 = odd_lanes<C>(v0, v1), o1 = odd_lanes<C>(v2, v3);
    const Resolved<C> r = resolve_pairs(a.xy + 2 * k, a.size + 2 * k);
    const PointGradient<Vec<C>> g =
        point_gradient<Vec<C>>(r.fx, r.fy, load(a.weight + k), even_lanes<C>(e0, e1), even_lanes<C>(o0, o1),
                               odd_lanes<C>(e0, e1), odd_lanes<C>(o0, o1));
    const IntVec<C> corners = load_ints<C>(a.corners + k);
    const Vec<C> x = corners != 0 ? g.x : zero, y = corners != 0 ? g.y : zero;
    store(grad_weight + k, corners != 0 ? g.weight : zero);
    store(grad_xy + 2 * k, zip_lanes<C, 0>(x, y)), store(grad_xy + 2 * k + w, zip_lanes<C, 1>(x, y));
  }
}

// Pixels per unit of an offset of query i of a run, for references with boxes.
template <typename C>
void fill_box_units(const DeformParams& p, QueryRange run, C* unit) {
  const C factor = C(0.5) / static_cast<C>(p.points);
  for (int64_t i = 0; i < run.count; ++i, unit += 2 * query_points(p)) {
    for_levels(p, 1, [&](int64_t k, int64_t l) {
      const C* r = reference_row<C>(p, run.image, run.query(i), l);
      fill_pairs(unit + 2 * k, p.points, r[2] * factor * level_width<C>(p, l), r[3] * factor * level_height<C>(p, l));
    });
  }
}

// Sums over the heads and points of one query.
template <typename O, typename C>
void reference_gradient(const DeformParams& p, int64_t image, int64_t query, const C* grad_xy) {
  const int64_t columns = p.reference_columns, cells = p.reference_levels * columns;
  C* all = static_cast<C*>(p.grad_reference) + (image * p.queries + query) * cells;
  for (int64_t j = 0; j < cells; ++j) all[j] = 0;
  const O* offsets = query_row<O>(p.locations, image, query);
  const C factor = C(0.5) / static_cast<C>(p.points);
  for_levels(p, 1, [&](int64_t k, int64_t l) {
    C* to = all + (p.reference_levels == 1 ? 0 : l) * columns;
    const C size[2] = {level_width<C>(p, l), level_height<C>(p, l)};
    for (int64_t j = 2 * k; j < 2 * (k + p.points); ++j) {
      const C g = grad_xy[j] * size[j % 2];
      if (g == 0) continue;  // 0 * NaN must stay 0: a point that reads nothing has no gradient
      to[j % 2] += g;
      if (columns == 4) to[2 + j % 2] += g * to_float(offsets[j]) * factor;
    }
  });
}

// x *= unit where x is not 0: 0 * NaN must stay 0
template <typename C>
inline void scale_gradient(C* x, const C* unit, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes<C>) {
    const Vec<C> v = load(x + j);
    store(x + j, v == C(0) ? Vec<C>{} : v * load(unit + j));
  }
}

// From the pixel coordinates and weights of a run to what the caller gave. O: dtype of that.
template <typename O, typename C>
void write_gradients(const DeformParams& p, QueryRange run, const PointArrays<C>& a, C* grad_xy, C* grad_weight,
                     C* unit) {
  const int64_t n = run.count * query_points(p);
  if (p.grad_reference != nullptr) {
    for (int64_t i = 0; i < run.count; ++i) {
      reference_gradient<O, C>(p, run.image, run.query(i), grad_xy + 2 * i * query_points(p));
    }
  }
  if (!p.fused) {
    scale_gradient(grad_xy, a.size, 2 * n);
  } else {
    softmax_backward_rows<C>(a.weight, grad_weight, run.count * p.heads, head_points(p));
    if (p.reference_columns == 4) {
      fill_box_units(p, run, unit);
      scale_gradient<C>(grad_xy, unit, 2 * n);
    }
  }
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t to = (run.image * p.queries + run.query(i)) * query_points(p), from = i * query_points(p);
    narrow<O>(grad_xy + 2 * from, static_cast<O*>(p.grad_locations) + 2 * to, 2 * query_points(p));
    narrow<O>(grad_weight + from, static_cast<O*>(p.grad_weights) + to, query_points(p));
  }
}

template <typename T>
void backward_queries(const DeformParams& p, const PointStreams& s, QueryRange range, char* scratch) {
  using C = Compute<T>;
  Arena arena{scratch};
  const PointArrays<C> a = take_points<C>(p, arena);
  const int64_t padded = padded_points(run_queries(p) * query_points(p));
  C *dots = arena.take<C>(4 * padded), *grad_xy = arena.take<C>(2 * padded), *grad_weight = arena.take<C>(padded);
  C *unit = arena.take<C>(2 * padded), *grad = arena.take<C>(round_up(p.dim, kBlock<T>));
  const T* value = static_cast<const T*>(p.value) + range.image * p.value_batch;
  fetch<T>(p, range);
  fetch_rows(p.grad_out, range, p.heads * p.dim, sizeof(T));
  for_runs(p, range, [&](QueryRange run) {
    stage<T>(p, run, a);
    resolve_points(p, run, a);
    write_streams(p, s, run, a);
    int64_t k = 0;
    for (int64_t i = 0; i < run.count; ++i) {
      const T* row = query_row<T>(p.grad_out, run.image, run.query(i));
      for (int64_t head = 0; head < p.heads; ++head, k += head_points(p)) {
        load_grad<T>(row + head * p.dim, p.dim, grad);
        const T* base = value + head * p.value_head;
        if (p.dim == 2 * kBlock<T>) {
          head_dots<T, 2>(p, base, a, k, grad, dots);
        } else if (p.dim == kBlock<T>) {
          head_dots<T, 1>(p, base, a, k, grad, dots);
        } else {
          head_dots<T, 0>(p, base, a, k, grad, dots);
        }
      }
    }
    finish_points<C>(a, run.count * query_points(p), dots, grad_xy, grad_weight);
    if (p.fused && p.offsets_are_values) {
      write_gradients<T, C>(p, run, a, grad_xy, grad_weight, unit);
    } else {
      write_gradients<C, C>(p, run, a, grad_xy, grad_weight, unit);
    }
  });
}

inline int64_t backward_points_scratch(const DeformParams& p) {  // enough for doubles
  return run_scratch(p) + 8 * (9 * padded_points(run_queries(p) * query_points(p)) + p.dim + 32) + 5 * 64;
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
