// SPDX-License-Identifier: Apache-2.0
// Windowed soft k-means of one image, phase by phase. Only candidate pairs are ever computed.
//
// score: 2 x 2 neighbouring tokens against the union of their candidates, in register tiles of dot products along the
// channels; softmax; the affinities are written in the order in which gather reads them. gather: for a row of tokens
// and a row of centers, the sums of the centers in the window slide along the row in registers, so that every
// multiply-add is a needed one. bfloat16 uses dot products of pairs where the CPU has them: pairs of channels in score,
// pairs of tokens of one cell in gather.
#pragma once

#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int kGroupTokens = 4;                        // 2 x 2 tokens are scored together
constexpr int kTileTokens = kVecBytes == 64 ? 4 : 2;   // of them per register tile
constexpr int kTileCenters = kVecBytes == 64 ? 6 : 5;  // tokens x centers accumulators
constexpr int kSegment = 64;                           // centers whose dot products are held at once
constexpr int kWindowPart = 5;                         // centers whose sums slide in registers
constexpr int64_t kMostBlock = 256;                    // channels per item of gather: what fits the second-level cache

// ---- workspace of one image

template <typename T>
struct ClusterSpace {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  static constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;  // values per unit

  int64_t width, slots_width, window, units_width;
  int32_t *y_groups, *x_groups;  // first token of each group; [0] is the number of groups
  int64_t* starts;               // [rows] start of the weights of each row of cells
  C *mean, *centers, *norms, *inverse, *logits;
  U *packed, *weights;
  int64_t bytes, weight_count;

