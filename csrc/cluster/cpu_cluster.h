// SPDX-License-Identifier: Apache-2.0
// Windowed soft k-means of one image, phase by phase. Only candidate pairs are ever computed.
//
// score (cpu_score.h): 2 x 2 neighbouring tokens against the union of their candidates, then their softmax. gather: for
// a row of cells and a row of centers, the sums of the centers in the window slide along the row in registers, so that
// every multiply-add is a needed one. Gather reads the tokens in chunks of channels, packed once per call. A channel of
// ones behind the others sums the affinities themselves. bfloat16 uses dot products of pairs where the CPU has them:
// pairs of channels in score, pairs of tokens of one cell (rows y, y + 1) in gather.
#pragma once

#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int kWindowPart = 5;  // centers whose sums slide in registers

// ---- workspace of one image

template <typename T>
struct ClusterSpace {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  static constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;    // values per unit
  static constexpr int64_t kSmall = kPer * kLanes<C>;       // channels of a small chunk
  static constexpr int64_t kChunk = kTileVecs * kLanes<C>;  // of a whole one

  int64_t channels;              // with the channel of ones, in small chunks
  int64_t width, units_width;    // rows of sums (relative centers), rows of pairs of channels
  int64_t window, weight_width;  // candidates along a row; row of weights
  int64_t norm_width;            // rows of norms, with a margin of the reach on both sides
  int64_t unit_tokens;           // units of tokens
  int32_t *y_groups, *x_groups;  // first token of each group; [0] is the number of groups
  int32_t *y_first, *x_first;    // [cells + 1] first token of each cell
  int64_t* starts;               // [rows] first unit of each row of cells
  C *mean, *sums, *norms;
  U *pairs, *tokens, *weights;
  int64_t bytes;

  ClusterSpace(const ClusterParams& p, char* workspace) {
    Arena arena{workspace};
    channels = round_up(p.channels + 1, kSmall);
    width = channels + kLanes<C>;  // no power of two: rows must not share cache sets
    units_width = width / 2;
    window = window_width(p.x_axis), weight_width = round_up(window, 8);
    norm_width = p.x_axis.cells + 2 * p.x_axis.reach;
    const int64_t occupied = p.y_axis.cells < p.y_axis.size ? p.y_axis.cells : p.y_axis.size;
    unit_tokens = (kPer == 1 ? p.y_axis.size : (p.y_axis.size + occupied) / 2) * p.x_axis.size;
    y_groups = arena.take<int32_t>(p.y_axis.size + 2), x_groups = arena.take<int32_t>(p.x_axis.size + 2);
    y_first = arena.take<int32_t>(p.y_axis.cells + 1), x_first = arena.take<int32_t>(p.x_axis.cells + 1);
    starts = arena.take<int64_t>(p.y_axis.cells + 1);
    mean = arena.take<C>(width);
    sums = arena.take<C>(p.clusters * width);
    norms = arena.take<C>((p.y_axis.cells + 2 * p.y_axis.reach) * norm_width + 8);
    pairs = arena.take<U>(kUsesPairs<T> ? p.clusters * units_width : 0);
    tokens = arena.take<U>(p.iters > 0 ? unit_tokens * channels : 0);
    weights = arena.take<U>(p.iters > 0 ? unit_tokens * window_width(p.y_axis) * weight_width : 0);
    bytes = arena.next - workspace;
  }

  int64_t units(int64_t cell) const { return ceil_div(y_first[cell + 1] - y_first[cell], kPer); }
  int64_t chunks() const { return channels / kChunk + channels % kChunk / kSmall; }
  C* norm_row(const ClusterParams& p, int64_t cy) const { return norms + (cy + p.y_axis.reach) * norm_width; }
};

template <typename T>
const T* token_row(const ClusterParams& p, int64_t image, int64_t y, int64_t x) {
  return static_cast<const T*>(p.x) + image * p.batch_stride + (y * p.x_axis.size + x) * p.token_stride;
}

// Sums of kSums vectors of channels; pairs of tokens give them in another order (interleave_pairs).
template <typename T>
constexpr int kSums = kUsesPairs<T> ? 2 : 1;

