// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the matching: for every a-token the b-token of highest cosine. Scores live in registers only.
//
// The dot products of raw rows are divided by the norms afterwards. A zero or NaN row has a NaN inverse norm, and a NaN
// score is never chosen. Ties go to the lowest b. Small problems split b over blocks; a last launch joins the parts.
#pragma once

#include <cmath>

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune {

constexpr int kMatchBlock = 128;
constexpr int kMatchColumns = 64;  // b-tokens per tile

__device__ __forceinline__ int64_t a_token(const MatchParams& p, int64_t b, int64_t i) {
  return p.a_index != nullptr ? p.a_index[b * p.na + i] : 2 * i;
}
__device__ __forceinline__ int64_t b_token(const MatchParams& p, int64_t b, int64_t j) {
  return p.b_index != nullptr ? p.b_index[b * p.nb + j] : 2 * j + 1;
}
// The row of a token; null for none (beyond the end, or an index out of range).
template <typename T>
__device__ __forceinline__ const T* metric_row(const MatchParams& p, int64_t b, int64_t token) {
  if (!in_range(token, p.tokens)) return nullptr;
  return static_cast<const T*>(p.metric) + b * p.batch_stride + token * p.token_stride;
}

// A row by 2^log_lanes lanes; a warp holds several rows.
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4) inverse_norms(MatchParams p, Acc<T>* inverse, int log_lanes) {
  using A = Acc<T>;
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1), in_warp = threadIdx.x % 32 >> log_lanes;
  const int64_t rows = p.batch * p.tokens;
  for (int64_t first = global_thread() / 32 * 32 >> log_lanes; first < rows; first += grid_threads() >> log_lanes) {
    const int64_t i = first + in_warp;
    const T* row = i < rows ? metric_row<T>(p, i / p.tokens, i % p.tokens) : nullptr;
    A sum = 0;
    for (int64_t c = static_cast<int64_t>(lane) * W; row != nullptr && c < p.channels; c += lanes * W) {
      const Pack<T, W> x = load_pack<W>(row + c);
#pragma unroll
      for (int k = 0; k < W; ++k) sum += to_acc(x.v[k]) * to_acc(x.v[k]);
    }
    for (int mask = 1; mask < lanes; mask *= 2) sum += warp_shuffle_xor(sum, mask);
    if (lane == 0 && i < rows) inverse[i] = sum > A(0) ? rsqrt_of(sum) : A(NAN);  // a zero row has no direction
  }
}

template <typename A>
struct Best {
  A score = -A(INFINITY);
  int32_t index = -1;

  __device__ __forceinline__ void offer(A s, int32_t j) {  // false for NaN and -inf; ties keep the lower index
    if (s > score || (s == score && j < index)) score = s, index = j;
  }
  // The best over groups of `lanes` neighbouring lanes.
  __device__ __forceinline__ void join(int lanes) {
    for (int mask = 1; mask < lanes; mask *= 2) {
      const A s = warp_shuffle_xor(score, mask);
      const int32_t j = warp_shuffle_xor(index, mask);
      if (j >= 0) offer(s, j);
    }
  }
};

// Where a block stores the result of its part of b.
template <typename A>
struct MatchParts {
  const A* inverse = nullptr;  // [batch, tokens]
  A* score = nullptr;          // [parts, batch, na], unused for one part
  int32_t* nearest = nullptr;
  int64_t parts = 1;
};

template <typename A>
__device__ __forceinline__ void finish_row(const MatchParams& p, const MatchParts<A>& parts, int64_t b, int64_t i,
                                           Best<A> best) {
  const int64_t token = a_token(p, b, i);
  const A score = in_range(token, p.tokens) && i >= p.protect_a && best.index >= 0
                      ? best.score * parts.inverse[b * p.tokens + token]
                      : A(NAN);
  const bool found = score == score;
  static_cast<A*>(p.score)[b * p.na + i] = found ? score : -A(INFINITY);
  p.nearest[b * p.na + i] = found ? best.index : static_cast<int32_t>(p.protect_b < p.nb ? p.protect_b : 0);
}

template <typename A>
__device__ __forceinline__ void store_part(const MatchParams& p, const MatchParts<A>& parts, int64_t b, int64_t i,
                                           const Best<A>& best) {
  if (i >= p.na) return;
  if (parts.parts == 1) return finish_row(p, parts, b, i, best);
  const int64_t slot = (blockIdx.y * p.batch + b) * p.na + i;
  parts.score[slot] = best.score;
  parts.nearest[slot] = best.index;
}

