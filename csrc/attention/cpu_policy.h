// SPDX-License-Identifier: Apache-2.0
// Attention under a key policy, forward and backward, of one (image, head). Rows are whole: the maximum runs over all
// keys, masked ones included, and its gradient term goes to the first key that attains it.
//
//   A_ij = (E_ij P_ij + eps / N) / (S_i + eps),  E = exp(a - m_i),  S_i = sum_j E_ij P_ij,  P_ii = 1, P_ij = policy_j
#pragma once

#include "strips.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

inline int64_t policy_scratch_bytes(const PolicyParams& p) {
  const int64_t keys = p.tokens + 2 * 64, width = round_up(p.dim, 16) + 16;
  return 8 * (7 * keys * width + 3 * kStrip * keys + 4 * keys + kStrip * (4 * width + 8)) + 8192;
}

template <typename T>
RowView<T> policy_rows(const Rows& rows, int64_t batch_stride, int64_t image, int64_t head) {
  return {static_cast<const T*>(rows.data) + image * batch_stride + head * rows.head_stride, rows.row_stride, 0,
          rows.rows, nullptr};
}

// Logits of one strip in the log2 domain (columns beyond n are -inf), then E in place; the row maxima.
template <typename C>
void policy_exponentials(const C* q, int64_t q_stride, const C* keys, const C* pad, C factor, int64_t rows,
                         int64_t padded, int64_t dim, C* e, C* row_max) {
  const Logits<C> logits(factor, pad, rows);
  Gemm<C>::panels(q, q_stride, keys, e, padded, rows, padded, dim, logits);
  for (int64_t r = 0; r < rows; ++r) {
    row_max[r] = logits.max(r);
    exponentials(e + r * padded, row_max[r], padded);
  }
}

template <typename T>
void policy_forward_item(const PolicyParams& p, int64_t item, char* scratch) {
  using C = Compute<T>;
  const int64_t image = item / p.heads, head = item % p.heads, n = p.tokens, dim = p.dim;
  const int64_t padded = round_up(n, kLanes<C>), width = round_up(dim, kLanes<C>);
  Arena arena{scratch};
  C* keys = arena.take<C>(padded * dim);
  C* staging = arena.take<C>(n * dim);
  C* values = arena.take<C>(n * width);
  C* mean = arena.take<C>(width);
  C* pad = arena.take<C>(padded);
  C* q = arena.take<C>(kStrip * width);
  C* out = arena.take<C>(kStrip * width);
  C* e = arena.take<C>(kStrip * padded);
  C* row_max = arena.take<C>(kStrip);
  pack_transposed(policy_rows<T>(p.k, p.k_batch, image, head), n, dim, staging, keys);
  pack_rows(policy_rows<T>(p.v, p.v_batch, image, head), 0, n, dim, width, values);
  __builtin_memset(mean, 0, width * sizeof(C));
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < width; ++d) mean[d] += values[j * width + d] / static_cast<C>(n);
  }
  for (int64_t j = 0; j < padded; ++j) pad[j] = j < n ? C(0) : kNegInf<C>;
  const C* policy = static_cast<const C*>(p.policy) + image * n;
  const C eps = static_cast<C>(p.eps);
  const int64_t stat_row = (image * p.heads + head) * n;
  const RowView<T> rows_q = policy_rows<T>(p.q, p.q_batch, image, head);
  for (int64_t begin = 0; begin < n; begin += kStrip) {
    const int64_t rows = n - begin < kStrip ? n - begin : kStrip;
    pack_rows(rows_q, begin, rows, dim, dim, q);
    policy_exponentials(q, dim, keys, pad, static_cast<C>(p.scale * kLog2E), rows, padded, dim, e, row_max);
    for (int64_t r = 0; r < rows; ++r) {
      C* u = e + r * padded;
      const C self = u[begin + r];
      for (int64_t j = 0; j < n; ++j) u[j] *= policy[j];
      u[begin + r] = self;
      C sum = 0;
      for (int64_t j = 0; j < n; ++j) sum += u[j];
      static_cast<C*>(p.row_sum)[stat_row + begin + r] = sum;
      static_cast<C*>(p.row_max)[stat_row + begin + r] = row_max[r] * C(kLn2);
    }
    Gemm<C>::rows(e, padded, 1, values, width, out, width, rows, width, n, false);
    for (int64_t r = 0; r < rows; ++r) {
      C* o = out + r * width;
      for (int64_t d = 0; d < dim; ++d) o[d] += eps * mean[d];
      const C total = static_cast<C*>(p.row_sum)[stat_row + begin + r] + eps;
      narrow<T>(o, static_cast<T*>(p.o) + ((image * n + begin + r) * p.heads + head) * dim, dim,
                total == 0 ? C(0) : C(1) / total);  // every visible key underflowed: zero, not NaN
    }
  }
}

