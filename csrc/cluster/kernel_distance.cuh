// SPDX-License-Identifier: Apache-2.0
// Squared distances between two sets of rows, in tiles of 64 x 64 by a block of 128 threads; their
// matrix, and the nearest rows.
//
// Two engines, alike in use. MmaDistance (16-bit types): |a|^2 + |b|^2 - 2 a.b on the tensor cores, the norms as well,
// so that equal rows are at distance 0. FmaDistance (float, double): sums of squared differences, exact where rows are
// close.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune::cluster {

constexpr int kThreads = 128;
constexpr int kSide = 64;
constexpr double kLog2e = 1.4426950408889634074;

// Rows of [batch, count, channels] with unit inner stride.
struct RowSet {
  const void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, count = 0;

  template <typename T>
  __device__ __forceinline__ const T* row(int64_t batch, int64_t i) const {
    return static_cast<const T*>(data) + batch * batch_stride + i * row_stride;
  }
};
template <typename T>
bool packable_rows(const RowSet& r, int64_t channels) {
  return packable<T>(r.data, r.row_stride) && r.batch_stride % kPack<T> == 0 && channels % kPack<T> == 0;
}

// ---- engines -------------------------------------------------------------------------------------------------------
//
// compute(): the whole block; `rows` is shared memory with the addresses of 64 own and 64 other rows, null for zeros;
// the first own row is never null. d[i][j] is the distance of own row row(i) and other row col(j). kRowLanes
// neighbouring lanes share a row. Packs: all rows may be read in packs of 16 bytes.

template <typename T, bool Packs>
struct MmaDistance {
  using Value = T;
  using Stat = float;
  static constexpr int kRowSlots = 2, kColSlots = 16, kRowLanes = 4;
  static constexpr int kDepth = 64, kPitch = kDepth + 8;  // an odd number of 16-byte units: no bank conflicts
  static constexpr int kStages = 3, kStage = 2 * kSide * kPitch, kNormsAt = kStages * kStage;
  static constexpr int kBytes = kNormsAt * static_cast<int>(sizeof(T)) + 2 * kSide * 4;
  float d[kRowSlots][kColSlots];

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }
  static __device__ __forceinline__ int row(int i) { return warp_row() + lane() / 4 + 8 * i; }
  static __device__ __forceinline__ int col(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }

  static __device__ __forceinline__ void load(T* stage, const T* const* rows, int64_t depth, int64_t channels) {
    constexpr int kW = Packs ? 8 : 1, kPerRow = kDepth / kW;
#pragma unroll(Packs ? 8 : 4)
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kSide * kPerRow; i += kThreads) {
      const int r = i / kPerRow, c = i % kPerRow * kW;
      const T* from = rows[r];
      const bool valid = from != nullptr && depth + c < channels;
      T* to = stage + r * kPitch + c;
      if constexpr (Packs) {
        copy_async<16>(to, valid ? from + depth + c : rows[0], valid);
      } else {
        *to = valid ? from[depth + c] : from_acc<T>(0);
      }
    }
  }

  __device__ __forceinline__ void compute(unsigned char* memory, const T* const* rows, int64_t channels) {
    T* stages = reinterpret_cast<T*>(memory);
    float* norms = reinterpret_cast<float*>(stages + kNormsAt);
    const int steps = static_cast<int>((channels + kDepth - 1) / kDepth), l = lane(), first = warp_row();
    float dot[kSide / 8][4] = {}, own[2][4] = {}, other[2][4] = {};
    __syncthreads();  // the rows are known, and an earlier result has been used
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load(stages + s * kStage, rows, s * kDepth, channels);
      copy_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // this stage has arrived; the one before has been read
      const int next = step + kStages - 1;
      if (next < steps) load(stages + next % kStages * kStage, rows, static_cast<int64_t>(next) * kDepth, channels);
      copy_async_commit();
      const T *a_tile = stages + step % kStages * kStage, *b_tile = a_tile + kSide * kPitch;
      const int a_at = l % 16 * kPitch + l / 16 * 8, b_at = (l / 16 * 8 + l % 8) * kPitch + l / 8 % 2 * 8;
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        uint32_t a[4], b[4], c[4];
        load_matrix_x4(a, a_tile + first * kPitch + a_at + k);
        load_matrix_x4(b, a_tile + first * kPitch + b_at + k);
        mma_16x8x16<T>(own[0], a, b);
        mma_16x8x16<T>(own[1], a, b + 2);
        load_matrix_x4(c, b_tile + first * kPitch + a_at + k);
        load_matrix_x4(b, b_tile + first * kPitch + b_at + k);
        mma_16x8x16<T>(other[0], c, b);
        mma_16x8x16<T>(other[1], c, b + 2);
#pragma unroll
        for (int n = 0; n < kSide; n += 16) {
          load_matrix_x4(b, b_tile + n * kPitch + b_at + k);
          mma_16x8x16<T>(dot[n / 8], a, b);
          mma_16x8x16<T>(dot[n / 8 + 1], a, b + 2);
        }
      }
    }
    const int g = l / 4;  // rows g and g + 8 of the products of 16 rows with themselves; the diagonal is at column g
    if (g / 2 == l % 4) {
      const bool odd = g % 2 != 0;
      norms[first + g] = odd ? own[0][1] : own[0][0];
      norms[first + 8 + g] = odd ? own[1][3] : own[1][2];
      norms[kSide + first + g] = odd ? other[0][1] : other[0][0];
      norms[kSide + first + 8 + g] = odd ? other[1][3] : other[1][2];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kColSlots; ++j) {
      const float norm = norms[kSide + col(j)];
#pragma unroll
      for (int i = 0; i < kRowSlots; ++i) d[i][j] = norms[row(i)] + norm - 2.f * dot[j / 2][2 * i + j % 2];
    }
  }
};

