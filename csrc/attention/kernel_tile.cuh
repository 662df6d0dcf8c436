// SPDX-License-Identifier: Apache-2.0
// The two tile engines of the attention kernels.
//
// Every kernel has the same shape: a block of 128 threads owns some rows (queries or keys), streams tiles of the other
// side past them, forms scores = own . other^T, turns them into weights and sums weights x other. An engine says how
// a tile product is computed and which elements of it a thread holds:
//   MmaTile  bf16 and fp16: tensor cores, 4 warps x 16 rows, everything between the products stays in registers
//   FmaTile  float and double: multiply-add on register tiles, weights pass through shared memory
// Both keep all elements of a score row inside one warp, so rows need shuffles only, no barrier.
#pragma once

#include "../common/cuda.h"

namespace tokenprune::attention {

constexpr int kThreads = 128;

// Blocks per multiprocessor that the registers must allow: as many as compile without spills.
template <typename Tile>
constexpr int kSingleSumBlocks = Tile::kBands == 2 || sizeof(typename Tile::Value) == 8 ? 2
                                 : !Tile::kMma || (Tile::kDim > 32 && Tile::kDim <= 96) ? 3
                                 : Tile::kDim <= 32                                     ? 4
                                                                                        : 2;

template <typename S>
constexpr S kInfinity = static_cast<S>(__builtin_huge_val());
constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.6931471805599453094;

__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_of(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float log2_of(float v) { return log2f(v); }
__device__ __forceinline__ double log2_of(double v) { return log2(v); }

template <typename S>
__device__ __forceinline__ void keep_larger(S& v, int& index, S v2, int index2) {
  if (v2 > v || (v2 == v && index2 < index)) v = v2, index = index2;
}

// ---- engines -------------------------------------------------------------------------------------------------------

// Scores: 64 * Bands own rows x Columns; sums: 64 * Bands x Dim. A warp owns Bands bands of 16 rows: with two, a
// fragment read from shared memory serves two instructions. Thread slots follow the accumulators of mma
// (common/cuda.h).
template <typename T, int Dim, int Columns, int Bands = 1>
struct MmaTile {
  using Value = T;
  using Stat = float;
  static constexpr bool kMma = true;
  static constexpr int kRows = 64 * Bands, kCols = Columns, kDim = Dim, kBands = Bands, kStages = 2, kScratch = 0;
  static constexpr int kPitch = Dim + 8;  // an odd number of 16-byte units: ldmatrix is free of bank conflicts
  static constexpr int kRowSlots = 2 * Bands, kColSlots = Columns / 4, kDimSlots = Dim / 4;
  static_assert(Dim % 16 == 0 && Columns % 16 == 0);

  template <int N>
  struct Fragments {
    float c[Bands][N / 8][4];
    __device__ __forceinline__ float& at(int i, int j) { return c[i / 2][j / 2][i % 2 * 2 + j % 2]; }
    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < Bands * N / 2; ++i) c[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0;
    }
  };
  using Scores = Fragments<Columns>;
  using Sums = Fragments<Dim>;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16 * Bands; }
  static __device__ __forceinline__ int row(int i) { return warp_row() + lane() / 4 + 8 * i; }
  static __device__ __forceinline__ int col(int j) { return j / 2 * 8 + lane() % 4 * 2 + j % 2; }
  static __device__ __forceinline__ int dim_of(int j) { return col(j); }

