// SPDX-License-Identifier: Apache-2.0
// Inverse transform sampling of one row. Plain loops in the order and precision of the PyTorch reference: a pick may
// hang on the last bit. Compiled without fused multiply-adds for the same reason.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "params.h"

namespace tokenprune {

template <typename C>
struct SampleRow {
  const SampleParams& p;
  const int64_t* order;  // positions by ascending score
  std::vector<C> cdf;    // [n + 1]: behind the last, an entry that is nearest to nothing
  std::vector<bool> candidate;
  C spread = 0;

  SampleRow(const SampleParams& params, int64_t row)
      : p(params), order(p.order + row * p.n), cdf(p.n + 1), candidate(p.n) {
    const C* scores = static_cast<const C*>(p.scores) + row * p.n;
    const bool* valid = p.valid == nullptr ? nullptr : p.valid + row * p.n;
    double total = 0;
    int64_t first = 0;  // not the hidden ones, which come first
    for (int64_t i = 0; i < p.n; ++i) {
      candidate[i] = valid == nullptr || valid[order[i]];
      first += !p.published && !candidate[i];
      cdf[i] = static_cast<C>(total += scores[order[i]]);
    }
    const C least = first < p.n ? cdf[first] : C(0);
    spread = (p.n > 0 ? cdf[p.n - 1] : C(0)) - least;
    for (int64_t i = 0; i < p.n; ++i) {
      const C scaled = (cdf[i] - least) / spread;
      cdf[i] = scaled < 0 ? C(0) : scaled;
    }
    cdf[p.n] = std::numeric_limits<C>::infinity();
  }

  // The first entry that is not less; NaN is never found.
  int64_t search(C value) const {
    int64_t begin = 0, end = p.n + 1;
    while (begin < end) {
      const int64_t middle = begin + (end - begin) / 2;
      if (cdf[middle] >= value) {
        end = middle;
      } else {
        begin = middle + 1;
      }
    }
    return std::min(begin, p.n);
  }

  int64_t nearest(C value) const {
    const int64_t above = search(value);
    const C lower = cdf[std::max<int64_t>(above - 1, 0)];
    return std::abs(cdf[above] - value) < std::abs(value - lower) ? above : search(lower);  // the first of equal ones
  }

  // y_k = y_0 + (l_k (G - 1) - y_0 k) / (G - 1), l from 0 to 1 in G equal steps, both ends exact.
  void fill_grid(int64_t count, C* grid) const {
    C start = std::numeric_limits<C>::infinity();
    for (int64_t i = 0; i < p.n; ++i) {
      if (cdf[i] != 0 && !(start <= cdf[i])) start = cdf[i];  // NaN stays
    }
    count = std::max<int64_t>(count, 1);
    const C last = static_cast<C>(std::max<int64_t>(count - 1, 1));
    for (int64_t i = 0; i < p.points; ++i) {
      const int64_t k = std::min(i, count - 1);
      const C step = k < count / 2 ? static_cast<C>(k) / last : C(1) - static_cast<C>(count - 1 - k) / last;
      grid[i] = start + (step * last - start * static_cast<C>(k)) / last;
    }
  }

  void run(int64_t row) const {
    fill_grid(p.counts == nullptr ? p.points : p.counts[row], static_cast<C*>(p.grid) + row * p.points);
    const C* grid = static_cast<const C*>(p.grid) + row * p.points;
    int64_t *pick = p.pick + row * p.points, highest = 0;
    bool* kept = p.kept + row * p.n;
    std::fill_n(kept, p.n, !(spread > 0));
    for (int64_t i = 0; i < p.points; ++i) {
      pick[i] = nearest(grid[i]);
      highest = std::max(highest, pick[i]);
      if (pick[i] < p.n) kept[pick[i]] = true;
    }
    if (p.published && highest == 1 && p.n > 1 && spread > 0) kept[1] = false;
    int32_t* rows = p.rows + row * p.n;
    for (int64_t i = 0; i < p.n; ++i) {
      kept[i] = kept[i] && candidate[i];
      if (kept[i]) *rows++ = static_cast<int32_t>(order[i]);
    }
    std::fill(rows, p.rows + (row + 1) * p.n, -1);
    std::copy_n(cdf.begin(), p.n, static_cast<C*>(p.cdf) + row * p.n);
  }
};

// The kept rows of sequence b: its prefix, then the sampled tokens by ascending significance, -1 behind them up to
// max_seqlen. `sort(x, n, order)` is the stable argsort. Returns how many are kept.
template <typename C, typename Sort>
int64_t sample_sequence(const SequenceParams& p, int64_t b, const C* significance, const Sort& sort, int32_t* rows) {
  const int64_t first = p.cu_seqlens[b] + p.prefix, n = p.cu_seqlens[b + 1] - first, columns = p.points + p.prefix;
  const bool* initial = p.initial + b * columns;
  const int32_t count = static_cast<int32_t>(std::count(initial, initial + columns, true) - p.prefix);
  std::vector<C> scores(significance + first, significance + first + n), cdf(n), grid(p.points);
  std::vector<int32_t> order(n);
  std::vector<int64_t> places(n), pick(p.points);
  const auto valid = std::make_unique<bool[]>(n), kept = std::make_unique<bool[]>(n);
  const C* bias = static_cast<const C*>(p.key_bias);
  for (int64_t i = 0; i < n; ++i) {
    valid[i] = bias == nullptr || bias[first + i] > -std::numeric_limits<C>::infinity();
    if (!valid[i]) scores[i] = 0;
  }
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += scores[i];
  for (int64_t i = 0; i < n; ++i) scores[i] /= static_cast<C>(total);
  std::vector<C> keys(scores);
  for (int64_t i = 0; i < n; ++i) keys[i] = valid[i] ? scores[i] : C(-1);  // hidden ones come first
  sort(keys.data(), n, order.data());
  std::copy(order.begin(), order.end(), places.begin());
  for (int64_t i = 0; i < p.prefix; ++i) rows[i] = static_cast<int32_t>(i);
  SampleParams sample{scores.data(), places.data(), valid.get(), &count,         1, n, p.points, false, cdf.data(),
                      grid.data(),   pick.data(),   kept.get(),  rows + p.prefix};
  SampleRow<C>(sample, 0).run(0);
  const int64_t found = std::count(kept.get(), kept.get() + n, true);
  for (int64_t i = p.prefix; i < p.prefix + found; ++i) rows[i] += static_cast<int32_t>(p.prefix);
  std::fill(rows + p.prefix + n, rows + p.max_seqlen, -1);
  return p.prefix + found;
}

}  // namespace tokenprune