template <typename T, bool Packs>
struct FmaDistance {
  using Value = T;
  using Stat = T;
  static constexpr int kUnit = kPack<T>, kRowSlots = 8, kColSlots = 4, kRowLanes = 16;
  static constexpr int kDepth = 8 * kUnit, kPitch = kDepth + kUnit;
  static constexpr int kBytes = 2 * kSide * kPitch * static_cast<int>(sizeof(T));
  T d[kRowSlots][kColSlots];

  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) / 16 * 8 + i; }
  static __device__ __forceinline__ int col(int j) { return static_cast<int>(threadIdx.x) % 16 + 16 * j; }

  // Eight packs per thread: pack threadIdx % 8 of every 16th row.
  using Held = Pack<T, kUnit>[8];
  static __device__ __forceinline__ void fetch(Held& held, const T* const* rows, int64_t depth, int64_t channels) {
    const int64_t c = depth + static_cast<int>(threadIdx.x) % 8 * kUnit;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const T* from = rows[k * 16 + static_cast<int>(threadIdx.x) / 8];
      if constexpr (Packs) {
        held[k] = from != nullptr && c < channels ? load_pack<kUnit>(from + c) : Pack<T, kUnit>{};
      } else {
#pragma unroll
        for (int u = 0; u < kUnit; ++u) held[k].v[u] = from != nullptr && c + u < channels ? from[c + u] : T(0);
      }
    }
  }

  __device__ __forceinline__ void compute(unsigned char* memory, const T* const* rows, int64_t channels) {
    T* tile = reinterpret_cast<T*>(memory);
#pragma unroll
    for (int i = 0; i < kRowSlots; ++i) {
#pragma unroll
      for (int j = 0; j < kColSlots; ++j) d[i][j] = 0;
    }
    __syncthreads();  // the rows are known
    Held held;
    if (channels > 0) fetch(held, rows, 0, channels);
    for (int64_t depth = 0; depth < channels; depth += kDepth) {
      __syncthreads();  // the previous tile has been read
      T* to = tile + static_cast<int>(threadIdx.x) / 8 * kPitch + static_cast<int>(threadIdx.x) % 8 * kUnit;
#pragma unroll
      for (int k = 0; k < 8; ++k) store_pack(to + k * 16 * kPitch, held[k]);
      __syncthreads();
      if (depth + kDepth < channels) fetch(held, rows, depth + kDepth, channels);
      const T *a_row = tile + row(0) * kPitch, *b_row = tile + (kSide + col(0)) * kPitch;
#pragma unroll 2
      for (int k = 0; k < kDepth; k += kUnit) {
        Pack<T, kUnit> b[kColSlots];
#pragma unroll
        for (int j = 0; j < kColSlots; ++j) b[j] = load_pack<kUnit>(b_row + 16 * j * kPitch + k);
#pragma unroll
        for (int i = 0; i < kRowSlots; ++i) {
          const Pack<T, kUnit> a = load_pack<kUnit>(a_row + i * kPitch + k);
#pragma unroll
          for (int u = 0; u < kUnit; ++u) {
#pragma unroll
            for (int j = 0; j < kColSlots; ++j) {
              const T difference = a.v[u] - b[j].v[u];
              d[i][j] += difference * difference;
            }
          }
        }
      }
    }
  }
};

template <typename T, bool Packs>
using DistanceTile = std::conditional_t<sizeof(T) == 2, MmaDistance<T, Packs>, FmaDistance<T, Packs>>;

constexpr int kDistanceBlocks = 2;  // per multiprocessor, at least: leaves enough registers for either engine

// ---- all distances, and the nearest rows
// --------------------------------------------------------------

