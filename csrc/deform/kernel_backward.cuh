// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the backward of deformable attention, first half: the gradients of points, weights and references.
//
// The pairs are laid out as in the forward. A point needs the dot products of the output's gradient with its four
// corners; everything else follows per point. On the way every point joins the list of the pixel under its corner (y,
// x); kernel_lists.cuh sums the gradient of the values over these lists in a fixed order, without float atomics.
#pragma once

#include "kernel_points.cuh"

namespace tokenprune {

// Workspace of the backward. Points are numbered [batch * heads][queries][levels * points]; a segment is one (image,
// head), and numbers within it are int32.
template <typename A>
struct DeformLists {
  int32_t* start = nullptr;           // [batch * heads][tokens + 1]: counts, then where the list of each pixel begins
  int32_t* cell = nullptr;            // [points]: the pixel in whose list the point is, -1 for none
  int32_t* slot = nullptr;            // [points]: its place there, in the order of arrival
  int32_t* member = nullptr;          // [points]: the lists
  Pack<A, 4>* weights = nullptr;      // [points]: what the pixel, its right, lower and lower right neighbour receive
  Pack<A, 2>* pixel_grads = nullptr;  // [points] derivatives by x and y in pixels; null: no reference wants them
};

// The four sums over the lanes of a pair at once: lane k of every four gets the k-th.
template <typename A>
__device__ __forceinline__ A reduce_corners(const A (&dot)[4], const DeformLane& lane) {
  const bool odd = lane.lane & 1, upper = lane.lane & 2;
  A first = odd ? dot[1] : dot[0], second = odd ? dot[3] : dot[2];
  first += warp_shuffle_xor(odd ? dot[0] : dot[1], 1);
  second += warp_shuffle_xor(odd ? dot[2] : dot[3], 1);
  A sum = upper ? second : first;
  sum += warp_shuffle_xor(upper ? first : second, 2);
  for (int mask = 4; mask < lane.lanes; mask *= 2) sum += warp_shuffle_xor(sum, mask);
  return sum;
}

// A point's place in shared memory between the phases; its lane writes and reads it.
template <typename A>
struct PointState {
  A fx, fy, weight;
  uint32_t reads;
  __device__ __forceinline__ explicit PointState(const Pack<A, 4>& v)
      : fx(v.v[0]), fy(v.v[1]), weight(v.v[2]), reads(static_cast<uint32_t>(v.v[3])) {}
  __device__ __forceinline__ PointGradient<A> gradient(const Pack<A, 4>& dot) const {
    if (reads == 0) return {A(0), A(0), A(0)};
    return point_gradient(fx, fy, weight, reads & 1 ? dot.v[0] : A(0), reads & 2 ? dot.v[1] : A(0),
                          reads & 4 ? dot.v[2] : A(0), reads & 8 ? dot.v[3] : A(0));
  }
};

// The lists hold pixels only: a point left of (above) its level counts for column (row) 0.
template <typename A>
__device__ __forceinline__ void enter_list(const DeformLists<A>& lists, const DeformParams& p, int64_t segment,
                                           int64_t point, const Sample<A>& s, A weight) {
  if (s.reads == 0) {
    lists.cell[point] = -1;
    return;
  }
  Pack<A, 4> w = s.weights(weight);
  int32_t cell = s.row;
  if (s.x < 0) w = {{w.v[1], A(0), w.v[3], A(0)}}, cell += 1;
  if (s.y < 0) w = {{w.v[2], w.v[3], A(0), A(0)}}, cell += s.width;
  lists.weights[point] = w;
  lists.cell[point] = cell;
  lists.slot[point] = atomicAdd(lists.start + segment * (p.tokens + 1) + 1 + cell, int32_t{1});
}

template <typename T, int W, bool Fused>
struct PairBackward {
  using A = Acc<T>;
  const DeformParams& p;
  const DeformLane& lane;
  const PairPoints<T, Fused>& points;
  const LevelBox* levels;
  int64_t b, m;
  Pack<A, 4>*state, *dots;  // [pitch]
  Pack<uint32_t, 4>* places;

  // State and places of the points [first, first + count); f(i, sample, weight) for each of this lane's.
  template <typename F>
  __device__ __forceinline__ void prepare(int first, int count, F&& f) {
    const uint32_t pitch = ValueRows<T, W>::pitch(p);
    warp_sync();  // the previous points have been read
    for (int j = lane.lane; j < count; j += lane.lanes) {
      const int i = first + j;
      Sample<A> s;
      A weight = 0;
      if (lane.active) {
        s = points.sample(i, levels);
        weight = points.attention(i);
        f(i, s, weight);
      }
      state[j] = {{s.fx, s.fy, weight, static_cast<A>(s.reads)}};
      places[j] = s.reads != 0 ? s.places(pitch) : Pack<uint32_t, 4>{};
    }
    warp_sync();
  }