  ClusterSpace(const ClusterParams& p, char* workspace) {
    Arena arena{workspace};
    width = round_up(p.channels, 2 * kLanes<C>) + kLanes<C>;  // no power of two: rows must not share cache sets
    units_width = width / 2;
    window = window_width(p.x_axis);
    slots_width = round_up(p.slots, kLanes<C>);
    y_groups = arena.take<int32_t>(p.y_axis.size + 2);
    x_groups = arena.take<int32_t>(p.x_axis.size + 2);
    starts = arena.take<int64_t>(p.y_axis.cells + 1);
    mean = arena.take<C>(width);
    centers = arena.take<C>(p.clusters * width);
    norms = arena.take<C>(p.clusters);
    inverse = arena.take<C>(p.clusters);
    logits = arena.take<C>(p.tokens * slots_width);
    packed = arena.take<U>(kUsesPairs<T> ? p.clusters * units_width : 0);
    const int64_t occupied = p.y_axis.cells < p.y_axis.size ? p.y_axis.cells : p.y_axis.size;
    const int64_t units = kPer == 1 ? p.y_axis.size : (p.y_axis.size + occupied) / 2;
    weight_count = units * p.x_axis.size * p.slots;
    weights = arena.take<U>(weight_count);
    bytes = arena.next - workspace;
  }
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

// Tokens of one cell in pairs; a lone token joins the lone token of the next cell.
inline void fill_groups(const ClusterAxis& a, int32_t* groups) {
  int64_t count = 0;
  for (int64_t i = 0; i < a.size;) {
    groups[++count] = static_cast<int32_t>(i);
    const int64_t home = home_cell(a, i), next = i + 1 < a.size ? home_cell(a, i + 1) : -9;
    const bool next_alone = i + 2 >= a.size || home_cell(a, i + 2) != next;
    i += next == home || (next == home + 1 && next_alone) ? 2 : 1;
  }
  groups[0] = static_cast<int32_t>(count);
  groups[count + 1] = static_cast<int32_t>(a.size);
}

template <typename T>
void cluster_setup(const ClusterParams& p, const ClusterStep& s) {
  const ClusterSpace<T> w(p, s.workspace);
  fill_groups(p.y_axis, w.y_groups);
  fill_groups(p.x_axis, w.x_groups);
  int64_t start = 0;
  for (int64_t cell = 0; cell < p.y_axis.cells; ++cell) {
    w.starts[cell] = start;
    const int64_t rows = first_token(p.y_axis, cell + 1) - first_token(p.y_axis, cell);
    start += ceil_div(rows, w.kPer) * p.x_axis.size * p.slots;
  }
  if (w.kPer > 1) __builtin_memset(w.weights, 0, w.weight_count * sizeof(*w.weights));  // missing halves of pairs
  coarse_mean<T>([&](int64_t i) { return token_row<T>(p, s.image, 0, i); }, p.tokens, p.channels, w.width, w.mean);
}

// ---- pooling: sums over the cells of one row; the counts go to mass

template <typename T>
void cluster_pool(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>, n = kSums<T>;
  const ClusterSpace<T> space(p, s.workspace);
  const int64_t y0 = pool_begin(p.y_axis, s.item), y1 = pool_end(p.y_axis, s.item);
  for (int64_t cx = 0; cx < p.x_axis.cells; ++cx) {
    const int64_t k = s.item * p.x_axis.cells + cx, x0 = pool_begin(p.x_axis, cx), x1 = pool_end(p.x_axis, cx);
    const int64_t count = (y1 - y0) * (x1 - x0);
    C* to = space.centers + k * space.width;
    for (int64_t c = 0; c < p.channels; c += n * w) {
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
    for (int64_t c = round_up(p.channels, n * w); c < space.width; ++c) to[c] = 0;
    space.inverse[k] = C(1) / C(count > 0 ? count : 1);
    static_cast<C*>(p.mass)[s.image * p.clusters + k] = C(count);
  }
}

// ---- centers relative to the mean, and what their squared norms add to a score

template <typename T>
void cluster_prepare(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>, n = kSums<T>;
  const ClusterSpace<T> space(p, s.workspace);
  for (int64_t k = s.item * p.x_axis.cells; k < (s.item + 1) * p.x_axis.cells; ++k) {
    C* row = space.centers + k * space.width;
    const C inverse = space.inverse[k];
    Vec<C> norm{};
    for (int64_t c = 0; c < p.channels; c += n * w) {
      Vec<C> e[n];
      load_sums<T>(row + c, e);
      TP_UNROLL for (int v = 0; v < n; ++v) {
        const Vec<C> mean = load(space.mean + c + v * w);
        e[v] = e[v] * inverse - mean;
        if constexpr (kUsesPairs<T>) {
          BFloat16* to = reinterpret_cast<BFloat16*>(space.packed + k * space.units_width) + c + v * w;
          store_narrow<BFloat16>(to, e[v]);
          e[v] = load_wide(to);
          norm += e[v] * (e[v] + mean * C(2));  // there the tokens keep the mean
        } else {
          store(row + c + v * w, e[v]);
          norm += e[v] * e[v];
        }
      }
    }
    space.norms[k] = reduce_add<C>(norm);
  }
}

// ---- scores of 2 x 2 tokens

// Lane-wise dot products of NT tokens (minus the mean) with NC consecutive centers.
template <typename T, int NT, int NC>
void dot_tile(const T* const* tokens, const ClusterSpace<T>& space, int64_t center, int64_t channels,
              Vec<Compute<T>>* out) {
  using C = Compute<T>;
  Vec<C> acc[NT][NC];
  TP_UNROLL for (int t = 0; t < NT; ++t) { TP_UNROLL for (int c = 0; c < NC; ++c) acc[t][c] = Vec<C>{}; }
  const T* x[NT];
  TP_UNROLL for (int t = 0; t < NT; ++t) x[t] = tokens[t];
  if constexpr (kUsesPairs<T>) {
    constexpr int w = 2 * kLanes<uint32_t>;
    const uint32_t* e = space.packed + center * space.units_width;
    const auto step = [&](const Vec<uint32_t>* v, int64_t i) {
      TP_UNROLL for (int c = 0; c < NC; ++c) {
        const Vec<uint32_t> row = load(e + c * space.units_width + i / 2);
        TP_UNROLL for (int t = 0; t < NT; ++t) acc[t][c] = dot_pairs(acc[t][c], v[t], row);
      }
    };
    int64_t i = 0;
    for (; i + w <= channels; i += w) {
      Vec<uint32_t> v[NT];
      TP_UNROLL for (int t = 0; t < NT; ++t) v[t] = load_pairs(x[t] + i);
      step(v, i);
    }
    if (i < channels) {
      Vec<uint32_t> v[NT];
      TP_UNROLL for (int t = 0; t < NT; ++t) v[t] = load_pairs_part(x[t] + i, channels - i);
      step(v, i);
    }
  } else {
    constexpr int w = kLanes<C>;
    const C *e = space.centers + center * space.width, *mean = space.mean;
    const auto step = [&](const Vec<C>* v, int64_t i) {
      TP_UNROLL for (int c = 0; c < NC; ++c) {
        const Vec<C> row = load(e + c * space.width + i);
        TP_UNROLL for (int t = 0; t < NT; ++t) acc[t][c] += v[t] * row;
      }
    };
    int64_t i = 0;
    for (; i + w <= channels; i += w) {
      Vec<C> v[NT];
      const Vec<C> m = load(mean + i);
      TP_UNROLL for (int t = 0; t < NT; ++t) v[t] = load_wide(x[t] + i) - m;
      step(v, i);
    }
    if (i < channels) {
      Vec<C> v[NT];
      const Vec<C> m = load(mean + i);
      TP_UNROLL for (int t = 0; t < NT; ++t) v[t] = load_part(x[t] + i, channels - i) - m;
      step(v, i);
    }
  }
  TP_UNROLL for (int t = 0; t < NT; ++t) { TP_UNROLL for (int c = 0; c < NC; ++c) out[t * NC + c] = acc[t][c]; }
}

template <typename T, int NT>
void dot_tile_of(int64_t centers, const T* const* tokens, const ClusterSpace<T>& space, int64_t center,
                 int64_t channels, Vec<Compute<T>>* out) {
  switch (centers) {
    case 1: return dot_tile<T, NT, 1>(tokens, space, center, channels, out);
    case 2: return dot_tile<T, NT, 2>(tokens, space, center, channels, out);
    case 3: return dot_tile<T, NT, 3>(tokens, space, center, channels, out);
    case 4: return dot_tile<T, NT, 4>(tokens, space, center, channels, out);
    case 5: return dot_tile<T, NT, 5>(tokens, space, center, channels, out);
    default: return dot_tile<T, NT, kTileCenters>(tokens, space, center, channels, out);
  }
}
template <typename T>
void dot_tile_of(int64_t tokens, int64_t centers, const T* const* rows, const ClusterSpace<T>& space, int64_t center,
                 int64_t channels, Vec<Compute<T>>* out) {
  if constexpr (kTileTokens == 4) {
    if (tokens == 4) return dot_tile_of<T, 4>(centers, rows, space, center, channels, out);
    if (tokens == 3) return dot_tile_of<T, 3>(centers, rows, space, center, channels, out);
  }
  if (tokens == 2) return dot_tile_of<T, 2>(centers, rows, space, center, channels, out);
  return dot_tile_of<T, 1>(centers, rows, space, center, channels, out);
}

// A group of up to 2 x 2 tokens and the rectangle of centers that any of them sees.
template <typename T>
struct Group {
  using C = Compute<T>;
  const ClusterParams& p;
  const ClusterSpace<T>& space;
  int64_t count = 0;
  const T* rows[kGroupTokens];
  int64_t token[kGroupTokens], home_y[kGroupTokens], home_x[kGroupTokens];
  int64_t cy0, cy1, cx0, cx1;

  Group(const ClusterParams& params, const ClusterSpace<T>& s, int64_t image, int64_t y0, int64_t y1, int64_t x0,
        int64_t x1)
      : p(params), space(s) {
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = x0; x < x1; ++x, ++count) {
        rows[count] = token_row<T>(p, image, y, x), token[count] = y * p.x_axis.size + x;
        home_y[count] = home_cell(p.y_axis, y), home_x[count] = home_cell(p.x_axis, x);
      }
    }
    cy0 = home_y[0] - p.y_axis.reach, cy1 = home_y[count - 1] + p.y_axis.reach + 1;
    cx0 = home_x[0] - p.x_axis.reach, cx1 = home_x[count - 1] + p.x_axis.reach + 1;
    cy0 = cy0 > 0 ? cy0 : 0, cy1 = cy1 < p.y_axis.cells ? cy1 : p.y_axis.cells;
    cx0 = cx0 > 0 ? cx0 : 0, cx1 = cx1 < p.x_axis.cells ? cx1 : p.x_axis.cells;
  }

