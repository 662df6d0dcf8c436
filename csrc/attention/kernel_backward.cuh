// SPDX-License-Identifier: Apache-2.0
// Backward of sparse_attention and attention_scores without atomics: one kernel owns query blocks (grad_q), one owns
// key blocks (grad_k, grad_v, grad_bias); both recompute P_ij = exp(scale q_i.k_j + bias_j - lse_i) and
//   dS_ij = P_ij (dO_i.v_j - delta_i + w_i g_j),  delta_i = dO_i.out_i - dlse_i.
#pragma once

#include "kernel_scores.cuh"

namespace tokenprune::attention {

// delta [heads, total_q]
template <typename T, int W>
__global__ void __launch_bounds__(kThreads) attention_delta_kernel(AttentionParams p, void* delta, int log_lanes) {
  using S = Acc<T>;
  const LaneGroup group(log_lanes);
  const int64_t row = group.item / p.heads, head = group.item % p.heads;
  const bool valid = row < p.total_q;
  S sum = 0;
  if (valid && p.grad_out.data != nullptr) {
    const T* g = static_cast<const T*>(p.grad_out.data) + row * p.grad_out.row_stride + head * p.grad_out.head_stride;
    const T* o = static_cast<const T*>(p.out.data) + row * p.out.row_stride + head * p.out.head_stride;
    sum = group.dot<W>(g, o, static_cast<int>(p.dim));
  }
  sum = group.sum(sum);
  if (valid && group.lane == 0) {
    const int64_t slot = head * p.total_q + row;
    static_cast<S*>(delta)[slot] = p.grad_lse != nullptr ? sum - at<S>(p.grad_lse, slot) : sum;
  }
}

// ---- queries own rows ----------------------------------------------------------------------------------------------

template <typename S>
struct KeyColumn {
  S bias, grad_score;
};
template <typename Tile>
using GradQueryLayout = SharedLayout<Tile, 2, 2, KeyColumn<typename Tile::Stat>>;
template <typename Tile>
constexpr int kGradQueryBlocks = sizeof(typename Tile::Value) == 8 || Tile::kBands == 2 ? 2
                                 : Tile::kMma || Tile::kRows == 32                      ? 3
                                                                                        : 2;

template <typename Tile>
__global__ void __launch_bounds__(kThreads, kGradQueryBlocks<Tile>)
    attention_grad_query_kernel(AttentionParams p, const void* delta, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = GradQueryLayout<Tile>;
  const Place place = place_of(blocks);
  const auto grad_at = [&](int64_t row) { return static_cast<T*>(p.grad_q) + (row * p.heads + place.head) * p.dim; };
  const int64_t stride = p.heads * p.dim;
  const int dim = static_cast<int>(p.dim);
  if (place.sequence == p.batch) {
    clear_rows(grad_at(0), stride, dim, clamp_to(p.cu_q[p.batch], 0, p.total_q), p.total_q, place);
    return;
  }
  const Range queries = range_of(p.cu_q, place.sequence, p.total_q);
  const Range keys = range_of(p.cu_k, place.sequence, p.total_k);
  const int first = place.block * Tile::kRows;
  if (first >= queries.count) return;

  const Layout shared{dynamic_shared<unsigned char>()};
  const bool has_grad = p.grad_out.data != nullptr;
  const Side<T, 2> own{{p.q, place.head * p.q.head_stride, p.q_index, p.dim},
                       {p.grad_out, place.head * p.grad_out.head_stride, nullptr, p.dim},
                       queries.begin,
                       first,
                       queries.count};
  const Side<T, 2> other{{p.k, place.head * p.k.head_stride, p.k_index, p.dim},
                         {p.v, place.head * p.v.head_stride, p.k_index, p.dim},
                         keys.begin,
                         0,
                         keys.count};
  const S scale = static_cast<S>(p.scale * kLog2e);
  S term[Tile::kRowSlots], shift[Tile::kRowSlots], weight[Tile::kRowSlots], factor[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    const bool valid = row < queries.count;
    term[i] = valid ? lse_term<S>(p, place.head, queries.begin + row) : -kInfinity<S>;
    shift[i] = valid ? at<S>(delta, place.head * p.total_q + queries.begin + row) : S(0);
    weight[i] = query_weight<S>(p.scores_kind, row, queries.count);
    factor[i] = static_cast<S>(p.scale);
  }
  const auto column_at = [&](int position) -> KeyColumn<S> {
    if (position >= keys.count) return {-kInfinity<S>, S(0)};
    return {bias_term<S>(p, keys.begin + position),
            p.grad_scores == nullptr ? S(0) : at<S>(p.grad_scores, place.head * p.total_k + keys.begin + position)};
  };
  const bool active = first + Tile::warp_row() < queries.count;
  typename Tile::Sums sums;
  sums.clear();
  stream_tiles<Tile>(shared, own, other, dim, column_at, [&](int, const T* tile, const KeyColumn<S>* columns) {
    if (!active) return;
    typename Tile::Scores s, g;
    Tile::dot(s, shared.own(0), tile, dim);
    if (has_grad) {
      Tile::dot(g, shared.own(1), tile + Layout::kTile, dim);
    } else {
      g.clear();
    }
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const KeyColumn<S> c = columns[Tile::col(j)];
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) {
        const S probability = exp2_fast(s.at(i, j) * scale + (term[i] + c.bias));
        s.at(i, j) = probability * (g.at(i, j) - shift[i] + weight[i] * c.grad_score);
      }
    }
    Tile::accumulate(sums, s, tile, shared.scratch());
  });
  if (active) {
    Tile::store(sums, factor, shared.own(0), grad_at(queries.begin + first), stride, queries.count - first, dim);
  }
}

