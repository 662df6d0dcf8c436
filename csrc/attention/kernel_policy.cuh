// SPDX-License-Identifier: Apache-2.0
// Attention under a key policy with straight-through gradients. With a_ij = scale q_i.k_j, m_i = max_j a_ij over ALL
// keys, p_ij = 1 if i = j else policy_j:
//   U_ij = exp(a_ij - m_i) p_ij,  S_i = sum_j U_ij,  A_ij = (U_ij + eps / N) / (S_i + eps),  out = A v
// Backward with G_ij = dO_i.v_j - dO_i.v_i (taking a constant from a row changes nothing, as A_ij sums to 1, and the
// token's own entry makes G_ii exactly 0: no cancellation where that token holds nearly all the weight):
//   X_i = sum_j G_ij U_ij,  Y_i = sum_j G_ij / N,  T_i = (X_i + eps Y_i) / (S_i + eps)
//   dU_ij = (G_ij - T_i) / (S_i + eps),  dpolicy_j = sum_{i != j} dU_ij exp(a_ij - m_i)
//   da_ij = dU_ij U_ij - [j = argmax_i] W_i,  W_i = sum_k dU_ik U_ik = eps (X_i - S_i Y_i) / (S_i + eps)^2
#pragma once

#include "kernel_forward.cuh"

namespace tokenprune::attention {

// What the kernels pass each other; all but value_sum [batch, heads, tokens].
struct PolicyWorkspace {
  void* value_sum = nullptr;                                        // forward: [batch, heads, dim], null when eps is 0
  void *pivot = nullptr, *row_grad = nullptr, *top_grad = nullptr;  // backward: dO_i.v_i, T, W
  int32_t* top = nullptr;                                           // argmax, lowest position first
};

// value_sum: a block per (batch, head); 128 threads share the dims and split the rows in fixed strides.
template <typename T>
__global__ void __launch_bounds__(kThreads) policy_value_sum_kernel(PolicyParams p, PolicyWorkspace w) {
  using S = Acc<T>;
  TP_SHARED(S, partial, [kThreads]);
  const int64_t b = blockIdx.x / p.heads, head = blockIdx.x % p.heads;
  const T* v = static_cast<const T*>(p.v.data) + b * p.v_batch + head * p.v.head_stride;
  const int dim = static_cast<int>(p.dim), thread = static_cast<int>(threadIdx.x), groups = kThreads / dim;
  const int group = thread / dim, d = thread % dim;
  S sum = 0;
  if (group < groups) {
    for (int64_t i = group; i < p.tokens; i += groups) sum += to_acc(v[i * p.v.row_stride + d]);
  }
  partial[thread] = sum;
  __syncthreads();
  if (thread < dim) {
    for (int g = 1; g < groups; ++g) sum += partial[g * dim + thread];
    static_cast<S*>(w.value_sum)[blockIdx.x * p.dim + thread] = sum;
  }
}

template <typename T>
struct PolicyHead {
  int64_t batch, head, stats;  // stats: first row of this head in [batch, heads, tokens]
  int first, tokens, dim;

