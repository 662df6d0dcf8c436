// SPDX-License-Identifier: Apache-2.0
// Affinities of 2 x 2 neighbouring tokens: register tiles of dot products along the channels, summed over the lanes
// many at a time, softmax, and the weights in the order in which gather reads them.
//
// The slots of a token are [row of the window][1 + window]: every row has a margin of one column, because neighbours'
// windows may be shifted by one and a tile of centers serves all tokens of the group.
#pragma once

#include "cpu_cluster.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int kGroupTokens = 4;
constexpr int kTileTokens = kVecBytes == 64 ? 4 : 2;   // per register tile
constexpr int kTileCenters = kVecBytes == 64 ? 6 : 5;  // tokens x centers accumulators

// ---- dot products

// Lane-wise dot products of NT tokens with NC relative centers from `center` on; out[t][c].
template <typename T, int NT, int NC>
void dot_tile(const ClusterSpace<T>& space, const T* const* tokens, int64_t center, int64_t channels,
              Vec<Compute<T>>* const* out) {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  constexpr int64_t w = ClusterSpace<T>::kPer * kLanes<U>;
  Vec<C> acc[NT][NC];
  TP_UNROLL for (int t = 0; t < NT; ++t) { TP_UNROLL for (int c = 0; c < NC; ++c) acc[t][c] = Vec<C>{}; }
  const T* x[NT];
  TP_UNROLL for (int t = 0; t < NT; ++t) x[t] = tokens[t];
  int64_t row_width;
  const U* rows;
  if constexpr (kUsesPairs<T>) {
    row_width = space.units_width, rows = space.pairs + center * row_width;
  } else {
    row_width = space.width, rows = space.sums + center * row_width;
  }
  const auto step = [&](const Vec<U>* v, int64_t i) {
    TP_UNROLL for (int c = 0; c < NC; ++c) {
      const Vec<U> row = load(rows + c * row_width + i / ClusterSpace<T>::kPer);
      TP_UNROLL for (int t = 0; t < NT; ++t) acc[t][c] = dot_lanes(acc[t][c], v[t], row);
    }
  };
  int64_t i = 0;
  for (; i + w <= channels; i += w) {
    Vec<U> v[NT];
    TP_UNROLL for (int t = 0; t < NT; ++t) {
      if constexpr (kUsesPairs<T>) {
        v[t] = load_pairs(x[t] + i);
      } else {
        v[t] = load_wide(x[t] + i);
      }
    }
    step(v, i);
  }
  if (i < channels) {
    Vec<U> v[NT];
    TP_UNROLL for (int t = 0; t < NT; ++t) {
      if constexpr (kUsesPairs<T>) {
        v[t] = load_pairs_upto(x[t], i, channels);
      } else {
        v[t] = load_upto(x[t], i, channels);
      }
    }
    step(v, i);
  }
  TP_UNROLL for (int t = 0; t < NT; ++t) { TP_UNROLL for (int c = 0; c < NC; ++c) out[t][c] = acc[t][c]; }
}

template <typename T, int NT>
void dot_tile_of(int64_t centers, const ClusterSpace<T>& space, const T* const* tokens, int64_t center,
                 int64_t channels, Vec<Compute<T>>* const* out) {
  switch (centers) {
    case 1: return dot_tile<T, NT, 1>(space, tokens, center, channels, out);
    case 2: return dot_tile<T, NT, 2>(space, tokens, center, channels, out);
    case 3: return dot_tile<T, NT, 3>(space, tokens, center, channels, out);
    case 4: return dot_tile<T, NT, 4>(space, tokens, center, channels, out);
    case 5: return dot_tile<T, NT, 5>(space, tokens, center, channels, out);
    default: return dot_tile<T, NT, kTileCenters>(space, tokens, center, channels, out);
  }
}
template <typename T>
void dot_tile_of(int64_t tokens, int64_t centers, const ClusterSpace<T>& space, const T* const* rows, int64_t center,
                 int64_t channels, Vec<Compute<T>>* const* out) {
  if constexpr (kTileTokens == 4) {
    if (tokens > 2) return dot_tile_of<T, 4>(centers, space, rows, center, channels, out);
  }
  if (tokens == 2) return dot_tile_of<T, 2>(centers, space, rows, center, channels, out);
  return dot_tile_of<T, 1>(centers, space, rows, center, channels, out);
}

// ---- a group of tokens

template <typename T>
struct ScoreSpace {  // scratch of one thread
  using C = Compute<T>;
  int64_t slots, row;
  Vec<C>*sums, *spare;  // [kGroupTokens][slots], and where dot products go that no token asked for
  C *norms, *affinity;  // [kGroupTokens][slots]
  int64_t bytes;

