// SPDX-License-Identifier: Apache-2.0
// Which tokens and centers meet, and sums over windows of the map, in gather form: centers from their tokens, gradients
// of tokens from their centers, and adaptive average pooling with its adjoint. A warp forms 2 x 2 neighbouring results,
// which share most sources.
#pragma once

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune::cluster {

// Where a candidate lies in a token's slots along one axis, -1 for none.
__device__ __forceinline__ int64_t slot_of(const ClusterAxis& a, int64_t token, int64_t cell) {
  const int64_t slot = cell - home_cell(a, token) + a.reach;
  return in_range(slot, window_width(a)) ? slot : -1;
}
// The existing candidates of a token are its slots [slots_begin, slots_end).
__device__ __forceinline__ int64_t slots_begin(const ClusterAxis& a, int64_t home) {
  return home < a.reach ? a.reach - home : 0;
}
__device__ __forceinline__ int64_t slots_end(const ClusterAxis& a, int64_t home) {
  const int64_t rest = a.cells - home + a.reach;
  return rest < window_width(a) ? rest : window_width(a);
}

// The candidates of one token in its row of slots.
struct Candidates {
  int64_t y0, y1, x0, x1, width;

  __device__ __forceinline__ Candidates(const ClusterAxis& ya, const ClusterAxis& xa, int64_t y, int64_t x)
      : y0(slots_begin(ya, home_cell(ya, y))),
        y1(slots_end(ya, home_cell(ya, y))),
        x0(slots_begin(xa, home_cell(xa, x))),
        x1(slots_end(xa, home_cell(xa, x))),
        width(window_width(xa)) {}

  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int64_t i = y0; i < y1; ++i) {
      for (int64_t j = x0; j < x1; ++j) f(i * width + j);
    }
  }
  __device__ __forceinline__ bool has(int64_t slot) const {
    return in_range(slot / width - y0, y1 - y0) && in_range(slot % width - x0, x1 - x0);
  }
};

template <typename A>
__device__ __forceinline__ A lower(A a, A b) {
  return b < a ? b : a;
}

// ---- sums ----------------------------------------------------------------------------------------------------------

enum WindowSum { kMeans, kMeansAdjoint, kPools, kPoolsAdjoint };

// Which sources a result has and with which weight. Adjoints: results are tokens and sources are cells, else vice
// versa.
template <WindowSum Kind>
struct WindowRule {
  static constexpr bool kAdjoint = Kind == kMeansAdjoint || Kind == kPoolsAdjoint;
  static constexpr bool kPooling = Kind == kPools || Kind == kPoolsAdjoint;

  static __host__ __device__ int64_t results(const ClusterAxis& a) { return kAdjoint ? a.size : a.cells; }
  static __host__ __device__ int64_t sources(const ClusterAxis& a) { return kAdjoint ? a.cells : a.size; }
  static __device__ __forceinline__ int64_t begin(const ClusterAxis& a, int64_t i) {
    if constexpr (Kind == kMeans) return tokens_begin(a, i);
    if constexpr (Kind == kPools) return pool_begin(a, i);
    if constexpr (Kind == kPoolsAdjoint) return pool_first(a, i);
    const int64_t cell = home_cell(a, i) - a.reach;
    return cell > 0 ? cell : 0;
  }
  static __device__ __forceinline__ int64_t end(const ClusterAxis& a, int64_t i) {
    if constexpr (Kind == kMeans) return tokens_end(a, i);
    if constexpr (Kind == kPools) return pool_end(a, i);
    if constexpr (Kind == kPoolsAdjoint) return pool_last(a, i) + 1;
    const int64_t cell = home_cell(a, i) + a.reach + 1;
    return cell < a.cells ? cell : a.cells;
  }
  // Slot of a pair along one axis, -1 where the source does not belong to the result.
  static __device__ __forceinline__ int64_t slot(const ClusterAxis& a, int64_t result, int64_t source) {
    if constexpr (kPooling) return source >= begin(a, result) && source < end(a, result) ? 0 : -1;
    return kAdjoint ? slot_of(a, result, source) : slot_of(a, source, result);
  }
};

template <typename A>
struct WindowParams {
  const void* source = nullptr;  // [batch, sources, channels], unit inner stride
  int64_t batch_stride = 0, row_stride = 0, batch = 0, channels = 0;
  ClusterAxis y_axis, x_axis;
  const A* affinity = nullptr;  // [batch, tokens, slots]
  void* out = nullptr;          // [batch, results, channels]
  A* mass = nullptr;            // [batch, clusters]: made by the sums (or null), used by their adjoints
};

template <typename A>
__device__ __forceinline__ A floored(A mass) {  // NaN stays
  return mass < static_cast<A>(kMassFloor) ? static_cast<A>(kMassFloor) : mass;
}

// N values in accesses of at most 16 bytes.
template <int N, typename T, typename A>
__device__ __forceinline__ void store_values(T* to, const A* values) {
  constexpr int kW = N < kPack<T> ? N : kPack<T>;
#pragma unroll
  for (int i = 0; i < N; i += kW) {
    Pack<T, kW> pack;
#pragma unroll
    for (int k = 0; k < kW; ++k) pack.v[k] = from_acc<T>(values[i + k]);
    store_pack(to + i, pack);
  }
}

