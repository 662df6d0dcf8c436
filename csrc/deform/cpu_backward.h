// SPDX-License-Identifier: Apache-2.0
// Backward in three steps. (1) The points of every query are written to streams, one per (image, head, level), in the
// order in which the queries are visited. (2) One item takes one band of pixel rows of one stream: it alone adds to
// those rows, in stream order, in a float32 buffer of its own, so that the result is the same however many bands and
// threads there are; the gradients of a point come from the band of its corner (y0, x0). (3) Gradients of points become
// gradients of the inputs.
#pragma once

#include "cpu_points.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

inline int64_t stream_start(const DeformParams& p, const DeformStreams& s, int64_t image, int64_t head, int64_t level) {
  return ((image - s.first_image) * p.heads + head) * p.levels * p.queries * p.points + level * p.queries * p.points;
}
inline const int32_t* order_of(const DeformStreams& s, int64_t image) {
  return s.order + (image - s.first_image) * s.order_stride;
}

// ---- step 1

template <typename T>
void stream_queries(const DeformParams& p, const DeformStreams& s, int64_t image, int64_t begin, int64_t count,
                    char* scratch) {
  using C = Compute<T>;
  const int64_t n = row_points(p), run = run_queries(p, n);
  const int32_t* order = order_of(s, image) + begin;
  Arena arena{scratch};
  const PointArrays<C> a = PointArrays<C>::take(arena, run * n);
  const QueryTables<C> tables = query_tables<C>(p, image, order, count, arena);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t first = 0; first < count; first += run) {
      const int64_t queries = count - first < run ? count - first : run;
      stage<T>(p, tables, image, head, order + first, first, queries, a.xy, a.weight);
      for (int64_t l = 0; l < p.levels; ++l) {
        const int64_t to = stream_start(p, s, image, head, l) + (begin + first) * p.points;
        C *xy = static_cast<C*>(s.pixels) + 2 * to, *weight = static_cast<C*>(s.weights) + to;
        for (int64_t i = 0; i < queries; ++i) {
          const int64_t from = i * n + l * p.points;
          for (int64_t k = 0; k < 2 * p.points; ++k) xy[2 * i * p.points + k] = a.xy[2 * from + k];
          for (int64_t k = 0; k < p.points; ++k) weight[i * p.points + k] = a.weight[from + k];
        }
      }
    }
  }
}

// ---- step 2

constexpr int64_t kGradPoints = 128;  // points per run

template <typename C>
struct GradArrays {
  C *w00, *w01, *w10, *w11, *dots;  // corner weights; [points, 4] dot products of grad and corner
  C *fx, *fy, *grad;                // fractions; [padded dim] gradient of one output row, in blocks
  Int<C>*row, *corners, *y0;
  static GradArrays take(Arena& arena, int64_t points, int64_t padded) {
    const int64_t n = round_up(points, 16) + 16;
    GradArrays a;
    a.w00 = arena.take<C>(n), a.w01 = arena.take<C>(n), a.w10 = arena.take<C>(n), a.w11 = arena.take<C>(n);
    a.dots = arena.take<C>(4 * n), a.fx = arena.take<C>(n), a.fy = arena.take<C>(n), a.grad = arena.take<C>(padded);
    a.row = arena.take<Int<C>>(n), a.corners = arena.take<Int<C>>(n), a.y0 = arena.take<Int<C>>(n);
    return a;
  }
};

// A band of pixel rows of one level of one (image, head).
template <typename T>
struct Band {
  using C = Compute<T>;
  const T* value;  // pixel 0 of the level
  int64_t stride;  // between its pixels
  int64_t width, height, first_row, last_row;
  C* sums;  // [(last_row - first_row) * width, padded], the gradient
  int64_t dim, padded;
};

