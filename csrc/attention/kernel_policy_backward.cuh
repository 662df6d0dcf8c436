// SPDX-License-Identifier: Apache-2.0
// Backward of policy_attention (formulas in kernel_policy.cuh): the pivot of every row, the sums over a row (T, W and
// where its maximum is), then queries own rows (grad_q), then keys own rows (grad_k, grad_v, grad_policy).
#pragma once

#include "kernel_policy.cuh"

namespace tokenprune::attention {

template <typename S>
__device__ __forceinline__ S inverse_sum(const PolicyParams& p, int64_t slot) {
  const S sum = at<S>(p.row_sum, slot) + static_cast<S>(p.eps);
  return sum == 0 ? S(0) : S(1) / sum;
}

// dO_i.v_i of every row of [batch, heads, tokens].
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) policy_pivot_kernel(PolicyParams p, PolicyWorkspace w, int log_lanes) {
  using S = Acc<T>;
  const LaneGroup group(log_lanes);
  const int64_t slot = group.item, b = slot / p.tokens / p.heads, head = slot / p.tokens % p.heads,
                row = slot % p.tokens;
  const bool valid = b < p.batch;
  S pivot = 0;
  if (valid) {
    const T* g = static_cast<const T*>(p.grad_out.data) + b * p.grad_out_batch + row * p.grad_out.row_stride +
                 head * p.grad_out.head_stride;
    const T* v = static_cast<const T*>(p.v.data) + b * p.v_batch + row * p.v.row_stride + head * p.v.head_stride;
    pivot = group.dot<V>(g, v, static_cast<int>(p.dim));
  }
  pivot = group.sum(pivot);
  if (valid && group.lane == 0) static_cast<S*>(w.pivot)[slot] = pivot;
}

template <typename Tile>
using PolicyGradQueryLayout = SharedLayout<Tile, 2, 2, PolicyColumn<typename Tile::Stat>>;

// T, W and the position of the maximum of every row. A pass of its own: T from the rounded output would be off by
// more than the gradient itself where one token holds nearly all the weight.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, 2) policy_row_kernel(PolicyParams p, PolicyWorkspace w, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = PolicyGradQueryLayout<Tile>;
  const PolicyHead<T> at_head(p, blocks, Tile::kRows);
  const int first = at_head.first, tokens = at_head.tokens, dim = at_head.dim;
  const Layout shared{dynamic_shared<unsigned char>()};
  const Side<T, 2> own{at_head.operand(p.q, p.q_batch, p.dim), at_head.operand(p.grad_out, p.grad_out_batch, p.dim), 0,
                       first, tokens};
  const Side<T, 2> other{at_head.operand(p.k, p.k_batch, p.dim), at_head.operand(p.v, p.v_batch, p.dim), 0, 0, tokens};
  const S scale = static_cast<S>(p.scale * kLog2e);
  S best[Tile::kRowSlots], pivot[Tile::kRowSlots], sum_gu[Tile::kRowSlots], sum_g[Tile::kRowSlots],
      top[Tile::kRowSlots];
  int top_at[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    const int64_t slot = at_head.stats + row;
    best[i] = row < tokens ? at<S>(p.row_max, slot) * static_cast<S>(kLog2e) : kInfinity<S>;
    pivot[i] = row < tokens ? at<S>(w.pivot, slot) : S(0);
    sum_gu[i] = sum_g[i] = 0, top[i] = -kInfinity<S>, top_at[i] = 0;
  }
  const auto column_at = [&](int position) { return policy_column<S>(p, at_head.batch, position); };
  const bool active = first + Tile::warp_row() < tokens;
  stream_tiles<Tile>(shared, own, other, dim, column_at,
                     [&](int tile, const T* key_tile, const PolicyColumn<S>* columns) {
                       if (!active) return;
                       typename Tile::Scores s, g;
                       Tile::dot(s, shared.own(0), key_tile, dim);
                       Tile::dot(g, shared.own(1), key_tile + Layout::kTile, dim);
                       const int start = tile * Tile::kCols;
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const PolicyColumn<S> c = columns[Tile::col(j)];
                         const int position = start + Tile::col(j);
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           const S logit = s.at(i, j) * scale + c.hidden;
                           if (logit > top[i]) top[i] = logit, top_at[i] = position;
                           // The own entry and the columns behind the last key add nothing.
                           const bool none = first + Tile::row(i) == position || position >= tokens;
                           const S centred = none ? S(0) : g.at(i, j) - pivot[i];
                           sum_g[i] += centred;
                           sum_gu[i] += centred * (exp2_fast(logit - best[i]) * c.policy);
                         }
                       }
                     });
  const S eps = static_cast<S>(p.eps);
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const S gu = Tile::row_sum(sum_gu[i]), mean = Tile::row_sum(sum_g[i]) / static_cast<S>(tokens);
    Tile::row_argmax(top[i], top_at[i]);
    const int row = first + Tile::row(i);
    if (row >= tokens || Tile::col(0) != 0) continue;
    const int64_t slot = at_head.stats + row;
    const S inverse = inverse_sum<S>(p, slot);
    static_cast<S*>(w.row_grad)[slot] = (gu + eps * mean) * inverse;
    static_cast<S*>(w.top_grad)[slot] = eps * (gu - at<S>(p.row_sum, slot) * mean) * inverse * inverse;
    w.top[slot] = top_at[i];
  }
}

