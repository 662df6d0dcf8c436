// SPDX-License-Identifier: Apache-2.0
// Which engine serves which dtype and head width, and the launches of every op. `launch` is the Launcher of
// common/launch.h, or the one of the host model in the tests.
#pragma once

#include <type_traits>

#include "kernel.cuh"

namespace tokenprune::attention {

constexpr int64_t kMostDim = 128;

// How many head widths have kernels of their own: all that vision transformers use, or fewer for the sake of build
// time.
constexpr int kAllWidths = 0, kCommonWidths = 1, kTwoWidths = 2;

// 16-bit tiles: 64 columns up to a head width of wide_up_to, 32 above; two bands per warp up to tall_up_to. Tiles of
// float for heads wider than 64 have wide_rows rows (double: half). All are as large as registers and shared memory
// allow.
struct TileRule {
  int widths, wide_up_to, tall_up_to, wide_rows;
};
constexpr TileRule kForward{kAllWidths, 128, 0, 64}, kForwardTall{kCommonWidths, 128, 80, 64},
    kGradQuery{kCommonWidths, 0, 80, 32}, kGradKey{kCommonWidths, 64, 0, 32}, kScores{kTwoWidths, 128, 0, 64},
    kPolicy{kTwoWidths, 128, 0, 64}, kPolicyBackward{kTwoWidths, 0, 0, 32};

template <typename T, TileRule Rule, typename F>
void visit_fma_tile(int64_t dim, F&& f) {
  constexpr int kShare = sizeof(T) / 4, kRows = 64 / kShare, kWideRows = Rule.wide_rows / kShare;
  if constexpr (Rule.widths == kAllWidths && sizeof(T) == 4) {  // double is there to check gradients
    if (dim <= 32) return f.template operator()<FmaTile<T, 2, kRows, kRows>>();
    if (dim > 64 && dim <= 96) return f.template operator()<FmaTile<T, 6, kWideRows, kRows / 2>>();
  }
  if (dim <= 64) return f.template operator()<FmaTile<T, 4, kRows, kRows>>();
  f.template operator()<FmaTile<T, 8, kWideRows, kRows / 2>>();
}

// Calls f<Tile>() with the engine for head width `dim`: the next width that has a kernel, the rest is zeros.
template <typename T, TileRule Rule, typename F>
void visit_tile(int64_t dim, F&& f) {
  if constexpr (sizeof(T) >= 4) {
    visit_fma_tile<T, Rule>(dim, f);
  } else {
    const auto with = [&]<int Dim>() {
      f.template operator()<MmaTile<T, Dim, (Dim <= Rule.wide_up_to ? 64 : 32), (Dim <= Rule.tall_up_to ? 2 : 1)>>();
    };
    if constexpr (Rule.widths != kTwoWidths) {
      if (dim <= 32) return with.template operator()<32>();
      if (dim > 64 && dim <= 80) return with.template operator()<80>();
    }
    if constexpr (Rule.widths == kAllWidths) {
      if (dim > 32 && dim <= 48) return with.template operator()<48>();
      if (dim > 80 && dim <= 96) return with.template operator()<96>();
    }
    if (dim <= 64) return with.template operator()<64>();
    with.template operator()<128>();
  }
}

inline int blocks_of(int64_t rows, int per_block) {
  const int64_t blocks = (rows + per_block - 1) / per_block;
  return blocks < 1 ? 1 : static_cast<int>(blocks);
}

// Blocks for `rows` groups of 2^log_lanes lanes.
inline dim3 row_grid(int64_t rows, int log_lanes) {
  return dim3(static_cast<unsigned>(((rows << log_lanes) + kThreads - 1) / kThreads));
}

// Blocks for every sequence and for the slots behind the last one.
inline dim3 sequence_grid(const AttentionParams& p, int blocks) {
  return dim3(static_cast<unsigned>(blocks * (p.batch + 1)), static_cast<unsigned>(p.heads));
}

// processors: multiprocessors of the card. Tall blocks read shared memory half as often; as long as they do not fill
// the card, more and smaller blocks finish sooner.
template <typename T, typename Launch>
void launch_forward(const Launch& launch, const AttentionParams& p, int processors) {
  if (p.heads == 0 || (p.total_q == 0 && p.cls == nullptr)) return;
  const auto run = [&]<typename Tile>() {
    const int blocks = blocks_of(p.max_q, Tile::kRows);
    launch(&sparse_attention_kernel<Tile>, sequence_grid(p, blocks), kThreads, ForwardLayout<Tile>::kBytes, p, blocks);
  };
  const bool fills = p.max_q > 64 && p.total_q / 128 * p.heads >= 2 * processors;  // max_q may be far too large
  if (sizeof(T) == 2 && p.dim <= kForwardTall.tall_up_to && fills) {
    visit_tile<T, kForwardTall>(p.dim, run);
  } else {
    visit_tile<T, kForward>(p.dim, run);
  }
}

// attention_scores when p.scores is set, otherwise attention_scores_grad_lse.
template <typename T, typename Launch>
void launch_scores(const Launch& launch, const AttentionParams& p) {
  const bool keys_own = p.scores != nullptr;
  if (p.heads == 0 || (keys_own ? p.total_k : p.total_q) == 0) return;
  visit_tile<T, kScores>(p.dim, [&]<typename Tile>() {
    const int blocks = blocks_of(keys_own ? p.max_k : p.max_q, Tile::kRows);
    launch(keys_own ? &attention_scores_kernel<Tile, true> : &attention_scores_kernel<Tile, false>,
           sequence_grid(p, blocks), kThreads, ScoreLayout<Tile>::kBytes, p, blocks);
  });
}

// delta: workspace [heads, total_q] stat dtype.
template <typename T, typename Launch>
void launch_backward(const Launch& launch, const AttentionParams& p, void* delta) {
  if (p.heads == 0) return;
  if (p.total_q > 0) {
    const bool packs = packable_rows<T>(p.grad_out, p.dim) && packable_rows<T>(p.out, p.dim);
    const int log_lanes = log_lanes_for(packs ? p.dim / kPack<T> : p.dim);
    launch(packs ? &attention_delta_kernel<T, kPack<T>> : &attention_delta_kernel<T, 1>,
           row_grid(p.total_q * p.heads, log_lanes), kThreads, 0, p, delta, log_lanes);
    visit_tile<T, kGradQuery>(p.dim, [&]<typename Tile>() {
      const int blocks = blocks_of(p.max_q, Tile::kRows);
      launch(&attention_grad_query_kernel<Tile>, sequence_grid(p, blocks), kThreads, GradQueryLayout<Tile>::kBytes, p,
             delta, blocks);
    });
  }
  if (p.total_k == 0) return;
  visit_tile<T, kGradKey>(p.dim, [&]<typename Tile>() {
    const int blocks = blocks_of(p.max_k, Tile::kRows);
    launch(&attention_grad_key_kernel<Tile>, sequence_grid(p, blocks), kThreads, GradKeyLayout<Tile>::kBytes, p, delta,
           blocks);
  });
}

inline dim3 policy_grid(const PolicyParams& p, int blocks) {
  return dim3(static_cast<unsigned>(blocks * p.batch), static_cast<unsigned>(p.heads));
}

// workspace.value_sum [batch, heads, dim] when eps is not 0, otherwise null.
template <typename T, typename Launch>
void launch_policy(const Launch& launch, const PolicyParams& p, const PolicyWorkspace& w) {
  if (p.batch * p.tokens * p.heads == 0) return;
  if (w.value_sum != nullptr && p.dim > 0) {
    launch(&policy_value_sum_kernel<T>, dim3(static_cast<unsigned>(p.batch * p.heads)), kThreads, 0, p, w);
  }
  visit_tile<T, kPolicy>(p.dim, [&]<typename Tile>() {
    const int blocks = blocks_of(p.tokens, Tile::kRows);
    launch(&policy_attention_kernel<Tile>, policy_grid(p, blocks), kThreads, PolicyForwardLayout<Tile>::kBytes, p, w,
           blocks);
  });
}

// The workspace of the backward: value_sum is not read.
template <typename T, typename Launch>
void launch_policy_backward(const Launch& launch, const PolicyParams& p, const PolicyWorkspace& w) {
  if (p.batch * p.tokens * p.heads == 0) return;
  const bool packs = packable_rows<T>(p.grad_out, p.dim) && packable_rows<T>(p.v, p.dim) &&
                     p.grad_out_batch % kPack<T> == 0 && p.v_batch % kPack<T> == 0;
  const int log_lanes = log_lanes_for(packs ? p.dim / kPack<T> : p.dim);
  launch(packs ? &policy_pivot_kernel<T, kPack<T>> : &policy_pivot_kernel<T, 1>,
         row_grid(p.batch * p.heads * p.tokens, log_lanes), kThreads, 0, p, w, log_lanes);
  visit_tile<T, kPolicyBackward>(p.dim, [&]<typename Tile>() {
    const int blocks = blocks_of(p.tokens, Tile::kRows);
    const dim3 grid = policy_grid(p, blocks);
    launch(&policy_row_kernel<Tile>, grid, kThreads, PolicyGradQueryLayout<Tile>::kBytes, p, w, blocks);
    launch(&policy_grad_query_kernel<Tile>, grid, kThreads, PolicyGradQueryLayout<Tile>::kBytes, p, w, blocks);
    launch(&policy_grad_key_kernel<Tile>, grid, kThreads, PolicyGradKeyLayout<Tile>::kBytes, p, w, blocks);
  });
}

}  // namespace tokenprune::attention
