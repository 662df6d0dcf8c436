// SPDX-License-Identifier: Apache-2.0
// Column scores and gradients of one (sequence, head). One item owns all its outputs: no atomics, fixed order.
#pragma once

#include "strips.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

inline int64_t backward_scratch_bytes(const AttentionParams& p) {
  const int64_t keys = p.max_k + 2 * 64, width = round_up(p.dim, 16) + 16;
  return 8 * (7 * keys * width + 2 * kStrip * keys + 2 * keys + kStrip * (4 * width + 8)) + 8192;
}

// P of one strip: scores[r, j] = exp2(q k factor + bias - lse), zero for queries without a finite lse.
template <typename C>
void strip_probabilities(const C* q, const C* keys, const C* bias, const C* lse, C factor, int64_t rows, int64_t padded,
                         int64_t dim, C* scores) {
  Gemm<C>::panels(q, dim, keys, scores, padded, rows, padded, dim, Logits<C>(factor, bias, rows));
  for (int64_t r = 0; r < rows; ++r) {
    C* s = scores + r * padded;
    if (lse[r] == kNegInf<C>) {
      __builtin_memset(s, 0, padded * sizeof(C));
      continue;
    }
    exponentials(s, static_cast<C>(lse[r] * C(kLog2E)), padded);
  }
}

// Weight of query r of the sequence in the scores: w of the schema.
template <typename C>
C score_weight(int64_t kind, int64_t query, int64_t queries) {
  return kind == 0 ? C(query == 0) : C(1) / static_cast<C>(queries);
}

template <typename T>
void scores_item(const AttentionParams& p, int64_t item, char* scratch) {
  using C = Compute<T>;
  const Span span = span_of(p, item);
  const bool forward = p.scores != nullptr;
  const int64_t padded = round_up(span.nk, kLanes<C>);
  const int64_t queries = p.scores_kind == 0 ? (span.nq > 0 ? 1 : 0) : span.nq;  // the others have weight 0
  C* sums = forward ? static_cast<C*>(p.scores) + span.head * p.total_k + span.k0 : nullptr;
  C* grad_lse = forward ? nullptr : static_cast<C*>(p.grad_lse_out) + span.head * p.total_q + span.q0;
  if (forward) {
    for (int64_t j = 0; j < span.nk; ++j) sums[j] = 0;
  } else {
    for (int64_t i = 0; i < span.nq; ++i) grad_lse[i] = 0;
  }
  if (queries == 0 || span.nk == 0) return;
  Arena arena{scratch};
  C* keys = arena.take<C>(padded * p.dim);
  C* staging = arena.take<C>(span.nk * p.dim);
  C* bias = arena.take<C>(padded);
  C* q = arena.take<C>(kStrip * p.dim);
  C* scores = arena.take<C>(kStrip * padded);
  pack_transposed(head_rows<T>(p.k, span.head, span.k0, p.k_index), span.nk, p.dim, staging, keys);
  fill_bias<C>(p, span.k0, span.nk, padded, bias);
  const RowView<T> rows_q = head_rows<T>(p.q, span.head, span.q0, p.q_index);
  const C* lse = static_cast<const C*>(p.lse_in) + span.head * p.total_q + span.q0;
  const C* grad = forward ? nullptr : static_cast<const C*>(p.grad_scores) + span.head * p.total_k + span.k0;
  for (int64_t begin = 0; begin < queries; begin += kStrip) {
    const int64_t rows = queries - begin < kStrip ? queries - begin : kStrip;
    pack_rows(rows_q, begin, rows, p.dim, p.dim, q);
    strip_probabilities(q, keys, bias, lse + begin, static_cast<C>(p.scale * kLog2E), rows, padded, p.dim, scores);
    for (int64_t r = 0; r < rows; ++r) {
      const C weight = score_weight<C>(p.scores_kind, begin + r, span.nq);
      const C* s = scores + r * padded;
      if (forward) {
        for (int64_t j = 0; j < span.nk; ++j) sums[j] += s[j] * weight;
      } else {
        C sum = 0;
        for (int64_t j = 0; j < span.nk; ++j) sum += s[j] * grad[j];
        grad_lse[begin + r] = -weight * sum;
      }
    }
  }
}

// Write accumulated gradient rows [n, width] of one head.
template <typename T>
void store_gradient(const Compute<T>* from, void* to, int64_t first, int64_t n, int64_t width, int64_t heads,
                    int64_t head, int64_t dim, Compute<T> factor) {
  for (int64_t i = 0; i < n; ++i) {
    narrow<T>(from + i * width, static_cast<T*>(to) + ((first + i) * heads + head) * dim, dim, factor);
  }
}

