// SPDX-License-Identifier: Apache-2.0
// Which rows a block works on, and the loop that streams tiles of the other side through shared memory.
#pragma once

#include <type_traits>

#include "../common/rows.cuh"
#include "kernel_tile.cuh"
#include "params.h"

namespace tokenprune::attention {

// ---- sequences -----------------------------------------------------------------------------------------------------

// blockIdx.x counts the row blocks of all sequences, and as many again for the slots behind the last sequence.
struct Place {
  int64_t sequence;
  int block, blocks, head;
};
__device__ __forceinline__ Place place_of(int blocks) {
  return {static_cast<int64_t>(blockIdx.x) / blocks, static_cast<int>(blockIdx.x % blocks), blocks,
          static_cast<int>(blockIdx.y)};
}

struct Range {  // packed positions fit int32, as cu_seqlens do
  int begin, count;
};
__device__ __forceinline__ int clamp_to(int v, int64_t low, int64_t high) {
  return v < low ? static_cast<int>(low) : v > high ? static_cast<int>(high) : v;
}
// Wrong contents of cu_seqlens stay inside the buffers.
__device__ __forceinline__ Range range_of(const int32_t* cu, int64_t sequence, int64_t total) {
  const int begin = clamp_to(cu[sequence], 0, total), end = clamp_to(cu[sequence + 1], begin, total);
  return {begin, end - begin};
}

// Slots of no sequence: the blocks of one head share [cu[batch], total).
template <typename S>
__device__ __forceinline__ void fill_stats(S* stats, S value, int64_t begin, int64_t end, const Place& place) {
  for (int64_t i = begin + place.block * kThreads + threadIdx.x; i < end; i += place.blocks * kThreads)
    stats[i] = value;
}
template <typename T>
__device__ __forceinline__ void clear_rows(T* rows, int64_t stride, int dim, int64_t begin, int64_t end,
                                           const Place& place) {
  for (int64_t i = begin + place.block; i < end; i += place.blocks) {
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += kThreads) rows[i * stride + d] = from_acc<T>(0);
  }
}

// ---- one value per row ---------------------------------------------------------------------------------------------

// Lanes that share a row: 2^log_lanes neighbours in a warp; item counts the groups of the grid.
struct LaneGroup {
  int lanes, lane;
  int64_t item;

  __device__ __forceinline__ explicit LaneGroup(int log_lanes)
      : lanes(1 << log_lanes),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        item((static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> log_lanes) {}

  // This lane's share of a.b; a is read in packs of W values, and so is b if it has the same type.
  template <int W, typename T, typename U>
  __device__ __forceinline__ Acc<T> dot(const T* a, const U* b, int dim) const {
    constexpr int kOther = std::is_same_v<T, U> ? W : 1;
    Acc<T> sum = 0;
    for (int d = lane * W; d < dim; d += lanes * W) {
      const Pack<T, W> x = load_pack<W>(a + d);
#pragma unroll
      for (int i = 0; i < W; i += kOther) {
        const Pack<U, kOther> y = load_pack<kOther>(b + d + i);
#pragma unroll
        for (int u = 0; u < kOther; ++u) sum += to_acc(x.v[i + u]) * to_acc(y.v[u]);
      }
    }
    return sum;
  }
  template <typename S>
  __device__ __forceinline__ S sum(S v) const {
    for (int mask = 1; mask < lanes; mask *= 2) v += warp_shuffle_xor(v, mask);
    return v;
  }
};

// Packs of 16 bytes fit all rows of an operand.
template <typename T>
bool packable_rows(const Rows& r, int64_t dim) {
  return packable<T>(r.data, r.row_stride) && r.head_stride % kPack<T> == 0 && dim % kPack<T> == 0;
}

// ---- operands and streaming ----------------------------------------------------------------------------------------

// One head of a row buffer. Packed position i of the batch lies in row index[i], or in row i without an index; a
// row outside the buffer reads as zeros.
template <typename T>
struct Operand {
  const T* base;
  int64_t stride;
  const int32_t* index;
  int rows;
  bool packs;  // 16-byte accesses are possible

