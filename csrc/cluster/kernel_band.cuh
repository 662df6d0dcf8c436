// SPDX-License-Identifier: Apache-2.0
// Soft k-means without centers. A center is a mean of tokens, so with the distances D between tokens that share a
// candidate (computed once, on the tensor cores) the distance of token p and the center with weights w is
//     sum_m w_m D(p, m) - 1/2 sum_mn w_m w_n D(m, n),
// and an iteration costs some kilobytes per center, whatever the number of channels is.
#pragma once

#include "kernel_distance.cuh"
#include "kernel_window.cuh"

namespace tokenprune::cluster {

// ---- which tokens meet through a center ----------------------------------------------------------------------------

// The tokens [begin, end) that share a candidate with `token` along one axis; a symmetric relation.
TP_HOST_DEVICE int64_t band_begin(const ClusterAxis& a, int64_t token) {
  return first_token(a, home_cell(a, token) - 2 * a.reach);
}
TP_HOST_DEVICE int64_t band_end(const ClusterAxis& a, int64_t token) {
  return first_token(a, home_cell(a, token) + 2 * a.reach + 1);
}

constexpr int kPatch = 8;               // pair_distances takes patches of 8 x 8 tokens: kSide rows
constexpr int64_t kMostBand = 576;      // larger bands cost more than comparing with the centers
constexpr int64_t kLongestAxis = 4096;  // the host looks at every token of an axis

struct BandAxis {
  int64_t width = 0;    // of the widest band
  int64_t patches = 0;  // a band reaches that many patches further
  bool pooled = true;   // every pooling cell lies within the tokens of its center
};
inline BandAxis band_axis(const ClusterAxis& a) {
  BandAxis band;
  if (a.size > kLongestAxis || a.cells > kLongestAxis) {
    band.pooled = false;
    return band;
  }
  for (int64_t token = 0; token < a.size; ++token) {
    const int64_t end = band_end(a, token), width = end - band_begin(a, token);
    const int64_t patches = (end - 1) / kPatch - token / kPatch;
    if (width > band.width) band.width = width;
    if (patches > band.patches) band.patches = patches;
  }
  for (int64_t cell = 0; cell < a.cells; ++cell) {
    band.pooled &= pool_begin(a, cell) >= tokens_begin(a, cell) && pool_end(a, cell) <= tokens_end(a, cell);
  }
  return band;
}

// ---- distances between tokens --------------------------------------------------------------------------------------

// Whether any token of one patch lies in the band of any token of another one, along one axis.
__device__ __forceinline__ bool patches_meet(const ClusterAxis& a, int64_t one, int64_t other) {
  const int64_t low = one < other ? one : other, high = one < other ? other : one;
  const int64_t last = low * kPatch + kPatch - 1;
  return band_end(a, last < a.size ? last : a.size - 1) > high * kPatch;
}

// One block per two patches: blockIdx.y counts the second one's places, those that come before the first left out.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kDistanceBlocks)
    pair_distances(ClusterParams p, BandAxis band_y, BandAxis band_x, typename Tile::Stat* pairs) {
  using T = typename Tile::Value;
  TP_SHARED(const T*, rows, [2 * kSide]);
  TP_SHARED(int32_t, begins, [4][kPatch]);  // bands of own rows, own columns, other rows, other columns
  TP_SHARED(int32_t, ends, [4][kPatch]);
  const int64_t height = p.y_axis.size, width = p.x_axis.size;
  const int64_t patch_rows = (height + kPatch - 1) / kPatch, patch_cols = (width + kPatch - 1) / kPatch;
  const int64_t own = blockIdx.x % (patch_rows * patch_cols), b = blockIdx.x / (patch_rows * patch_cols);
  const int64_t place = blockIdx.y + band_x.patches, places = 2 * band_x.patches + 1;
  const int64_t own_row = own / patch_cols, own_col = own % patch_cols;
  const int64_t other_row = own_row + place / places, other_col = own_col + place % places - band_x.patches;
  if (other_row >= patch_rows || !in_range(other_col, patch_cols)) return;
  if (!patches_meet(p.y_axis, own_row, other_row) || !patches_meet(p.x_axis, own_col, other_col)) return;
  const int r = static_cast<int>(threadIdx.x) % kSide;
  const bool first = threadIdx.x < kSide;
  const int64_t y = (first ? own_row : other_row) * kPatch + r / kPatch;
  const int64_t x = (first ? own_col : other_col) * kPatch + r % kPatch;
  const T* values = static_cast<const T*>(p.x) + b * p.batch_stride;
  rows[threadIdx.x] = y < height && x < width ? values + (y * width + x) * p.token_stride : nullptr;
  if (threadIdx.x < 4 * kPatch) {
    const int set = static_cast<int>(threadIdx.x) / kPatch;
    const ClusterAxis& axis = set % 2 == 0 ? p.y_axis : p.x_axis;
    const int64_t patch = set == 0 ? own_row : set == 1 ? own_col : set == 2 ? other_row : other_col;
    const int64_t at = patch * kPatch + threadIdx.x % kPatch;
    begins[set][threadIdx.x % kPatch] = at < axis.size ? static_cast<int32_t>(band_begin(axis, at)) : 0;
    ends[set][threadIdx.x % kPatch] = at < axis.size ? static_cast<int32_t>(band_end(axis, at)) : 0;
  }
  Tile tile;
  tile.compute(dynamic_shared<unsigned char>(), rows, p.channels);

  const int64_t area = band_y.width * band_x.width;
  const auto store = [&](int set, int64_t row0, int64_t col0, int at, int64_t y2, int64_t x2, typename Tile::Stat d) {
    const int ry = at / kPatch, rx = at % kPatch;
    if (y2 < begins[set][ry] || y2 >= ends[set][ry] || x2 < begins[set + 1][rx] || x2 >= ends[set + 1][rx]) return;
    const int64_t token = b * p.tokens + (row0 * kPatch + ry) * width + col0 * kPatch + rx;
    pairs[token * area + (y2 - begins[set][ry]) * band_x.width + x2 - begins[set + 1][rx]] = d;
  };
  const bool same = own_row == other_row && own_col == other_col;
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const int at = Tile::row(i), other = Tile::col(j);
      if (rows[at] == nullptr || rows[kSide + other] == nullptr) continue;
      store(0, own_row, own_col, at, other_row * kPatch + other / kPatch, other_col * kPatch + other % kPatch,
            tile.d[i][j]);
      if (same) continue;
      store(2, other_row, other_col, other, own_row * kPatch + at / kPatch, own_col * kPatch + at % kPatch,
            tile.d[i][j]);
    }
  }
}