// Adds to one corner and returns its dot product, lane by lane. `add`: the corner lies in the band.
template <typename T, int Blocks>
inline Vec<Compute<T>> visit_corner(const Band<T>& band, const Compute<T>* grad, int64_t pixel, Compute<T> weight,
                                    bool add) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const T* value = band.value + pixel * band.stride;
  C* sums = band.sums + (pixel - band.first_row * band.width) * band.padded;
  const int64_t blocks = Blocks > 0 ? Blocks : band.padded / kBlock<T>;
  Vec<C> dot{};
  TP_UNROLL
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t rest = band.dim - j * kBlock<T>;
    const Block<C> v =
        Blocks > 0 || rest >= kBlock<T> ? load_block(value + j * kBlock<T>) : load_block(value + j * kBlock<T>, rest);
    const Vec<C> a = load(grad + 2 * j * w), b = load(grad + (2 * j + 1) * w);
    dot += a * v.a, dot += b * v.b;
    if (!add) continue;
    store(sums + 2 * j * w, load(sums + 2 * j * w) + weight * a);
    store(sums + (2 * j + 1) * w, load(sums + (2 * j + 1) * w) + weight * b);
  }
  return dot;
}

template <typename T, int Blocks>
inline void visit_point(const Band<T>& band, const GradArrays<Compute<T>>& a, int64_t k) {
  using C = Compute<T>;
  const Int<C> corners = a.corners[k];
  const int64_t row = a.row[k], y0 = a.y0[k];
  const bool up = y0 >= band.first_row && y0 < band.last_row;
  const bool down = y0 + 1 >= band.first_row && y0 + 1 < band.last_row;
  if (__builtin_expect(corners == 15 && up && down, 1)) {
    const Vec<C> d00 = visit_corner<T, Blocks>(band, a.grad, row, a.w00[k], true);
    const Vec<C> d01 = visit_corner<T, Blocks>(band, a.grad, row + 1, a.w01[k], true);
    const Vec<C> d10 = visit_corner<T, Blocks>(band, a.grad, row + band.width, a.w10[k], true);
    const Vec<C> d11 = visit_corner<T, Blocks>(band, a.grad, row + band.width + 1, a.w11[k], true);
    store_sums<C>(d00, d01, d10, d11, a.dots + 4 * k);
    return;
  }
  Vec<C> d00{}, d01{}, d10{}, d11{};
  if (up || down) {
    if (corners & 1) d00 = visit_corner<T, Blocks>(band, a.grad, row, a.w00[k], up);
    if (corners & 2) d01 = visit_corner<T, Blocks>(band, a.grad, row + 1, a.w01[k], up);
    if (corners & 4) d10 = visit_corner<T, Blocks>(band, a.grad, row + band.width, a.w10[k], down);
    if (corners & 8) d11 = visit_corner<T, Blocks>(band, a.grad, row + band.width + 1, a.w11[k], down);
  }
  store_sums<C>(d00, d01, d10, d11, a.dots + 4 * k);
}

// Points [0, n) of a stream: fractions, corners and corner weights.
template <typename C>
void resolve_stream(const C* xy, const C* weight, C width, C height, int64_t n, const GradArrays<C>& a) {
  constexpr int w = kLanes<C>;
  for (int64_t k = 0; k < n; k += w) {
    const Vec<C> first = load(xy + 2 * k), second = load(xy + 2 * k + w);
    const Resolved<C> r =
        resolve<C>(even_lanes<C>(first, second), odd_lanes<C>(first, second), splat<C>(width), splat<C>(height));
    const CornerWeights<Vec<C>> c = corner_weights<Vec<C>>(r.fx, r.fy, load(weight + k));
    store(a.w00 + k, c.w00), store(a.w01 + k, c.w01), store(a.w10 + k, c.w10), store(a.w11 + k, c.w11);
    store(a.fx + k, r.fx), store(a.fy + k, r.fy);
    store_ints<C>(a.row + k, r.row), store_ints<C>(a.corners + k, r.corners), store_ints<C>(a.y0 + k, r.y0);
  }
}

