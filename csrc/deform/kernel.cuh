// SPDX-License-Identifier: Apache-2.0
// CUDA kernel of multi-scale deformable attention, forward.
#pragma once

#include "kernel_points.cuh"

namespace tokenprune {

// Weights and places of the points [first, first + count) that read something, compacted in order; returns their
// number.
template <typename T, bool Fused>
__device__ __forceinline__ int store_points(const PairPoints<T, Fused>& points, const DeformLane& lane,
                                            const LevelBox* levels, int first, int count, Pack<Acc<T>, 4>* weights,
                                            Pack<uint32_t, 4>* places, uint32_t pitch) {
  int stored = 0;
  for (int round = 0; round < count; round += lane.lanes) {
    const int i = first + round + lane.lane;
    Sample<Acc<T>> s;
    if (lane.active && round + lane.lane < count) s = points.sample(i, levels);
    const uint32_t reading = lane.mine(warp_ballot(s.reads != 0));
    if (s.reads != 0) {
      const int slot = stored + popcount(reading & ((1u << lane.lane) - 1));
      weights[slot] = s.weights(points.attention(i));
      places[slot] = s.places(pitch);
    }
    stored += popcount(reading);
  }
  return stored;
}

template <typename T, int W, bool Fused>
__global__ void __launch_bounds__(kBlock, 3) deform_forward(DeformParams p, LevelArgs args, DeformTile tile) {
  using A = Acc<T>;
  const DeformShared<A> shared(tile, 1);
  load_levels(p, args, shared.levels);
  const DeformLane lane(p, tile, shared.levels);
  Pack<A, 4>* weights = shared.values + lane.group * tile.pitch();
  Pack<uint32_t, 4>* places = shared.places + lane.group * tile.pitch();
  const int total = static_cast<int>(p.levels * p.points);
  for (int64_t bm = blockIdx.y; bm < p.batch * p.heads; bm += gridDim.y) {
    const int64_t b = image_of(p, bm), m = bm - b * p.heads;
    const PairPoints<T, Fused> points(p, tile, b, m, lane);
    int stored = 0;
    for (int64_t pass = 0; pass < p.dim; pass += lane.lanes * W) {
      const int64_t c = pass + lane.lane * W;
      const bool inside = lane.active && c < p.dim;
      const ValueRows<T, W> value(p, b, m, inside ? c : 0);
      A sum[W] = {};
      for (int first = 0; first < total; first += tile.chunk) {
        if (pass == 0 || total > tile.chunk) {
          const int count = total - first < tile.chunk ? total - first : tile.chunk;
          warp_sync();  // the previous points have been read
          stored = store_points(points, lane, shared.levels, first, count, weights, places, ValueRows<T, W>::pitch(p));
          warp_sync();
        }
        const int reading = inside ? stored : 0;
#pragma unroll 2
        for (int i = 0; i < reading; ++i) {
          const Pack<uint32_t, 4> place = places[i];
          const Pack<A, 4> weight = weights[i];
          Pack<T, W> v[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) v[k] = value(place.v[k]);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            A wide[W];
            widen(v[k], wide);
#pragma unroll
            for (int j = 0; j < W; ++j) sum[j] += weight.v[k] * wide[j];
          }
        }
      }
      if (!inside) continue;
      Pack<T, W> out;
#pragma unroll
      for (int j = 0; j < W; ++j) out.v[j] = from_acc<T>(sum[j]);
      store_pack(static_cast<T*>(p.out) + ((b * p.queries + lane.query) * p.heads + m) * p.dim + c, out);
    }
  }
}

template <typename T, int W, typename Launch>
void launch_forward_as(const Launch& launch, const DeformParams& p, const LevelArgs& args) {
  const DeformTile tile = deform_tile(p, W);
  launch(p.fused ? &deform_forward<T, W, true> : &deform_forward<T, W, false>, deform_grid(p, tile), kBlock,
         DeformShared<Acc<T>>::bytes(tile, 1, p.levels), p, args, tile);
}

template <typename T, typename Launch>
void launch_deform(const Launch& launch, const DeformParams& p, int64_t* level_workspace) {
  if (p.batch * p.heads * p.queries * p.dim == 0) return;
  const LevelArgs args = level_args(launch, p, level_workspace);
  if (value_packable<T>(p) && packable<T>(p.out, p.dim)) {
    launch_forward_as<T, kPack<T>>(launch, p, args);
  } else {
    launch_forward_as<T, 1>(launch, p, args);
  }
}

}  // namespace tokenprune