  ScoreSpace(const ClusterParams& p, char* scratch) {
    Arena arena{scratch};
    row = window_width(p.x_axis) + 1;
    slots = round_up(window_width(p.y_axis) * row + 1, kLanes<C>);
    sums = arena.take<Vec<C>>(kGroupTokens * slots);
    spare = arena.take<Vec<C>>(slots);
    norms = arena.take<C>(kGroupTokens * slots + 8), affinity = arena.take<C>(kGroupTokens * slots + 8);
    bytes = arena.next - scratch;
  }
};

template <typename T>
struct Group {
  using C = Compute<T>;
  const ClusterParams& p;
  const ClusterSpace<T>& space;
  const ScoreSpace<T>& scratch;
  int64_t count = 0;
  const T* rows[kGroupTokens];
  int64_t home_y[kGroupTokens], home_x[kGroupTokens];

  Group(const ClusterParams& params, const ClusterSpace<T>& s, const ScoreSpace<T>& t, int64_t image, int64_t y0,
        int64_t y1, int64_t x0, int64_t x1)
      : p(params), space(s), scratch(t) {
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = x0; x < x1; ++x, ++count) {
        rows[count] = token_row<T>(p, image, y, x);
        home_y[count] = home_cell(p.y_axis, y), home_x[count] = home_cell(p.x_axis, x);
      }
    }
  }

  void dots() const {
    const int64_t height = window_width(p.y_axis);
    int64_t cy = home_y[0] - p.y_axis.reach, cy1 = home_y[count - 1] + p.y_axis.reach + 1;
    int64_t cx0 = home_x[0] - p.x_axis.reach, cx1 = home_x[count - 1] + p.x_axis.reach + 1;
    cy = cy > 0 ? cy : 0, cy1 = cy1 < p.y_axis.cells ? cy1 : p.y_axis.cells;
    cx0 = cx0 > 0 ? cx0 : 0, cx1 = cx1 < p.x_axis.cells ? cx1 : p.x_axis.cells;
    const int64_t parts = ceil_div(cx1 - cx0, kTileCenters), part = ceil_div(cx1 - cx0, parts);
    for (; cy < cy1; ++cy) {
      for (int64_t cx = cx0; cx < cx1; cx += part) {
        Vec<C>* out[kGroupTokens];
        for (int64_t t = 0; t < count; ++t) {
          const int64_t dy = cy - home_y[t] + p.y_axis.reach, dx = cx - home_x[t] + p.x_axis.reach;
          out[t] =
              dy < 0 || dy >= height ? scratch.spare : scratch.sums + t * scratch.slots + 1 + dy * scratch.row + dx;
        }
        for (int64_t t = 0; t < count; t += kTileTokens) {
          dot_tile_of<T>(count - t < kTileTokens ? count - t : kTileTokens, cx1 - cx < part ? cx1 - cx : part, space,
                         rows + t, cy * p.x_axis.cells + cx, p.channels, out + t);
        }
      }
    }
  }

  // Squared norms of token t's candidates in their slots, infinite where there is none.
  const C* norms(int64_t t) const {
    C* all = scratch.norms + t * scratch.slots;
    if (t > 0 && home_y[t] == home_y[t - 1] && home_x[t] == home_x[t - 1]) {
      if (t == 1 || (home_y[t] == home_y[0] && home_x[t] == home_x[0])) return scratch.norms;
    }
    const int64_t height = window_width(p.y_axis);
    all[0] = -kNegInf<C>;
    for (int64_t dy = 0; dy < height; ++dy) {
      C* to = all + 1 + dy * scratch.row;
      copy_steps(space.norm_row(p, home_y[t] + dy - p.y_axis.reach) + home_x[t], to, space.window);
      to[space.window] = -kNegInf<C>;
    }
    for (int64_t i = height * scratch.row + 1; i < scratch.slots; ++i) all[i] = -kNegInf<C>;
    return all;
  }

  C* slots(int64_t t) const { return scratch.affinity + t * scratch.slots; }

  // Softmax of every token over its candidates, in steps that go over all tokens: the chains of one alone are long.
  void softmax(C factor) const {
    constexpr int w = kLanes<C>;
    C top[kGroupTokens], inverse[kGroupTokens];
    Vec<C> best[kGroupTokens], sum[kGroupTokens];
    for (int64_t t = 0; t < count; ++t) {
      const C* norm = norms(t);
      best[t] = splat<C>(kNegInf<C>);
      for (int64_t i = 0; i < scratch.slots; i += w) {
        const Vec<C> dots = reduce_square<C>(scratch.sums + t * scratch.slots + i), n = load(norm + i);
        const Vec<C> known = n == splat<C>(-kNegInf<C>) ? splat<C>(kNegInf<C>) : factor * (C(2) * dots - n);
        store(slots(t) + i, known);
        best[t] = vmax<C>(best[t], known);
      }
    }
    for (int64_t t = 0; t < count; ++t) top[t] = reduce_max<C>(best[t]);
    for (int64_t t = 0; t < count; ++t) {
      sum[t] = Vec<C>{};
      for (int64_t i = 0; i < scratch.slots; i += w) {
        const Vec<C> e = exp2v(load(slots(t) + i) - top[t]);
        store(slots(t) + i, e);
        sum[t] += e;
      }
    }
    for (int64_t t = 0; t < count; ++t) inverse[t] = C(1) / reduce_add<C>(sum[t]);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < scratch.slots; i += w) store(slots(t) + i, load(slots(t) + i) * inverse[t]);
    }
  }
};