  C* logits(int64_t t) const { return space.logits + token[t] * space.slots_width; }

  // Dots of `nt` tokens from `t0` on with centers [x, x + n) of row cy.
  void scatter(const C* dots, int64_t t0, int64_t nt, int64_t cy, int64_t x, int64_t n, C factor) const {
    const C* norms = space.norms + cy * p.x_axis.cells + x;
    for (int64_t t = t0; t < t0 + nt; ++t, dots += n) {
      const int64_t dy = cy - home_y[t] + p.y_axis.reach, dx = x - home_x[t] + p.x_axis.reach;
      if (dy < 0 || dy >= window_width(p.y_axis)) continue;
      const int64_t first = dx < 0 ? -dx : 0, last = space.window - dx < n ? space.window - dx : n;
      C* to = logits(t) + dy * space.window + dx;
      for (int64_t c = first; c < last; ++c) to[c] = factor * (C(2) * dots[c] - norms[c]);
    }
  }

  void score(C factor) const {
    constexpr int w = kLanes<C>;
    struct Tile {
      int64_t t0, nt, cy, x, n;
    };
    Vec<C> sums[(kSegment + kTileCenters) * kGroupTokens + w];
    C dots[(kSegment + kTileCenters) * kGroupTokens + w];
    Tile tiles[kSegment * kGroupTokens];
    int64_t used = 0, count_tiles = 0;
    const auto flush = [&] {
      for (int64_t i = used; i < round_up(used, w); ++i) sums[i] = Vec<C>{};
      for (int64_t i = 0; i < used; i += w) store(dots + i, reduce_square<C>(sums + i));
      const C* from = dots;
      for (int64_t i = 0; i < count_tiles; ++i) {
        const Tile& tile = tiles[i];
        scatter(from, tile.t0, tile.nt, tile.cy, tile.x, tile.n, factor);
        from += tile.nt * tile.n;
      }
      used = count_tiles = 0;
    };
    const int64_t parts = ceil_div(cx1 - cx0, kTileCenters), part = ceil_div(cx1 - cx0, parts);
    for (int64_t cy = cy0; cy < cy1; ++cy) {
      for (int64_t x = cx0; x < cx1; x += part) {
        const int64_t n = cx1 - x < part ? cx1 - x : part;
        for (int64_t t = 0; t < count; t += kTileTokens) {
          const int64_t nt = count - t < kTileTokens ? count - t : kTileTokens;
          dot_tile_of<T>(nt, n, rows + t, space, cy * p.x_axis.cells + x, p.channels, sums + used);
          tiles[count_tiles++] = {t, nt, cy, x, n};
          used += nt * n;
        }
        if (used >= kSegment * kGroupTokens) flush();
      }
    }
    flush();
  }
};

