// SPDX-License-Identifier: Apache-2.0
// Forward attention of one head: online softmax over key blocks, strips of 48 queries in the outer loop.
//
// K is packed once as transposed panels, V as rows; both stay in the second-level cache of the core. bfloat16 uses dot
// products of pairs where the CPU has them (K paired along the channels, V and P along the keys), float32 otherwise.
#pragma once

#include "online_softmax.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

template <typename T>
struct ForwardPlan {
  using U = typename Packed<T>::type;
  static constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;  // values per unit
  static constexpr int64_t kPanel = kTileVecs * kLanes<U>;
  int64_t dim_units, width, block, stride;
  explicit ForwardPlan(int64_t dim, int64_t keys) {
    dim_units = ceil_div(dim, kPer);
    width = round_up(dim, kLanes<U>);
    const int64_t blocks = ceil_div(keys > 0 ? keys : 1, kKeyBlock);
    block = round_up(ceil_div(keys > 0 ? keys : 1, blocks), kPanel);
    stride = block + kPer * kLanes<U>;  // whole lines, but no power of two: rows must not compete for cache sets
  }
};

inline int64_t forward_scratch_bytes(const AttentionParams& p) {
  const int64_t keys = p.max_k + 2 * 64, width = round_up(p.dim, 16) + 16;
  const int64_t wide = 8;  // bytes of the widest compute type
  return wide * (2 * keys * width + 2 * keys + kStrip * (kKeyBlock + 128) + kStrip * (4 * width + 64)) + 4096;
}

// v rows -> [keys / kPer, width] units.
template <typename T>
void pack_values(const RowView<T>& v, int64_t n, int64_t dim, int64_t width, typename Packed<T>::type* out) {
  if constexpr (kUsesPairs<T>) {
    static constexpr BFloat16 kZero[256] = {};
    for (int64_t i = 0; i < n; i += 2) {
      const BFloat16* a = v(i);
      const BFloat16* b = i + 1 < n ? v(i + 1) : nullptr;
      uint32_t* to = out + i / 2 * width;
      for (int64_t d0 = 0; d0 < dim; d0 += 256) {
        const int64_t part = dim - d0 < 256 ? dim - d0 : 256;
        const BFloat16* x = a ? a + d0 : kZero;
        const BFloat16* y = b ? b + d0 : kZero;
        for (int64_t d = 0; d < part; ++d) to[d0 + d] = x[d].bits | static_cast<uint32_t>(y[d].bits) << 16;
      }
      for (int64_t d = dim; d < width; ++d) to[d] = 0;
    }
  } else {
    pack_rows(v, 0, n, dim, width, out);
  }
}

// Asks for a row (null: none). Always inlined: GCC drops calls of functions that do nothing but prefetch.
template <bool Write = false, typename T>
__attribute__((always_inline)) inline void prefetch_row(const T* row, int64_t dim) {
  if (row == nullptr) return;
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d, Write, 2);
}

template <typename T>
struct ForwardHead {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  using Plan = ForwardPlan<T>;
  const AttentionParams& p;
  const Span span;
  const Plan plan;
  const RowView<T> q, k, v;
  U *keys, *values, *queries, *staged;
  C *bias, *cls;  // per key; cls: logits of the first query
  OnlineSoftmax<T> softmax;

  // K and V of one panel.
  void pack(int64_t j) const {
    const int64_t n = span.nk - j < Plan::kPanel ? span.nk - j : Plan::kPanel;
    U* to = keys + j * plan.dim_units;
    if constexpr (sizeof(T) == sizeof(U)) {
      pack_columns<U>([&](int64_t i) { return reinterpret_cast<const U*>(k(j + i)); }, n, plan.dim_units, to);
    } else {
      pack_units<T>(k, j, n, p.dim, plan.dim_units, staged);
      pack_columns<U>([&](int64_t i) { return staged + i * plan.dim_units; }, n, plan.dim_units, to);
    }
    RowView<T> rest = v;
    rest.first += j;
    pack_values<T>(rest, n, p.dim, plan.width, values + j / Plan::kPer * plan.width);
  }
  // Rows of K and V are far apart in memory. Those of the next panel are asked for tile by tile while one is
  // multiplied.
  __attribute__((always_inline)) void prefetch_keys(int64_t panel, int64_t tile, int64_t tiles) const {
    const int64_t begin = panel + Plan::kPanel * tile / tiles, end = panel + Plan::kPanel * (tile + 1) / tiles;
    for (int64_t j = begin; j < end && j < span.nk; ++j) prefetch_row(k(j), p.dim), prefetch_row(v(j), p.dim);
  }
  // The rows that come after the last product: outputs of this strip, queries of the next.
  __attribute__((always_inline)) void prefetch_queries(int64_t begin, int64_t rows) const {
    for (int64_t i = begin; i < begin + rows; ++i) {
      prefetch_row<true>(output(i), p.dim);
      if (i + kStrip < span.nq) prefetch_row(q(i + kStrip), p.dim);
    }
  }

  T* output(int64_t i) const { return static_cast<T*>(p.o) + ((span.q0 + i) * p.heads + span.head) * p.dim; }