  Operand() = default;  // the absent second one
  __device__ __forceinline__ Operand(const Rows& r, int64_t offset, const int32_t* index_, int64_t dim)
      : base(static_cast<const T*>(r.data) + offset),
        stride(r.row_stride),
        index(index_),
        rows(r.data == nullptr ? 0 : static_cast<int>(r.rows)),
        packs(packable<T>(base, r.row_stride) && dim % kPack<T> == 0) {}

  __device__ __forceinline__ int64_t offset_of(int position) const {  // bytes; negative: zeros
    const int row = index != nullptr ? index[position] : position;
    return row >= 0 && row < rows ? row * stride * static_cast<int64_t>(sizeof(T)) : -1;
  }
};

// The rows of packed positions [begin + first, begin + count) of one or two operands. Two members, not an array: arrays
// of structs end up in local memory.
template <typename T, int N>
struct Side {
  Operand<T> a, b;
  int begin, first, count;

  // Offset of slot `slot` (operand slot / kTileRows) in the tile that starts at position `start`.
  template <int kTileRows>
  __device__ __forceinline__ int64_t offset_of(int slot, int start) const {
    const int position = start + slot % kTileRows;
    if (position >= count) return -1;
    if (N == 2 && slot >= kTileRows) return b.offset_of(begin + position);
    return a.offset_of(begin + position);
  }
};

// Shared memory of a kernel whose block owns Own tiles and streams Streamed tiles with one Column record per row.
template <typename Tile, int Own, int Streamed, typename Column>
struct SharedLayout {
  using T = typename Tile::Value;
  static constexpr int kOwnTile = Tile::kRows * Tile::kPitch, kTile = Tile::kCols * Tile::kPitch;
  static constexpr int kScratchAt = (Own * kOwnTile + Tile::kStages * Streamed * kTile) * static_cast<int>(sizeof(T));
  static constexpr int kColumnsAt = kScratchAt + Tile::kScratch;
  static constexpr int kOffsetsAt = kColumnsAt + 2 * Tile::kCols * static_cast<int>(sizeof(Column));
  static constexpr int kOwnRows = Own * Tile::kRows, kTileRows = Streamed * Tile::kCols;
  static constexpr int kBytes = kOffsetsAt + (kOwnRows + 2 * kTileRows) * 8;
  static_assert(kTileRows <= kThreads && kScratchAt % 16 == 0 && kOffsetsAt % 8 == 0);
  static_assert(kBytes <= 99 * 1024);  // what every card from sm_80 on grants a block