// A warp: 2 x 2 results, 32 * W channels. Every lane finds the weights of one source for the four results; then the
// warp goes through those sources together.
template <WindowSum Kind, typename T, typename Out, int W>
__global__ void __launch_bounds__(kBlock, 2) window_sums(WindowParams<Acc<T>> p, int64_t slices) {
  using A = Acc<T>;
  using Rule = WindowRule<Kind>;
  constexpr int kAhead = 4;  // sources whose loads are in flight together
  const int64_t rows = Rule::results(p.y_axis), cols = Rule::results(p.x_axis);
  const int64_t source_cols = Rule::sources(p.x_axis), source_count = Rule::sources(p.y_axis) * source_cols;
  const int64_t tile_rows = (rows + 1) / 2, tile_cols = (cols + 1) / 2,
                units = p.batch * tile_rows * tile_cols * slices;
  const int64_t clusters = p.y_axis.cells * p.x_axis.cells, slots_x = window_width(p.x_axis);
  const int64_t slots = window_width(p.y_axis) * slots_x;
  const int lane = threadIdx.x % 32;
  for (int64_t unit = global_thread() / 32; unit < units; unit += grid_threads() / 32) {
    const int64_t slice = unit % slices, tile = unit / slices;
    const int64_t col = tile % tile_cols * 2, row = tile / tile_cols % tile_rows * 2, b = tile / tile_cols / tile_rows;
    const int64_t last_row = row + 1 < rows ? row + 1 : row, last_col = col + 1 < cols ? col + 1 : col;
    const int64_t y0 = Rule::begin(p.y_axis, row), x0 = Rule::begin(p.x_axis, col);
    const int64_t width = Rule::end(p.x_axis, last_col) - x0, count = (Rule::end(p.y_axis, last_row) - y0) * width;
    const int64_t channel = slice * 32 * W + lane * W;
    const bool inside = channel < p.channels;
    const T* base = static_cast<const T*>(p.source) + b * p.batch_stride + channel;
    A sum[4][W] = {}, mass[4] = {};
    for (int64_t first = 0; first < count; first += 32) {
      const int64_t mine = first + lane;
      A weight[4] = {};
      int64_t source = 0;
      if (mine < count) {
        const int64_t sy = y0 + mine / width, sx = x0 + mine % width;
        source = sy * source_cols + sx;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t ry = row + i / 2, rx = col + i % 2;
          if (ry > last_row || rx > last_col) continue;
          const int64_t slot_y = Rule::slot(p.y_axis, ry, sy), slot_x = Rule::slot(p.x_axis, rx, sx);
          if (slot_y < 0 || slot_x < 0) continue;
          const int64_t token = Rule::kAdjoint ? b * rows * cols + ry * cols + rx : b * source_count + source;
          weight[i] = Rule::kPooling ? A(1) : p.affinity[token * slots + slot_y * slots_x + slot_x];
          if (Rule::kAdjoint) weight[i] /= floored(p.mass[b * clusters + source]);
          mass[i] += weight[i];
        }
      }
      const int here = count - first < 32 ? static_cast<int>(count - first) : 32;
      for (int k = 0; k < here; k += kAhead) {
        Pack<T, W> x[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int64_t from = warp_shuffle(source, k + j);
          x[j] = inside && k + j < here ? load_pack<W>(base + from * p.row_stride) : Pack<T, W>{};
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const A w = warp_shuffle(weight[i], k + j);
            if (w == A(0)) continue;  // not a source of this result; its values may be NaN
#pragma unroll
            for (int c = 0; c < W; ++c) sum[i][c] += w * to_acc(x[j].v[c]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t ry = row + i / 2, rx = col + i % 2;
      if (ry > last_row || rx > last_col) continue;
      const int64_t result = (b * rows + ry) * cols + rx;
      if constexpr (!Rule::kAdjoint) {
        const A total = warp_sum(mass[i]), divisor = floored(total);
#pragma unroll
        for (int c = 0; c < W; ++c) sum[i][c] /= divisor;
        if (slice == 0 && lane == 0 && p.mass != nullptr) p.mass[result] = total;
      }
      if (inside) store_values<W>(static_cast<Out*>(p.out) + result * p.channels + channel, sum[i]);
    }
  }
}

template <WindowSum Kind, typename T, typename Out, typename Launch>
void launch_window_sums(const Launch& launch, const WindowParams<Acc<T>>& p) {
  using Rule = WindowRule<Kind>;
  const int64_t tiles = p.batch * ((Rule::results(p.y_axis) + 1) / 2) * ((Rule::results(p.x_axis) + 1) / 2);
  if (tiles == 0) return;
  const bool packed = packable<T>(p.source, p.row_stride) && p.batch_stride % kPack<T> == 0 &&
                      p.channels % kPack<T> == 0 && packable<Out>(p.out, p.channels);
  const int64_t width = 32 * (packed ? kPack<T> : 1), wanted = (p.channels + width - 1) / width;
  const int64_t slices = wanted < 1 ? 1 : wanted;  // without channels there still is a mass
  launch(packed ? &window_sums<Kind, T, Out, kPack<T>> : &window_sums<Kind, T, Out, 1>,
         grid_for(tiles * slices, kWarps), kBlock, 0, p, slices);
}

template <typename T, typename Launch>
void launch_cluster_backward(const Launch& launch, const ClusterBackwardParams& q) {
  WindowParams<Acc<T>> p;
  p.source = q.grad, p.batch_stride = q.clusters * q.channels, p.row_stride = q.channels;
  p.batch = q.batch, p.channels = q.channels, p.y_axis = q.y_axis, p.x_axis = q.x_axis;
  p.affinity = static_cast<const Acc<T>*>(q.affinity);
  p.out = q.grad_x, p.mass = static_cast<Acc<T>*>(const_cast<void*>(q.mass));
  if (q.iters == 0) return launch_window_sums<kPoolsAdjoint, T, T>(launch, p);
  launch_window_sums<kMeansAdjoint, T, T>(launch, p);
}

}  // namespace tokenprune::cluster