// Addresses of the rows [first, first + 64) of a set, null beyond its end; by 64 threads.
template <typename T>
__device__ __forceinline__ void find_rows(const T** rows, const RowSet& set, int64_t batch, int64_t first) {
  const int i = static_cast<int>(threadIdx.x) % kSide;
  rows[i] = first + i < set.count ? set.row<T>(batch, first + i) : nullptr;
}

// matrix [batch, own.count, other.count]; blockIdx.y is the tile of other rows.
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kDistanceBlocks)
    distance_matrix(RowSet own, RowSet other, int64_t channels, int64_t row_tiles, typename Tile::Stat* matrix) {
  using T = typename Tile::Value;
  TP_SHARED(const T*, rows, [2 * kSide]);
  const int64_t batch = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * kSide;
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * kSide;
  if (threadIdx.x < kSide) {
    find_rows<T>(rows, own, batch, first_row);
  } else {
    find_rows<T>(rows + kSide, other, batch, first_col);
  }
  Tile tile;
  tile.compute(dynamic_shared<unsigned char>(), rows, channels);
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    const int64_t row = first_row + Tile::row(i);
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const int64_t col = first_col + Tile::col(j);
      if (row < own.count && col < other.count) {
        matrix[(batch * own.count + row) * other.count + col] = tile.d[i][j];
      }
    }
  }
}

// The first of the nearest centers; a NaN distance is never chosen, and 0 stands for "none".
template <typename Tile>
__global__ void __launch_bounds__(kThreads, kDistanceBlocks)
    nearest_rows(RowSet own, RowSet other, int64_t channels, int64_t row_tiles, int64_t* nearest) {
  using T = typename Tile::Value;
  using S = typename Tile::Stat;
  TP_SHARED(const T*, rows, [2 * kSide]);
  const int64_t batch = blockIdx.x / row_tiles, first_row = blockIdx.x % row_tiles * kSide;
  if (threadIdx.x < kSide) find_rows<T>(rows, own, batch, first_row);
  S best[Tile::kRowSlots];
  int32_t index[Tile::kRowSlots];
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) best[i] = S(INFINITY), index[i] = 0;
  for (int64_t first_col = 0; first_col < other.count; first_col += kSide) {
    __syncthreads();  // the previous addresses have been read
    if (threadIdx.x >= kSide) find_rows<T>(rows + kSide, other, batch, first_col);
    Tile tile;
    tile.compute(dynamic_shared<unsigned char>(), rows, channels);
#pragma unroll
    for (int j = 0; j < Tile::kColSlots; ++j) {
      const int64_t col = first_col + Tile::col(j);
#pragma unroll
      for (int i = 0; i < Tile::kRowSlots; ++i) {
        if (col < other.count && tile.d[i][j] < best[i]) best[i] = tile.d[i][j], index[i] = static_cast<int32_t>(col);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kRowSlots; ++i) {
    for (int mask = 1; mask < Tile::kRowLanes; mask *= 2) {
      const S value = warp_shuffle_xor(best[i], mask);
      const int32_t at = warp_shuffle_xor(index[i], mask);
      if (value < best[i] || (value == best[i] && at < index[i])) best[i] = value, index[i] = at;
    }
    const int64_t row = first_row + Tile::row(i);
    if (threadIdx.x % Tile::kRowLanes == 0 && row < own.count) nearest[batch * own.count + row] = index[i];
  }
}

inline int64_t tiles_of(int64_t rows) { return (rows + kSide - 1) / kSide; }

template <typename T, typename Launch>
void launch_distance_matrix(const Launch& launch, const RowSet& own, const RowSet& other, int64_t batch,
                            int64_t channels, Acc<T>* matrix) {
  const int64_t row_tiles = tiles_of(own.count);
  const dim3 grid(batch * row_tiles, tiles_of(other.count));
  const bool packs = packable_rows<T>(own, channels) && packable_rows<T>(other, channels);
  launch(packs ? &distance_matrix<DistanceTile<T, true>> : &distance_matrix<DistanceTile<T, false>>, grid, kThreads,
         DistanceTile<T, true>::kBytes, own, other, channels, row_tiles, matrix);
}

template <typename T, typename Launch>
void launch_nearest(const Launch& launch, const ReconstructParams& p) {
  if (p.batch == 0 || p.tokens == 0) return;
  const RowSet own{p.features, p.features_batch, p.features_row, p.tokens};
  const RowSet other{p.centers, p.centers_batch, p.centers_row, p.clusters};
  const int64_t row_tiles = tiles_of(p.tokens);
  const bool packs = packable_rows<T>(own, p.channels) && packable_rows<T>(other, p.channels);
  launch(packs ? &nearest_rows<DistanceTile<T, true>> : &nearest_rows<DistanceTile<T, false>>, p.batch * row_tiles,
         kThreads, DistanceTile<T, true>::kBytes, own, other, p.channels, row_tiles, p.nearest);
}

}  // namespace tokenprune::cluster