  static __device__ __forceinline__ float row_max(float v) {
    v = fmaxf(v, warp_shuffle_xor(v, 1));
    return fmaxf(v, warp_shuffle_xor(v, 2));
  }
  static __device__ __forceinline__ float row_sum(float v) {
    v += warp_shuffle_xor(v, 1);
    return v + warp_shuffle_xor(v, 2);
  }
  static __device__ __forceinline__ void row_argmax(float& v, int& index) {
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2)
      keep_larger(v, index, warp_shuffle_xor(v, mask), warp_shuffle_xor(index, mask));
  }

  // s = own . other^T
  static __device__ __forceinline__ void dot(Scores& s, const T* own, const T* other, int) {
    s.clear();
    const int l = lane();
    const T* a_row = own + (warp_row() + l % 16) * kPitch + l / 16 * 8;
    const T* b_row = other + (l / 16 * 8 + l % 8) * kPitch + l / 8 % 2 * 8;
#pragma unroll(Dim == 96 || Dim == 128 ? 2 : Dim / 16)  // wide sums leave few registers
    for (int k = 0; k < Dim; k += 16) {
      uint32_t a[Bands][4];
#pragma unroll
      for (int band = 0; band < Bands; ++band) load_matrix_x4(a[band], a_row + 16 * band * kPitch + k);
#pragma unroll
      for (int n = 0; n < Columns; n += 16) {
        uint32_t b[4];
        load_matrix_x4(b, b_row + n * kPitch + k);
#pragma unroll
        for (int band = 0; band < Bands; ++band) {
          mma_16x8x16<T>(s.c[band][n / 8], a[band], b);
          mma_16x8x16<T>(s.c[band][n / 8 + 1], a[band], b + 2);
        }
      }
    }
  }

  // sums += weights x other
  static __device__ __forceinline__ void accumulate(Sums& sums, Scores& weights, const T* other, void*) {
    const int l = lane();
    const T* b_row = other + l % 16 * kPitch + l / 16 * 8;
#pragma unroll
    for (int k = 0; k < Columns; k += 16) {
      uint32_t a[Bands][4];
#pragma unroll
      for (int band = 0; band < Bands; ++band) {
        const float *low = weights.c[band][k / 8], *high = weights.c[band][k / 8 + 1];
        a[band][0] = pack_pair<T>(low[0], low[1]), a[band][1] = pack_pair<T>(low[2], low[3]);
        a[band][2] = pack_pair<T>(high[0], high[1]), a[band][3] = pack_pair<T>(high[2], high[3]);
      }
#pragma unroll
      for (int n = 0; n < Dim; n += 16) {
        uint32_t b[4];
        load_matrix_x4_trans(b, b_row + k * kPitch + n);
#pragma unroll
        for (int band = 0; band < Bands; ++band) {
          mma_16x8x16<T>(sums.c[band][n / 8], a[band], b);
          mma_16x8x16<T>(sums.c[band][n / 8 + 1], a[band], b + 2);
        }
      }
    }
  }

  // Rows 0 .. rows - 1 of the block, times their factor, to `to` + row * stride. `own`: the block's own tile, free by
  // now; a warp touches only its own rows of it.
  static __device__ __forceinline__ void store(Sums& sums, const float* factor, T* own, T* to, int64_t stride, int rows,
                                               int dim) {
    warp_sync();
#pragma unroll
    for (int i = 0; i < kRowSlots; ++i) {
#pragma unroll
      for (int j = 0; j < kDimSlots; j += 2) {
        const uint32_t pair = pack_pair<T>(sums.at(i, j) * factor[i], sums.at(i, j + 1) * factor[i]);
        *reinterpret_cast<uint32_t*>(own + row(i) * kPitch + dim_of(j)) = pair;
      }
    }
    warp_sync();
    const int first = warp_row(), count = rows - first < 16 * Bands ? rows - first : 16 * Bands;
    const bool packs = packable<T>(to, stride) && dim % 8 == 0;
    const int unit = packs ? 8 : 1, per_row = dim / unit;
    for (int c = lane(); c < count * per_row; c += 32) {
      const int r = first + c / per_row, d = c % per_row * unit;
      if (packs) {
        store_pack(to + r * stride + d, load_pack<8>(own + r * kPitch + d));
      } else {
        to[r * stride + d] = own[r * kPitch + d];
      }
    }
  }
};

// Scores: Rows x Columns, sums: Rows x 16 * DimSlots. 8 x 16 threads; a thread holds Rows / 8 rows and Columns / 16
// columns.
template <typename T, int DimSlots, int Rows, int Columns>
struct FmaTile {
  using Value = T;
  using Stat = T;
  static constexpr bool kMma = false;
  static constexpr int kUnit = kPack<T>;
  static constexpr int kRows = Rows, kCols = Columns, kDim = 16 * DimSlots, kBands = 1, kStages = 1;
  static constexpr int kPitch = kDim + kUnit, kWeightPitch = Columns + kUnit;  // odd numbers of 16-byte units
  static constexpr int kScratch = Rows * kWeightPitch * static_cast<int>(sizeof(T));
  static constexpr int kRowSlots = Rows / 8, kColSlots = Columns / 16, kDimSlots = DimSlots;
  static constexpr int kGroup = DimSlots % kUnit == 0 ? kUnit : DimSlots % 2 == 0 ? 2 : 1;  // dims side by side