template <typename T>
inline void load_sums(const Compute<T>* p, Vec<Compute<T>>* out) {
  TP_UNROLL for (int i = 0; i < kSums<T>; ++i) out[i] = load(p + i * kLanes<Compute<T>>);
  if constexpr (kUsesPairs<T>) from_interleaved(out[0], out[1]);
}
template <typename T>
inline void store_sums(Compute<T>* p, Vec<Compute<T>>* values) {
  if constexpr (kUsesPairs<T>) to_interleaved(values[0], values[1]);
  TP_UNROLL for (int i = 0; i < kSums<T>; ++i) store(p + i * kLanes<Compute<T>>, values[i]);
}
// Where channel c is.
template <typename T>
inline int64_t sum_offset(int64_t c) {
  if constexpr (kUsesPairs<T>) return c / 32 * 32 + c % 8 / 4 * 16 + c % 32 / 8 * 4 + c % 4;
  return c;
}

// ---- setup: who neighbours whom

// Tokens of one cell in pairs; a lone token joins the lone token of the next cell.
inline void fill_groups(const ClusterAxis& a, int32_t* groups) {
  int64_t count = 0;
  for (int64_t i = 0; i < a.size;) {
    groups[++count] = static_cast<int32_t>(i);
    const int64_t home = home_cell(a, i), next = i + 1 < a.size ? home_cell(a, i + 1) : -9;
    const bool first = i == 0 || home_cell(a, i - 1) != home;
    const bool next_alone = i + 2 >= a.size || home_cell(a, i + 2) != next;
    i += next == home || (first && next == home + 1 && next_alone) ? 2 : 1;
  }
  groups[0] = static_cast<int32_t>(count);
  groups[count + 1] = static_cast<int32_t>(a.size);
}

template <typename T>
void cluster_setup(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  const ClusterSpace<T> space(p, s.workspace);
  fill_groups(p.y_axis, space.y_groups);
  fill_groups(p.x_axis, space.x_groups);
  for (int64_t i = 0; i <= p.y_axis.cells; ++i) space.y_first[i] = static_cast<int32_t>(first_token(p.y_axis, i));
  for (int64_t i = 0; i <= p.x_axis.cells; ++i) space.x_first[i] = static_cast<int32_t>(first_token(p.x_axis, i));
  int64_t start = 0;
  for (int64_t cell = 0; cell < p.y_axis.cells; ++cell) {
    space.starts[cell] = start;
    start += space.units(cell) * p.x_axis.size;
  }
  const int64_t norms = (p.y_axis.cells + 2 * p.y_axis.reach) * space.norm_width + 8;
  for (int64_t i = 0; i < norms; ++i) space.norms[i] = -kNegInf<C>;  // the margin: no center
  coarse_mean<T>([&](int64_t i) { return token_row<T>(p, s.image, 0, i); }, p.tokens, p.channels, space.width,
                 space.mean);
}

// ---- pool: the tokens of one row of cells packed for gather, [chunk][cell row][x][unit of rows][channel]

template <typename T>
void pack_tokens(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  using Space = ClusterSpace<T>;
  constexpr int64_t w = kLanes<C>;
  const Space space(p, s.workspace);
  const int64_t y0 = space.y_first[s.item], y1 = space.y_first[s.item + 1], units = space.units(s.item);
  for (int64_t u = 0; u < units; ++u) {
    for (int64_t x = 0; x < p.x_axis.size; ++x) {
      const int64_t y = y0 + u * space.kPer;
      const T* row = token_row<T>(p, s.image, y, x);
      const T* second = y + 1 < y1 ? token_row<T>(p, s.image, y + 1, x) : nullptr;
      const int64_t place = space.starts[s.item] + x * units + u;
      for (int64_t c = 0; c < space.channels; c += Space::kSmall) {
        const bool whole = c / Space::kChunk * Space::kChunk + Space::kChunk <= space.channels;
        const int64_t chunk = whole ? c / Space::kChunk * Space::kChunk : c;
        auto* to =
            space.tokens + chunk * space.unit_tokens + place * (whole ? Space::kChunk : Space::kSmall) + (c - chunk);
        if constexpr (kUsesPairs<T>) {
          Vec<uint32_t> low, high;
          interleave_pairs(load_pairs_upto(row, c, p.channels), load_pairs_upto(second, c, p.channels), low, high);
          store(to, low), store(to + w, high);
        } else {
          store(to, load_upto(row, c, p.channels));
        }
        if (c <= p.channels && p.channels < c + Space::kSmall) {
          auto& one = to[sum_offset<T>(p.channels - c)];
          if constexpr (kUsesPairs<T>) {
            one = second == nullptr ? 0x3f80u : 0x3f803f80u;
          } else {
            one = 1;
          }
        }
      }
    }
  }
}