  unsigned char* memory;
  __device__ __forceinline__ T* own(int n) const { return reinterpret_cast<T*>(memory) + n * kOwnTile; }
  __device__ __forceinline__ T* tile(int stage) const { return own(Own) + stage * Streamed * kTile; }
  __device__ __forceinline__ void* scratch() const { return memory + kScratchAt; }
  __device__ __forceinline__ Column* columns(int parity) const {
    return reinterpret_cast<Column*>(memory + kColumnsAt) + parity * Tile::kCols;
  }
  __device__ __forceinline__ int64_t* own_offsets() const { return reinterpret_cast<int64_t*>(memory + kOffsetsAt); }
  __device__ __forceinline__ int64_t* offsets(int parity) const {
    return own_offsets() + kOwnRows + parity * kTileRows;
  }
};

// A thread copies the same 16 bytes of every kStep-th row, so that addresses are sums of constants and one offset.
template <typename Tile, int TileRows, typename T>
__device__ __forceinline__ void issue_tile(T* tile, const Operand<T>& source, const int64_t* offsets, int dim) {
  constexpr int kUnit = kPack<T>, kUnits = Tile::kDim / kUnit, kStep = kThreads / kUnits;
  const int thread = static_cast<int>(threadIdx.x);
  const auto base = reinterpret_cast<uintptr_t>(source.base);  // there are no pointers to absent rows
  if (source.packs) {
    const int r0 = thread / kUnits, d = thread % kUnits * kUnit;
    if (kThreads % kUnits != 0 && r0 >= kStep) return;
#pragma unroll
    for (int i = 0; i < (TileRows + kStep - 1) / kStep; ++i) {
      const int r = r0 + i * kStep;
      if (TileRows % kStep != 0 && r >= TileRows) break;
      const int64_t offset = offsets[r];
      copy_async<16>(tile + r * Tile::kPitch + d, reinterpret_cast<const void*>(base + d * sizeof(T) + offset),
                     offset >= 0 && d < dim);
    }
  } else {
#pragma unroll 1
    for (int e = thread; e < TileRows * Tile::kDim; e += kThreads) {
      const int r = e / Tile::kDim, d = e % Tile::kDim;
      const int64_t offset = offsets[r];
      tile[r * Tile::kPitch + d] =
          offset >= 0 && d < dim ? reinterpret_cast<const T*>(base + offset)[d] : from_acc<T>(0);
    }
  }
}

// Loads the own tiles, then calls body(tile number, streamed tiles, columns) for each tile of `other`. Copies run one
// tile ahead with two stages; the row offsets they need and the columns are fetched to registers before the body and
// stored behind it, so no load is waited for. column_at(position) gives the record of a position (also past the end).
template <typename Tile, typename Layout, int Own, int Streamed, typename ColumnAt, typename Body>
__device__ __forceinline__ void stream_tiles(const Layout& shared, const Side<typename Tile::Value, Own>& own,
                                             const Side<typename Tile::Value, Streamed>& other, int dim,
                                             ColumnAt column_at, Body body) {
  constexpr int kCols = Tile::kCols, kAhead = Tile::kStages;
  const int thread = static_cast<int>(threadIdx.x), tiles = (other.count + kCols - 1) / kCols;
  const auto issue = [&](int tile) {
    typename Tile::Value* to = shared.tile(tile % Tile::kStages);
    const int64_t* offsets = shared.offsets(tile % 2);
    issue_tile<Tile, kCols>(to, other.a, offsets, dim);
    if constexpr (Streamed == 2) issue_tile<Tile, kCols>(to + Layout::kTile, other.b, offsets + kCols, dim);
    copy_async_commit();
  };

  for (int slot = thread; slot < Layout::kOwnRows; slot += kThreads) {
    shared.own_offsets()[slot] = own.template offset_of<Tile::kRows>(slot, own.first);
  }
  if (thread < Layout::kTileRows) {
#pragma unroll
    for (int tile = 0; tile < kAhead; ++tile) {
      shared.offsets(tile)[thread] = other.template offset_of<kCols>(thread, tile * kCols);
    }
  }
  if (thread < kCols) shared.columns(0)[thread] = column_at(thread);
  __syncthreads();
  issue_tile<Tile, Tile::kRows>(shared.own(0), own.a, shared.own_offsets(), dim);
  if constexpr (Own == 2) {
    issue_tile<Tile, Tile::kRows>(shared.own(1), own.b, shared.own_offsets() + Tile::kRows, dim);
  }
  copy_async_commit();
  if (tiles > 0) issue(0);

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    if (kAhead == 2 && tile + 1 < tiles) issue(tile + 1);
    const int64_t next_offset =
        thread < Layout::kTileRows ? other.template offset_of<kCols>(thread, (tile + kAhead) * kCols) : -1;
    const auto next_column = column_at((tile + 1) * kCols + thread % kCols);
    body(tile, shared.tile(tile % Tile::kStages), shared.columns(tile % 2));
    if (thread < Layout::kTileRows) shared.offsets((tile + kAhead) % 2)[thread] = next_offset;
    if (thread < kCols) shared.columns((tile + 1) % 2)[thread] = next_column;
    if (kAhead == 1 && tile + 1 < tiles) {
      __syncthreads();
      issue(tile + 1);
    }
  }
  if (tiles == 0) {  // nobody waited for the own tiles yet
    copy_async_wait<0>();
    __syncthreads();
  }
}

}  // namespace tokenprune::attention
