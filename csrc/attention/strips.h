// SPDX-License-Identifier: Apache-2.0
// Building blocks of the CPU attention kernels: packing rows of one head, and strips of query rows.
#pragma once

#include "../common/pack.h"
#include "params.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kStrip = 48;       // query rows per strip: 8 register tiles
constexpr int64_t kKeyBlock = 1024;  // most keys per online-softmax step: strip of scores <= 192 KiB

template <typename T>
RowView<T> head_rows(const Rows& r, int64_t head, int64_t first, const int32_t* index) {
  return {static_cast<const T*>(r.data) + head * r.head_stride, r.row_stride, first, r.rows, index};
}

// Turns products into logits of the log2 domain, s * factor + bias, and keeps their lane-wise maximum per row, while
// the products are in registers: two passes less over the strip. Columns are padded with bias -inf.
template <typename C>
struct Logits : StoreOnly {
  C factor;
  const C* bias;  // of the block's first column
  mutable Vec<C> best[kStrip];

  Logits(C factor_, const C* bias_, int64_t rows) : factor(factor_), bias(bias_) {
    for (int64_t r = 0; r < rows; ++r) best[r] = splat<C>(kNegInf<C>);
  }
  template <int V, typename Acc>
  void row(int64_t r, int64_t, int64_t column, Vec<Acc>* s) const {
    Vec<C> top = best[r];
    TP_UNROLL for (int v = 0; v < V; ++v) {
      s[v] = s[v] * factor + load(bias + column + v * kLanes<C>);
      top = vmax<C>(top, s[v]);
    }
    best[r] = top;
  }
  C max(int64_t r) const { return reduce_max<C>(best[r]); }
};

// s[j] = exp2(s[j] - shift)
template <typename C>
void exponentials(C* s, C shift, int64_t padded) {
  for (int64_t j = 0; j < padded; j += kLanes<C>) store(s + j, exp2v(load(s + j) - shift));
}

// Per-key bias in the log2 domain, padded with -inf.
template <typename C>
void fill_bias(const AttentionParams& p, int64_t first, int64_t n, int64_t padded, C* out) {
  const C* bias = static_cast<const C*>(p.key_bias);
  for (int64_t j = 0; j < n; ++j) out[j] = bias == nullptr ? C(0) : bias[first + j] * C(kLog2E);
  for (int64_t j = n; j < padded; ++j) out[j] = kNegInf<C>;
}

struct Span {
  int64_t sequence, head, q0, nq, k0, nk;
};

// Bounds of one (sequence, head). Contents were checked before; clamping keeps any content memory-safe.
inline Span span_of(const AttentionParams& p, int64_t item) {
  Span s;
  s.sequence = item / p.heads, s.head = item % p.heads;
  s.q0 = p.cu_q[s.sequence], s.nq = p.cu_q[s.sequence + 1] - s.q0;
  s.k0 = p.cu_k[s.sequence], s.nk = p.cu_k[s.sequence + 1] - s.k0;
  return s;
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