template <typename A>
__global__ void __launch_bounds__(kBlock, 4) join_parts(MatchParams p, MatchParts<A> parts) {
  const int64_t rows = p.batch * p.na;
  for (int64_t i = global_thread(); i < rows; i += grid_threads()) {
    Best<A> best;
    for (int64_t part = 0; part < parts.parts; ++part) {
      const int32_t j = parts.nearest[part * rows + i];
      if (j >= 0) best.offer(parts.score[part * rows + i], j);
    }
    finish_row(p, parts, i / p.na, i % p.na, best);
  }
}

// This block's tiles of b: [begin, end) tokens, begin a multiple of the tile.
struct PartRange {
  int64_t begin, end;
  __device__ __forceinline__ PartRange(int64_t nb, int64_t parts) {
    const int64_t tiles = (nb + kMatchColumns - 1) / kMatchColumns;
    begin = tiles * blockIdx.y / parts * kMatchColumns;
    end = tiles * (blockIdx.y + 1) / parts * kMatchColumns;
    if (end > nb) end = nb;
  }
};

// The factor of column j: the inverse norm of its token, NaN where it may not be chosen.
template <typename A>
__device__ __forceinline__ A column_factor(const MatchParams& p, const MatchParts<A>& parts, int64_t b, int64_t j,
                                           int64_t end) {
  if (j >= end || j < p.protect_b) return A(NAN);
  const int64_t token = b_token(p, b, j);
  return in_range(token, p.tokens) ? parts.inverse[b * p.tokens + token] : A(NAN);
}