// Softmax in place over one token's slots (base-2 logits; slots without a center hold -inf).
template <typename C>
void softmax_slots(C* logits, int64_t padded) {
  constexpr int w = kLanes<C>;
  Vec<C> best = splat<C>(kNegInf<C>), sum{};
  for (int64_t i = 0; i < padded; i += w) best = vmax<C>(best, load(logits + i));
  const C top = reduce_max<C>(best);
  for (int64_t i = 0; i < padded; i += w) {
    const Vec<C> e = exp2v(load(logits + i) - top);
    store(logits + i, e);
    sum += e;
  }
  const C inverse = C(1) / reduce_add<C>(sum);
  for (int64_t i = 0; i < padded; i += w) store(logits + i, load(logits + i) * inverse);
}

// Where the affinities of one row of tokens go: [cell row][dy][x][unit of token rows][dx], as gather reads them.
template <typename T>
struct WeightRow {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  U* base;
  int64_t half, x_step, dy_step, window, height;

  WeightRow() = default;
  WeightRow(const ClusterParams& p, const ClusterSpace<T>& space, int64_t y) {
    const int64_t cell = home_cell(p.y_axis, y), first = first_token(p.y_axis, cell);
    const int64_t units = ceil_div(first_token(p.y_axis, cell + 1) - first, space.kPer);
    half = (y - first) % space.kPer;
    window = space.window, height = window_width(p.y_axis);
    x_step = units * window, dy_step = p.x_axis.size * x_step;
    base = space.weights + space.starts[cell] + (y - first) / space.kPer * window;
  }

