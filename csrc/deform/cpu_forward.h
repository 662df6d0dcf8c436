// SPDX-License-Identifier: Apache-2.0
// Forward: heads outside, so that one head's surroundings stay in the second-level cache while the neighbouring queries
// of a list read them; channels of one (query, head) in registers over all points.
#pragma once

#include "cpu_points.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

template <typename T>
struct HeadValues {  // one head of one image
  const T* base;
  int64_t stride;  // between tokens
};

// `Blocks` blocks of channels (from the base on) of one query. n < block: only the first n channels, of one block.
template <typename T, int Blocks, bool Whole>
inline void sample_channels(const DeformParams& p, const HeadValues<T>& v, const PointArrays<Compute<T>>& a, int64_t k,
                            T* out, int64_t n) {
  using C = Compute<T>;
  constexpr int kSets = Blocks == 1 ? 4 : 2;  // independent sums hide the latency of the additions
  Block<C> sum[kSets][Blocks] = {};
  const auto add = [&](int set, const T* at, C weight) __attribute__((always_inline)) {
    TP_UNROLL
    for (int j = 0; j < Blocks; ++j) {
      const Block<C> x = Whole ? load_block(at + j * kBlock<T>) : load_block(at, n);
      sum[set][j].a += weight * x.a;
      sum[set][j].b += weight * x.b;
    }
  };
  for (int64_t l = 0; l < p.levels; ++l) {
    const T* level = v.base + p.level[l].start * v.stride;
    const int64_t down = p.level[l].width * v.stride;
    for (int64_t i = 0; i < p.points; ++i, ++k) {
      const T* at = level + static_cast<int64_t>(a.row[k]) * v.stride;
      const Int<C> corners = a.corners[k];
      if (__builtin_expect(corners == 15, 1)) {
        add(0, at, a.w00[k]);
        add(1, at + v.stride, a.w01[k]);
        add(2 % kSets, at + down, a.w10[k]);
        add(3 % kSets, at + down + v.stride, a.w11[k]);
      } else if (corners != 0) {
        if (corners & 1) add(0, at, a.w00[k]);
        if (corners & 2) add(1, at + v.stride, a.w01[k]);
        if (corners & 4) add(2 % kSets, at + down, a.w10[k]);
        if (corners & 8) add(3 % kSets, at + down + v.stride, a.w11[k]);
      }
    }
  }
  TP_UNROLL
  for (int j = 0; j < Blocks; ++j) {
    Block<C> x = {sum[0][j].a + sum[1][j].a, sum[0][j].b + sum[1][j].b};
    if constexpr (kSets == 4) x.a += sum[2][j].a + sum[3][j].a, x.b += sum[2][j].b + sum[3][j].b;
    if constexpr (Whole) {
      store_block(out + j * kBlock<T>, x);
    } else {
      store_block(out, x, n);
    }
  }
}

template <typename T>
inline void sample_query(const DeformParams& p, HeadValues<T> v, const PointArrays<Compute<T>>& a, int64_t k, T* out) {
  int64_t d = 0;
  for (; d + 2 * kBlock<T> <= p.dim; d += 2 * kBlock<T>, v.base += 2 * kBlock<T>) {
    sample_channels<T, 2, true>(p, v, a, k, out + d, kBlock<T>);
  }
  if (d + kBlock<T> <= p.dim) {
    sample_channels<T, 1, true>(p, v, a, k, out + d, kBlock<T>);
    d += kBlock<T>, v.base += kBlock<T>;
  }
  if (d < p.dim) sample_channels<T, 1, false>(p, v, a, k, out + d, p.dim - d);
}

template <typename C>
inline void fill_sizes(const DeformParams& p, int64_t queries, const PointArrays<C>& a) {
  const int64_t n = row_points(p), total = round_up(queries * n, 16);
  for (int64_t k = 0; k < total; ++k) {
    const Level& level = p.level[k % n / p.points];
    a.width[k] = static_cast<C>(level.width), a.height[k] = static_cast<C>(level.height);
  }
}

template <typename C>
inline void apply_mask(const DeformParams& p, const bool* mask, int64_t queries, const PointArrays<C>& a) {
  int64_t k = 0;
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t l = 0; l < p.levels; ++l) {
      for (int64_t j = 0; j < p.points; ++j, ++k) {
        a.corners[k] = unmasked_corners(a.corners[k], mask + p.level[l].start, a.row[k], p.level[l].width);
      }
    }
  }
}

template <typename T>
void forward_queries(const DeformParams& p, int64_t image, const int32_t* order, int64_t count, char* scratch) {
  using C = Compute<T>;
  const int64_t n = row_points(p), run = run_queries(p, n), width = p.heads * p.dim;
  T* out = static_cast<T*>(p.out) + image * p.queries * width;
  if (n == 0) {
    for (int64_t i = 0; i < count; ++i) __builtin_memset(out + order[i] * width, 0, width * sizeof(T));
    return;
  }
  Arena arena{scratch};
  const PointArrays<C> a = PointArrays<C>::take(arena, run * n);
  const QueryTables<C> tables = query_tables<C>(p, image, order, count, arena);
  fill_sizes(p, run, a);
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + image * p.tokens;
  for (int64_t head = 0; head < p.heads; ++head) {
    const T* base = static_cast<const T*>(p.value) + image * p.value_batch + head * p.value_head;
    for (int64_t first = 0; first < count; first += run) {
      const int64_t queries = count - first < run ? count - first : run;
      stage<T>(p, tables, image, head, order + first, first, queries, a.xy, a.weight);
      resolve_points(a, queries * n);
      if (mask != nullptr) apply_mask(p, mask, queries, a);
      for (int64_t i = 0; i < queries; ++i) {
        sample_query<T>(p, {base, p.value_token}, a, i * n, out + order[first + i] * width + head * p.dim);
      }
    }
  }
}

inline int64_t forward_scratch(const DeformParams& p, int64_t count) {  // enough for doubles
  const int64_t n = row_points(p);
  return PointArrays<double>::bytes(run_queries(p, n) * n) + QueryTables<double>::bytes(p, count) + 4096;
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
