// SPDX-License-Identifier: Apache-2.0
// Forward attention of one head: online softmax over key blocks, strips of 48 queries in the outer loop.
//
// K is packed once as transposed panels, V as rows; both stay in the second-level cache of the core. bfloat16 uses dot
// products of pairs where the CPU has them (K paired along the channels, V and P along the keys), float32 otherwise.
#pragma once

#include "strips.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

template <typename T>
struct ForwardPlan {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  static constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;  // values per unit
  int64_t dim_units, width, block, stride;
  explicit ForwardPlan(int64_t dim, int64_t keys) {
    dim_units = ceil_div(dim, kPer);
    width = round_up(dim, kLanes<U>);
    const int64_t blocks = ceil_div(keys > 0 ? keys : 1, kKeyBlock);
    block = round_up(ceil_div(keys > 0 ? keys : 1, blocks), kTileVecs * kLanes<U>);
    stride = block + kLanes<U>;  // no power of two: rows must not compete for the same cache sets
  }
};

inline int64_t forward_scratch_bytes(const AttentionParams& p) {
  const int64_t keys = p.max_k + 2 * 64, width = round_up(p.dim, 16) + 16;
  const int64_t wide = 8;  // bytes of the widest compute type
  return wide *
             (2 * keys * width + keys * width / 2 + 2 * kStrip * (kKeyBlock + 128) + keys + kStrip * (2 * width + 8)) +
         4096;
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

template <typename T>
struct ForwardStrip {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  const AttentionParams& p;
  const ForwardPlan<T>& plan;
  const U *keys, *values;
  const C* bias;
  U* queries;
  C *scores, *out, *row_max, *row_sum;
  BFloat16* rounded;  // P as bfloat16 pairs

  // One key block of `n` keys starting at `begin` (a multiple of the panel width).
  void step(int64_t rows, int64_t begin, int64_t n, C factor, C* cls_row) {
    const int64_t padded = round_up(n, kLanes<U>), ld = plan.stride;
    const Logits<C> logits(factor, bias + begin, rows);
    Gemm<U>::panels(queries, plan.dim_units, keys + begin * plan.dim_units, scores, ld, rows, padded, plan.dim_units,
                    logits);
    for (int64_t r = 0; r < rows; ++r) {
      C* s = scores + r * ld;
      const C best = logits.max(r);
      if (r == 0 && cls_row != nullptr) {
        for (int64_t j = 0; j < n; ++j) cls_row[begin + j] = s[j];
      }
      const C top = best > row_max[r] ? best : row_max[r];
      const C shift = top == kNegInf<C> ? C(0) : top;
      const C keep = begin == 0 ? C(0) : exp2s(row_max[r] - shift);
      C sum;
      if constexpr (kUsesPairs<T>) {
        sum = exp_and_sum(s, shift, padded, rounded + r * ld);
      } else {
        sum = exp_and_sum(s, shift, padded, s);
      }
      row_sum[r] = row_sum[r] * keep + sum;
      row_max[r] = top;
      if (begin > 0) {
        C* o = out + r * plan.width;
        for (int64_t d = 0; d < plan.width; ++d) o[d] *= keep;
      }
    }
    const int64_t units = ceil_div(n, ForwardPlan<T>::kPer);
    const U* weights = kUsesPairs<T> ? reinterpret_cast<const U*>(rounded) : reinterpret_cast<const U*>(scores);
    Gemm<U>::rows(weights, ld / ForwardPlan<T>::kPer, 1, values + begin / ForwardPlan<T>::kPer * plan.width, plan.width,
                  out, plan.width, rows, plan.width, units, begin > 0);
  }

  void finish(const Span& span, int64_t q, int64_t rows) {
    C* lse = static_cast<C*>(p.lse) + span.head * p.total_q + span.q0 + q;
    for (int64_t r = 0; r < rows; ++r) {
      T* to = static_cast<T*>(p.o) + ((span.q0 + q + r) * p.heads + span.head) * p.dim;
      const C sum = row_sum[r];
      narrow<T>(out + r * plan.width, to, p.dim, sum > 0 ? C(1) / sum : C(0));
      lse[r] = sum > 0 ? (row_max[r] + log2s(sum)) * C(kLn2) : sum == 0 ? kNegInf<C> : sum;
      if (sum != sum) narrow<T>(out + r * plan.width, to, p.dim, sum);  // NaN in, NaN out
    }
  }
};

template <typename T>
void forward_item(const AttentionParams& p, int64_t item, int64_t chunks, char* scratch) {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  const Span span = span_of(p, item / chunks);
  const int64_t strips = ceil_div(span.nq, kStrip), chunk = item % chunks;
  const int64_t first = strips * chunk / chunks, last = strips * (chunk + 1) / chunks;
  if (first == last) return;
  const ForwardPlan<T> plan(p.dim, span.nk);
  const int64_t padded = round_up(span.nk, kLanes<U>);
  Arena arena{scratch};
  U* keys = arena.take<U>(padded * plan.dim_units);
  U* values = arena.take<U>((ceil_div(span.nk, ForwardPlan<T>::kPer) + 1) * plan.width);
  C* bias = arena.take<C>(padded);
  U* queries = arena.take<U>(kStrip * plan.dim_units);
  C* scores = arena.take<C>(kStrip * plan.stride);
  C* out = arena.take<C>(kStrip * plan.width);
  C* stats = arena.take<C>(2 * kStrip);
  BFloat16* rounded = arena.take<BFloat16>(kUsesPairs<T> ? kStrip * plan.stride : 0);

  const RowView<T> k = head_rows<T>(p.k, span.head, span.k0, p.k_index);
  // Stage rows as units in the scores array, panel by panel, then transpose.
  const int64_t panel = kTileVecs * kLanes<U>;
  for (int64_t j = 0; j < span.nk; j += panel) {
    const int64_t n = span.nk - j < panel ? span.nk - j : panel;
    U* to = keys + j * plan.dim_units;
    if constexpr (sizeof(T) == sizeof(U)) {
      pack_columns<U>([&](int64_t i) { return reinterpret_cast<const U*>(k(j + i)); }, n, plan.dim_units, to);
    } else {
      U* staged = values;  // free until the values are packed
      pack_units<T>(k, j, n, p.dim, plan.dim_units, staged);
      pack_columns<U>([&](int64_t i) { return staged + i * plan.dim_units; }, n, plan.dim_units, to);
    }
  }
  pack_values<T>(head_rows<T>(p.v, span.head, span.k0, p.k_index), span.nk, p.dim, plan.width, values);
  fill_bias<C>(p, span.k0, span.nk, padded, bias);

  ForwardStrip<T> strip{p, plan, keys, values, bias, queries, scores, out, stats, stats + kStrip, rounded};
  const RowView<T> q = head_rows<T>(p.q, span.head, span.q0, p.q_index);
  const C factor = static_cast<C>(p.scale * kLog2E);
  C* cls = p.cls == nullptr ? nullptr : static_cast<C*>(p.cls) + span.head * p.total_k + span.k0;
  for (int64_t s = first; s < last; ++s) {
    const int64_t begin = s * kStrip, rows = span.nq - begin < kStrip ? span.nq - begin : kStrip;
    pack_units<T>(q, begin, rows, p.dim, plan.dim_units, queries);
    for (int64_t r = 0; r < rows; ++r) stats[r] = kNegInf<C>, stats[kStrip + r] = 0;
    if (span.nk == 0) __builtin_memset(out, 0, rows * plan.width * sizeof(C));
    for (int64_t j = 0; j < span.nk; j += plan.block) {
      strip.step(rows, j, span.nk - j < plan.block ? span.nk - j : plan.block, factor, s == 0 ? cls : nullptr);
    }
    strip.finish(span, begin, rows);
    if (s == 0 && cls != nullptr) {
      const C sum = stats[kStrip], shift = sum > 0 ? stats[0] + log2s(sum) : C(0);
      for (int64_t j = 0; j < span.nk; ++j) cls[j] = sum == 0 ? C(0) : exp2s(cls[j] - shift);
    }
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