// Sums over the cells of one row of centers, and the tokens of (about) the same rows packed.
template <typename T>
void cluster_pool(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>, n = kSums<T>;
  const ClusterSpace<T> space(p, s.workspace);
  const int64_t y0 = pool_begin(p.y_axis, s.item), y1 = pool_end(p.y_axis, s.item);
  for (int64_t cx = 0; cx < p.x_axis.cells; ++cx) {
    const int64_t x0 = pool_begin(p.x_axis, cx), x1 = pool_end(p.x_axis, cx);
    C* to = space.sums + (s.item * p.x_axis.cells + cx) * space.width;
    for (int64_t c = 0; c < space.channels; c += n * w) {
      Vec<C> sum[n];
      TP_UNROLL for (int v = 0; v < n; ++v) sum[v] = Vec<C>{};
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t x = x0; x < x1; ++x) {
          const T* row = token_row<T>(p, s.image, y, x);
          TP_UNROLL for (int v = 0; v < n; ++v) sum[v] += load_upto(row, c + v * w, p.channels);
        }
      }
      store_sums<T>(to + c, sum);
    }
    to[sum_offset<T>(p.channels)] = static_cast<C>((y1 - y0) * (x1 - x0));
  }
  if (p.iters > 0) pack_tokens<T>(p, s);
}

// ---- prepare: centers of one row relative to the mean m, e = s - m, and the token-free part of their distances:
// |x - s|^2 = |x - m|^2 + e (e + 2m) - 2 e x. The first term is the same for all candidates, and round-off is of the
// size |e| |x| instead of |x|^2.

template <typename C>
C inverse_mass(C mass) {
  const C floor = static_cast<C>(kMassFloor);
  return C(1) / (mass > floor || mass != mass ? mass : floor);
}

template <typename T>
void cluster_prepare(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>, n = kSums<T>;
  const ClusterSpace<T> space(p, s.workspace);
  for (int64_t cx = 0; cx < p.x_axis.cells; ++cx) {
    const int64_t k = s.item * p.x_axis.cells + cx;
    C* row = space.sums + k * space.width;
    const C inverse = inverse_mass(row[sum_offset<T>(p.channels)]);
    Vec<C> norm{};
    for (int64_t c = 0; c < space.channels; c += n * w) {
      Vec<C> e[n];
      load_sums<T>(row + c, e);
      TP_UNROLL for (int v = 0; v < n; ++v) {
        const Vec<C> mean = load(space.mean + c + v * w);
        e[v] = e[v] * inverse - mean;
        if (c + (v + 1) * w > p.channels) e[v] = keep_first<C>(e[v], p.channels - c - v * w);
        if constexpr (kUsesPairs<T>) {
          BFloat16* to = reinterpret_cast<BFloat16*>(space.pairs + k * space.units_width) + c + v * w;
          store_narrow<BFloat16>(to, e[v]);
          e[v] = load_wide(to);
        } else {
          store(row + c + v * w, e[v]);
        }
        norm += e[v] * (e[v] + mean * C(2));
      }
    }
    space.norm_row(p, s.item)[p.x_axis.reach + cx] = reduce_add<C>(norm);
  }
}

// ---- gather: weighted sums of tokens

