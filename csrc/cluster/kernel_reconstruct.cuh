// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of reconstruction and its backward.
//
// The distances of some images are a matrix [images, tokens, clusters] in memory. A warp per token finds the k-th
// smallest of its row and turns the row into weights. Sums over the kept entries of a row (or a column,
// in the backward) are gathered in ascending order.
#pragma once

#include "kernel_distance.cuh"

namespace tokenprune::cluster {

// ---- sparse sums ---------------------------------------------------------------------------------------------------

constexpr int kListed = 64;  // entries of a warp's list; it is used up whenever it is half full
template <typename A>
struct Entry {
  A weight;
  int32_t at;
};

// use(entries, n) for the entries i in [0, count) of non-zero weight(i), ascending, a few at a time. `list`: kListed
// entries of shared memory for this warp.
template <typename A, typename Weight, typename Use>
__device__ __forceinline__ void each_entry(int64_t count, Entry<A>* list, Weight&& weight, Use&& use) {
  const int lane = threadIdx.x % 32;
  int filled = 0;
  for (int64_t first = 0; first < count; first += 32) {
    const int64_t i = first + lane;
    const A w = i < count ? weight(i) : A(0);
    const uint32_t kept = warp_ballot(w != A(0));
    if (w != A(0)) list[filled + popcount(kept & ((1u << lane) - 1u))] = {w, static_cast<int32_t>(i)};
    filled += popcount(kept);
    if (filled >= kListed / 2 || (first + 32 >= count && filled > 0)) {
      warp_sync();
      use(list, filled);
      warp_sync();  // the list has been read
      filled = 0;
    }
  }
}

// out[0 .. channels) = sum_i weight(i) * (rows[i], or ref - rows[i] if there is a ref), by a warp.
template <typename T, int W, bool Relative, typename Weight>
__device__ __forceinline__ void sparse_sum(int64_t count, Entry<Acc<T>>* list, Weight&& weight, const T* rows,
                                           int64_t row_stride, const T* ref, int64_t channels, T* out) {
  using A = Acc<T>;
  constexpr int kChunks = W == 1 ? 4 : 2, kAhead = 4;
  const int lane = threadIdx.x % 32;
  for (int64_t first = 0; first < channels; first += 32 * W * kChunks) {
    A sum[kChunks][W] = {};
    each_entry<A>(count, list, weight, [&](const Entry<A>* entries, int n) {
      for (int e = 0; e < n; e += kAhead) {
        Pack<T, W> x[kAhead][kChunks];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const T* row = rows + (e + j < n ? entries[e + j].at : 0) * row_stride;
#pragma unroll
          for (int k = 0; k < kChunks; ++k) {
            const int64_t c = first + (k * 32 + lane) * W;
            x[j][k] = e + j < n && c < channels ? load_pack<W>(row + c) : Pack<T, W>{};
          }
        }
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const int64_t c = first + (k * 32 + lane) * W;
          Pack<T, W> base = {};
          if (Relative && c < channels) base = load_pack<W>(ref + c);
#pragma unroll
          for (int j = 0; j < kAhead; ++j) {
            const A w = e + j < n ? entries[e + j].weight : A(0);
#pragma unroll
            for (int i = 0; i < W; ++i) {
              sum[k][i] += w * (Relative ? to_acc(base.v[i]) - to_acc(x[j][k].v[i]) : to_acc(x[j][k].v[i]));
            }
          }
        }
      }
    });
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int64_t c = first + (k * 32 + lane) * W;
      if (c >= channels) continue;
      Pack<T, W> y;
#pragma unroll
      for (int i = 0; i < W; ++i) y.v[i] = from_acc<T>(sum[k][i]);
      store_pack(out + c, y);
    }
  }
}

// ---- the kept weights of a row -------------------------------------------------------------------------------------

// Integers in the order of the distances, the nearest largest; NaN ranks last.
__device__ __forceinline__ uint32_t rank_bits(float d) {
  uint32_t bits;
  memcpy(&bits, &d, 4);
  return d != d ? 0 : bits >> 31 != 0 ? bits : ~bits & 0x7fffffffu;
}
__device__ __forceinline__ uint64_t rank_bits(double d) {
  uint64_t bits;
  memcpy(&bits, &d, 8);
  return d != d ? 0 : bits >> 63 != 0 ? bits : ~bits & 0x7fffffffffffffffull;
}