  __device__ __forceinline__ PolicyHead(const PolicyParams& p, int blocks, int rows)
      : batch(static_cast<int64_t>(blockIdx.x) / blocks),
        head(blockIdx.y),
        stats((batch * p.heads + head) * p.tokens),
        first(static_cast<int>(blockIdx.x % blocks) * rows),
        tokens(static_cast<int>(p.tokens)),
        dim(static_cast<int>(p.dim)) {}
  __device__ __forceinline__ Operand<T> operand(const Rows& rows, int64_t batch_stride, int64_t dims) const {
    return {rows, batch * batch_stride + head * rows.head_stride, nullptr, dims};
  }
  __device__ __forceinline__ int64_t
  offset(const PolicyParams& p) const {  // of row `first` in [batch, tokens, heads, dim]
    return ((batch * p.tokens + first) * p.heads + head) * p.dim;
  }
};

template <typename S>
struct PolicyColumn {
  S hidden, policy;  // hidden: -inf behind the last key, otherwise 0
};
template <typename S>
__device__ __forceinline__ PolicyColumn<S> policy_column(const PolicyParams& p, int64_t batch, int position) {
  if (position >= p.tokens) return {-kInfinity<S>, S(0)};
  return {S(0), at<S>(p.policy, batch * p.tokens + position)};
}

template <typename Tile>
using PolicyForwardLayout = SharedLayout<Tile, 1, 2, PolicyColumn<typename Tile::Stat>>;

template <typename Tile>
__global__ void __launch_bounds__(kThreads, (Tile::kDim > 64 ? 2 : kSingleSumBlocks<Tile>))
    policy_attention_kernel(PolicyParams p, PolicyWorkspace w, int blocks) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  using Layout = PolicyForwardLayout<Tile>;
  const PolicyHead<T> at_head(p, blocks, Tile::kRows);
  const int first = at_head.first, tokens = at_head.tokens, dim = at_head.dim;
  const Layout shared{dynamic_shared<unsigned char>()};
  const Side<T, 1> own{at_head.operand(p.q, p.q_batch, p.dim), {}, 0, first, tokens};
  const Side<T, 2> other{at_head.operand(p.k, p.k_batch, p.dim), at_head.operand(p.v, p.v_batch, p.dim), 0, 0, tokens};
  const S scale = static_cast<S>(p.scale * kLog2e);
  const auto column_at = [&](int position) { return policy_column<S>(p, at_head.batch, position); };
  const bool active = first + Tile::warp_row() < tokens;
  Softmax<Tile> state;
  state.clear();

  stream_tiles<Tile>(shared, own, other, dim, column_at,
                     [&](int tile, const T* key_tile, const PolicyColumn<S>* columns) {
                       if (!active) return;
                       typename Tile::Scores s;
                       Tile::dot(s, shared.own(0), key_tile, dim);
                       S top[Tile::kRowSlots], base[Tile::kRowSlots];
#pragma unroll
                       for (int i = 0; i < Tile::kRowSlots; ++i) top[i] = state.best[i];
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const S hidden = columns[Tile::col(j)].hidden;
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           s.at(i, j) = s.at(i, j) * scale + hidden;
                           top[i] = max_of(top[i], s.at(i, j));
                         }
                       }
                       state.raise(top, base);
                       const int shift = tile * Tile::kCols - first;
#pragma unroll
                       for (int j = 0; j < Tile::kColSlots; ++j) {
                         const S policy = columns[Tile::col(j)].policy;
#pragma unroll
                         for (int i = 0; i < Tile::kRowSlots; ++i) {
                           const S visible = Tile::row(i) == shift + Tile::col(j) ? S(1) : policy;
                           s.at(i, j) = exp2_fast(s.at(i, j) - base[i]) * visible;
                           state.sum[i] += s.at(i, j);
                         }
                       }
                       Tile::accumulate(state.values, s, key_tile + Layout::kTile, shared.scratch());
                     });

  S factor[Tile::kRowSlots];
  const S eps = static_cast<S>(p.eps), share = eps / static_cast<S>(p.tokens);
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const S sum = Tile::row_sum(state.sum[i]);
    factor[i] = sum + eps == 0 ? S(0) : S(1) / (sum + eps);
    const int row = first + Tile::row(i);
    if (row < tokens && Tile::col(0) == 0) {
      static_cast<S*>(p.row_max)[at_head.stats + row] = state.best[i] * static_cast<S>(kLn2);
      static_cast<S*>(p.row_sum)[at_head.stats + row] = sum;
    }
  }
  if (w.value_sum != nullptr) {
    const S* value_sum = static_cast<const S*>(w.value_sum) + (at_head.batch * p.heads + at_head.head) * p.dim;
#pragma unroll
    for (int j = 0; j < Tile::kDimSlots; ++j) {
      const S extra = Tile::dim_of(j) < dim ? share * value_sum[Tile::dim_of(j)] : S(0);
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) state.values.at(i, j) += extra;
    }
  }
  if (active) {
    Tile::store(state.values, factor, shared.own(0), static_cast<T*>(p.o) + at_head.offset(p), p.heads * p.dim,
                tokens - first, dim);
  }
}

}  // namespace tokenprune::attention