template <typename Tile>
__global__ void __launch_bounds__(kThreads, 2) policy_grad_query_kernel(PolicyParams p, PolicyWorkspace w, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = PolicyGradQueryLayout<Tile>;
  const PolicyHead<T> at_head(p, blocks, Tile::kRows);
  const int first = at_head.first, tokens = at_head.tokens, dim = at_head.dim;
  const Layout shared{dynamic_shared<unsigned char>()};
  const Side<T, 2> own{at_head.operand(p.q, p.q_batch, p.dim), at_head.operand(p.grad_out, p.grad_out_batch, p.dim), 0,
                       first, tokens};
  const Side<T, 2> other{at_head.operand(p.k, p.k_batch, p.dim), at_head.operand(p.v, p.v_batch, p.dim), 0, 0, tokens};
  const S scale = static_cast<S>(p.scale * kLog2e);
  S best[Tile::kRowSlots], inverse[Tile::kRowSlots], pivot[Tile::kRowSlots], row_grad[Tile::kRowSlots],
      top_grad[Tile::kRowSlots], factor[Tile::kRowSlots];
  int top_at[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    const int64_t slot = at_head.stats + row;
    best[i] = row < tokens ? at<S>(p.row_max, slot) * static_cast<S>(kLog2e) : kInfinity<S>;
    inverse[i] = row < tokens ? inverse_sum<S>(p, slot) : S(0);
    pivot[i] = row < tokens ? at<S>(w.pivot, slot) : S(0);
    row_grad[i] = row < tokens ? at<S>(w.row_grad, slot) : S(0);
    top_grad[i] = row < tokens ? at<S>(w.top_grad, slot) : S(0);
    top_at[i] = row < tokens ? w.top[slot] : -1;
    factor[i] = static_cast<S>(p.scale);
  }
  const auto column_at = [&](int position) { return policy_column<S>(p, at_head.batch, position); };
  const bool active = first + Tile::warp_row() < tokens;
  typename Tile::Sums sums;
  sums.clear();
  stream_tiles<Tile>(shared, own, other, dim, column_at,
                     [&](int tile, const T* key_tile, const PolicyColumn<S>* columns) {
                       if (!active) return;
                       typename Tile::Scores s, g;
                       Tile::dot(s, shared.own(0), key_tile, dim);
                       Tile::dot(g, shared.own(1), key_tile + Layout::kTile, dim);
                       const int start = tile * Tile::kCols;
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const PolicyColumn<S> c = columns[Tile::col(j)];
                         const int position = start + Tile::col(j);
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           const bool self = first + Tile::row(i) == position;
                           const S centred = self ? S(0) : g.at(i, j) - pivot[i];
                           const S e = exp2_fast(s.at(i, j) * scale + c.hidden - best[i]);
                           s.at(i, j) = (centred - row_grad[i]) * inverse[i] * (e * (self ? S(1) : c.policy)) -
                                        (position == top_at[i] ? top_grad[i] : S(0));
                         }
                       }
                       Tile::accumulate(sums, s, key_tile, shared.scratch());
                     });
  if (active) {
    Tile::store(sums, factor, shared.own(0), static_cast<T*>(p.grad_q) + at_head.offset(p), p.heads * p.dim,
                tokens - first, dim);
  }
}

