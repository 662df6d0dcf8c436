// SPDX-License-Identifier: Apache-2.0
// Bringing the values into the cache before the points ask for them. Points read short pieces all over the levels,
// which no hardware prefetcher foresees, and a core keeps too few misses in flight to hide main memory. But a range of
// queries covers a part of the image, so the pixels there are read in long pieces, at several times the speed: a few
// further to the right, where no range has been, and a few more above and below. (What lies above was read once, but a
// whole row of parts has passed since.) Nothing but time depends on it.
#pragma once

#include "cpu_points.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kWorthFetching = 2 << 20;  // bytes of values: fewer stay in the cache anyway
constexpr int64_t kFetchAhead = 6;           // pixels by which points are expected to leave their query

// Loads, not prefetch instructions: those do not wake the hardware's own prefetcher.
inline void touch(const char* p, int64_t bytes) {
  int64_t sum = 0;
  for (int64_t i = 0; i < bytes; i += 64) sum += p[i];
  __asm__ volatile("" : : "r"(sum));
}

// First pixel not to fetch, for an edge of the part; the image's own edges stay where they are.
inline int64_t fetch_limit(float edge, int64_t size) {
  if (edge <= 0) return 0;
  const int64_t pixel = static_cast<int64_t>(edge * static_cast<float>(size)) + kFetchAhead;
  return edge >= 1 || pixel > size ? size : pixel;
}
inline int64_t first_row(const QueryRange& range, int64_t height) {
  const int64_t row = fetch_limit(range.top, height) - 2 * kFetchAhead;
  return row > 0 ? row : 0;
}

template <typename T>
void fetch_values(const DeformParams& p, QueryRange range) {
  const int64_t pixel = p.value_token * static_cast<int64_t>(sizeof(T));
  if (!(range.right > range.left) || p.tokens * pixel < kWorthFetching || p.value_head >= p.value_token) return;
  int64_t pixels = 0;
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t h = p.level[l].height, w = p.level[l].width;
    pixels += (fetch_limit(range.bottom, h) - first_row(range, h)) *
              (fetch_limit(range.right, w) - fetch_limit(range.left, w));
  }
  if (pixels > 2 * head_points(p) * range.count) return;  // few queries: most of it would be read for nothing
  const char* value = reinterpret_cast<const char*>(static_cast<const T*>(p.value) + range.image * p.value_batch);
  for (int64_t l = 0; l < p.levels; ++l) {
    const int64_t h = p.level[l].height, w = p.level[l].width;
    const int64_t left = fetch_limit(range.left, w), right = fetch_limit(range.right, w);
    for (int64_t y = first_row(range, h); y < fetch_limit(range.bottom, h); ++y) {
      const char* row = value + (p.level[l].start + y * w) * pixel;
      touch(row + left * pixel, (right - left) * pixel);
    }
  }
}

// The rows of a range, that come in an order of their own.
inline void fetch_rows(const QueryRows& rows, QueryRange range, int64_t count, int64_t size) {
  const char* base = static_cast<const char*>(rows.data) + range.image * rows.batch_stride * size;
  for (int64_t i = 0; i < range.count; ++i) touch(base + range.query(i) * rows.query_stride * size, count * size);
}

template <typename T>
void fetch(const DeformParams& p, QueryRange range) {
  const int64_t size = p.fused && p.offsets_are_values ? sizeof(T) : sizeof(Compute<T>);
  fetch_values<T>(p, range);
  fetch_rows(p.locations, range, 2 * query_points(p), size);
  fetch_rows(p.weights, range, query_points(p), size);
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