// ---- where the affinities of one row of tokens go

template <typename T>
struct WeightRow {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  U* base;
  int64_t x_step, dy_step;

  WeightRow() = default;
  WeightRow(const ClusterParams& p, const ClusterSpace<T>& space, int64_t y) {
    const int64_t cell = home_cell(p.y_axis, y), units = space.units(cell);
    x_step = units * space.weight_width, dy_step = p.x_axis.size * x_step;
    base = space.weights +
           (space.starts[cell] * window_width(p.y_axis) + (y - space.y_first[cell]) / space.kPer) * space.weight_width;
  }

  void place(const ClusterParams& p, const ClusterSpace<T>& space, int64_t row, int64_t x, const U* slots) const {
    U* to = base + x * x_step;
    for (int64_t dy = 0; dy < window_width(p.y_axis); ++dy, to += dy_step) {
      copy_steps(slots + 1 + dy * row, to, space.window);
    }
  }
};

template <typename T>
void keep_affinity(const ClusterParams& p, const ScoreSpace<T>& scratch, int64_t token, const Compute<T>* slots) {
  using C = Compute<T>;
  const int64_t window = scratch.row - 1;
  C* to = static_cast<C*>(p.affinity) + token * p.slots;
  for (int64_t dy = 0; dy < window_width(p.y_axis); ++dy) {
    for (int64_t dx = 0; dx < window; ++dx) to[dy * window + dx] = slots[1 + dy * scratch.row + dx];
  }
}

// Rows [y0, y1) of one group row are at most two; pairs of one cell share their units.
template <typename T>
void cluster_score(const ClusterParams& p, const ClusterStep& s) {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  const ClusterSpace<T> space(p, s.workspace);
  const ScoreSpace<T> scratch(p, s.scratch);
  const C factor = static_cast<C>(p.temperature * kLog2E);
  const int64_t y0 = space.y_groups[s.item + 1], y1 = space.y_groups[s.item + 2];
  WeightRow<T> places[2];
  for (int64_t y = y0; y < y1; ++y) places[y - y0] = WeightRow<T>(p, space, y);
  for (int64_t g = 1; g <= space.x_groups[0]; ++g) {
    const int64_t x0 = space.x_groups[g], columns = space.x_groups[g + 1] - x0;
    const Group<T> group(p, space, scratch, s.image, y0, y1, x0, x0 + columns);
    group.dots();
    group.softmax(factor);
    for (int64_t t = 0; t < group.count; ++t) {
      C* slots = group.slots(t);
      const int64_t x = x0 + t % columns, y = y0 + t / columns;
      if constexpr (kUsesPairs<T>) {
        round_slots(slots, scratch.slots);
        const bool second = t >= columns && group.home_y[t] == group.home_y[t - columns];
        const bool first = t < columns && columns < group.count && group.home_y[t] == group.home_y[t + columns];
        if (!first) {  // with the second token of the unit, or without one
          U* units = reinterpret_cast<U*>(scratch.spare);
          join_slots(second ? slots - columns * scratch.slots : slots, second ? slots : nullptr, scratch.slots, units);
          places[t / columns].place(p, space, scratch.row, x, units);
        }
      } else {
        places[t / columns].place(p, space, scratch.row, x, slots);
      }
      if (s.last && p.affinity != nullptr) {
        keep_affinity<T>(p, scratch, s.image * p.tokens + y * p.x_axis.size + x, slots);
      }
    }
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