// Dot products -> gradients of the weights and of the pixel coordinates, of the points that the band owns. A point
// without corners has none, whatever its weight is.
template <typename T>
void finish_points(const Band<T>& band, const GradArrays<Compute<T>>& a, const Compute<T>* weight, int64_t n,
                   Compute<T>* grad_xy, Compute<T>* grad_weight) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const bool all = band.first_row == 0 && band.last_row == band.height;
  for (int64_t k = 0; k < n; k += w) {
    const C* d = a.dots + 4 * k;
    const Vec<C> v0 = load(d), v1 = load(d + w), v2 = load(d + 2 * w), v3 = load(d + 3 * w);
    const Vec<C> e0 = even_lanes<C>(v0, v1), e1 = even_lanes<C>(v2, v3);
    const Vec<C> o0 = odd_lanes<C>(v0, v1), o1 = odd_lanes<C>(v2, v3);
    const PointGradient<Vec<C>> g =
        point_gradient<Vec<C>>(load(a.fx + k), load(a.fy + k), load(weight + k), even_lanes<C>(e0, e1),
                               even_lanes<C>(o0, o1), odd_lanes<C>(e0, e1), odd_lanes<C>(o0, o1));
    IntVec<C> corners, y0;
    __builtin_memcpy(&corners, a.corners + k, sizeof(corners));
    __builtin_memcpy(&y0, a.y0 + k, sizeof(y0));
    const Vec<C> zero{}, gw = corners != 0 ? g.weight : zero, gx = corners != 0 ? g.x : zero,
                         gy = corners != 0 ? g.y : zero;
    const Vec<C> xy[2] = {zip_lanes<C, 0>(gx, gy), zip_lanes<C, 1>(gx, gy)};
    if (all && k + w <= n) {
      store(grad_weight + k, gw), store(grad_xy + 2 * k, xy[0]), store(grad_xy + 2 * k + w, xy[1]);
      continue;
    }
    for (int l = 0; l < w && k + l < n; ++l) {
      const int64_t y = y0[l] < 0 ? 0 : y0[l];  // points above the level and points without corners: the first band's
      if (!all && (y < band.first_row || y >= band.last_row)) continue;
      grad_weight[k + l] = gw[l], grad_xy[2 * (k + l)] = gx[l], grad_xy[2 * (k + l) + 1] = gy[l];
    }
  }
}

template <typename T>
inline void load_grad(const DeformParams& p, const T* from, int64_t padded, Compute<T>* to) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  for (int64_t d = 0; d < padded; d += kBlock<T>) {
    const int64_t rest = p.dim - d;
    const Block<C> g = rest >= kBlock<T> ? load_block(from + d) : load_block(from + d, rest);
    store(to + d, g.a), store(to + d + w, g.b);
  }
}

template <typename T>
void write_band(const DeformParams& p, const Band<T>& band, T* to) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const int64_t pixels = (band.last_row - band.first_row) * band.width, step = p.heads * p.dim;
  to += band.first_row * band.width * step;
  for (int64_t i = 0; i < pixels; ++i, to += step) {
    const C* sums = band.sums + i * band.padded;
    for (int64_t d = 0; d < p.dim; d += kBlock<T>, sums += kBlock<T>) {
      const int64_t rest = p.dim - d;
      store_block(to + d, Block<C>{load(sums), load(sums + w)}, rest < kBlock<T> ? rest : kBlock<T>);
    }
  }
}

