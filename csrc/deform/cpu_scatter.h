// SPDX-License-Identifier: Apache-2.0
// Backward with respect to the values. One item is one band of pixel rows of one level of one (image, head): it alone
// adds to those rows, in the order of the queries, in a buffer of its own that stays in float32. So there are no
// atomics, and the result is the same however many bands and threads there are.
#pragma once

#include "cpu_backward.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kScatterPoints = 128;  // points per run

template <typename C>
struct Band {
  int64_t width, first_row, last_row;
  C* sums;         // [(last_row - first_row) * width, padded]: the gradient, channels in blocks
  int64_t padded;  // channels rounded up to blocks
};

template <typename C>
struct ScatterArrays {
  C *w00, *w01, *w10, *w11, *grad;
  Int<C>*row, *corners, *y0;
};

// Points [0, n) of a stream.
template <typename C>
void resolve_stream(const C* xy, const C* weight, C width, C height, int64_t n, const ScatterArrays<C>& a) {
  constexpr int w = kLanes<C>;
  for (int64_t k = 0; k < n; k += w) {
    const Vec<C> first = load(xy + 2 * k), second = load(xy + 2 * k + w);
    const Resolved<C> r =
        resolve<C>(even_lanes<C>(first, second), odd_lanes<C>(first, second), splat<C>(width), splat<C>(height));
    const CornerWeights<Vec<C>> c = corner_weights<Vec<C>>(r.fx, r.fy, load(weight + k));
    store(a.w00 + k, c.w00), store(a.w01 + k, c.w01), store(a.w10 + k, c.w10), store(a.w11 + k, c.w11);
    store_ints<C>(a.row + k, r.row), store_ints<C>(a.corners + k, r.corners), store_ints<C>(a.y0 + k, r.y0);
  }
}

// Vectors: of channels, 0 when unusual.
template <typename C, int Vectors>
inline void add_corner(const Band<C>& band, int64_t pixel, C weight, const C* grad) {
  constexpr int w = kLanes<C>;
  C* sums = band.sums + pixel * band.padded;
  const int64_t count = Vectors > 0 ? Vectors : band.padded / w;
  TP_UNROLL
  for (int64_t j = 0; j < count; ++j) store(sums + j * w, load(sums + j * w) + weight * load(grad + j * w));
}

// The corners of a point that lie in the band.
template <typename C>
inline Int<C> band_corners(const Band<C>& band, const ScatterArrays<C>& a, int64_t k) {
  const int64_t y0 = a.y0[k];
  const Int<C> up = y0 >= band.first_row && y0 < band.last_row ? 3 : 0;
  const Int<C> down = y0 + 1 >= band.first_row && y0 + 1 < band.last_row ? 12 : 0;
  return a.corners[k] & (up | down);
}

template <typename C, int Vectors>
inline void add_point(const Band<C>& band, const ScatterArrays<C>& a, int64_t k, Int<C> corners) {
  const int64_t pixel = a.row[k] - band.first_row * band.width;
  if (__builtin_expect(corners == 15, 1)) {
    add_corner<C, Vectors>(band, pixel, a.w00[k], a.grad);
    add_corner<C, Vectors>(band, pixel + 1, a.w01[k], a.grad);
    add_corner<C, Vectors>(band, pixel + band.width, a.w10[k], a.grad);
    add_corner<C, Vectors>(band, pixel + band.width + 1, a.w11[k], a.grad);
  } else {
    if (corners & 1) add_corner<C, Vectors>(band, pixel, a.w00[k], a.grad);
    if (corners & 2) add_corner<C, Vectors>(band, pixel + 1, a.w01[k], a.grad);
    if (corners & 4) add_corner<C, Vectors>(band, pixel + band.width, a.w10[k], a.grad);
    if (corners & 8) add_corner<C, Vectors>(band, pixel + band.width + 1, a.w11[k], a.grad);
  }
}

