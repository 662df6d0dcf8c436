// SPDX-License-Identifier: Apache-2.0
// Forward: run by run of queries; the channels of one (query, head) stay in registers over all points.
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

// Where the corners of the points of a run lie, so that the loop over them has no branch and little arithmetic. A
// corner outside (or masked) reads a row of zeros.
struct CornerRows {
  int64_t *level, *down;  // address of the first pixel of the level, for the head; bytes to the next row of pixels
  int64_t* at[4];         // addresses of the corners
  int64_t zeros;
};
constexpr int kCornerArrays = 6;

inline int64_t forward_scratch(const DeformParams& p) {  // enough for doubles
  const int64_t points = padded_points(run_queries(p) * query_points(p));
  return run_scratch(p) + 8 * (kCornerArrays * points + p.dim) + 7 * 64;
}

template <typename T>
CornerRows take_corners(const DeformParams& p, int64_t image, Arena& arena) {
  const int64_t run = run_queries(p), n = padded_points(run * query_points(p));
  CornerRows r;
  r.level = arena.take<int64_t>(n), r.down = arena.take<int64_t>(n);
  for (int64_t*& at : r.at) at = arena.take<int64_t>(n);
  T* zeros = arena.take<T>(p.dim);
  __builtin_memset(zeros, 0, p.dim * sizeof(T));
  r.zeros = reinterpret_cast<int64_t>(zeros);
  const T* value = static_cast<const T*>(p.value) + image * p.value_batch;
  int64_t k = 0;
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t l = 0; l < p.levels; ++l) {
      const T* first = value + head * p.value_head + p.level[l].start * p.value_token;
      const int64_t down = p.level[l].width * p.value_token * static_cast<int64_t>(sizeof(T));
      for (const int64_t end = k + p.points; k < end; ++k) {
        r.level[k] = reinterpret_cast<int64_t>(first), r.down[k] = down;
      }
    }
  }
  for (const int64_t query = k; query > 0 && k < n; ++k) {  // the other queries are as the first
    r.level[k] = r.level[k - query], r.down[k] = r.down[k - query];
  }
  return r;
}

// As many integers as there are 64-bit lanes.
template <typename I>
inline IntVec<double> load_long(const I* from) {
  typedef I Narrow __attribute__((vector_size(kLanes<double> * sizeof(I))));
  Narrow v;
  __builtin_memcpy(&v, from, sizeof(v));
  return __builtin_convertvector(v, IntVec<double>);
}

// Addresses of the corners of a run; those outside weigh nothing.
template <typename T>
void locate_corners(const DeformParams& p, QueryRange run, const PointArrays<Compute<T>>& a, const CornerRows& r) {
  using C = Compute<T>;
  const int64_t n = run.count * query_points(p), right = p.value_token * static_cast<int64_t>(sizeof(T));
  for (int64_t k = 0; k < n; k += kLanes<double>) {
    const IntVec<double> corners = load_long(a.corners + k), zeros = IntVec<double>{} + r.zeros;
    const IntVec<double> at = load_long(r.level + k) + load_long(a.row + k) * right, below = at + load_long(r.down + k);
    store_ints<double>(r.at[0] + k, (corners & 1) != 0 ? at : zeros);
    store_ints<double>(r.at[1] + k, (corners & 2) != 0 ? at + right : zeros);
    store_ints<double>(r.at[2] + k, (corners & 4) != 0 ? below : zeros);
    store_ints<double>(r.at[3] + k, (corners & 8) != 0 ? below + right : zeros);
  }
  for (int64_t k = 0; k < n; k += kLanes<C>) {
    const IntVec<C> corners = load_ints<C>(a.corners + k);
    const Vec<C> zeros{};
    store(a.w00 + k, (corners & 1) != 0 ? load(a.w00 + k) : zeros);
    store(a.w01 + k, (corners & 2) != 0 ? load(a.w01 + k) : zeros);
    store(a.w10 + k, (corners & 4) != 0 ? load(a.w10 + k) : zeros);
    store(a.w11 + k, (corners & 8) != 0 ? load(a.w11 + k) : zeros);
  }
}

// `Blocks` blocks of channels from d on. Not Whole: what is left of the channels, less than a block. Not inlined: the
// loop over the points needs all registers.
template <typename T, int Blocks, bool Whole>
__attribute__((noinline)) void sample_channels(const DeformParams& p, QueryRange run, const PointArrays<Compute<T>>& a,
                                               const CornerRows& r, int64_t d, bool stream) {
  using C = Compute<T>;
  constexpr int kSets = Blocks == 1 ? 4 : 2;  // independent sums hide the latency of the additions
  const C *w00 = a.w00, *w01 = a.w01, *w10 = a.w10, *w11 = a.w11;
  const int64_t *at00 = r.at[0], *at01 = r.at[1], *at10 = r.at[2], *at11 = r.at[3];
  const int64_t points = head_points(p), n = p.dim - d;
  T* all = static_cast<T*>(p.out) + run.image * p.queries * p.heads * p.dim + d;
  for (int64_t head = 0; head < p.heads; ++head) {  // outside: the queries of a run read about the same values
    for (int64_t i = 0; i < run.count; ++i) {
      Block<C> sum[kSets][Blocks] = {};
      const auto add = [&](int set, int64_t address, C weight) __attribute__((always_inline)) {
        const T* at = reinterpret_cast<const T*>(address) + d;
        TP_UNROLL
        for (int j = 0; j < Blocks; ++j) {
          const Block<C> x = Whole ? load_block(at + j * kBlock<T>) : load_block(at, n);
          sum[set][j].a += weight * x.a;
          sum[set][j].b += weight * x.b;
        }
      };
      int64_t k = (i * p.heads + head) * points;
      for (const int64_t end = k + points; k < end; ++k) {
        add(0, at00[k], w00[k]);
        add(1, at01[k], w01[k]);
        add(2 % kSets, at10[k], w10[k]);
        add(3 % kSets, at11[k], w11[k]);
      }
      T* out = all + (run.query(i) * p.heads + head) * p.dim;
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
  }
}

template <typename T>
void forward_queries(const DeformParams& p, QueryRange range, char* scratch) {
  Arena arena{scratch};
  const PointArrays<Compute<T>> a = take_points<Compute<T>>(p, arena);
  const CornerRows r = take_corners<T>(p, range.image, arena);
  const bool stream = streams<T>(p);
  fetch<T>(p, range);
  for_runs(p, range, [&](QueryRange run) {
    stage<T>(p, run, a);
    resolve_points(p, run, a);
    locate_corners<T>(p, run, a, r);
    int64_t d = 0;
    for (; d + 2 * kBlock<T> <= p.dim; d += 2 * kBlock<T>) sample_channels<T, 2, true>(p, run, a, r, d, stream);
    for (; d + kBlock<T> <= p.dim; d += kBlock<T>) sample_channels<T, 1, true>(p, run, a, r, d, stream);
    if (d < p.dim) sample_channels<T, 1, false>(p, run, a, r, d, stream);
  });
  if (stream) stream_fence();
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