// The k-th largest rank of a row, bit by bit, by a warp; each lane reads its own entries only. Held > 0: at most
// 32 * Held entries, which stay in registers.
template <int Held, typename A>
__device__ __forceinline__ auto rank_of_kth(const A* row, int64_t count, int64_t k) {
  using Rank = decltype(rank_bits(A()));
  const int lane = threadIdx.x % 32;
  Rank held[Held > 0 ? Held : 1], kth = 0;
  if (k >= count) return kth;
#pragma unroll
  for (int i = 0; i < Held; ++i) held[i] = i * 32 + lane < count ? rank_bits(row[i * 32 + lane]) : 0;
  for (int bit = sizeof(A) * 8 - 1; bit >= 0; --bit) {
    const Rank candidate = kth | Rank(1) << bit;
    int reached = 0;
    if constexpr (Held > 0) {
#pragma unroll
      for (int i = 0; i < Held; ++i) reached += held[i] >= candidate;
    } else {
      for (int64_t i = lane; i < count; i += 32) reached += rank_bits(row[i]) >= candidate;
    }
    reached = warp_sum(reached);
    if (reached >= k) kth = candidate;
    if (reached == k) break;
  }
  return kth;
}

// Turns the distances of a row into weights: exp(-temperature * d) of the k nearest (with ties) divided by their norm,
// 0 for the others. True when the norm has reached its floor.
template <int Held, typename A>
__device__ __forceinline__ bool weigh_row(A* row, const ReconstructParams& p) {
  const int lane = threadIdx.x % 32;
  const auto kth = rank_of_kth<Held>(row, p.clusters, p.k);
  const A factor = static_cast<A>(-p.temperature * kLog2e);
  A sum = 0;
  for (int64_t i = lane; i < p.clusters; i += 32) {
    const A d = row[i], u = rank_bits(d) >= kth ? exp2_fast(d * factor) : A(0);
    row[i] = u;
    sum += p.l1 ? u : u * u;
  }
  sum = warp_sum(sum);
  const A norm = p.l1 ? sum : std::sqrt(sum), floor = static_cast<A>(kNormFloor);
  const A divisor = norm < floor ? floor : norm;
  for (int64_t i = lane; i < p.clusters; i += 32) row[i] /= divisor;
  return norm < floor;
}

constexpr int kHeld = 32;  // up to 1024 centers

// ---- kernels: p and the pointers in it are those of the images in the matrix
// -----------------------------------------

template <typename T, int W, int Held>
__global__ void __launch_bounds__(kBlock, 2) reconstruct_rows(ReconstructParams p, Acc<T>* weights) {
  using A = Acc<T>;
  TP_SHARED(Entry<A>, lists, [kWarps][kListed]);
  for (int64_t t = global_thread() / 32; t < p.batch * p.tokens; t += grid_threads() / 32) {
    A* row = weights + t * p.clusters;
    weigh_row<Held>(row, p);
    const T* values = static_cast<const T*>(p.values) + t / p.tokens * p.values_batch;
    sparse_sum<T, W, false>(
        p.clusters, lists[threadIdx.x / 32], [&](int64_t m) { return row[m]; }, values, p.values_row,
        static_cast<const T*>(nullptr), p.width, static_cast<T*>(p.out) + t * p.width);
  }
}