template <typename T>
void backward_item(const AttentionParams& p, int64_t item, char* scratch) {
  using C = Compute<T>;
  const Span span = span_of(p, item);
  const int64_t nk = span.nk, padded = round_up(nk, kLanes<C>), width = round_up(p.dim, kLanes<C>), dim = p.dim;
  const bool values = p.grad_out.data != nullptr;
  Arena arena{scratch};
  C* keys_t = arena.take<C>(padded * dim);
  C* keys = arena.take<C>(nk * width);
  C* values_t = arena.take<C>(padded * dim);
  C* bias = arena.take<C>(padded);
  C* staging = arena.take<C>(nk * dim);
  C* grad_k = arena.take<C>(nk * width);
  C* grad_v = arena.take<C>(nk * width);
  C* q = arena.take<C>(kStrip * width);
  C* grad_out = arena.take<C>(kStrip * width);
  C* out = arena.take<C>(kStrip * width);
  C* grad_q = arena.take<C>(kStrip * width);
  C* scores = arena.take<C>(kStrip * padded);
  C* grads = arena.take<C>(kStrip * padded);
  C* grad_bias = static_cast<C*>(p.grad_bias) + span.head * p.total_k + span.k0;
  for (int64_t j = 0; j < nk; ++j) grad_bias[j] = 0;
  __builtin_memset(grad_k, 0, nk * width * sizeof(C));
  __builtin_memset(grad_v, 0, nk * width * sizeof(C));
  const RowView<T> rows_k = head_rows<T>(p.k, span.head, span.k0, p.k_index);
  const RowView<T> rows_q = head_rows<T>(p.q, span.head, span.q0, p.q_index);
  const RowView<T> rows_go = head_rows<T>(p.grad_out, span.head, span.q0, nullptr);
  const RowView<T> rows_out = head_rows<T>(p.out, span.head, span.q0, nullptr);
  pack_transposed(rows_k, nk, dim, staging, keys_t);
  pack_rows(rows_k, 0, nk, dim, width, keys);
  if (values) pack_transposed(head_rows<T>(p.v, span.head, span.k0, p.k_index), nk, dim, staging, values_t);
  fill_bias<C>(p, span.k0, nk, padded, bias);
  const int64_t stat_row = span.head * p.total_q + span.q0;
  const C* lse = static_cast<const C*>(p.lse_in) + stat_row;
  const C* grad_lse = p.grad_lse == nullptr ? nullptr : static_cast<const C*>(p.grad_lse) + stat_row;
  const C* grad_scores =
      p.grad_scores == nullptr ? nullptr : static_cast<const C*>(p.grad_scores) + span.head * p.total_k + span.k0;

  for (int64_t begin = 0; begin < span.nq; begin += kStrip) {
    const int64_t rows = span.nq - begin < kStrip ? span.nq - begin : kStrip;
    pack_rows(rows_q, begin, rows, dim, width, q);
    // panels() wants the rows of A dense in k; width >= dim keeps the tail zero, so k = dim with row stride width.
    Gemm<C>::panels(q, width, keys_t, scores, padded, rows, padded, dim,
                    Logits<C>(static_cast<C>(p.scale * kLog2E), bias, rows));
    if (values) {
      pack_rows(rows_go, begin, rows, dim, width, grad_out);
      pack_rows(rows_out, begin, rows, dim, width, out);
      Gemm<C>::panels(grad_out, width, values_t, grads, padded, rows, padded, dim);
    }
    for (int64_t r = 0; r < rows; ++r) {
      C *s = scores + r * padded, *g = grads + r * padded;
      if (lse[begin + r] == kNegInf<C>) {
        __builtin_memset(s, 0, padded * sizeof(C));
        __builtin_memset(g, 0, padded * sizeof(C));
        continue;
      }
      exponentials(s, static_cast<C>(lse[begin + r] * C(kLog2E)), padded);
      C shift = grad_lse == nullptr ? C(0) : grad_lse[begin + r];
      if (values) {
        for (int64_t d = 0; d < dim; ++d) shift -= grad_out[r * width + d] * out[r * width + d];
        for (int64_t j = 0; j < padded; ++j) g[j] = s[j] * (g[j] + shift);
      } else {
        for (int64_t j = 0; j < padded; ++j) g[j] = s[j] * shift;
      }
      const C weight = score_weight<C>(p.scores_kind, begin + r, span.nq);
      if (grad_scores != nullptr && weight != 0) {
        for (int64_t j = 0; j < nk; ++j) g[j] += s[j] * weight * grad_scores[j];
      }
      for (int64_t j = 0; j < nk; ++j) grad_bias[j] += g[j];
    }
    Gemm<C>::rows(grads, padded, 1, keys, width, grad_q, width, rows, width, nk, false);
    Gemm<C>::rows(grads, 1, padded, q, width, grad_k, width, nk, width, rows, true);
    if (values) Gemm<C>::rows(scores, 1, padded, grad_out, width, grad_v, width, nk, width, rows, true);
    store_gradient<T>(grad_q, p.grad_q, span.q0 + begin, rows, width, p.heads, span.head, dim, C(p.scale));
  }
  store_gradient<T>(grad_k, p.grad_k, span.k0, nk, width, p.heads, span.head, dim, C(p.scale));
  store_gradient<T>(grad_v, p.grad_v, span.k0, nk, width, p.heads, span.head, dim, C(1));
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