template <typename T, int Blocks>
void backward_stream(const DeformParams& p, const DeformStreams& s, int64_t image, int64_t head, int64_t l,
                     const Band<T>& band, const GradArrays<Compute<T>>& a) {
  using C = Compute<T>;
  const Level& level = p.level[l];
  const int64_t run = kGradPoints > p.points ? kGradPoints / p.points : 1, start = stream_start(p, s, image, head, l);
  const C *xy = static_cast<const C*>(s.pixels) + 2 * start, *weight = static_cast<const C*>(s.weights) + start;
  C *grad_xy = static_cast<C*>(s.grad_pixels) + 2 * start, *grad_weight = static_cast<C*>(s.grad_weights) + start;
  const int32_t* order = order_of(s, image);
  const T* grad = static_cast<const T*>(p.grad_out.data) + image * p.grad_out.batch_stride + head * p.dim;
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + image * p.tokens + level.start;
  for (int64_t first = 0; first < p.queries; first += run) {
    const int64_t queries = p.queries - first < run ? p.queries - first : run;
    const int64_t at = first * p.points, n = queries * p.points;
    resolve_stream<C>(xy + 2 * at, weight + at, static_cast<C>(level.width), static_cast<C>(level.height), n, a);
    if (mask != nullptr) {
      for (int64_t k = 0; k < n; ++k) a.corners[k] = unmasked_corners(a.corners[k], mask, a.row[k], level.width);
    }
    for (int64_t i = 0; i < queries; ++i) {
      load_grad<T>(p, grad + order[first + i] * p.grad_out.query_stride, band.padded, a.grad);
      for (int64_t k = i * p.points; k < (i + 1) * p.points; ++k) visit_point<T, Blocks>(band, a, k);
    }
    finish_points<T>(band, a, weight + at, n, grad_xy + 2 * at, grad_weight + at);
  }
}

// item = ((image in the streams) * heads + head) * levels * bands + level * bands + band
template <typename T>
void backward_item(const DeformParams& p, const DeformStreams& s, int64_t item, int64_t bands, char* scratch) {
  using C = Compute<T>;
  const int64_t b = item % bands, l = item / bands % p.levels, head = item / (bands * p.levels) % p.heads;
  const int64_t image = s.first_image + item / (bands * p.levels * p.heads);
  const Level& level = p.level[l];
  Arena arena{scratch};
  Band<T> band;
  band.dim = p.dim, band.padded = round_up(p.dim, kBlock<T>);
  band.width = level.width, band.height = level.height;
  band.first_row = level.height * b / bands, band.last_row = level.height * (b + 1) / bands;
  band.value =
      static_cast<const T*>(p.value) + image * p.value_batch + head * p.value_head + level.start * p.value_token;
  band.stride = p.value_token;
  const int64_t points = kGradPoints > p.points ? kGradPoints : p.points;
  const GradArrays<C> a = GradArrays<C>::take(arena, points, band.padded + 16);
  const int64_t size = (band.last_row - band.first_row) * band.width * band.padded;
  band.sums = arena.take<C>(size);
  __builtin_memset(band.sums, 0, size * sizeof(C));
  if (p.points > 0) {
    if (p.dim == 2 * kBlock<T>) {
      backward_stream<T, 2>(p, s, image, head, l, band, a);
    } else if (p.dim == kBlock<T>) {
      backward_stream<T, 1>(p, s, image, head, l, band, a);
    } else {
      backward_stream<T, 0>(p, s, image, head, l, band, a);
    }
  }
  write_band<T>(p, band, static_cast<T*>(p.grad_value) + ((image * p.tokens + level.start) * p.heads + head) * p.dim);
}

inline int64_t backward_scratch(const DeformParams& p, int64_t bands) {  // enough for doubles
  int64_t most = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t pixels = ceil_div(p.level[l].height, bands) * p.level[l].width;
    most = pixels > most ? pixels : most;
  }
  const int64_t points = round_up(kGradPoints > p.points ? kGradPoints : p.points, 16) + 16;
  return 8 * (14 * points + (most + 1) * (p.dim + 32) + 64) + 16 * 64;
}

// ---- step 3

// One row of points: gradients of the pixel coordinates -> of the locations or offsets. `scale` null: the same.
template <typename O, typename C>
inline void write_scaled(const C* from, const C* scale, int64_t n, O* to) {
  for (int64_t j = 0; j < n; ++j) {
    // 0 * NaN must stay 0: a point that reads nothing has no gradient
    to[j] = from_float<O, C>(scale == nullptr || from[j] == 0 ? from[j] : from[j] * scale[j]);
  }
}

