// SPDX-License-Identifier: Apache-2.0
// Backward of policy_attention (formulas in kernel_policy.cuh): row terms, then queries own rows (grad_q and the argmax
// of every row), then keys own rows (grad_k, grad_v, grad_policy).
#pragma once

#include "kernel_policy.cuh"

namespace tokenprune::attention {

template <typename S>
__device__ __forceinline__ S inverse_sum(const PolicyParams& p, int64_t slot) {
  const S sum = at<S>(p.row_sum, slot) + static_cast<S>(p.eps);
  return sum == 0 ? S(0) : S(1) / sum;
}

// T and W of every row of [batch, heads, tokens].
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) policy_row_kernel(PolicyParams p, PolicyWorkspace w, int log_lanes) {
  using S = Acc<T>;
  const LaneGroup group(log_lanes);
  const int64_t slot = group.item, b = slot / p.tokens / p.heads, head = slot / p.tokens % p.heads,
                row = slot % p.tokens;
  const bool valid = b < p.batch;
  S grad = 0, mean = 0;
  if (valid) {
    const T* g = static_cast<const T*>(p.grad_out.data) + b * p.grad_out_batch + row * p.grad_out.row_stride +
                 head * p.grad_out.head_stride;
    const T* o =
        static_cast<const T*>(p.out.data) + b * p.out_batch + row * p.out.row_stride + head * p.out.head_stride;
    grad = group.dot<V>(g, o, static_cast<int>(p.dim));
    if (w.value_sum != nullptr) {
      const S* value_sum = static_cast<const S*>(w.value_sum) + (b * p.heads + head) * p.dim;
      mean = group.dot<V>(g, value_sum, static_cast<int>(p.dim)) / static_cast<S>(p.tokens);
    }
  }
  grad = group.sum(grad);
  mean = group.sum(mean);
  if (valid && group.lane == 0) {
    static_cast<S*>(w.row_grad)[slot] = grad;
    static_cast<S*>(w.top_grad)[slot] = static_cast<S>(p.eps) * (grad - mean) * inverse_sum<S>(p, slot);
  }
}

template <typename Tile>
using PolicyGradQueryLayout = SharedLayout<Tile, 2, 2, PolicyColumn<typename Tile::Stat>>;

template <typename Tile>
__global__ void __launch_bounds__(kThreads, 2) policy_grad_query_kernel(PolicyParams p, PolicyWorkspace w, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = PolicyGradQueryLayout<Tile>;
  const PolicyHead<T> at_head(p, blocks, Tile::kRows);
  const int first = at_head.first, tokens = at_head.tokens, dim = at_head.dim;
  const Layout shared{dynamic_shared<unsigned char>()};
  const Operand<T> keys = at_head.operand(p.k, p.k_batch, p.dim);
  const Side<T, 2> own{at_head.operand(p.q, p.q_batch, p.dim), at_head.operand(p.grad_out, p.grad_out_batch, p.dim), 0,
                       first, tokens};
  const Side<T, 2> other{keys, at_head.operand(p.v, p.v_batch, p.dim), 0, 0, tokens};
  const S scale = static_cast<S>(p.scale * kLog2e);
  S best[Tile::kRowSlots], inverse[Tile::kRowSlots], row_grad[Tile::kRowSlots], factor[Tile::kRowSlots],
      top[Tile::kRowSlots];
  int top_at[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    const int64_t slot = at_head.stats + row;
    best[i] = row < tokens ? at<S>(p.row_max, slot) * static_cast<S>(kLog2e) : kInfinity<S>;
    inverse[i] = row < tokens ? inverse_sum<S>(p, slot) : S(0);
    row_grad[i] = row < tokens ? at<S>(w.row_grad, slot) : S(0);
    factor[i] = static_cast<S>(p.scale), top[i] = -kInfinity<S>, top_at[i] = 0;
  }
  const auto column_at = [&](int position) { return policy_column<S>(p, at_head.batch, position); };
  const bool active = first + Tile::warp_row() < tokens;
  typename Tile::Sums sums;
  sums.clear();
  stream_tiles<Tile>(
      shared, own, other, dim, column_at, [&](int tile, const T* key_tile, const PolicyColumn<S>* columns) {
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
            const S visible = first + Tile::row(i) == position ? S(1) : c.policy;
            s.at(i, j) = (g.at(i, j) - row_grad[i]) * inverse[i] * (exp2_fast(logit - best[i]) * visible);
          }
        }
        Tile::accumulate(sums, s, key_tile, shared.scratch());
      });
  if (w.value_sum != nullptr && active) {  // eps > 0: the maximum has a gradient
#pragma unroll
    for (int i = 0; i < Tile::kRowSlots; ++i) {
      Tile::row_argmax(top[i], top_at[i]);
      const int row = first + Tile::row(i);
      if (row >= tokens) continue;
      if (Tile::col(0) == 0) w.top[at_head.stats + row] = top_at[i];
      const S top_grad = at<S>(w.top_grad, at_head.stats + row);
#pragma unroll
      for (int j = 0; j < Tile::kDimSlots; ++j) {
        const int d = Tile::dim_of(j);
        if (d < dim) sums.at(i, j) -= top_grad * to_acc(keys.base[top_at[i] * keys.stride + d]);
      }
    }
  }
  if (active) {
    Tile::store(sums, factor, shared.own(0), static_cast<T*>(p.grad_q) + at_head.offset(p), p.heads * p.dim,
                tokens - first, dim);
  }
}

template <typename S>
struct PolicyRow {
  S best, inverse, row_grad, top_grad;
  int64_t top;
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
    if (position >= tokens) return {kInfinity<S>, S(0), S(0), S(0), -1};
    const int64_t slot = at_head.stats + position;
    const S best = at<S>(p.row_max, slot) * static_cast<S>(kLog2e), row_grad = at<S>(w.row_grad, slot);
    if (w.value_sum == nullptr) return {best, inverse_sum<S>(p, slot), row_grad, S(0), -1};
    return {best, inverse_sum<S>(p, slot), row_grad, at<S>(w.top_grad, slot), w.top[slot]};
  };
  const bool active = first + Tile::warp_row() < tokens;
  typename Tile::Sums sum_k, sum_v;
  sum_k.clear();
  sum_v.clear();
  stream_tiles<Tile>(
      shared, own, other, dim, column_at, [&](int tile, const T* query_tile, const PolicyRow<S>* columns) {
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
            const S grad = (g.at(i, j) - c.row_grad) * c.inverse * e.at(i, j);
            if (row != position) policy_sum[i] += grad;
            s.at(i, j) = grad * (row == position ? S(1) : policy[i]) - (row == c.top ? c.top_grad : S(0));
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