  // dots of the prepared points. What a lane without channels or a point that reads nothing loads is not used, so no
  // load waits for a condition.
  __device__ __forceinline__ void find_dots(int count) {
    if (p.tokens * p.dim == 0) {
      for (int i = lane.lane; i < count; i += lane.lanes) dots[i] = {};
      return warp_sync();
    }
    const T* grads = static_cast<const T*>(p.grad_out.data) + b * p.grad_out.batch_stride +
                     lane.query * p.grad_out.query_stride + m * p.dim;
    for (int64_t pass = 0; pass < p.dim; pass += lane.lanes * W) {
      const int64_t c = pass + lane.lane * W;
      const bool inside = c < p.dim;
      const ValueRows<T, W> value(p, b, m, inside ? c : 0);
      const Pack<T, W> packed = load_pack<W>(grads + (inside ? c : 0));
      A grad[W];
      widen(packed, grad);
      for (int i = 0; i < count; i += 2) {  // two points: eight loads in flight
        Pack<T, W> v[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const Pack<uint32_t, 4> place = places[i + n < count ? i + n : i];
#pragma unroll
          for (int k = 0; k < 4; ++k) v[n][k] = value(place.v[k]);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          A dot[4] = {};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            A wide[W];
            widen(v[n][k], wide);
#pragma unroll
            for (int j = 0; j < W; ++j) dot[k] += grad[j] * wide[j];
            if (!inside) dot[k] = 0;
          }
          const A sum = reduce_corners(dot, lane);
          if (lane.lane < 4 && i + n < count) {
            A& kept = dots[i + n].v[lane.lane];
            kept = pass == 0 ? sum : kept + sum;
          }
        }
      }
    }
    warp_sync();
  }

  // sum of weight * gradient of the weight, over this lane's points: what the softmax subtracts.
  __device__ __forceinline__ A weighted(int count) const {
    A sum = 0;
    for (int j = lane.lane; j < count; j += lane.lanes) {
      const PointState<A> s(state[j]);
      sum += s.weight * s.gradient(dots[j]).weight;
    }
    return sum;
  }

  __device__ __forceinline__ void store(void* to, int64_t i, A v) const {
    if (Fused && p.offsets_are_values) {
      static_cast<T*>(to)[i] = from_acc<T>(v);
    } else {
      static_cast<A*>(to)[i] = v;
    }
  }

  __device__ __forceinline__ void write(int first, int count, A delta, Pack<A, 2>* pixel_grads) const {
    if (!lane.active) return;
    const int64_t pair = ((b * p.queries + lane.query) * p.heads + m) * p.levels * p.points;
    for (int j = lane.lane; j < count; j += lane.lanes) {
      const int i = first + j, level = points.level_of(i);
      const PointState<A> s(state[j]);
      const PointGradient<A> g = s.gradient(dots[j]);
      A x = g.x, y = g.y;
      if (pixel_grads != nullptr) pixel_grads[i] = {{x, y}};
      if (!Fused || p.reference_columns == 4) x *= levels[level].width, y *= levels[level].height;
      if (Fused && p.reference_columns == 4) {
        const A half = A(0.5) / static_cast<A>(p.points);
        x *= points.reference_at(level, 2) * half, y *= points.reference_at(level, 3) * half;
      }
      if (Fused && s.reads == 0) x = 0, y = 0;  // whatever the reference holds
      store(p.grad_locations, 2 * (pair + i), x);
      store(p.grad_locations, 2 * (pair + i) + 1, y);
      store(p.grad_weights, pair + i, Fused ? s.weight * (g.weight - delta) : g.weight);
    }
  }
};