  template <int N>
  struct Fragments {
    T c[kRowSlots][N];
    __device__ __forceinline__ T& at(int i, int j) { return c[i][j]; }
    __device__ __forceinline__ void clear() {
#pragma unroll
      for (int i = 0; i < kRowSlots; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) c[i][j] = 0;
      }
    }
  };
  using Scores = Fragments<kColSlots>;
  using Sums = Fragments<DimSlots>;

  static __device__ __forceinline__ int tx() { return static_cast<int>(threadIdx.x) % 16; }
  static __device__ __forceinline__ int ty() { return static_cast<int>(threadIdx.x) / 16; }
  static __device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 2 * kRowSlots; }
  static __device__ __forceinline__ int row(int i) { return ty() * kRowSlots + i; }
  static __device__ __forceinline__ int col(int j) { return tx() + 16 * j; }
  static __device__ __forceinline__ int dim_of(int j) { return (j / kGroup * 16 + tx()) * kGroup + j % kGroup; }

  static __device__ __forceinline__ T row_max(T v) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) v = max_of(v, warp_shuffle_xor(v, mask));
    return v;
  }
  static __device__ __forceinline__ T row_sum(T v) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2) v += warp_shuffle_xor(v, mask);
    return v;
  }
  static __device__ __forceinline__ void row_argmax(T& v, int& index) {
#pragma unroll
    for (int mask = 1; mask < 16; mask *= 2)
      keep_larger(v, index, warp_shuffle_xor(v, mask), warp_shuffle_xor(index, mask));
  }
  static __device__ __forceinline__ void dot(Scores& s, const T* own, const T* other, int dim) {
    s.clear();
    const T *a_row = own + row(0) * kPitch, *b_row = other + tx() * kPitch;
#pragma unroll 2
    for (int k = 0; k < dim; k += kUnit) {
      Pack<T, kUnit> a[kRowSlots], b[kColSlots];
#pragma unroll
      for (int i = 0; i < kRowSlots; ++i) a[i] = load_pack<kUnit>(a_row + i * kPitch + k);
#pragma unroll
      for (int j = 0; j < kColSlots; ++j) b[j] = load_pack<kUnit>(b_row + 16 * j * kPitch + k);
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
#pragma unroll
        for (int i = 0; i < kRowSlots; ++i) {
#pragma unroll
          for (int j = 0; j < kColSlots; ++j) s.c[i][j] += a[i].v[u] * b[j].v[u];
        }
      }
    }
  }

  // The weights of a row are written and read by the same half warp.
  static __device__ __forceinline__ void accumulate(Sums& sums, Scores& weights, const T* other, void* scratch) {
    T* w = static_cast<T*>(scratch) + row(0) * kWeightPitch;
    warp_sync();
#pragma unroll
    for (int i = 0; i < kRowSlots; ++i) {
#pragma unroll
      for (int j = 0; j < kColSlots; ++j) w[i * kWeightPitch + col(j)] = weights.c[i][j];
    }
    warp_sync();
#pragma unroll 1
    for (int k = 0; k < kCols; k += kUnit) {
      Pack<T, kUnit> a[kRowSlots];
#pragma unroll
      for (int i = 0; i < kRowSlots; ++i) a[i] = load_pack<kUnit>(w + i * kWeightPitch + k);
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
#pragma unroll
        for (int j = 0; j < DimSlots; j += kGroup) {
          const Pack<T, kGroup> b = load_pack<kGroup>(other + (k + u) * kPitch + dim_of(j));
#pragma unroll
          for (int i = 0; i < kRowSlots; ++i) {
#pragma unroll
            for (int g = 0; g < kGroup; ++g) sums.c[i][j + g] += a[i].v[u] * b.v[g];
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void store(Sums& sums, const T* factor, T*, T* to, int64_t stride, int rows,
                                               int dim) {
#pragma unroll
    for (int i = 0; i < kRowSlots; ++i) {
      if (row(i) < rows) {
#pragma unroll
        for (int j = 0; j < DimSlots; ++j) {
          if (dim_of(j) < dim) to[row(i) * stride + dim_of(j)] = sums.c[i][j] * factor[i];
        }
      }
    }
  }
};

}  // namespace tokenprune::attention