// A warp per token: weights v in place of the distances, and in `slopes` the factors of (feature - center) in the
// gradient: -2 t u dL/du. Then the gradient of the feature.
template <typename T, int W, int Held>
__global__ void __launch_bounds__(kBlock, 1)
    reconstruct_slopes(ReconstructParams p, Acc<T>* weights, Acc<T>* slopes, bool packed_values) {
  using A = Acc<T>;
  TP_SHARED(Entry<A>, lists, [kWarps][kListed]);
  const int lane = threadIdx.x % 32;
  for (int64_t t = global_thread() / 32; t < p.batch * p.tokens; t += grid_threads() / 32) {
    const int64_t b = t / p.tokens;
    A *row = weights + t * p.clusters, *slope = slopes + t * p.clusters;
    Entry<A>* list = lists[threadIdx.x / 32];
    const bool at_floor = weigh_row<Held>(row, p);
    for (int64_t m = lane; m < p.clusters; m += 32) slope[m] = 0;
    const T* grad = static_cast<const T*>(p.grad) + t * p.width;
    const T* values = static_cast<const T*>(p.values) + b * p.values_batch;
    A mean = 0;  // sum_m v_m dL/dv_m
    each_entry<A>(
        p.clusters, list, [&](int64_t m) { return row[m]; },
        [&](const Entry<A>* entries, int n) {
          for (int e = 0; e < n; ++e) {
            const T* value = values + entries[e].at * p.values_row;
            A dot = 0;
            if (packed_values) {
              constexpr int kP = kPack<T>;
              for (int64_t c = static_cast<int64_t>(lane) * kP; c < p.width; c += 32 * kP) {
                const Pack<T, kP> g = load_pack<kP>(grad + c), x = load_pack<kP>(value + c);
#pragma unroll
                for (int i = 0; i < kP; ++i) dot += to_acc(g.v[i]) * to_acc(x.v[i]);
              }
            } else {
              for (int64_t c = lane; c < p.width; c += 32) dot += to_acc(grad[c]) * to_acc(value[c]);
            }
            dot = warp_sum(dot);
            mean += entries[e].weight * dot;
            if (lane == entries[e].at % 32) slope[entries[e].at] = dot;  // by the lane that reads it below
          }
        });
    if (at_floor) mean = 0;  // the divisor is a constant there
    const A factor = static_cast<A>(-2 * p.temperature);
    for (int64_t m = lane; m < p.clusters; m += 32) {
      const A v = row[m];
      if (v != A(0)) slope[m] = factor * v * (slope[m] - (p.l1 ? mean : v * mean));
    }
    sparse_sum<T, W, true>(
        p.clusters, list, [&](int64_t m) { return slope[m]; }, static_cast<const T*>(p.centers) + b * p.centers_batch,
        p.centers_row, static_cast<const T*>(p.features) + b * p.features_batch + (t - b * p.tokens) * p.features_row,
        p.channels, static_cast<T*>(p.grad_features) + t * p.channels);
  }
}

