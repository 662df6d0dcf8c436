// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of windowed soft k-means.
//
// Usual maps never form a center before the last iteration. The centers are means of tokens, so with the distances D
// between tokens that share a candidate (computed once, tensor cores) the distance of token p and the center with
// weights w is   sum_m w_m D(p, m) - 1/2 sum_mn w_m w_n D(m, n),   and an iteration costs a few kilobytes per center
// whatever the number of channels is. One launch each: pair_distances; center_step from the pooling weights;
// center_step for every iteration but the last; token_softmax; window_sums (kernel_window.cuh).
// Where cells hold many tokens, or pooling reaches outside of the window, the centers are formed in every iteration
// and token_distances compares them with their tokens directly.
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

// ---- affinities ----------------------------------------------------------------------------------------------------

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
      const A* row = before + token_of(m) * p.slots;
      const Candidates candidates(p.y_axis, p.x_axis, y, x);
      A nearest = A(INFINITY), sum = 0;
      candidates.each([&](int64_t s) { nearest = lower(nearest, row[s]); });
      candidates.each([&](int64_t s) { sum += exp2_fast((row[s] - nearest) * factor); });
      w = exp2_fast((row[own_slot(m)] - nearest) * factor) / sum;
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