template <typename T, int W, bool Fused>
__global__ void __launch_bounds__(kBlock, 2)
    deform_backward_points(DeformParams p, LevelArgs args, DeformTile tile, DeformLists<Acc<T>> lists) {
  using A = Acc<T>;
  const DeformShared<A> shared(tile, 2);
  load_levels(p, args, shared.levels);
  const DeformLane lane(p, tile, shared.levels);
  Pack<A, 4>* const state = shared.values + lane.group * tile.pitch();
  Pack<A, 4>* const dots = state + tile.pairs() * tile.pitch();
  Pack<uint32_t, 4>* const places = shared.places + lane.group * tile.pitch();
  const int total = static_cast<int>(p.levels * p.points);
  for (int64_t bm = blockIdx.y; bm < p.batch * p.heads; bm += gridDim.y) {
    const int64_t b = image_of(p, bm), m = bm - b * p.heads;
    const PairPoints<T, Fused> points(p, tile, b, m, lane);
    PairBackward<T, W, Fused> pair{p, lane, points, shared.levels, b, m, state, dots, places};
    const int64_t number = (bm * p.queries + lane.query) * total;
    const bool chunked = total > tile.chunk;
    A delta = 0;
    // The softmax needs all points before the first result: more than one chunk goes round twice.
    for (int round = Fused && chunked ? 0 : 1; round < 2; ++round) {
      for (int first = 0; first < total; first += tile.chunk) {
        const int count = total - first < tile.chunk ? total - first : tile.chunk;
        pair.prepare(first, count, [&](int i, const Sample<A>& s, A weight) {
          if (round == 1) enter_list(lists, p, bm, number + i, s, weight);
        });
        pair.find_dots(count);
        if (Fused && (round == 0 || !chunked)) delta += lane.sum(pair.weighted(count));
        if (round == 1) {
          pair.write(first, count, delta, lists.pixel_grads != nullptr ? lists.pixel_grads + number : nullptr);
        }
      }
    }
  }
}

// Gradient of one row of reference points: over the heads and the points that used it, one warp.
template <typename T>
__global__ void __launch_bounds__(kBlock, 4)
    deform_reference_grad(DeformParams p, LevelArgs args, const Pack<Acc<T>, 2>* pixel_grads) {
  using A = Acc<T>;
  LevelBox* levels = dynamic_shared<LevelBox>();
  load_levels(p, args, levels);
  const int64_t total = p.levels * p.points, used = p.reference_levels == 1 ? total : p.points;
  const int64_t rows = p.batch * p.queries * p.reference_levels;
  const A half = A(0.5) / static_cast<A>(p.points);
  for (int64_t row = global_thread() / 32; row < rows; row += grid_threads() / 32) {
    const int64_t query = row / p.reference_levels, b = query / p.queries, q = query - b * p.queries;
    const int64_t first = (row - query * p.reference_levels) * p.points;
    A sum[4] = {};
    for (int64_t j = threadIdx.x % 32; j < p.heads * used; j += 32) {
      const int64_t m = j / used, i = first + j - m * used;
      const LevelBox level = levels[i / p.points];
      const Pack<A, 2> g = pixel_grads[((b * p.heads + m) * p.queries + q) * total + i];
      const A x = g.v[0] * level.width, y = g.v[1] * level.height;
      sum[0] += x, sum[1] += y;
      if (p.reference_columns == 4 && (x != A(0) || y != A(0))) {  // a point that read nothing may have a NaN offset
        const int64_t at_point = b * p.locations.batch_stride + q * p.locations.query_stride + 2 * (m * total + i);
        const auto offset = [&](int64_t k) {
          return p.offsets_are_values ? to_acc(at<T>(p.locations.data, at_point + k))
                                      : at<A>(p.locations.data, at_point + k);
        };
        sum[2] += x * offset(0) * half, sum[3] += y * offset(1) * half;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= p.reference_columns) break;
      const A all = warp_sum(sum[k]);
      if (threadIdx.x % 32 == 0) static_cast<A*>(p.grad_reference)[row * p.reference_columns + k] = all;
    }
  }
}

template <typename T>
bool grads_packable(const DeformParams& p) {
  return packable<T>(p.grad_out.data, p.grad_out.batch_stride) && packable<T>(p.grad_out.data, p.grad_out.query_stride);
}

template <typename T, int W, typename Launch>
void launch_backward_points_as(const Launch& launch, const DeformParams& p, const LevelArgs& args,
                               const DeformLists<Acc<T>>& lists) {
  const DeformTile tile = deform_tile(p, W);
  launch(p.fused ? &deform_backward_points<T, W, true> : &deform_backward_points<T, W, false>, deform_grid(p, tile),
         kBlock, DeformShared<Acc<T>>::bytes(tile, 2, p.levels), p, args, tile, lists);
}

// lists.start must hold zeros; it holds the counts afterwards.
template <typename T, typename Launch>
void launch_backward_points(const Launch& launch, const DeformParams& p, const LevelArgs& args,
                            const DeformLists<Acc<T>>& lists) {
  if (p.batch * p.heads * p.queries != 0) {
    if (value_packable<T>(p) && grads_packable<T>(p)) {
      launch_backward_points_as<T, kPack<T>>(launch, p, args, lists);
    } else {
      launch_backward_points_as<T, 1>(launch, p, args, lists);
    }
  }
  const int64_t rows = p.batch * p.queries * p.reference_levels;
  if (p.grad_reference != nullptr && rows > 0) {
    launch(&deform_reference_grad<T>, grid_for(rows, kWarps), kBlock, p.levels * sizeof(LevelBox), p, args,
           lists.pixel_grads);
  }
}

}  // namespace tokenprune