template <typename T>
void policy_backward_item(const PolicyParams& p, int64_t item, char* scratch) {
  using C = Compute<T>;
  const int64_t image = item / p.heads, head = item % p.heads, n = p.tokens, dim = p.dim;
  const int64_t padded = round_up(n, kLanes<C>), width = round_up(dim, kLanes<C>);
  Arena arena{scratch};
  C* keys_t = arena.take<C>(padded * dim);
  C* values_t = arena.take<C>(padded * dim);
  C* staging = arena.take<C>(n * dim);
  C* keys = arena.take<C>(n * width);
  C* grad_k = arena.take<C>(n * width);
  C* grad_v = arena.take<C>(n * width);
  C* pad = arena.take<C>(padded);
  C* q = arena.take<C>(kStrip * width);
  C* grad_out = arena.take<C>(kStrip * width);
  C* grad_q = arena.take<C>(kStrip * width);
  C* e = arena.take<C>(kStrip * padded);
  C* g = arena.take<C>(kStrip * padded);
  C* row_max = arena.take<C>(kStrip);
  C* grad_mean = arena.take<C>(width);  // sum of eps / N / (S + eps) dO: the share of v in every row
  pack_transposed(policy_rows<T>(p.k, p.k_batch, image, head), n, dim, staging, keys_t);
  pack_transposed(policy_rows<T>(p.v, p.v_batch, image, head), n, dim, staging, values_t);
  pack_rows(policy_rows<T>(p.k, p.k_batch, image, head), 0, n, dim, width, keys);
  __builtin_memset(grad_k, 0, n * width * sizeof(C));
  __builtin_memset(grad_v, 0, n * width * sizeof(C));
  __builtin_memset(grad_mean, 0, width * sizeof(C));
  for (int64_t j = 0; j < padded; ++j) pad[j] = j < n ? C(0) : kNegInf<C>;
  const C* policy = static_cast<const C*>(p.policy) + image * n;
  const C eps = static_cast<C>(p.eps);
  const int64_t stat_row = (image * p.heads + head) * n;
  const C* row_sum = static_cast<const C*>(p.row_sum) + stat_row;
  C* grad_policy = static_cast<C*>(p.grad_policy) + stat_row;
  for (int64_t j = 0; j < n; ++j) grad_policy[j] = 0;
  const RowView<T> rows_q = policy_rows<T>(p.q, p.q_batch, image, head);
  const RowView<T> rows_go = policy_rows<T>(p.grad_out, p.grad_out_batch, image, head);
  for (int64_t begin = 0; begin < n; begin += kStrip) {
    const int64_t rows = n - begin < kStrip ? n - begin : kStrip;
    pack_rows(rows_q, begin, rows, dim, width, q);
    pack_rows(rows_go, begin, rows, dim, width, grad_out);
    policy_exponentials(q, width, keys_t, pad, static_cast<C>(p.scale * kLog2E), rows, padded, dim, e, row_max);
    Gemm<C>::panels(grad_out, width, values_t, g, padded, rows, padded, dim);
    for (int64_t r = 0; r < rows; ++r) {
      C *er = e + r * padded, *gr = g + r * padded;
      C *go = grad_out + r * width, delta = 0;
      const C total = row_sum[begin + r] + eps, inverse = total == 0 ? C(0) : C(1) / total,
              share = eps / static_cast<C>(n);
      // G - sum_k G_ik A_ik does not change when a constant is taken from G (the A_ik sum to 1). Taking the token's own
      // entry keeps it exact where that token holds nearly all the weight and everything would cancel.
      const C pivot = gr[begin + r];
      for (int64_t j = 0; j < n; ++j) gr[j] -= pivot;
      for (int64_t j = 0; j < n; ++j) {
        delta += gr[j] * ((j == begin + r ? er[j] : er[j] * policy[j]) + share) * inverse;
      }
      int64_t top = 0;  // E is 1 where the maximum is; the first one takes the gradient of the maximum
      for (int64_t j = n - 1; j >= 0; --j) top = er[j] >= C(1) ? j : top;
      const C self_e = er[begin + r], self_du = (gr[begin + r] - delta) * inverse;
      C through_max = 0;
      for (int64_t j = 0; j < n; ++j) {
        const C du = (gr[j] - delta) * inverse, u = er[j] * policy[j];
        grad_policy[j] += j == begin + r ? C(0) : du * er[j];
        gr[j] = du * u;
        er[j] = u * inverse;
        through_max += gr[j];
      }
      through_max += self_du * self_e - gr[begin + r];
      gr[begin + r] = self_du * self_e;
      er[begin + r] = self_e * inverse;
      gr[top] -= through_max;
      for (int64_t j = n; j < padded; ++j) gr[j] = 0, er[j] = 0;
      for (int64_t d = 0; d < dim; ++d) grad_mean[d] += go[d] * inverse * eps / static_cast<C>(n);
    }
    Gemm<C>::rows(g, padded, 1, keys, width, grad_q, width, rows, width, n, false);
    Gemm<C>::rows(g, 1, padded, q, width, grad_k, width, n, width, rows, true);
    Gemm<C>::rows(e, 1, padded, grad_out, width, grad_v, width, n, width, rows, true);
    for (int64_t r = 0; r < rows; ++r) {
      narrow<T>(grad_q + r * width, static_cast<T*>(p.grad_q) + ((image * n + begin + r) * p.heads + head) * dim, dim,
                C(p.scale));
    }
  }
  for (int64_t j = 0; j < n; ++j) {
    const int64_t row = ((image * n + j) * p.heads + head) * dim;
    for (int64_t d = 0; d < dim; ++d) grad_v[j * width + d] += grad_mean[d];
    narrow<T>(grad_k + j * width, static_cast<T*>(p.grad_k) + row, dim, C(p.scale));
    narrow<T>(grad_v + j * width, static_cast<T*>(p.grad_v) + row, dim, C(1));
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