// A warp per center: out [batch, clusters, channels], summed over the tokens with the weights of its column of the
// matrix. Relative: sum weight * (center - row), else sum weight * row.
template <typename T, int W, bool Relative>
__global__ void __launch_bounds__(kBlock, 2)
    column_sums(const Acc<T>* matrix, RowSet rows, RowSet centers, int64_t batch, int64_t channels, T* out) {
  using A = Acc<T>;
  TP_SHARED(Entry<A>, lists, [kWarps][kListed]);
  for (int64_t m = global_thread() / 32; m < batch * centers.count; m += grid_threads() / 32) {
    const int64_t b = m / centers.count, i = m % centers.count;
    sparse_sum<T, W, Relative>(
        rows.count, lists[threadIdx.x / 32],
        [&](int64_t n) { return matrix[(b * rows.count + n) * centers.count + i]; },
        rows.count > 0 ? rows.row<T>(b, 0) : nullptr, rows.row_stride, Relative ? centers.row<T>(b, i) : nullptr,
        channels, out + m * channels);
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

constexpr int64_t kMostWeights = 1 << 25;  // elements of a matrix; more images than that are taken in turns

inline int64_t images_at_once(const ReconstructParams& p) {
  const int64_t image = p.tokens * p.clusters, fit = image > 0 ? kMostWeights / image : p.batch;
  return fit < 1 ? 1 : fit < p.batch ? fit : p.batch;
}

// The arguments of `count` images from `first` on.
template <typename T>
ReconstructParams images_of(const ReconstructParams& p, int64_t first, int64_t count) {
  ReconstructParams q = p;
  const auto skip = [&](const void* base, int64_t stride) {
    return base == nullptr ? nullptr : static_cast<const void*>(static_cast<const T*>(base) + first * stride);
  };
  const auto skip_out = [&](void* base, int64_t rows) { return const_cast<void*>(skip(base, rows)); };
  q.batch = count;
  q.features = skip(p.features, p.features_batch), q.centers = skip(p.centers, p.centers_batch);
  q.values = skip(p.values, p.values_batch), q.grad = skip(p.grad, p.tokens * p.width);
  q.out = skip_out(p.out, p.tokens * p.width);
  q.grad_features = skip_out(p.grad_features, p.tokens * p.channels);
  q.grad_centers = skip_out(p.grad_centers, p.clusters * p.channels);
  q.grad_values = skip_out(p.grad_values, p.clusters * p.width);
  return q;
}

// Workspace: weights [images_at_once, tokens, clusters].
template <typename T, typename Launch>
void launch_reconstruct(const Launch& launch, const ReconstructParams& p, Acc<T>* weights) {
  if (p.batch * p.tokens * p.width == 0) return;
  const RowSet values{p.values, p.values_batch, p.values_row, p.clusters};
  const bool packed = packable_rows<T>(values, p.width) && packable<T>(p.out, p.width);
  const bool held = p.clusters <= 32 * kHeld;
  for (int64_t first = 0, step = images_at_once(p); first < p.batch; first += step) {
    const ReconstructParams q = images_of<T>(p, first, step < p.batch - first ? step : p.batch - first);
    launch_distance_matrix<T>(launch, {q.features, q.features_batch, q.features_row, q.tokens},
                              {q.centers, q.centers_batch, q.centers_row, q.clusters}, q.batch, q.channels, weights);
    constexpr int kP = kPack<T>;
    launch(packed ? (held ? &reconstruct_rows<T, kP, kHeld> : &reconstruct_rows<T, kP, 0>)
                  : (held ? &reconstruct_rows<T, 1, kHeld> : &reconstruct_rows<T, 1, 0>),
           grid_for(q.batch * q.tokens, kWarps), kBlock, 0, q, weights);
  }
}

// Workspace: weights and slopes [images_at_once, tokens, clusters].
template <typename T, typename Launch>
void launch_reconstruct_backward(const Launch& launch, const ReconstructParams& p, Acc<T>* weights, Acc<T>* slopes) {
  if (p.batch == 0) return;
  const RowSet all_features{p.features, p.features_batch, p.features_row, p.tokens};
  const RowSet all_centers{p.centers, p.centers_batch, p.centers_row, p.clusters};
  const RowSet all_values{p.values, p.values_batch, p.values_row, p.clusters};
  const bool packed = packable_rows<T>(all_features, p.channels) && packable_rows<T>(all_centers, p.channels) &&
                      packable<T>(p.grad_features, p.channels) && packable<T>(p.grad_centers, p.channels);
  const bool packed_values =
      packable_rows<T>(all_values, p.width) && packable<T>(p.grad, p.width) && packable<T>(p.grad_values, p.width);
  const bool held = p.clusters <= 32 * kHeld;
  constexpr int kP = kPack<T>;
  for (int64_t first = 0, step = images_at_once(p); first < p.batch; first += step) {
    const ReconstructParams q = images_of<T>(p, first, step < p.batch - first ? step : p.batch - first);
    const RowSet features{q.features, q.features_batch, q.features_row, q.tokens};
    const RowSet centers{q.centers, q.centers_batch, q.centers_row, q.clusters};
    const RowSet grads{q.grad, q.tokens * q.width, q.width, q.tokens};
    if (q.tokens > 0) {
      launch_distance_matrix<T>(launch, features, centers, q.batch, q.channels, weights);
      launch(packed ? (held ? &reconstruct_slopes<T, kP, kHeld> : &reconstruct_slopes<T, kP, 0>)
                    : (held ? &reconstruct_slopes<T, 1, kHeld> : &reconstruct_slopes<T, 1, 0>),
             grid_for(q.batch * q.tokens, kWarps), kBlock, 0, q, weights, slopes, packed_values);
    }
    if (q.clusters == 0) continue;
    const int64_t grid = grid_for(q.batch * q.clusters, kWarps);
    launch(packed ? &column_sums<T, kP, true> : &column_sums<T, 1, true>, grid, kBlock, 0, slopes, features, centers,
           q.batch, q.channels, static_cast<T*>(q.grad_centers));
    launch(packed_values ? &column_sums<T, kP, false> : &column_sums<T, 1, false>, grid, kBlock, 0, weights, grads,
           centers, q.batch, q.width, static_cast<T*>(q.grad_values));
  }
}

}  // namespace tokenprune::cluster