template <typename S>
struct PolicyRow {
  S best, inverse, pivot, row_grad, top_grad;
  int top;
};
template <typename Tile>
using PolicyGradKeyLayout = SharedLayout<Tile, 2, 2, PolicyRow<typename Tile::Stat>>;

template <typename Tile>
__global__ void __launch_bounds__(kThreads, 2) policy_grad_key_kernel(PolicyParams p, PolicyWorkspace w, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = PolicyGradKeyLayout<Tile>;
  const PolicyHead<T> at_head(p, blocks, Tile::kRows);
  const int first = at_head.first, tokens = at_head.tokens, dim = at_head.dim;
  const Layout shared{dynamic_shared<unsigned char>()};
  const Side<T, 2> own{at_head.operand(p.k, p.k_batch, p.dim), at_head.operand(p.v, p.v_batch, p.dim), 0, first,
                       tokens};
  const Side<T, 2> other{at_head.operand(p.q, p.q_batch, p.dim), at_head.operand(p.grad_out, p.grad_out_batch, p.dim),
                         0, 0, tokens};
  const S scale = static_cast<S>(p.scale * kLog2e);
  const S share = static_cast<S>(p.eps) / static_cast<S>(p.tokens);
  S policy[Tile::kRowSlots], policy_sum[Tile::kRowSlots], one[Tile::kRowSlots], factor[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    policy[i] = row < tokens ? at<S>(p.policy, at_head.batch * p.tokens + row) : S(0);
    policy_sum[i] = 0, one[i] = 1, factor[i] = static_cast<S>(p.scale);
  }
  const auto column_at = [&](int position) -> PolicyRow<S> {
    if (position >= tokens) return {kInfinity<S>, S(0), S(0), S(0), S(0), -1};
    const int64_t slot = at_head.stats + position;
    return {at<S>(p.row_max, slot) * static_cast<S>(kLog2e),
            inverse_sum<S>(p, slot),
            at<S>(w.pivot, slot),
            at<S>(w.row_grad, slot),
            at<S>(w.top_grad, slot),
            w.top[slot]};
  };
  const bool active = first + Tile::warp_row() < tokens;
  typename Tile::Sums sum_k, sum_v;
  sum_k.clear();
  sum_v.clear();
  stream_tiles<Tile>(shared, own, other, dim, column_at,
                     [&](int tile, const T* query_tile, const PolicyRow<S>* columns) {
                       if (!active) return;
                       typename Tile::Scores e, s, g;
                       Tile::dot(e, shared.own(0), query_tile, dim);
                       const int start = tile * Tile::kCols;
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const S best = columns[Tile::col(j)].best, inverse = columns[Tile::col(j)].inverse;
                         const int position = start + Tile::col(j);
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           e.at(i, j) = exp2_fast(e.at(i, j) * scale - best);
                           const S visible = first + Tile::row(i) == position ? S(1) : policy[i];
                           s.at(i, j) = (e.at(i, j) * visible + share) * inverse;
                         }
                       }
                       Tile::accumulate(sum_v, s, query_tile + Layout::kTile, shared.scratch());
                       Tile::dot(g, shared.own(1), query_tile + Layout::kTile, dim);
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const PolicyRow<S> c = columns[Tile::col(j)];
                         const int position = start + Tile::col(j);
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           const int row = first + Tile::row(i);
                           const bool self = row == position;
                           const S centred = self ? S(0) : g.at(i, j) - c.pivot;
                           const S grad = (centred - c.row_grad) * c.inverse * e.at(i, j);
                           if (!self) policy_sum[i] += grad;
                           s.at(i, j) = grad * (self ? S(1) : policy[i]) - (row == c.top ? c.top_grad : S(0));
                         }
                       }
                       Tile::accumulate(sum_k, s, query_tile, shared.scratch());
                     });
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const S sum = Tile::row_sum(policy_sum[i]);
    const int row = first + Tile::row(i);
    if (row < tokens && Tile::col(0) == 0) static_cast<S*>(p.grad_policy)[at_head.stats + row] = sum;
  }
  if (active) {
    const int64_t start = at_head.offset(p), stride = p.heads * p.dim;
    Tile::store(sum_k, factor, shared.own(0), static_cast<T*>(p.grad_k) + start, stride, tokens - first, dim);
    Tile::store(sum_v, one, shared.own(1), static_cast<T*>(p.grad_v) + start, stride, tokens - first, dim);
  }
}

}  // namespace tokenprune::attention