// ---- an iteration on distances alone -------------------------------------------------------------------------------

template <typename A>
__device__ __forceinline__ A block_sum(A v, A* warps) {  // ends with a barrier; every thread gets the sum
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  A sum = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum += warps[w];
  return sum;
}

// The softmax over the candidates of a token, at one slot.
template <typename A>
__device__ __forceinline__ A affinity_of(const A* row, const Candidates& candidates, int64_t slot, A factor) {
  A nearest = A(INFINITY), sum = 0;
  candidates.each([&](int64_t s) { nearest = lower(nearest, row[s]); });
  candidates.each([&](int64_t s) { sum += exp2_fast((row[s] - nearest) * factor); });
  return exp2_fast((row[slot] - nearest) * factor) / sum;
}

// One block per center: the weights of its tokens from `before` (null: the pooling weights), its new distances to
// them. All [batch, tokens, slots].
template <typename T, int W>
__global__ void __launch_bounds__(kThreads, 4)
    center_step(ClusterParams p, BandAxis band_y, BandAxis band_x, const Acc<T>* pairs, const Acc<T>* before,
                Acc<T>* after, Acc<T> factor) {
  using A = Acc<T>;
  TP_SHARED(A, weight, [kMostBand]);
  TP_SHARED(A, distance, [kMostBand]);
  TP_SHARED(int32_t, offset, [kMostBand]);     // of a member in the band of another one, relative to the first member
  TP_SHARED(int32_t, start, [2 * kMostBand]);  // where the first member lies in the band of a member's row, column
  TP_SHARED(A, warps, [2][kThreads / 32]);
  const int64_t b = blockIdx.x / p.clusters, center = blockIdx.x % p.clusters;
  const int64_t cy = center / p.x_axis.cells, cx = center % p.x_axis.cells, map_width = p.x_axis.size;
  const int64_t y0 = tokens_begin(p.y_axis, cy), x0 = tokens_begin(p.x_axis, cx);
  const int height = static_cast<int>(tokens_end(p.y_axis, cy) - y0);
  const int width = static_cast<int>(tokens_end(p.x_axis, cx) - x0), members = height * width;
  if (members == 0) return;
  const int64_t slots_x = window_width(p.x_axis);
  const auto token_of = [&](int m) { return b * p.tokens + (y0 + m / width) * map_width + x0 + m % width; };
  const auto own_slot = [&](int m) {
    return slot_of(p.y_axis, y0 + m / width, cy) * slots_x + slot_of(p.x_axis, x0 + m % width, cx);
  };

  const int64_t pool_y = pool_begin(p.y_axis, cy), pool_x = pool_begin(p.x_axis, cx);
  const int64_t pool_height = pool_end(p.y_axis, cy) - pool_y, pool_width = pool_end(p.x_axis, cx) - pool_x;
  A part = 0;
  for (int m = threadIdx.x; m < members; m += kThreads) {
    const int64_t y = y0 + m / width, x = x0 + m % width;
    A w = 0;
    if (before == nullptr) {
      w = in_range(y - pool_y, pool_height) && in_range(x - pool_x, pool_width) ? A(1) : A(0);
    } else {
      w = affinity_of(before + token_of(m) * p.slots, Candidates(p.y_axis, p.x_axis, y, x), own_slot(m), factor);
    }
    weight[m] = w, part += w;
    offset[m] = m / width * static_cast<int32_t>(band_x.width) + m % width;
    if (m % width == 0) start[m / width] = static_cast<int32_t>((y0 - band_begin(p.y_axis, y)) * band_x.width);
    if (m < width) start[kMostBand + m] = static_cast<int32_t>(x0 - band_begin(p.x_axis, x));
  }
  const A mass = block_sum(part, warps[0]), divisor = floored(mass);
  // A center of hardly any mass is partly the zero vector: one more member, at distance |x|^2 from token x.
  const A rest = mass < divisor ? A(1) - mass / divisor : A(0);
  for (int m = threadIdx.x; m < members; m += kThreads) weight[m] /= divisor;
  __syncthreads();

  const int lane = threadIdx.x % 32;
  A spread = 0;
  for (int m = threadIdx.x / 32; m < members; m += kThreads / 32) {
    const A* row = pairs + token_of(m) * band_y.width * band_x.width + start[m / width] + start[kMostBand + m % width];
    A sum = 0, norm = 0;
    for (int i = lane; i < members; i += 32) {
      if (weight[i] != A(0)) sum += weight[i] * row[offset[i]];  // the distance may be infinite
    }
    if (rest > A(0)) {
      const T* x = static_cast<const T*>(p.x) + b * p.batch_stride + (token_of(m) - b * p.tokens) * p.token_stride;
      for (int64_t c = static_cast<int64_t>(lane) * W; c < p.channels; c += 32 * W) {
        const Pack<T, W> v = load_pack<W>(x + c);
#pragma unroll
        for (int i = 0; i < W; ++i) norm += to_acc(v.v[i]) * to_acc(v.v[i]);
      }
      norm = rest * warp_sum(norm);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      distance[m] = sum + norm;
      if (weight[m] != A(0)) spread += weight[m] * (sum / 2 + norm);
    }
  }
  spread = block_sum(spread, warps[1]);
  for (int m = threadIdx.x; m < members; m += kThreads) {
    after[token_of(m) * p.slots + own_slot(m)] = distance[m] - spread;
  }
}

}  // namespace tokenprune::cluster
