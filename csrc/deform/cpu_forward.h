// SPDX-License-Identifier: Apache-2.0
// Forward: query by query with all heads, whose values lie side by side in memory; the channels of one (query, head)
// stay in registers over all points.
#pragma once

#include "cpu_fetch.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kWorthStreaming = 32 << 20;  // bytes of output that do not stay in the last cache

// Whether the output goes past the caches, which saves reading what it overwrites.
template <typename T>
bool streams(const DeformParams& p) {
  const int64_t head = p.dim * static_cast<int64_t>(sizeof(T));
  return p.batch * p.queries * p.heads * head >= kWorthStreaming && head % kVecBytes == 0 &&
         reinterpret_cast<uintptr_t>(p.out) % kVecBytes == 0;
}

template <typename T>
struct HeadValues {  // one head of one image
  const T* base;
  int64_t stride;  // between tokens
};

// `Blocks` blocks of channels (from the base on) of one query. Not Whole: only the first n channels, of one block.
template <typename T, int Blocks, bool Whole>
inline void sample_channels(const DeformParams& p, const HeadValues<T>& v, const PointArrays<Compute<T>>& a, int64_t k,
                            T* out, int64_t n, bool stream) {
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
  const int64_t right = v.stride;
  for (int64_t l = 0; l < p.levels; ++l) {
    const T* level = v.base + p.level[l].start * right;
    const int64_t down = p.level[l].width * right;
    for (int64_t i = 0; i < p.points; ++i, ++k) {
      const int64_t at = static_cast<int64_t>(a.row[k]) * right;  // outside for a corner that is
      const Int<C> corners = a.corners[k];
      if (__builtin_expect(corners == 15, 1)) {
        add(0, level + at, a.w00[k]);
        add(1, level + (at + right), a.w01[k]);
        add(2 % kSets, level + (at + down), a.w10[k]);
        add(3 % kSets, level + (at + down + right), a.w11[k]);
      } else if (corners != 0) {
        if (corners & 1) add(0, level + at, a.w00[k]);
        if (corners & 2) add(1, level + (at + right), a.w01[k]);
        if (corners & 4) add(2 % kSets, level + (at + down), a.w10[k]);
        if (corners & 8) add(3 % kSets, level + (at + down + right), a.w11[k]);
      }
    }
  }
  TP_UNROLL
  for (int j = 0; j < Blocks; ++j) {
    Block<C> x = {sum[0][j].a + sum[1][j].a, sum[0][j].b + sum[1][j].b};
    if constexpr (kSets == 4) x.a += sum[2][j].a + sum[3][j].a, x.b += sum[2][j].b + sum[3][j].b;
    if constexpr (Whole) {
      stream ? stream_block(out + j * kBlock<T>, x) : store_block(out + j * kBlock<T>, x);
    } else {
      store_block(out, x, n);
    }
  }
}

// k: the first point of the (query, head).
template <typename T>
inline void sample_query(const DeformParams& p, HeadValues<T> v, const PointArrays<Compute<T>>& a, int64_t k, T* out,
                         bool stream) {
  int64_t d = 0;
  for (; d + 2 * kBlock<T> <= p.dim; d += 2 * kBlock<T>, v.base += 2 * kBlock<T>) {
    sample_channels<T, 2, true>(p, v, a, k, out + d, kBlock<T>, stream);
  }
  if (d + kBlock<T> <= p.dim) {
    sample_channels<T, 1, true>(p, v, a, k, out + d, kBlock<T>, stream);
    d += kBlock<T>, v.base += kBlock<T>;
  }
  if (d < p.dim) sample_channels<T, 1, false>(p, v, a, k, out + d, p.dim - d, stream);
}

template <typename T>
void forward_queries(const DeformParams& p, QueryRange range, char* scratch) {
  using C = Compute<T>;
  Arena arena{scratch};
  const PointArrays<C> a = take_points<C>(p, arena);
  const T* value = static_cast<const T*>(p.value) + range.image * p.value_batch;
  T* all = static_cast<T*>(p.out) + range.image * p.queries * p.heads * p.dim;
  const bool stream = streams<T>(p);
  fetch<T>(p, range);
  for_runs(p, range, [&](QueryRange run) {
    stage<T>(p, run, a);
    resolve_points(p, run, a);
    int64_t k = 0;
    for (int64_t i = 0; i < run.count; ++i) {
      T* out = all + run.query(i) * p.heads * p.dim;
      for (int64_t head = 0; head < p.heads; ++head, k += head_points(p), out += p.dim) {
        sample_query<T>(p, {value + head * p.value_head, p.value_token}, a, k, out, stream);
      }
    }
  });
  if (stream) stream_fence();
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