// One row of cells for one row of centers: sums of the part [offset, offset + NW) of the window. `tokens` [x][unit]
// [V vectors] and `weights` [x][unit][weight_width] are read in order; `fresh` sums start from zero.
template <typename U, int NW, int V>
void slide(const U* tokens, const U* weights, int64_t weight_width, const int32_t* x_first, int64_t units, int64_t cols,
           int64_t left, bool fresh, typename Dot<U>::Acc* sums, int64_t width) {
  using C = typename Dot<U>::Acc;
  constexpr int w = kLanes<C>;
  Vec<C> acc[NW][V];  // acc[j] is of center left + j
  const auto enter = [&](int64_t cx, Vec<C>* to) {
    const bool known = !fresh && cx >= 0 && cx < cols;
    TP_UNROLL for (int v = 0; v < V; ++v) to[v] = known ? load(sums + cx * width + v * w) : Vec<C>{};
  };
  const auto leave = [&](int64_t cx, const Vec<C>* from) {
    if (cx < 0 || cx >= cols) return;
    TP_UNROLL for (int v = 0; v < V; ++v) store(sums + cx * width + v * w, from[v]);
  };
  TP_UNROLL for (int j = 0; j < NW; ++j) enter(left + j, acc[j]);
  for (int64_t home = 0;; ++home) {
    for (int64_t n = (x_first[home + 1] - x_first[home]) * units; n > 0;
         --n, tokens += V * w, weights += weight_width) {
      Vec<U> x[V];
      TP_UNROLL for (int v = 0; v < V; ++v) x[v] = load(tokens + v * w);
      TP_UNROLL for (int j = 0; j < NW; ++j) {
        TP_UNROLL for (int v = 0; v < V; ++v) acc[j][v] = Dot<U>::step(acc[j][v], weights[j], x[v]);
      }
    }
    if (home == cols - 1) break;
    leave(left, acc[0]);
    TP_UNROLL for (int j = 0; j + 1 < NW; ++j) { TP_UNROLL for (int v = 0; v < V; ++v) acc[j][v] = acc[j + 1][v]; }
    ++left;
    enter(left + NW - 1, acc[NW - 1]);
  }
  TP_UNROLL for (int j = 0; j < NW; ++j) leave(left + j, acc[j]);
}

template <typename T, int V>
void slide_window(const ClusterParams& p, const ClusterSpace<T>& space, int64_t cell, int64_t cy, int64_t channel) {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  constexpr int64_t kWidth = V * kLanes<C>;
  const int64_t units = space.units(cell), dy = cy - cell + p.y_axis.reach, cols = p.x_axis.cells;
  const U* tokens = space.tokens + channel * space.unit_tokens + space.starts[cell] * kWidth;
  const U* weights =
      space.weights + (space.starts[cell] * window_width(p.y_axis) + dy * p.x_axis.size * units) * space.weight_width;
  C* sums = space.sums + cy * cols * space.width + channel;
  // No token before this row of cells sees the row of centers.
  bool fresh = tokens_begin(p.y_axis, cy) == space.y_first[cell];
  if (fresh && space.window > kWindowPart) {  // the first part does not pass by all centers
    for (int64_t cx = 0; cx < cols; ++cx) __builtin_memset(sums + cx * space.width, 0, kWidth * sizeof(C));
    fresh = false;
  }
  for (int64_t offset = 0; offset < space.window; offset += kWindowPart) {
    const auto run = [&]<int NW>() {
      slide<U, NW, V>(tokens, weights + offset, space.weight_width, space.x_first, units, cols, offset - p.x_axis.reach,
                      fresh, sums, space.width);
    };
    switch (space.window - offset) {
      case 1: run.template operator()<1>(); break;
      case 2: run.template operator()<2>(); break;
      case 3: run.template operator()<3>(); break;
      case 4: run.template operator()<4>(); break;
      default: run.template operator()<kWindowPart>(); break;
    }
  }
}

// One chunk of channels of all centers.
template <typename T>
void cluster_gather(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  using Space = ClusterSpace<T>;
  const Space space(p, s.workspace);
  const int64_t whole = space.channels / Space::kChunk;
  const bool small = s.item >= whole;
  const int64_t channel = small ? whole * Space::kChunk + (s.item - whole) * Space::kSmall : s.item * Space::kChunk;
  for (int64_t cy = 0; cy < p.y_axis.cells; ++cy) {
    if (tokens_begin(p.y_axis, cy) < tokens_end(p.y_axis, cy)) continue;  // otherwise nobody sees these centers
    for (int64_t k = cy * p.x_axis.cells; k < (cy + 1) * p.x_axis.cells; ++k) {
      __builtin_memset(space.sums + k * space.width + channel, 0, (small ? Space::kSmall : Space::kChunk) * sizeof(C));
    }
  }
  for (int64_t cell = 0; cell < p.y_axis.cells; ++cell) {
    if (space.units(cell) == 0) continue;
    const int64_t low = cell - p.y_axis.reach, high = cell + p.y_axis.reach;
    for (int64_t cy = low > 0 ? low : 0; cy <= high && cy < p.y_axis.cells; ++cy) {
      if (small) {
        slide_window<T, kSums<T>>(p, space, cell, cy, channel);
      } else {
        slide_window<T, kTileVecs>(p, space, cell, cy, channel);
      }
    }
  }
}