template <typename O, typename C>
void reference_gradient(const DeformParams& p, int64_t image, int64_t query, const C* grads, const C* size_xy) {
  const int64_t n = row_points(p), columns = p.reference_columns;
  C* to = static_cast<C*>(p.grad_reference) + (image * p.queries + query) * p.reference_levels * columns;
  for (int64_t j = 0; j < p.reference_levels * columns; ++j) to[j] = 0;
  const O* offsets =
      static_cast<const O*>(p.locations.data) + image * p.locations.batch_stride + query * p.locations.query_stride;
  const C factor = C(0.5) / static_cast<C>(p.points);
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t j = 0; j < 2 * n; ++j) {
      const C g = grads[h * 2 * n + j] * size_xy[j];
      if (g == 0) continue;
      C* r = to + (p.reference_levels == 1 ? 0 : j / (2 * p.points)) * columns + j % 2;
      r[0] += g;
      if (columns == 4) r[2] += g * to_float(offsets[h * 2 * n + j]) * factor;
    }
  }
}

// a = softmax, g = gradient of a: a * (g - a.g)
template <typename O, typename C>
inline void write_logits(const C* a, const C* g, int64_t n, O* to) {
  C dot = 0;
  for (int64_t j = 0; j < n; ++j) dot += a[j] * g[j];
  for (int64_t j = 0; j < n; ++j) to[j] = from_float<O, C>(a[j] * (g[j] - dot));
}

template <typename O, typename C>
void gradients_of_queries(const DeformParams& p, const DeformStreams& s, int64_t image, int64_t begin, int64_t count,
                          char* scratch) {
  const int64_t n = row_points(p), all = p.heads * n;
  const int32_t* order = order_of(s, image) + begin;
  Arena arena{scratch};
  const QueryTables<C> tables = query_tables<C>(p, image, order, count, arena);
  C *xy = arena.take<C>(2 * all), *g = arena.take<C>(n), *a = arena.take<C>(n);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t query = order[i], row = image * p.queries + query;
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t l = 0; l < p.levels; ++l) {
        const int64_t from = stream_start(p, s, image, h, l) + (begin + i) * p.points, to = l * p.points;
        const C *gxy = static_cast<const C*>(s.grad_pixels) + 2 * from,
                *gw = static_cast<const C*>(s.grad_weights) + from, *w = static_cast<const C*>(s.weights) + from;
        for (int64_t k = 0; k < 2 * p.points; ++k) xy[h * 2 * n + 2 * to + k] = gxy[k];
        for (int64_t k = 0; k < p.points; ++k) g[to + k] = gw[k], a[to + k] = w[k];
      }
      O* weights = static_cast<O*>(p.grad_weights) + row * all + h * n;
      O* locations = static_cast<O*>(p.grad_locations) + (row * all + h * n) * 2;
      if (p.fused) {
        write_logits(a, g, n, weights);
        write_scaled(xy + h * 2 * n, tables.scale == nullptr ? nullptr : tables.scale + i * 2 * n, 2 * n, locations);
      } else {
        for (int64_t j = 0; j < n; ++j) weights[j] = from_float<O, C>(g[j]);
        write_scaled(xy + h * 2 * n, tables.size_xy, 2 * n, locations);
      }
    }
    if (p.grad_reference != nullptr) reference_gradient<O>(p, image, query, xy, tables.size_xy);
  }
}

template <typename T>
void point_gradients_of(const DeformParams& p, const DeformStreams& s, int64_t image, int64_t begin, int64_t count,
                        char* scratch) {
  if (p.fused && p.offsets_are_values) {
    gradients_of_queries<T, Compute<T>>(p, s, image, begin, count, scratch);
  } else {
    gradients_of_queries<Compute<T>, Compute<T>>(p, s, image, begin, count, scratch);
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