template <typename T, int Vectors>
void scatter_stream(const DeformParams& p, const PointStreams& s, int64_t image, int64_t head, int64_t l,
                    const Band<Compute<T>>& band, const ScatterArrays<Compute<T>>& a) {
  using C = Compute<T>;
  const int64_t run = kScatterPoints > p.points ? kScatterPoints / p.points : 1;
  const bool whole = band.first_row == 0 && band.last_row == p.level[l].height;
  const int32_t* order = s.order + (image - s.first_image) * s.order_stride;
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + image * p.tokens + p.level[l].start;
  const auto grad = [&](int64_t position) { return query_row<T>(p.grad_out, image, order[position]) + head * p.dim; };
  for (int64_t first = 0; first < p.queries; first += run) {
    const int64_t queries = p.queries - first < run ? p.queries - first : run, n = queries * p.points;
    const int64_t at = stream_at(p, s, image, head, l, first);
    resolve_stream<C>(static_cast<const C*>(s.xy) + 2 * at, static_cast<const C*>(s.weight) + at, level_width<C>(p, l),
                      level_height<C>(p, l), n, a);
    if (mask != nullptr) {
      for (int64_t k = 0; k < n; ++k) a.corners[k] = unmasked_corners(a.corners[k], mask, a.row[k], band.width);
    }
    for (int64_t i = first + run; whole && i < p.queries && i < first + 2 * run; ++i) {  // for the next run
      const char* row = reinterpret_cast<const char*>(grad(i));
      for (int64_t j = 0; j < p.dim * static_cast<int64_t>(sizeof(T)); j += 64) __builtin_prefetch(row + j);
    }
    for (int64_t i = 0; i < queries; ++i) {
      bool loaded = false;
      for (int64_t k = i * p.points; k < (i + 1) * p.points; ++k) {
        const Int<C> corners = band_corners(band, a, k);
        if (corners == 0) continue;
        if (!loaded) load_grad<T>(grad(first + i), p.dim, a.grad);
        loaded = true;
        add_point<C, Vectors>(band, a, k, corners);
      }
    }
  }
}

template <typename T>
void write_band(const DeformParams& p, const Band<Compute<T>>& band, T* to) {
  using C = Compute<T>;
  const int64_t step = p.heads * p.dim, first = band.first_row * band.width, last = band.last_row * band.width;
  const C* sums = band.sums;
  for (int64_t pixel = first; pixel < last; ++pixel) {
    for (int64_t d = 0; d < p.dim; d += kBlock<T>, sums += kBlock<T>) {
      const int64_t rest = p.dim - d;
      store_block(to + pixel * step + d, Block<C>{load(sums), load(sums + kLanes<C>)},
                  rest < kBlock<T> ? rest : kBlock<T>);
    }
  }
}

inline int64_t scatter_points(const DeformParams& p) {
  return padded_points(kScatterPoints > p.points ? kScatterPoints : p.points);
}

template <typename T>
void backward_values_item(const DeformParams& p, const PointStreams& s, int64_t item, int64_t bands, char* scratch) {
  using C = Compute<T>;
  const int64_t b = item % bands, l = item / bands % p.levels, head = item / (bands * p.levels) % p.heads;
  const int64_t image = s.first_image + item / (bands * p.levels * p.heads), points = scatter_points(p);
  const Level& level = p.level[l];
  Arena arena{scratch};
  ScatterArrays<C> a;
  a.w00 = arena.take<C>(points), a.w01 = arena.take<C>(points), a.w10 = arena.take<C>(points);
  a.w11 = arena.take<C>(points), a.row = arena.take<Int<C>>(points), a.corners = arena.take<Int<C>>(points);
  a.y0 = arena.take<Int<C>>(points);
  Band<C> band;
  band.width = level.width, band.padded = round_up(p.dim, kBlock<T>);
  band.first_row = level.height * b / bands, band.last_row = level.height * (b + 1) / bands;
  a.grad = arena.take<C>(band.padded);
  const int64_t size = (band.last_row - band.first_row) * band.width * band.padded;
  band.sums = arena.take<C>(size);
  __builtin_memset(band.sums, 0, size * sizeof(C));
  if (p.points > 0) {
    if (p.dim == 2 * kBlock<T>) {
      scatter_stream<T, 4>(p, s, image, head, l, band, a);
    } else if (p.dim == kBlock<T>) {
      scatter_stream<T, 2>(p, s, image, head, l, band, a);
    } else {
      scatter_stream<T, 0>(p, s, image, head, l, band, a);
    }
  }
  write_band<T>(p, band, static_cast<T*>(p.grad_value) + ((image * p.tokens + level.start) * p.heads + head) * p.dim);
}

inline int64_t backward_values_scratch(const DeformParams& p, int64_t bands) {  // enough for doubles
  int64_t most = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t pixels = ceil_div(p.level[l].height, bands) * p.level[l].width;
    most = pixels > most ? pixels : most;
  }
  return 8 * (7 * scatter_points(p) + (most + 1) * (p.dim + 32)) + 9 * 64;
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