// ---- output

template <typename T>
void cluster_output(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>, n = kSums<T>;
  const ClusterSpace<T> space(p, s.workspace);
  for (int64_t k = s.item * p.x_axis.cells; k < (s.item + 1) * p.x_axis.cells; ++k) {
    const C* row = space.sums + k * space.width;
    T* to = static_cast<T*>(p.centers) + (s.image * p.clusters + k) * p.channels;
    const C mass = row[sum_offset<T>(p.channels)], inverse = inverse_mass(mass);
    static_cast<C*>(p.mass)[s.image * p.clusters + k] = mass;
    for (int64_t c = 0; c < p.channels; c += n * w) {
      Vec<C> sum[n];
      load_sums<T>(row + c, sum);
      TP_UNROLL for (int v = 0; v < n; ++v) store_upto(to, c + v * w, p.channels, sum[v] * inverse);
    }
  }
}

// ---- backward: every token gathers from its candidates

template <typename T>
void cluster_backward_row(const ClusterBackwardParams& p, int64_t row) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const int64_t image = row / p.y_axis.size, y = row % p.y_axis.size, cols = p.x_axis.cells;
  const C* mass = static_cast<const C*>(p.mass) + image * p.clusters;
  const bool pooled = p.iters == 0;
  const int64_t home_y = pooled ? 0 : home_cell(p.y_axis, y) - p.y_axis.reach;
  const int64_t cy0 = pooled ? pool_first(p.y_axis, y) : home_y > 0 ? home_y : 0;
  const int64_t cy_end = pooled ? pool_last(p.y_axis, y) + 1 : home_y + window_width(p.y_axis);
  const int64_t cy1 = cy_end < p.y_axis.cells ? cy_end : p.y_axis.cells;
  for (int64_t x = 0; x < p.x_axis.size; ++x) {
    const int64_t token = row * p.x_axis.size + x;
    const int64_t home_x = pooled ? 0 : home_cell(p.x_axis, x) - p.x_axis.reach;
    const int64_t cx0 = pooled ? pool_first(p.x_axis, x) : home_x > 0 ? home_x : 0;
    const int64_t cx_end = pooled ? pool_last(p.x_axis, x) + 1 : home_x + window_width(p.x_axis);
    const int64_t cx1 = cx_end < cols ? cx_end : cols;
    const C* affinity = static_cast<const C*>(p.affinity) + token * p.slots;
    const auto sum = [&]<int V>(int64_t c) {
      Vec<C> acc[V];
      TP_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec<C>{};
      for (int64_t cy = cy0; cy < cy1; ++cy) {
        for (int64_t cx = cx0; cx < cx1; ++cx) {
          const int64_t k = cy * cols + cx;
          const C weight =
              (pooled ? C(1) : affinity[(cy - home_y) * window_width(p.x_axis) + cx - home_x]) * inverse_mass(mass[k]);
          const T* from = static_cast<const T*>(p.grad) + (image * p.clusters + k) * p.channels;
          TP_UNROLL for (int v = 0; v < V; ++v) acc[v] += weight * load_upto(from, c + v * w, p.channels);
        }
      }
      T* to = static_cast<T*>(p.grad_x) + token * p.channels;
      TP_UNROLL for (int v = 0; v < V; ++v) store_upto<T>(to, c + v * w, p.channels, acc[v]);
    };
    int64_t c = 0;
    for (; c + 8 * w <= p.channels; c += 8 * w) sum.template operator()<8>(c);
    for (; c < p.channels; c += w) sum.template operator()<1>(c);
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