  // Rounds the affinities where they are stored rounded.
  void place(int64_t x, C* affinity) const {
    U* to = base + x * x_step;
    for (int64_t dy = 0; dy < height; ++dy, to += dy_step, affinity += window) {
      for (int64_t j = 0; j < window; ++j) {
        if constexpr (kUsesPairs<T>) {
          const BFloat16 rounded = from_float<BFloat16, float>(affinity[j]);
          reinterpret_cast<BFloat16*>(to + j)[half] = rounded;
          affinity[j] = to_float(rounded);
        } else {
          to[j] = affinity[j];
        }
      }
    }
  }
};

template <typename T>
void cluster_score(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  const ClusterSpace<T> space(p, s.workspace);
  const C factor = static_cast<C>(p.temperature * kLog2E);
  const int64_t y0 = space.y_groups[s.item + 1], y1 = space.y_groups[s.item + 2];
  WeightRow<T> rows[2];
  for (int64_t y = y0; y < y1; ++y) rows[y - y0] = WeightRow<T>(p, space, y);
  for (int64_t g = 1; g <= space.x_groups[0]; ++g) {
    const int64_t x0 = space.x_groups[g], x1 = space.x_groups[g + 1];
    const Group<T> group(p, space, s.image, y0, y1, x0, x1);
    for (int64_t t = 0; t < group.count; ++t) {
      C* logits = group.logits(t);
      for (int64_t i = 0; i < space.slots_width; ++i) logits[i] = kNegInf<C>;
    }
    group.score(factor);
    for (int64_t t = 0; t < group.count; ++t) {
      C* logits = group.logits(t);
      softmax_slots<C>(logits, space.slots_width);
      rows[t / (x1 - x0)].place(x0 + t % (x1 - x0), logits);
      if (s.last && p.affinity != nullptr) {
        C* to = static_cast<C*>(p.affinity) + (s.image * p.tokens + group.token[t]) * p.slots;
        __builtin_memcpy(to, logits, p.slots * sizeof(C));
      }
    }
  }
}

// ---- sums of affinities of one row of centers

template <typename T>
void cluster_mass(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  const ClusterSpace<T> space(p, s.workspace);
  const int64_t cy = s.item, cols = p.x_axis.cells;
  C* mass = static_cast<C*>(p.mass) + s.image * p.clusters + cy * cols;
  for (int64_t cx = 0; cx < cols; ++cx) mass[cx] = 0;
  for (int64_t cell = 0; cell < p.y_axis.cells; ++cell) {
    const int64_t dy = cy - cell + p.y_axis.reach;
    if (dy < 0 || dy >= window_width(p.y_axis)) continue;
    const int64_t units = ceil_div(first_token(p.y_axis, cell + 1) - first_token(p.y_axis, cell), space.kPer);
    const auto* from = space.weights + space.starts[cell] + dy * p.x_axis.size * units * space.window;
    for (int64_t x = 0; x < p.x_axis.size; ++x) {
      const int64_t left = home_cell(p.x_axis, x) - p.x_axis.reach;
      const int64_t first = left < 0 ? -left : 0, last = cols - left < space.window ? cols - left : space.window;
      for (int64_t u = 0; u < units; ++u, from += space.window) {
        for (int64_t j = first; j < last; ++j) {
          if constexpr (kUsesPairs<T>) {
            const BFloat16* pair = reinterpret_cast<const BFloat16*>(from + j);
            mass[left + j] += to_float(pair[0]) + to_float(pair[1]);
          } else {
            mass[left + j] += from[j];
          }
        }
      }
    }
  }
  for (int64_t cx = 0; cx < cols; ++cx) {
    const C floor = static_cast<C>(kMassFloor);
    space.inverse[cy * cols + cx] = C(1) / (mass[cx] > floor || mass[cx] != mass[cx] ? mass[cx] : floor);
  }
}

