// SPDX-License-Identifier: Apache-2.0
// Sums over one side of the probabilities, recomputed from lse: attention_scores (keys own rows, queries stream) and
// its gradient with respect to lse (queries own rows, keys stream).
#pragma once

#include "kernel_stream.cuh"

namespace tokenprune::attention {

template <typename S>
struct ScoreColumn {
  S term, weight;  // P = exp2(scale q.k + own term + term)
};
template <typename Tile>
using ScoreLayout = SharedLayout<Tile, 1, 1, ScoreColumn<typename Tile::Stat>>;

// The two exponents that are not q.k, base 2. Hidden keys and queries without keys have probability 0.
template <typename S>
__device__ __forceinline__ S bias_term(const AttentionParams& p, int64_t key) {
  return p.key_bias == nullptr ? S(0) : at<S>(p.key_bias, key) * static_cast<S>(kLog2e);
}
template <typename S>
__device__ __forceinline__ S lse_term(const AttentionParams& p, int64_t head, int64_t query) {
  const S lse = at<S>(p.lse_in, head * p.total_q + query);
  return lse == -kInfinity<S> ? lse : -lse * static_cast<S>(kLog2e);
}
// Weight of a query in the column statistic: first query, or mean.
template <typename S>
__device__ __forceinline__ S query_weight(int64_t kind, int position, int queries) {
  return kind == 1 ? S(1) / static_cast<S>(queries) : position == 0 ? S(1) : S(0);
}

template <typename Tile, bool KeysOwn>
__global__ void __launch_bounds__(kThreads, 4) attention_scores_kernel(AttentionParams p, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  const Place place = place_of(blocks);
  const int64_t total = KeysOwn ? p.total_k : p.total_q;
  const auto result_at = [&](int64_t row) {
    return static_cast<S*>(KeysOwn ? p.scores : p.grad_lse_out) + place.head * total + row;
  };
  if (place.sequence == p.batch) {
    fill_stats(result_at(0), S(0), clamp_to((KeysOwn ? p.cu_k : p.cu_q)[p.batch], 0, total), total, place);
    return;
  }
  const Range queries = range_of(p.cu_q, place.sequence, p.total_q);
  const Range keys = range_of(p.cu_k, place.sequence, p.total_k);
  const Range& rows = KeysOwn ? keys : queries;
  const int first = place.block * Tile::kRows;
  if (first >= rows.count) return;

  // The other queries have weight 0 for the class score.
  const int weighted = p.scores_kind == 0 && queries.count > 1 ? 1 : queries.count;
  const ScoreLayout<Tile> shared{dynamic_shared<unsigned char>()};
  const Operand<T> q{p.q, place.head * p.q.head_stride, p.q_index, p.dim};
  const Operand<T> k{p.k, place.head * p.k.head_stride, p.k_index, p.dim};
  const Side<T, 1> own{KeysOwn ? k : q, {}, rows.begin, first, rows.count};
  const bool nothing = !KeysOwn && first >= weighted;
  const Side<T, 1> other{KeysOwn ? q : k,
                         {},
                         KeysOwn ? queries.begin : keys.begin,
                         0,
                         nothing   ? 0
                         : KeysOwn ? weighted
                                   : keys.count};
  const S scale = static_cast<S>(p.scale * kLog2e);
  S term[Tile::kRowSlots], sum[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int row = first + Tile::row(i);
    sum[i] = 0;
    term[i] = row >= rows.count ? -kInfinity<S>
              : KeysOwn         ? bias_term<S>(p, keys.begin + row)
                                : lse_term<S>(p, place.head, queries.begin + row);
  }
  const auto column_at = [&](int position) -> ScoreColumn<S> {
    if (position >= other.count) return {-kInfinity<S>, S(0)};
    if (KeysOwn) return {lse_term<S>(p, place.head, queries.begin + position), S(1)};
    return {bias_term<S>(p, keys.begin + position),
            at<S>(p.grad_scores, place.head * p.total_k + keys.begin + position)};
  };

  stream_tiles<Tile>(shared, own, other, static_cast<int>(p.dim), column_at,
                     [&](int, const T* tile, const ScoreColumn<S>* columns) {
                       typename Tile::Scores s;
                       Tile::dot(s, shared.own(0), tile, static_cast<int>(p.dim));
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const ScoreColumn<S> c = columns[Tile::col(j)];
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           sum[i] += exp2_fast(s.at(i, j) * scale + (term[i] + c.term)) * c.weight;
                         }
                       }
                     });
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const S value = Tile::row_sum(sum[i]);
    const int row = first + Tile::row(i);
    if (row < rows.count && Tile::col(0) == 0) {
      const S weight = query_weight<S>(p.scores_kind, KeysOwn ? 0 : row, queries.count);
      *result_at(rows.begin + row) = queries.count == 0 ? S(0) : KeysOwn ? value * weight : -value * weight;
    }
  }
}

}  // namespace tokenprune::attention