// float and double: 32 a-rows per block, 4 x 4 results per thread.
template <typename T>
__global__ void __launch_bounds__(kMatchBlock, 4) match_fma(MatchParams p, MatchParts<T> parts, int64_t row_tiles) {
  constexpr int kRows = 32, kDepth = 16;
  TP_SHARED(T, a_tile, [kDepth][kRows + 1]);
  TP_SHARED(T, b_tile, [kDepth][kMatchColumns + 1]);
  TP_SHARED(T, factor, [kMatchColumns]);
  const int column = threadIdx.x % 16, row = threadIdx.x / 16 * 4;
  const int64_t b = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * kRows;
  const PartRange range(p.nb, parts.parts);
  Best<T> best[4];
  for (int64_t tile = range.begin; tile < range.end; tile += kMatchColumns) {
    T sum[4][4] = {};
    for (int64_t depth = 0; depth == 0 || depth < p.channels; depth += kDepth) {
      __syncthreads();  // the previous tiles have been read
      for (int i = threadIdx.x; i < kRows * kDepth; i += kMatchBlock) {
        const int64_t a = first_row + i / kDepth, c = depth + i % kDepth;
        const T* from = a < p.na ? metric_row<T>(p, b, a_token(p, b, a)) : nullptr;
        a_tile[i % kDepth][i / kDepth] = from != nullptr && c < p.channels ? from[c] : T(0);
      }
      for (int i = threadIdx.x; i < kMatchColumns * kDepth; i += kMatchBlock) {
        const int64_t j = tile + i / kDepth, c = depth + i % kDepth;
        const T* from = j < range.end ? metric_row<T>(p, b, b_token(p, b, j)) : nullptr;
        b_tile[i % kDepth][i / kDepth] = from != nullptr && c < p.channels ? from[c] : T(0);
      }
      if (depth == 0 && threadIdx.x < kMatchColumns) {
        factor[threadIdx.x] = column_factor(p, parts, b, tile + threadIdx.x, range.end);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        T a[4], o[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = a_tile[k][row + i], o[i] = b_tile[k][column + 16 * i];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * o[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T f = factor[column + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) best[i].offer(sum[i][j] * f, static_cast<int32_t>(tile + column + 16 * j));
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    best[i].join(16);
    if (column == 0) store_part(p, parts, b, first_row + row + i, best[i]);
  }
}

// Rows of 64 channels into shared memory, W values per access; absent rows and channels are zero.
constexpr int kMatchDepth = 64, kMatchPitch = kMatchDepth + 8;  // the pitch keeps ldmatrix free of bank conflicts
template <typename T, int W, typename RowOf>
__device__ __forceinline__ void load_match_tile(T (*tile)[kMatchPitch], int rows, int64_t depth, int64_t channels,
                                                RowOf row_of) {
  constexpr int kPacks = kMatchDepth / W;
  for (int i = threadIdx.x; i < rows * kPacks; i += kMatchBlock) {
    const int r = i / kPacks, c = i % kPacks * W;
    const T* from = row_of(r);
    store_pack(&tile[r][c], from != nullptr && depth + c < channels ? load_pack<W>(from + depth + c) : Pack<T, W>{});
  }
}

// 16-bit values: 64 a-rows per block, 16 per warp, matrix instructions with float32 sums.
template <typename T, int W>
__global__ void __launch_bounds__(kMatchBlock, 4) match_mma(MatchParams p, MatchParts<float> parts, int64_t row_tiles) {
  constexpr int kRows = 64;
  TP_SHARED(T, a_tile, [kRows][kMatchPitch]);
  TP_SHARED(T, b_tile, [kMatchColumns][kMatchPitch]);
  TP_SHARED(float, factor, [kMatchColumns]);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int64_t b = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * kRows;
  const PartRange range(p.nb, parts.parts);
  Best<float> best[2];
  for (int64_t tile = range.begin; tile < range.end; tile += kMatchColumns) {
    float sum[kMatchColumns / 8][4] = {};
    for (int64_t depth = 0; depth == 0 || depth < p.channels; depth += kMatchDepth) {
      __syncthreads();                                        // the previous tiles have been read
      if (tile == range.begin || p.channels > kMatchDepth) {  // one depth: the a-tile stays
        load_match_tile<T, W>(a_tile, kRows, depth, p.channels, [&](int r) {
          return first_row + r < p.na ? metric_row<T>(p, b, a_token(p, b, first_row + r)) : nullptr;
        });
      }
      load_match_tile<T, W>(b_tile, kMatchColumns, depth, p.channels, [&](int r) {
        return tile + r < range.end ? metric_row<T>(p, b, b_token(p, b, tile + r)) : nullptr;
      });
      if (depth == 0 && threadIdx.x < kMatchColumns) {
        factor[threadIdx.x] = column_factor(p, parts, b, tile + threadIdx.x, range.end);
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kMatchDepth; k += 16) {
        uint32_t a[4];
        load_matrix_x4(a, &a_tile[warp_row + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int n = 0; n < kMatchColumns / 8; n += 2) {  // two groups of 8 b-rows: [n][k] is column major already
          uint32_t o[4];
          load_matrix_x4(o, &b_tile[n * 8 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
          mma_16x8x16<T>(sum[n], a, o);
          mma_16x8x16<T>(sum[n + 1], a, o + 2);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kMatchColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = n * 8 + lane % 4 * 2 + i;
        const float f = factor[j];
        best[0].offer(sum[n][i] * f, static_cast<int32_t>(tile + j));
        best[1].offer(sum[n][2 + i] * f, static_cast<int32_t>(tile + j));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    best[i].join(4);
    if (lane % 4 == 0) store_part(p, parts, b, first_row + warp_row + lane / 4 + 8 * i, best[i]);
  }
}

template <typename T>
constexpr int kMatchRows = sizeof(T) == 2 ? 64 : 32;

// Parts of b: enough blocks for a large GPU, never empty ones. Depends on shapes only, so results are reproducible.
template <typename T>
int64_t match_parts(const MatchParams& p) {
  const int64_t blocks = p.batch * ((p.na + kMatchRows<T> - 1) / kMatchRows<T>);
  const int64_t tiles = (p.nb + kMatchColumns - 1) / kMatchColumns, wanted = blocks > 0 ? 256 / blocks : 1;
  const int64_t most = tiles < 8 ? tiles : 8;
  return wanted < most ? (wanted < 1 ? 1 : wanted) : (most < 1 ? 1 : most);
}

// Workspace: inverse [batch, tokens]; score and nearest [parts, batch, na] when match_parts > 1.
template <typename T, typename Launch>
void launch_match(const Launch& launch, const MatchParams& p, MatchParts<Acc<T>> parts, Acc<T>* inverse) {
  if (p.batch == 0 || p.na == 0) return;
  parts.inverse = inverse;
  parts.parts = match_parts<T>(p);
  const int64_t row_tiles = (p.na + kMatchRows<T> - 1) / kMatchRows<T>;
  const bool packed =
      packable<T>(p.metric, p.token_stride) && packable<T>(p.metric, p.batch_stride) && p.channels % kPack<T> == 0;
  const int log_lanes = log_lanes_for(packed ? p.channels / kPack<T> : p.channels);
  launch(packed ? &inverse_norms<T, kPack<T>> : &inverse_norms<T, 1>, grid_for(p.batch * p.tokens << log_lanes, kBlock),
         kBlock, 0, p, inverse, log_lanes);
  const dim3 grid(p.batch * row_tiles, parts.parts);
  if constexpr (sizeof(T) == 2) {
    launch(packed ? &match_mma<T, kPack<T>> : &match_mma<T, 1>, grid, kMatchBlock, 0, p, parts, row_tiles);
  } else {
    launch(&match_fma<T>, grid, kMatchBlock, 0, p, parts, row_tiles);
  }
  if (parts.parts > 1) {
    launch(&join_parts<Acc<T>>, grid_for(p.batch * p.na, kBlock), kBlock, 0, p, parts);
  }
}

}  // namespace tokenprune