// ---- weighted sums of tokens

// V vectors of channels of one unit of tokens; bfloat16 pairs of tokens come in the channel order of unpack.
template <typename T, int V>
struct TokenVectors {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  Vec<U> v[V];

  void load_unit(const T* row, const T* second, int64_t part) {
    if constexpr (kUsesPairs<T>) {
      TP_UNROLL for (int i = 0; i < V; i += 2) {
        const int64_t c = i * kLanes<C>;
        const bool whole = part == V * kLanes<C>;
        const Vec<uint32_t> a = whole ? load_pairs(row + c) : load_pairs_part(row + c, part);
        const Vec<uint32_t> b = whole ? load_pairs(second + c) : load_pairs_part(second + c, part);
        interleave_pairs(a, b, v[i], v[i + 1]);
      }
    } else {
      TP_UNROLL for (int i = 0; i < V; ++i) {
        v[i] = part == V * kLanes<C> ? load_wide(row + i * kLanes<C>) : load_part(row, part);
      }
    }
  }
};

// Sums of the part [offset, offset + NW) of the window, for one row of cells and one row of centers.
template <typename T, int NW, int V>
void slide(const ClusterParams& p, const ClusterSpace<T>& space, const ClusterStep& s, int64_t cell, int64_t cy,
           int64_t offset, int64_t channel, int64_t part) {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  constexpr int w = kLanes<C>;
  const int64_t y0 = first_token(p.y_axis, cell), y1 = first_token(p.y_axis, cell + 1);
  const int64_t units = ceil_div(y1 - y0, space.kPer), cols = p.x_axis.cells, dy = cy - cell + p.y_axis.reach;
  const U* weights = space.weights + space.starts[cell] + dy * p.x_axis.size * units * space.window + offset;
  C* sums = space.centers + cy * cols * space.width + channel;
  const int64_t row_step = p.x_axis.size * p.token_stride;
  Vec<C> acc[NW][V];
  int64_t left = offset - p.x_axis.reach;  // the center of acc[0]
  const auto enter = [&](int64_t cx, Vec<C>* to) {
    const bool inside = cx >= 0 && cx < cols;
    TP_UNROLL for (int v = 0; v < V; ++v) to[v] = inside ? load(sums + cx * space.width + v * w) : Vec<C>{};
  };
  const auto leave = [&](int64_t cx, const Vec<C>* from) {
    if (cx < 0 || cx >= cols) return;
    TP_UNROLL for (int v = 0; v < V; ++v) store(sums + cx * space.width + v * w, from[v]);
  };
  TP_UNROLL for (int j = 0; j < NW; ++j) enter(left + j, acc[j]);
  int64_t x = 0;
  for (int64_t home = 0;; ++home) {
    for (; x < p.x_axis.size && home_cell(p.x_axis, x) == home; ++x) {
      const T* row = token_row<T>(p, s.image, y0, x) + channel;
      for (int64_t u = 0; u < units; ++u, row += space.kPer * row_step, weights += space.window) {
        TokenVectors<T, V> tokens;
        tokens.load_unit(row, y0 + 2 * u + 1 < y1 ? row + row_step : row, part);
        TP_UNROLL for (int j = 0; j < NW; ++j) {
          TP_UNROLL for (int v = 0; v < V; ++v) acc[j][v] = Dot<U>::step(acc[j][v], weights[j], tokens.v[v]);
        }
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
void slide_window(const ClusterParams& p, const ClusterSpace<T>& space, const ClusterStep& s, int64_t cell, int64_t cy,
                  int64_t channel, int64_t part) {
  for (int64_t offset = 0; offset < space.window; offset += kWindowPart) {
    const int64_t n = space.window - offset;
    if (n >= 5) {
      slide<T, 5, V>(p, space, s, cell, cy, offset, channel, part);
    } else if (n == 4) {
      slide<T, 4, V>(p, space, s, cell, cy, offset, channel, part);
    } else if (n == 3) {
      slide<T, 3, V>(p, space, s, cell, cy, offset, channel, part);
    } else if (n == 2) {
      slide<T, 2, V>(p, space, s, cell, cy, offset, channel, part);
    } else {
      slide<T, 1, V>(p, space, s, cell, cy, offset, channel, part);
    }
  }
}

template <typename T>
void cluster_gather(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t kPart = kTileVecs * kLanes<C>, kSmall = ClusterSpace<T>::kPer * kLanes<C>;
  const ClusterSpace<T> space(p, s.workspace);
  const int64_t parts = ceil_div(p.channels, kPart);
  const int64_t first = parts * s.item / s.items * kPart, end = parts * (s.item + 1) / s.items * kPart;
  const int64_t last = end < p.channels ? end : p.channels, padded = round_up(last, kSmall);
  for (int64_t k = 0; k < p.clusters; ++k) {
    __builtin_memset(space.centers + k * space.width + first, 0, (padded - first) * sizeof(C));
  }
  for (int64_t cell = 0; cell < p.y_axis.cells; ++cell) {
    if (first_token(p.y_axis, cell) == first_token(p.y_axis, cell + 1)) continue;
    const int64_t low = cell - p.y_axis.reach, high = cell + p.y_axis.reach;
    for (int64_t c = first; c < last;) {
      const bool wide = c + kPart <= last;
      for (int64_t cy = low > 0 ? low : 0; cy <= high && cy < p.y_axis.cells; ++cy) {
        if (wide) {
          slide_window<T, kTileVecs>(p, space, s, cell, cy, c, kPart);
        } else {
          slide_window<T, kSmall / kLanes<C>>(p, space, s, cell, cy, c, last - c < kSmall ? last - c : kSmall);
        }
      }
      c += wide ? kPart : kSmall;
    }
  }
}

template <typename T>
void cluster_output(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>, n = kSums<T>;
  const ClusterSpace<T> space(p, s.workspace);
  for (int64_t k = s.item * p.x_axis.cells; k < (s.item + 1) * p.x_axis.cells; ++k) {
    T* to = static_cast<T*>(p.centers) + (s.image * p.clusters + k) * p.channels;
    for (int64_t c = 0; c < p.channels; c += n * w) {
      Vec<C> sum[n];
      load_sums<T>(space.centers + k * space.width + c, sum);
      TP_UNROLL for (int v = 0; v < n; ++v) store_upto(to, c + v * w, p.channels, sum[v] * space.inverse[k]);
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
    const C* affinity =
        pooled ? nullptr
               : static_cast<const C*>(p.affinity) + token * p.slots - home_y * window_width(p.x_axis) - home_x;
    const auto sum = [&]<int V>(int64_t c, int64_t part) {
      Vec<C> acc[V];
      TP_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec<C>{};
      for (int64_t cy = cy0; cy < cy1; ++cy) {
        for (int64_t cx = cx0; cx < cx1; ++cx) {
          const int64_t k = cy * cols + cx;
          const C floor = static_cast<C>(kMassFloor), total = mass[k] > floor ? mass[k] : floor;
          const C weight = (pooled ? C(1) : affinity[cy * window_width(p.x_axis) + cx]) / total;
          const T* from = static_cast<const T*>(p.grad) + (image * p.clusters + k) * p.channels + c;
          TP_UNROLL for (int v = 0; v < V; ++v) {
            acc[v] += weight * (part == w ? load_wide(from + v * w) : load_part(from, part));
          }
        }
      }
      T* to = static_cast<T*>(p.grad_x) + token * p.channels + c;
      if (part == w) {
        TP_UNROLL for (int v = 0; v < V; ++v) store_narrow<T>(to + v * w, acc[v]);
      } else {
        for (int64_t i = 0; i < part; ++i) to[i] = from_float<T, C>(acc[0][i]);
      }
    };
    int64_t c = 0;
    for (; c + 8 * w <= p.channels; c += 8 * w) sum.template operator()<8>(c, w);
    for (; c < p.channels; c += w) sum.template operator()<1>(c, p.channels - c < w ? p.channels - c : w);
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
