// SPDX-License-Identifier: Apache-2.0
// CUDA kernels that turn the scores of a matching into unm, src, dst and parent. The ranking is exact: score
// descending, then index ascending; protected rows come last, NaN and -inf before them.
#pragma once

#include <cmath>
#include <cstring>

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune {

// Keys whose ascending order is the ranking.
template <typename A>
struct RankKey;

template <>
struct RankKey<float> {
  uint64_t bits;
  __device__ static RankKey make(float score, uint32_t index, bool is_protected) {
    if (score != score) score = -INFINITY;
    if (score == 0.0f) score = 0.0f;  // -0 ties with +0
    uint32_t u;
    memcpy(&u, &score, 4);
    const uint32_t descending = u & 0x80000000u ? u : ~u & 0x7fffffffu;
    return {static_cast<uint64_t>(is_protected ? 0xffffffffu : descending) << 32 | index};
  }
  __device__ uint32_t index() const { return static_cast<uint32_t>(bits); }
  __device__ bool operator<(const RankKey& other) const { return bits < other.bits; }
};

template <>
struct RankKey<double> {
  uint64_t bits;
  uint32_t place;
  __device__ static RankKey make(double score, uint32_t index, bool is_protected) {
    if (score != score) score = -INFINITY;
    if (score == 0.0) score = 0.0;
    uint64_t u;
    memcpy(&u, &score, 8);
    const uint64_t sign = uint64_t{1} << 63;
    return {is_protected ? ~uint64_t{0} : u & sign ? u : ~u & ~sign, index};
  }
  __device__ uint32_t index() const { return place; }
  __device__ bool operator<(const RankKey& other) const {
    return bits < other.bits || (bits == other.bits && place < other.place);
  }
};

template <typename A>
__device__ __forceinline__ RankKey<A> rank_key(const SelectMergeParams& p, int64_t b, int64_t i) {
  return RankKey<A>::make(at<A>(p.score, b * p.na + i), static_cast<uint32_t>(i), i < p.protect_a);
}

// Ascending bitonic sort of n = 2^k keys in shared memory by the whole block. A warp's 32 exchanges stay within 64
// neighbouring keys while the distance is at most 32, so those steps need no block barrier.
template <typename Key>
__device__ __forceinline__ void sort_keys(Key* keys, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      if (distance > 32 || (distance == 32 && size > 64)) {  // this step or the one before leaves the 64 keys
        __syncthreads();
      } else {
        warp_sync();
      }
      for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (distance - 1)), high = low + distance;
        const Key a = keys[low], b = keys[high];
        if ((b < a) == ((low & size) == 0)) keys[low] = b, keys[high] = a;
      }
    }
  }
  __syncthreads();
}

// From the ranks of one image to the results, in index order. Ends without a barrier.
__device__ __forceinline__ void write_selection(const SelectMergeParams& p, int64_t b, const int32_t* rank,
                                                int* warp_sums) {
  const int64_t kept = p.na - p.r, front_a = (p.interleave + 1) / 2, front_b = p.interleave / 2;
  int32_t* parent = p.parent + b * p.tokens;
  const auto b_row = [&](int64_t j) { return static_cast<int32_t>(j < front_b ? 2 * j + 1 : kept + j); };
  int64_t before = 0;
  for (int64_t first = 0; first < p.na; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const int32_t place = i < p.na ? rank[i] : 0;
    const bool merged = place < p.r;
    int total = 0;
    const int64_t ordered = before + block_scan(i < p.na && !merged, warp_sums, total);
    before += total;
    if (i >= p.na) continue;
    if (merged) {
      const int32_t to = p.nearest[b * p.na + i];
      p.src[b * p.r + place] = static_cast<int32_t>(i);
      p.dst[b * p.r + place] = to;
      parent[2 * i] = b_row(to);
    } else {
      const int64_t u = p.sort_unmerged ? ordered : place - p.r;
      p.unm[b * kept + u] = static_cast<int32_t>(i);
      parent[2 * i] = static_cast<int32_t>(u < front_a ? 2 * u : u + front_b);
    }
  }
  for (int64_t j = threadIdx.x; j < p.nb; j += blockDim.x) parent[2 * j + 1] = b_row(j);
}

// One block per image; the keys fit into shared memory. rank [batch, na].
template <typename A, int Block>
__global__ void __launch_bounds__(Block, 1) select_by_sorting(SelectMergeParams p, int32_t* rank, int n) {
  TP_SHARED(int, warp_sums, [Block / 32]);
  RankKey<A>* keys = dynamic_shared<RankKey<A>>();
  const int64_t b = blockIdx.x;
  for (int i = threadIdx.x; i < n; i += Block) {
    keys[i] = i < p.na ? rank_key<A>(p, b, i) : RankKey<A>::make(0, 0xffffffffu, true);
  }
  __syncthreads();
  sort_keys(keys, n);
  for (int i = threadIdx.x; i < p.na; i += Block) rank[b * p.na + keys[i].index()] = i;
  __syncthreads();
  write_selection(p, b, rank + b * p.na, warp_sums);
}

// Any number of tokens: the rank of a key is the number of smaller ones. blockIdx.x = image * tiles + tile.
template <typename A>
__global__ void __launch_bounds__(kBlock, 4) rank_by_counting(SelectMergeParams p, int32_t* rank, int64_t tiles) {
  TP_SHARED(RankKey<A>, keys, [kBlock]);
  const int64_t b = blockIdx.x / tiles, i = blockIdx.x % tiles * kBlock + threadIdx.x;
  const RankKey<A> mine = RankKey<A>(i < p.na ? rank_key<A>(p, b, i) : RankKey<A>{});
  int32_t smaller = 0;
  for (int64_t first = 0; first < p.na; first += kBlock) {
    if (first + threadIdx.x < p.na) keys[threadIdx.x] = rank_key<A>(p, b, first + threadIdx.x);
    __syncthreads();
    const int count = static_cast<int>(p.na - first < kBlock ? p.na - first : kBlock);
    for (int k = 0; k < count; ++k) smaller += keys[k] < mine;
    __syncthreads();
  }
  if (i < p.na) rank[b * p.na + i] = smaller;
}

template <int Block>
__global__ void __launch_bounds__(Block, 1) select_by_rank(SelectMergeParams p, const int32_t* rank) {
  TP_SHARED(int, warp_sums, [Block / 32]);
  write_selection(p, blockIdx.x, rank + blockIdx.x * p.na, warp_sums);
}

constexpr int kSortBlock = 1024;

// Workspace: rank [batch, na].
template <typename A, int Block = kSortBlock, typename Launch>
void launch_select_merge(const Launch& launch, const SelectMergeParams& p, int32_t* rank) {
  if (p.batch == 0 || p.tokens == 0) return;
  int64_t n = 1;
  while (n < p.na) n *= 2;
  const int64_t bytes = n * static_cast<int64_t>(sizeof(RankKey<A>));
  if (bytes + 1024 <= launch.most_shared_bytes()) {  // some static shared memory beside it
    launch(&select_by_sorting<A, Block>, p.batch, Block, bytes, p, rank, static_cast<int>(n));
    return;
  }
  const int64_t tiles = (p.na + kBlock - 1) / kBlock;
  launch(&rank_by_counting<A>, p.batch * tiles, kBlock, 0, p, rank, tiles);
  launch(&select_by_rank<Block>, p.batch, Block, 0, p, rank);
}

}  // namespace tokenprune
