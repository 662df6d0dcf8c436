// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of windowed soft k-means.
//
// Usual maps never form a center before the last iteration (kernel_band.cuh). One launch each: pair_distances;
// center_step from the pooling weights; center_step for every iteration but the last; token_softmax; window_sums.
// Where cells hold many tokens, or pooling reaches outside of the window, the centers are formed in every iteration
// and token_distances compares them with their tokens directly.
#pragma once

#include "kernel_band.cuh"

namespace tokenprune::cluster {

// ---- plan ----------------------------------------------------------------------------------------------------------

// What a call needs besides its outputs: elements of the stat dtype, 0 for none.
struct ClusterPlan {
  BandAxis y, x;
  bool banded = false;
  int64_t distances = 0;  // [batch, tokens, slots]; two of them when banded
  int64_t pairs = 0;      // [batch, tokens, y.width * x.width]
  int64_t centers = 0;    // [batch, clusters, channels]
};
inline ClusterPlan plan_of(const ClusterParams& p) {
  ClusterPlan plan;
  if (p.iters == 0) return plan;
  plan.y = band_axis(p.y_axis), plan.x = band_axis(p.x_axis);
  const int64_t area = plan.y.width * plan.x.width;
  plan.banded = plan.y.pooled && plan.x.pooled && area > 0 && area <= kMostBand && p.channels > 0;
  plan.distances = p.batch * p.tokens * p.slots;
  (plan.banded ? plan.pairs : plan.centers) =
      plan.banded ? p.batch * p.tokens * area : p.batch * p.clusters * p.channels;
  return plan;
}

template <typename A>
struct ClusterSpace {
  A *affinity = nullptr, *distances = nullptr;  // [batch, tokens, slots]; the second only when banded
  A *pairs = nullptr, *centers = nullptr;       // as in the plan
};

// ---- affinities ----------------------------------------------------------------------------------------------------

// Distances to affinities, in place, by a warp: the softmax over the candidates, 0 in the other slots.
template <typename A>
__device__ __forceinline__ void softmax_row(A* row, const Candidates& candidates, int64_t slots, A factor) {
  const int lane = threadIdx.x % 32;
  A nearest = A(INFINITY), sum = 0;
  for (int64_t s = lane; s < slots; s += 32) {
    if (candidates.has(s)) nearest = lower(nearest, row[s]);
  }
  nearest = -warp_max(-nearest);
  for (int64_t s = lane; s < slots; s += 32) {
    const A e = candidates.has(s) ? exp2_fast((row[s] - nearest) * factor) : A(0);
    row[s] = e;
    sum += e;
  }
  sum = warp_sum(sum);
  for (int64_t s = lane; s < slots; s += 32) row[s] = candidates.has(s) ? row[s] / sum : A(0);
}

template <typename A>
__global__ void __launch_bounds__(kBlock, 4) token_softmax(ClusterParams p, A* affinity, A factor) {
  for (int64_t t = global_thread() / 32; t < p.batch * p.tokens; t += grid_threads() / 32) {
    const int64_t token = t % p.tokens;
    const Candidates candidates(p.y_axis, p.x_axis, token / p.x_axis.size, token % p.x_axis.size);
    softmax_row(affinity + t * p.slots, candidates, p.slots, factor);
  }
}

// ---- the general way -----------------------------------------------------------------------------------------------

// A warp: the affinities of 2 x 2 neighbouring tokens from the centers [batch, clusters, channels].
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 2)
    token_distances(ClusterParams p, const Acc<T>* centers, Acc<T>* affinity, Acc<T> factor) {
  using A = Acc<T>;
  using Rule = WindowRule<kMeansAdjoint>;  // the candidates of a token
  const int64_t rows = p.y_axis.size, cols = p.x_axis.size, tile_rows = (rows + 1) / 2, tile_cols = (cols + 1) / 2;
  const int lane = threadIdx.x % 32;
  for (int64_t t = global_thread() / 32; t < p.batch * tile_rows * tile_cols; t += grid_threads() / 32) {
    const int64_t col = t % tile_cols * 2, row = t / tile_cols % tile_rows * 2, b = t / tile_cols / tile_rows;
    const int64_t last_row = row + 1 < rows ? row + 1 : row, last_col = col + 1 < cols ? col + 1 : col;
    const int64_t y0 = Rule::begin(p.y_axis, row), y1 = Rule::end(p.y_axis, last_row);
    const int64_t x0 = Rule::begin(p.x_axis, col), x1 = Rule::end(p.x_axis, last_col);
    const T* x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // at the border a token stands twice
      const int64_t y = row + i / 2 <= last_row ? row + i / 2 : row, z = col + i % 2 <= last_col ? col + i % 2 : col;
      x[i] = static_cast<const T*>(p.x) + b * p.batch_stride + (y * cols + z) * p.token_stride;
    }
    for (int64_t k = 0; k < (y1 - y0) * (x1 - x0); ++k) {
      const int64_t cy = y0 + k / (x1 - x0), cx = x0 + k % (x1 - x0);
      const A* center = centers + (b * p.clusters + cy * p.x_axis.cells + cx) * p.channels;
      A sum[4] = {};
      for (int64_t c = static_cast<int64_t>(lane) * W; c < p.channels; c += 32 * W) {
        constexpr int kWide = W < kPack<A> ? W : kPack<A>;
        Pack<T, W> v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = load_pack<W>(x[i] + c);
#pragma unroll
        for (int w = 0; w < W; w += kWide) {
          const Pack<A, kWide> s = load_pack<kWide>(center + c + w);
#pragma unroll
          for (int u = 0; u < kWide; ++u) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const A difference = to_acc(v[i].v[w + u]) - s.v[u];
              sum[i] += difference * difference;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t y = row + i / 2, z = col + i % 2;
        const A d = warp_sum(sum[i]);
        if (y > last_row || z > last_col) continue;
        const int64_t slot_y = slot_of(p.y_axis, y, cy), slot_x = slot_of(p.x_axis, z, cx);
        if (slot_y < 0 || slot_x < 0 || lane != 0) continue;
        affinity[(b * p.tokens + y * cols + z) * p.slots + slot_y * window_width(p.x_axis) + slot_x] = d;
      }
    }
    warp_sync();
    for (int64_t y = row; y <= last_row; ++y) {
      for (int64_t z = col; z <= last_col; ++z) {
        const Candidates candidates(p.y_axis, p.x_axis, y, z);
        softmax_row(affinity + (b * p.tokens + y * cols + z) * p.slots, candidates, p.slots, factor);
      }
    }
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <typename T, typename Launch>
void launch_banded(const Launch& launch, const ClusterParams& p, const ClusterPlan& plan,
                   const ClusterSpace<Acc<T>>& space) {
  using A = Acc<T>;
  const A factor = static_cast<A>(-p.temperature * kLog2e);
  const RowSet x{p.x, p.batch_stride, p.token_stride, p.tokens};
  const bool packs = packable_rows<T>(x, p.channels);
  const int64_t patches = ((p.y_axis.size + kPatch - 1) / kPatch) * ((p.x_axis.size + kPatch - 1) / kPatch);
  const int64_t places = (2 * plan.x.patches + 1) * plan.y.patches + plan.x.patches + 1;
  launch(packs ? &pair_distances<DistanceTile<T, true>> : &pair_distances<DistanceTile<T, false>>,
         dim3(p.batch * patches, places), kThreads, DistanceTile<T, true>::kBytes, p, plan.y, plan.x, space.pairs);
  A *before = nullptr, *after = p.iters % 2 == 1 ? space.affinity : space.distances;  // the last one: affinity
  for (int64_t i = 0; i < p.iters; ++i) {
    launch(packs ? &center_step<T, kPack<T>> : &center_step<T, 1>, p.batch * p.clusters, kThreads, 0, p, plan.y, plan.x,
           space.pairs, before, after, factor);
    before = after;
    after = before == space.affinity ? space.distances : space.affinity;
  }
  launch(&token_softmax<A>, grid_for(p.batch * p.tokens, kWarps), kBlock, 0, p, space.affinity, factor);
}

template <typename T, typename Launch>
void launch_cluster(const Launch& launch, const ClusterParams& p, const ClusterPlan& plan,
                    const ClusterSpace<Acc<T>>& space) {
  using A = Acc<T>;
  if (p.batch == 0 || p.clusters == 0) return;
  WindowParams<A> w;
  w.source = p.x, w.batch_stride = p.batch_stride, w.row_stride = p.token_stride, w.batch = p.batch;
  w.channels = p.channels, w.y_axis = p.y_axis, w.x_axis = p.x_axis, w.affinity = space.affinity;
  w.out = p.centers, w.mass = static_cast<A*>(p.mass);
  if (p.iters == 0) return launch_window_sums<kPools, T, T>(launch, w);
  if (plan.banded) {
    launch_banded<T>(launch, p, plan, space);
  } else {
    const A factor = static_cast<A>(-p.temperature * kLog2e);
    const RowSet x{p.x, p.batch_stride, p.token_stride, p.tokens};
    const int64_t tiles = p.batch * ((p.y_axis.size + 1) / 2) * ((p.x_axis.size + 1) / 2);
    WindowParams<A> refined = w;
    refined.out = space.centers, refined.mass = nullptr;
    for (int64_t i = 0; i < p.iters; ++i) {
      if (i == 0) launch_window_sums<kPools, T, A>(launch, refined);
      if (i > 0) launch_window_sums<kMeans, T, A>(launch, refined);
      if (tiles == 0) break;  // no tokens: the centers are zero
      launch(packable_rows<T>(x, p.channels) ? &token_distances<T, kPack<T>> : &token_distances<T, 1>,
             grid_for(tiles, kWarps), kBlock, 0, p, space.centers, space.affinity, factor);
    }
  }
  launch_window_sums<kMeans, T, T>(launch, w);
}

}  // namespace tokenprune::cluster