// ---- keys own rows -------------------------------------------------------------------------------------------------

template <typename S>
struct QueryColumn {
  S term, shift, weight;
};
template <typename Tile>
using GradKeyLayout = SharedLayout<Tile, 2, 2, QueryColumn<typename Tile::Stat>>;

template <typename Tile>
__global__ void __launch_bounds__(kThreads, 2)
    attention_grad_key_kernel(AttentionParams p, const void* delta, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = GradKeyLayout<Tile>;
  const Place place = place_of(blocks);
  const auto grad_k_at = [&](int64_t row) { return static_cast<T*>(p.grad_k) + (row * p.heads + place.head) * p.dim; };
  const auto grad_v_at = [&](int64_t row) { return static_cast<T*>(p.grad_v) + (row * p.heads + place.head) * p.dim; };
  const auto grad_bias_at = [&](int64_t row) { return static_cast<S*>(p.grad_bias) + place.head * p.total_k + row; };
  const int64_t stride = p.heads * p.dim;
  const int dim = static_cast<int>(p.dim);
  if (place.sequence == p.batch) {
    const int end = clamp_to(p.cu_k[p.batch], 0, p.total_k);
    clear_rows(grad_k_at(0), stride, dim, end, p.total_k, place);
    clear_rows(grad_v_at(0), stride, dim, end, p.total_k, place);
    fill_stats(grad_bias_at(0), S(0), end, p.total_k, place);
    return;
  }
  const Range queries = range_of(p.cu_q, place.sequence, p.total_q);
  const Range keys = range_of(p.cu_k, place.sequence, p.total_k);
  const int first = place.block * Tile::kRows;
  if (first >= keys.count) return;

  const Layout shared{dynamic_shared<unsigned char>()};
  const bool has_grad = p.grad_out.data != nullptr;
  const Side<T, 2> own{{p.k, place.head * p.k.head_stride, p.k_index, p.dim},
                       {p.v, place.head * p.v.head_stride, p.k_index, p.dim},
                       keys.begin,
                       first,
                       keys.count};
  const Side<T, 2> other{{p.q, place.head * p.q.head_stride, p.q_index, p.dim},
                         {p.grad_out, place.head * p.grad_out.head_stride, nullptr, p.dim},
                         queries.begin,
                         0,
                         queries.count};
  const S scale = static_cast<S>(p.scale * kLog2e);
  S bias[Tile::kRowSlots], grad_score[Tile::kRowSlots], bias_sum[Tile::kRowSlots], one[Tile::kRowSlots],
      factor[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    const bool valid = row < keys.count;
    bias[i] = valid ? bias_term<S>(p, keys.begin + row) : -kInfinity<S>;
    grad_score[i] =
        valid && p.grad_scores != nullptr ? at<S>(p.grad_scores, place.head * p.total_k + keys.begin + row) : S(0);
    bias_sum[i] = 0, one[i] = 1, factor[i] = static_cast<S>(p.scale);
  }
  const auto column_at = [&](int position) -> QueryColumn<S> {
    if (position >= queries.count) return {-kInfinity<S>, S(0), S(0)};
    const int64_t query = queries.begin + position;
    return {lse_term<S>(p, place.head, query), at<S>(delta, place.head * p.total_q + query),
            query_weight<S>(p.scores_kind, position, queries.count)};
  };
  const bool active = first + Tile::warp_row() < keys.count;
  typename Tile::Sums sum_k, sum_v;
  sum_k.clear();
  sum_v.clear();
  stream_tiles<Tile>(shared, own, other, dim, column_at, [&](int, const T* tile, const QueryColumn<S>* columns) {
    if (!active) return;
    typename Tile::Scores s, g;
    Tile::dot(s, shared.own(0), tile, dim);
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const S term = columns[Tile::col(j)].term;
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) s.at(i, j) = exp2_fast(s.at(i, j) * scale + (bias[i] + term));
    }
    if (has_grad) {
      Tile::accumulate(sum_v, s, tile + Layout::kTile, shared.scratch());
      Tile::dot(g, shared.own(1), tile + Layout::kTile, dim);
    } else {
      g.clear();
    }
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const QueryColumn<S> c = columns[Tile::col(j)];
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) {
        s.at(i, j) *= g.at(i, j) - c.shift + c.weight * grad_score[i];
        bias_sum[i] += s.at(i, j);
      }
    }
    Tile::accumulate(sum_k, s, tile, shared.scratch());
  });
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const S sum = Tile::row_sum(bias_sum[i]);
    const int row = first + Tile::row(i);
    if (row < keys.count && Tile::col(0) == 0) *grad_bias_at(keys.begin + row) = sum;
  }
  if (active) {
    Tile::store(sum_k, factor, shared.own(0), grad_k_at(keys.begin + first), stride, keys.count - first, dim);
    Tile::store(sum_v, one, shared.own(1), grad_v_at(keys.begin + first), stride, keys.count - first, dim);
  }
}

}  // namespace tokenprune::attention
