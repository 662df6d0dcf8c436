// SPDX-License-Identifier: Apache-2.0
// Building blocks of kernels that work on rows: grids, a block scan, and lists "which sources go to this row" whose
// members come in ascending order, so that sums over them are deterministic without float atomics.
#pragma once

#include "cuda.h"

namespace tokenprune {

// Threads of the row kernels: 8 warps. Their launch bounds name the blocks per multiprocessor (4: 64 registers),
// because without that ptxas spills a register here and there for a higher occupancy that a memory-bound kernel does
// not need.
constexpr int kBlock = 256;
constexpr int kWarps = kBlock / 32;
constexpr int64_t kMostBlocks = 1 << 20;  // more work than that goes round the grid-stride loops again

// Blocks for `items`, never zero; the kernels loop with a grid stride.
inline int64_t grid_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks;
}

__device__ __forceinline__ int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

__device__ __forceinline__ bool in_range(int64_t i, int64_t n) { return i >= 0 && i < n; }

// A row is handled by 2^log_lanes threads of one warp, so that narrow rows do not leave lanes idle.
__host__ __device__ __forceinline__ int log_lanes_for(int64_t units) {
  int log_lanes = 0;
  while (log_lanes < 5 && (int64_t{1} << log_lanes) < units) ++log_lanes;
  return log_lanes;
}

// Exclusive prefix sum over the block; `total` gets the sum. `warp_sums` is shared memory for one int per warp; it may
// be used again after the call returns (there is a barrier on both sides).
__device__ __forceinline__ int block_scan(int value, int* warp_sums, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int inclusive = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = warp_shuffle_up(inclusive, d);
    if (lane >= d) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0, sum = 0;
  for (int w = 0; w < warps; ++w) {
    const int s = warp_sums[w];
    if (w < warp) before += s;
    sum += s;
  }
  total = sum;
  __syncthreads();
  return before + inclusive - value;
}

// Sources are grouped in `groups` groups of `per_group` (images); a source names a row of its group or none.
struct RowTargets {
  const int32_t* target = nullptr;  // [groups * per_group]
  int64_t groups = 1, per_group = 0, rows = 0;

  __host__ __device__ int64_t sources() const { return groups * per_group; }
  // The row over all groups, -1 for none.
  __device__ __forceinline__ int64_t row_of(int64_t source) const {
    const int64_t row = target[source];
    return in_range(row, rows) ? (groups == 1 ? row : source / per_group * rows + row) : -1;
  }
};

// What the sources leave in their row's cell. The cells [groups * rows] start as kEmpty.
struct LinkSources {  // cell: some source of the row, next[source]: another one, -1 ends; RowList puts them in order
  static constexpr int32_t kEmpty = -1;
  int32_t *cells, *next;
  __device__ void operator()(int64_t row, int32_t source) const { next[source] = atomicExch(cells + row, source); }
};
struct HighestSource {  // who wins when several sources write
  static constexpr int32_t kEmpty = -1;
  int32_t* cells;
  __device__ void operator()(int64_t row, int32_t source) const { atomicMax(cells + row, source); }
};
struct CountSources {
  static constexpr int32_t kEmpty = 0;
  int32_t* cells;
  __device__ void operator()(int64_t row, int32_t) const { atomicAdd(cells + row, int32_t{1}); }
};

template <typename Visit>
__global__ void __launch_bounds__(kBlock, 4) fill_cells(int64_t cells, Visit visit) {
  for (int64_t i = global_thread(); i < cells; i += grid_threads()) visit.cells[i] = Visit::kEmpty;
}
template <typename Visit>
__global__ void __launch_bounds__(kBlock, 4) visit_sources(RowTargets t, Visit visit) {
  for (int64_t i = global_thread(); i < t.sources(); i += grid_threads()) {
    const int64_t row = t.row_of(i);
    if (row >= 0) visit(row, static_cast<int32_t>(i));
  }
}
// Both for small groups, one block each: a launch less.
template <typename Visit>
__global__ void __launch_bounds__(kBlock, 4) fill_and_visit(RowTargets t, Visit visit) {
  const int64_t group = blockIdx.x, first_row = group * t.rows, first_source = group * t.per_group;
  for (int64_t i = threadIdx.x; i < t.rows; i += kBlock) visit.cells[first_row + i] = Visit::kEmpty;
  __syncthreads();
  for (int64_t i = first_source + threadIdx.x; i < first_source + t.per_group; i += kBlock) {
    const int64_t row = t.row_of(i);
    if (row >= 0) visit(row, static_cast<int32_t>(i));
  }
}

template <typename Launch, typename Visit>
void launch_visit(const Launch& launch, const RowTargets& t, Visit visit) {
  constexpr int64_t kSmall = 4096;
  const int64_t cells = t.groups * t.rows;
  if (t.groups > 0 && t.rows <= kSmall && t.per_group <= kSmall) {
    launch(&fill_and_visit<Visit>, t.groups, kBlock, 0, t, visit);
    return;
  }
  if (cells > 0) launch(&fill_cells<Visit>, grid_for(cells, kBlock), kBlock, 0, cells, visit);
  if (t.sources() > 0) launch(&visit_sources<Visit>, grid_for(t.sources(), kBlock), kBlock, 0, t, visit);
}

// The members of one row, held by a warp. Up to 32 of them sit in the lanes' registers with their rank; a longer list
// is found again in the targets of its group, which are scanned in order.
struct RowList {
  static constexpr int kLong = 33;
  int count = 0;  // kLong: more than 32
  int32_t member = -1;
  int rank = 0;
  int64_t row = 0;

  __device__ __forceinline__ RowList(LinkSources links, int64_t r) : row(r) {
    const int lane = threadIdx.x % 32;
    int32_t walk = links.cells[row];
    while (walk >= 0 && count < kLong) {
      if (count == lane) member = walk;
      walk = links.next[walk];
      ++count;
    }
    if (count > 1 && count < kLong) {
      for (int i = 0; i < count; ++i) rank += warp_shuffle(member, i) < member;
      if (lane >= count) rank = -1;
    }
  }

  // f(source) for every member, ascending; the whole warp calls it with the same source.
  template <typename F>
  __device__ __forceinline__ void each(const RowTargets& t, F&& f) const {
    if (count < kLong) {
      for (int k = 0; k < count; ++k) {
        const uint32_t holder = warp_ballot(count == 1 ? threadIdx.x % 32 == 0 : rank == k);
        f(static_cast<int64_t>(warp_shuffle(member, lowest_bit(holder))));
      }
      return;
    }
    const int64_t begin = row / t.rows * t.per_group, end = begin + t.per_group;
    const int32_t wanted = static_cast<int32_t>(row % t.rows);
    for (int64_t i = begin; i < end; i += 32) {
      const int64_t mine = i + threadIdx.x % 32;
      uint32_t hits = warp_ballot(mine < end && t.target[mine] == wanted);
      for (; hits != 0; hits &= hits - 1) f(i + lowest_bit(hits));
    }
  }
};

}  // namespace tokenprune