  // Weights of the strip for `n` keys from `begin` on; the first strip of an item also packs them.
  void weigh(int64_t rows, int64_t begin, int64_t n, bool packs) const {
    const int64_t padded = round_up(n, kLanes<U>), tiles = ceil_div(rows, kTileRows);
    for (int64_t j = 0; j < padded; j += Plan::kPanel) {
      const int64_t panel = begin + j, columns = padded - j < Plan::kPanel ? padded - j : Plan::kPanel;
      if (packs) pack(panel);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t r = t * kTileRows, count = rows - r < kTileRows ? rows - r : kTileRows;
        if (packs) prefetch_keys(panel + Plan::kPanel, t, tiles);
        Gemm<U>::panels(queries + r * plan.dim_units, plan.dim_units, keys + panel * plan.dim_units, nullptr, 0, count,
                        columns, plan.dim_units, softmax, r, j);
      }
    }
    softmax.flush();
  }
  // out (+)= weights x values.
  void sum_values(int64_t strip, int64_t rows, int64_t begin, int64_t n) const {
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = rows - r < kTileRows ? rows - r : kTileRows;
      if (begin + n == span.nk) prefetch_queries(strip + r, count);
      Gemm<U>::rows(reinterpret_cast<const U*>(softmax.weights + r * plan.stride), plan.stride / Plan::kPer, 1,
                    values + begin / Plan::kPer * plan.width, plan.width, softmax.out + r * plan.width, plan.width,
                    count, plan.width, ceil_div(n, Plan::kPer), begin > 0);
    }
  }

  void finish(int64_t strip, int64_t rows) const {
    C* lse = static_cast<C*>(p.lse) + span.head * p.total_q + span.q0 + strip;
    for (int64_t r = 0; r < rows; ++r) {
      const C* out = softmax.out + r * plan.width;
      const C sum = softmax.sum(r);
      narrow<T>(out, output(strip + r), p.dim, sum > 0 ? C(1) / softmax.rounded_sum(r) : C(0));
      lse[r] = sum > 0 ? (softmax.shift[r] + log2s(sum)) * C(kLn2) : sum == 0 ? kNegInf<C> : sum;
      if (sum != sum) narrow<T>(out, output(strip + r), p.dim, sum);  // NaN in, NaN out
    }
  }
  void finish_cls() const {
    C* to = static_cast<C*>(p.cls) + span.head * p.total_k + span.k0;
    const C sum = softmax.sum(0), shift = sum == 0 ? C(0) : softmax.shift[0] + log2s(sum);
    for (int64_t j = 0; j < span.nk; j += kLanes<C>) store(cls + j, exp2v(load(cls + j) - shift));
    __builtin_memcpy(to, cls, span.nk * sizeof(C));
  }

  void run(int64_t strip, bool packs) {
    const int64_t rows = span.nq - strip < kStrip ? span.nq - strip : kStrip;
    const bool with_cls = strip == 0 && p.cls != nullptr;
    pack_units<T>(q, strip, rows, p.dim, plan.dim_units, queries);
    softmax.start(rows);
    if (span.nk == 0) __builtin_memset(softmax.out, 0, rows * plan.width * sizeof(C));
    for (int64_t begin = 0; begin < span.nk; begin += plan.block) {
      const int64_t n = span.nk - begin < plan.block ? span.nk - begin : plan.block;
      softmax.bias = bias + begin, softmax.cls = with_cls ? cls + begin : nullptr, softmax.first = begin == 0;
      weigh(rows, begin, n, packs);
      sum_values(strip, rows, begin, n);
    }
    finish(strip, rows);
    if (with_cls) finish_cls();
  }
};

template <typename T>
void forward_item(const AttentionParams& p, int64_t item, int64_t chunks, char* scratch) {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  using Plan = ForwardPlan<T>;
  const Span span = span_of(p, item / chunks);
  const int64_t strips = ceil_div(span.nq, kStrip), chunk = item % chunks;
  const int64_t first = strips * chunk / chunks, last = strips * (chunk + 1) / chunks;
  if (first == last) return;
  const Plan plan(p.dim, span.nk);
  const int64_t padded = round_up(span.nk, kLanes<U>);
  Arena arena{scratch};
  U* keys = arena.take<U>(padded * plan.dim_units);
  U* values = arena.take<U>((ceil_div(span.nk, Plan::kPer) + 1) * plan.width);
  U* queries = arena.take<U>(kStrip * plan.dim_units);
  U* staged = arena.take<U>(sizeof(T) == sizeof(U) ? 0 : Plan::kPanel * plan.dim_units);
  C* bias = arena.take<C>(padded);
  C* cls = arena.take<C>(padded);
  auto* weights = arena.take<typename PackedValue<T>::type>(kStrip * plan.stride);
  C* out = arena.take<C>(kStrip * plan.width);
  C* stats = arena.take<C>(2 * kStrip);
  C* queue = arena.take<C>(kTileRows * kTileVecs * kLanes<C>);
  auto* sums = arena.take<Vec<C>>(kStrip);
  auto* rounded_sums = kUsesPairs<T> ? arena.take<Vec<C>>(kStrip) : sums;
  fill_bias<C>(p, span.k0, span.nk, padded, bias);
  ForwardHead<T> head{p,
                      span,
                      plan,
                      head_rows<T>(p.q, span.head, span.q0, p.q_index),
                      head_rows<T>(p.k, span.head, span.k0, p.k_index),
                      head_rows<T>(p.v, span.head, span.k0, p.k_index),
                      keys,
                      values,
                      queries,
                      staged,
                      bias,
                      cls,
                      {{},
                       static_cast<C>(p.scale * kLog2E),
                       plan.stride,
                       plan.width,
                       weights,
                       out,
                       stats,
                       stats + kStrip,
                       sums,
                       rounded_sums,
                       queue}};
  for (int64_t s = first; s < last; ++s) head.run(s * kStrip, s == first);
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
