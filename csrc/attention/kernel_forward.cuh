// SPDX-License-Identifier: Apache-2.0
// Forward of sparse_attention: online softmax in base 2 over streamed key tiles. A block owns Tile::kRows queries.
#pragma once

#include "kernel_stream.cuh"

namespace tokenprune::attention {

template <typename Tile>
using ForwardLayout = SharedLayout<Tile, 1, 2, typename Tile::Stat>;

// Running maximum (base 2), sum of weights (per thread until the end) and weighted sum of the values of each own row.
template <typename Tile>
struct Softmax {
  using S = typename Tile::Stat;
  S best[Tile::kRowSlots], sum[Tile::kRowSlots];
  typename Tile::Sums values;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::kRowSlots; ++i) best[i] = -kInfinity<S>, sum[i] = 0;
    values.clear();
  }
  // Takes the maxima of a new tile (per thread), rescales what was summed and returns the base of the exponents.
  __device__ __forceinline__ void raise(const S* top, S* base) {
#pragma unroll
    for (int i = 0; i < Tile::kRowSlots; ++i) {
      const S now = Tile::row_max(top[i]);
      base[i] = now == -kInfinity<S> ? S(0) : now;  // only hidden keys so far
      const S factor = exp2_fast(best[i] - base[i]);
      best[i] = now;
      sum[i] *= factor;
#pragma unroll
      for (int j = 0; j < Tile::kDimSlots; ++j) values.at(i, j) *= factor;
    }
  }
};

template <typename Tile>
__global__ void __launch_bounds__(kThreads, kSingleSumBlocks<Tile>)
    sparse_attention_kernel(AttentionParams p, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  const Place place = place_of(blocks);
  const int64_t out_stride = p.heads * p.dim;
  const int dim = static_cast<int>(p.dim);
  const auto out_at = [&](int64_t row) { return static_cast<T*>(p.o) + row * out_stride + place.head * p.dim; };
  const auto lse_at = [&](int64_t row) { return static_cast<S*>(p.lse) + place.head * p.total_q + row; };
  const auto cls_at = [&](int64_t row) { return static_cast<S*>(p.cls) + place.head * p.total_k + row; };
  bool cls = p.cls != nullptr;
  if (place.sequence == p.batch) {
    const int end_q = clamp_to(p.cu_q[p.batch], 0, p.total_q), end_k = clamp_to(p.cu_k[p.batch], 0, p.total_k);
    clear_rows(out_at(0), out_stride, dim, end_q, p.total_q, place);
    fill_stats(lse_at(0), -kInfinity<S>, end_q, p.total_q, place);
    if (cls) fill_stats(cls_at(0), S(0), end_k, p.total_k, place);
    return;
  }
  const Range queries = range_of(p.cu_q, place.sequence, p.total_q);
  const Range keys = range_of(p.cu_k, place.sequence, p.total_k);
  const int first = place.block * Tile::kRows, thread = static_cast<int>(threadIdx.x);
  cls = cls && place.block == 0;  // the block with the first query writes its row
  if (first >= queries.count) {
    for (int i = thread; cls && i < keys.count; i += kThreads) *cls_at(keys.begin + i) = 0;
    return;
  }

  const ForwardLayout<Tile> shared{dynamic_shared<unsigned char>()};
  const Side<T, 1> own{{p.q, place.head * p.q.head_stride, p.q_index, p.dim}, {}, queries.begin, first, queries.count};
  const Side<T, 2> other{{p.k, place.head * p.k.head_stride, p.k_index, p.dim},
                         {p.v, place.head * p.v.head_stride, p.k_index, p.dim},
                         keys.begin,
                         0,
                         keys.count};
  const S scale = static_cast<S>(p.scale * kLog2e);
  const auto bias_at = [&](int position) {  // base 2; -inf: no such key
    if (position >= keys.count) return -kInfinity<S>;
    return p.key_bias == nullptr ? S(0) : at<S>(p.key_bias, keys.begin + position) * static_cast<S>(kLog2e);
  };
  const bool active = first + Tile::warp_row() < queries.count;
  Softmax<Tile> state;
  state.clear();

  stream_tiles<Tile>(shared, own, other, dim, bias_at, [&](int tile, const T* key_tile, const S* bias) {
    if (!active) return;
    typename Tile::Scores s;
    Tile::dot(s, shared.own(0), key_tile, dim);
    S top[Tile::kRowSlots], base[Tile::kRowSlots];
#pragma unroll
    for (int i = 0; i < Tile::kRowSlots; ++i) top[i] = state.best[i];
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const S b = bias[Tile::col(j)];
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) {
        s.at(i, j) = s.at(i, j) * scale + b;
        top[i] = max_of(top[i], s.at(i, j));
      }
    }
    if (cls && Tile::row(0) == 0) {  // raw logits for now
#pragma unroll
      for (int j = 0; j < Tile::kColSlots; ++j) {
        const int position = tile * Tile::kCols + Tile::col(j);
        if (position < keys.count) *cls_at(keys.begin + position) = s.at(0, j);
      }
    }
    state.raise(top, base);
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) {
        s.at(i, j) = exp2_fast(s.at(i, j) - base[i]);
        state.sum[i] += s.at(i, j);
      }
    }
    Tile::accumulate(state.values, s, key_tile + ForwardLayout<Tile>::kTile, shared.scratch());
  });

  S factor[Tile::kRowSlots], lse2[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const S sum = Tile::row_sum(state.sum[i]);
    factor[i] = sum == 0 ? S(0) : S(1) / sum;
    lse2[i] = state.best[i] + log2_of(sum);  // no visible key: -inf
    if (first + Tile::row(i) < queries.count && Tile::col(0) == 0) {
      *lse_at(queries.begin + first + Tile::row(i)) = lse2[i] * static_cast<S>(kLn2);
    }
  }
  if (active) {
    Tile::store(state.values, factor, shared.own(0), out_at(queries.begin + first), out_stride, queries.count - first,
                dim);
  }
  if (cls) {
    S* row_lse = shared.columns(0);
    __syncthreads();  // the last tile read its columns
    if (thread == 0) row_lse[0] = lse2[0];
    __syncthreads();
    const S total = row_lse[0];
    for (int i = thread; i < keys.count; i += kThreads) {
      S* score = cls_at(keys.begin + i);
      *score = total == -kInfinity<S> ? S(0) : exp2_fast(*score - total);
    }
  }
}

}  // namespace tokenprune::attention
