// SPDX-License-Identifier: Apache-2.0
// Bringing the values into the cache before the points ask for them. Points read short pieces all over the levels,
// which no hardware prefetcher foresees, and a core keeps too few misses in flight to hide main memory. But queries
// usually sweep the image from top to bottom, so the rows of pixels that a range of queries will be the first to read
// are read in one long piece each, at several times the speed. Nothing but time depends on it.
#pragma once

#include "cpu_points.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kWorthFetching = 2 << 20;  // bytes of values: fewer stay in the cache anyway
constexpr double kFetchAhead = 6;            // pixels by which points are expected to leave their query

// Vertical position of a query in the image: of its reference, or the mean of its points.
template <typename C>
inline double query_height(const DeformParams& p, int64_t image, int64_t query) {
  if (p.fused) return reference_row<C>(p, image, query, 0)[1];
  const C* xy = query_row<C>(p.locations, image, query);
  const int64_t n = query_points(p);
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += xy[2 * k + 1];
  return sum / static_cast<double>(n);
}

inline int64_t fetch_limit(double position, int64_t height) {
  const double row = position * static_cast<double>(height) + kFetchAhead;
  return row > 0 ? static_cast<int64_t>(row < static_cast<double>(height) ? row : static_cast<double>(height)) : 0;
}

template <typename T>
void fetch_values(const DeformParams& p, QueryRange range) {
  using C = Compute<T>;
  const int64_t pixel = p.value_token * static_cast<int64_t>(sizeof(T)), n = head_points(p);
  if (p.tokens * pixel < kWorthFetching || n == 0 || p.heads == 0 || p.value_head >= p.value_token) return;
  const double to = query_height<C>(p, range.image, range.begin + range.count - 1);
  const double from = range.begin == 0 ? -1e9 : query_height<C>(p, range.image, range.begin - 1);
  if (!(to > from)) return;
  int64_t pixels = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t rows = fetch_limit(to, p.level[l].height) - fetch_limit(from, p.level[l].height);
    pixels += rows * p.level[l].width;
  }
  if (2 * pixels > 4 * n * range.count) return;  // scattered queries: most of it would be read for nothing
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t first = fetch_limit(from, p.level[l].height), last = fetch_limit(to, p.level[l].height);
    const char* at = reinterpret_cast<const char*>(static_cast<const T*>(p.value) + range.image * p.value_batch) +
                     (p.level[l].start + first * p.level[l].width) * pixel;
    const int64_t bytes = (last - first) * p.level[l].width * pixel;
    int64_t sum = 0;
    for (int64_t i = 0; i < bytes; i += 64) sum += at[i];
    __asm__ volatile("" : : "r"(sum));
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
