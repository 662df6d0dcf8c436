// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the backward of deformable attention, second half: the gradient of the values.
//
// Every pixel has a list of the points whose corner (y, x) it is; it receives from four lists, its own and those of its
// left, upper and upper left neighbours. The lists are counted and filled with integer atomics, so their order depends
// on timing; sorting them by point number makes the sums reproducible. A sum reads each gradient row straight from
// grad_out: there are no partial results in memory.
#pragma once

#include "kernel_backward.cuh"

namespace tokenprune {

constexpr int kShortList = 8;      // sorted by one thread, in registers
constexpr int kWarpList = 32;      // sorted by a warp
constexpr int kSortBlock = 128;    // longer ones by a block of this size,
constexpr int kSharedList = 4096;  // in shared memory up to this length, then in place

// Counts at [1 + pixel] of every segment [tokens + 1] -> where the lists begin, in place.
template <int Block>
__global__ void __launch_bounds__(Block, 1) scan_lists(int32_t* start, int64_t segments, int64_t tokens) {
  constexpr int kItems = 8;
  TP_SHARED(int, warp_sums, [Block / 32]);
  for (int64_t segment = blockIdx.x; segment < segments; segment += gridDim.x) {
    int32_t* counts = start + segment * (tokens + 1) + 1;
    int before = 0;
    for (int64_t first = 0; first < tokens; first += Block * kItems) {
      const int64_t at_thread = first + threadIdx.x * kItems;
      int v[kItems], sum = 0, all = 0;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        v[k] = at_thread + k < tokens ? counts[at_thread + k] : 0;
        sum += v[k];
      }
      int end = before + block_scan(sum, warp_sums, all);
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        end += v[k];
        if (at_thread + k < tokens) counts[at_thread + k] = end;
      }
      before += all;
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kBlock, 4)
    fill_lists(DeformLists<A> lists, int64_t segments, int64_t tokens, int64_t per_segment) {
  for (int64_t segment = blockIdx.y; segment < segments; segment += gridDim.y) {
    const int64_t first = segment * per_segment;
    const int32_t* start = lists.start + segment * (tokens + 1);
    for (int64_t i = global_thread(); i < per_segment; i += grid_threads()) {
      const int32_t cell = lists.cell[first + i];
      if (cell >= 0) lists.member[first + start[cell] + lists.slot[first + i]] = static_cast<int32_t>(i);
    }
  }
}

// ---- sorting

__device__ __forceinline__ void order(int32_t& a, int32_t& b) {
  const int32_t low = a < b ? a : b, high = a < b ? b : a;
  a = low, b = high;
}

__device__ __forceinline__ void sort_by_thread(int32_t* list, int count) {
  int32_t v[kShortList];
#pragma unroll
  for (int i = 0; i < kShortList; ++i) v[i] = i < count ? list[i] : INT32_MAX;
#pragma unroll
  for (int round = 0; round < kShortList; ++round) {
#pragma unroll
    for (int i = round % 2; i + 1 < kShortList; i += 2) order(v[i], v[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < kShortList; ++i) {
    if (i < count) list[i] = v[i];
  }
}

// Lists of up to kWarpList members. A warp looks after 32 neighbouring pixels.
template <int Block>
__global__ void __launch_bounds__(Block, 4)
    sort_short_lists(int32_t* member, const int32_t* start, int64_t segments, int64_t tokens, int64_t per_segment) {
  const int lane = threadIdx.x % 32;
  for (int64_t segment = blockIdx.y; segment < segments; segment += gridDim.y) {
    int32_t* const lists = member + segment * per_segment;
    const int32_t* const begins = start + segment * (tokens + 1);
    for (int64_t first = global_thread() - lane; first < tokens; first += grid_threads()) {
      const int64_t pixel = first + lane;
      const int32_t begin = pixel < tokens ? begins[pixel] : 0;
      const int count = pixel < tokens ? begins[pixel + 1] - begin : 0;
      if (count > 1 && count <= kShortList) sort_by_thread(lists + begin, count);
      uint32_t longer = warp_ballot(count > kShortList && count <= kWarpList);
      for (; longer != 0; longer &= longer - 1) {
        const int owner = lowest_bit(longer), n = warp_shuffle(count, owner);
        int32_t* const list = lists + warp_shuffle(begin, owner);
        const int32_t mine = lane < n ? list[lane] : INT32_MAX;
        int rank = 0;
        for (int i = 0; i < n; ++i) rank += warp_shuffle(mine, i) < mine;
        warp_sync();  // all members have been read
        if (lane < n) list[rank] = mine;
      }
    }
  }
}

// Bitonic sort of any number of distinct keys by the block: every exchange puts the smaller key first, so the places
// behind the end may stay imaginary. Begins and ends with a barrier.
__device__ __forceinline__ void sort_by_block(int32_t* keys, int32_t count) {
  for (int64_t size = 2; size / 2 < count; size *= 2) {
    for (int64_t distance = size / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; 2 * i < count + size; i += blockDim.x) {
        const int64_t low = 2 * i - (i & (distance - 1));
        const int64_t high = distance == size / 2 ? low ^ (size - 1) : low + distance;  // mirrored, then shifted
        if (high < count) order(keys[low], keys[high]);
      }
    }
  }
  __syncthreads();
}

// The longer lists, a block each. The pixels are dealt out to the blocks one by one: long lists are neighbours.
template <int Block>
__global__ void __launch_bounds__(Block, 4)
    sort_long_lists(int32_t* member, const int32_t* start, int64_t segments, int64_t tokens, int64_t per_segment) {
  TP_SHARED(int32_t, keys, [kSharedList]);
  TP_SHARED(int32_t, found, [Block]);
  TP_SHARED(int, warp_sums, [Block / 32]);
  for (int64_t segment = blockIdx.y; segment < segments; segment += gridDim.y) {
    int32_t* const lists = member + segment * per_segment;
    const int32_t* const begins = start + segment * (tokens + 1);
    for (int64_t first = blockIdx.x; first < tokens; first += static_cast<int64_t>(gridDim.x) * Block) {
      const int64_t pixel = first + static_cast<int64_t>(threadIdx.x) * gridDim.x;
      const bool longer = pixel < tokens && begins[pixel + 1] - begins[pixel] > kWarpList;
      int total = 0;
      const int slot = block_scan(longer, warp_sums, total);
      if (longer) found[slot] = static_cast<int32_t>(pixel);
      __syncthreads();
      for (int i = 0; i < total; ++i) {
        int32_t* const list = lists + begins[found[i]];
        const int32_t count = begins[found[i] + 1] - begins[found[i]];
        if (count > kSharedList) {
          sort_by_block(list, count);
          continue;
        }
        for (int32_t k = threadIdx.x; k < count; k += Block) keys[k] = list[k];
        sort_by_block(keys, count);
        for (int32_t k = threadIdx.x; k < count; k += Block) list[k] = keys[k];
        __syncthreads();  // the keys have been read
      }
      __syncthreads();  // so has `found`
    }
  }
}

// ---- sums

// A pixel belongs to 2^log_width lanes, in parts of 2^log_lanes lanes that share a row of channels; the parts take
// turns at the members.
struct SumTile {
  int log_lanes = 0, log_width = 0;
};

inline SumTile sum_tile(const DeformParams& p, int width) {
  SumTile tile;
  tile.log_lanes = tile.log_width = log_lanes_for((p.dim + width - 1) / width);
  const int64_t average = 4 * p.queries * p.levels * p.points / (p.tokens > 0 ? p.tokens : 1);
  while (tile.log_width < 5 && (int64_t{8} << (tile.log_width - tile.log_lanes)) < average) ++tile.log_width;
  return tile;
}

// The lists of the pixels a pixel receives from, one after another.
struct FourLists {
  int32_t offset[4], end[4];  // list k: places [end[k - 1], end[k]), member at place + offset[k]

  __device__ __forceinline__ FourLists(const int32_t* begins, const LevelBox& level, int32_t pixel) {
    const int32_t y = (pixel - level.start) / level.width, x = pixel - level.start - y * level.width;
    int32_t total = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool exists = x >= (k & 1) && y >= (k >> 1);
      const int32_t cell = exists ? pixel - (k & 1) - (k >> 1) * level.width : 0;
      const int32_t begin = exists ? begins[cell] : 0, count = exists ? begins[cell + 1] - begin : 0;
      offset[k] = begin - total;
      total += count;
      end[k] = total;
    }
  }
  __device__ __forceinline__ int list_of(int32_t place) const {
    return (place >= end[0]) + (place >= end[1]) + (place >= end[2]);
  }
  __device__ __forceinline__ int32_t offset_of(int k) const {  // not an index: that would put it into local memory
    return k < 2 ? (k == 0 ? offset[0] : offset[1]) : (k == 2 ? offset[2] : offset[3]);
  }
};

// One pixel's sum over the lists of one level, by one part of its lanes.
template <typename T, int W>
struct PixelSum {
  using A = Acc<T>;
  static constexpr int kAtOnce = 4;  // members in flight
  const int32_t* member;             // of the segment
  const Pack<A, 4>* weights;
  const T* grads;  // of the segment's first query, at this lane's channels
  int64_t query_stride;
  Divider per_query;
  A sum[W] = {};

  // Points [first, first + points) of a query belong to the level. Levels given by the device may overlap: a list then
  // holds points of several.
  __device__ __forceinline__ void add(const FourLists& four, uint32_t first, uint32_t points, int part, int parts) {
    const int32_t last = four.end[3] - 1;
    for (int32_t begin = part; begin <= last; begin += kAtOnce * parts) {
      uint32_t number[kAtOnce];
      int list[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int32_t wanted = begin + n * parts, place = wanted < last ? wanted : last;
        list[n] = four.list_of(place);
        number[n] = static_cast<uint32_t>(member[place + four.offset_of(list[n])]);
      }
      Pack<T, W> g[kAtOnce];
      A weight[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const uint32_t q = per_query(number[n]), point = number[n] - q * per_query.divisor;
        g[n] = load_pack<W>(grads + q * query_stride);
        weight[n] = point - first < points ? weights[number[n]].v[list[n]] : A(0);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        if (begin + n * parts > last) break;
        A wide[W];
        widen(g[n], wide);
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] += weight[n] * wide[j];
      }
    }
  }
};

template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 3)
    sum_value_grad(DeformParams p, LevelArgs args, DeformLists<Acc<T>> lists, SumTile tile, Divider per_query) {
  using A = Acc<T>;
  LevelBox* levels = dynamic_shared<LevelBox>();
  load_levels(p, args, levels);
  const int lanes = 1 << tile.log_lanes, lane = threadIdx.x & (lanes - 1), width = 1 << tile.log_width;
  const int part = (threadIdx.x & (width - 1)) >> tile.log_lanes, parts = 1 << (tile.log_width - tile.log_lanes);
  const uint32_t points = static_cast<uint32_t>(p.points);
  const int64_t per_segment = p.queries * p.levels * p.points, pixels_at_once = grid_threads() >> tile.log_width;
  for (int64_t segment = blockIdx.y; segment < p.batch * p.heads; segment += gridDim.y) {
    const int64_t b = image_of(p, segment), m = segment - b * p.heads;
    const int32_t* begins = lists.start + segment * (p.tokens + 1);
    const T* grads = static_cast<const T*>(p.grad_out.data) + b * p.grad_out.batch_stride + m * p.dim;
    // The first pixel of this warp, so that all its lanes leave the loop together.
    for (int64_t base = global_thread() / 32 * 32 >> tile.log_width; base < p.tokens; base += pixels_at_once) {
      const int64_t pixel = base + (threadIdx.x % 32 >> tile.log_width);
      const bool exists = pixel < p.tokens;
      const bool receives = exists && (p.mask == nullptr || !p.mask[b * p.tokens + pixel]);
      for (int64_t pass = 0; pass < p.dim; pass += lanes * W) {
        const int64_t c = pass + lane * W;
        const bool inside = c < p.dim;
        PixelSum<T, W> pixel_sum{lists.member + segment * per_segment, lists.weights + segment * per_segment,
                                 grads + (inside ? c : 0), p.grad_out.query_stride, per_query};
        for (int l = 0; l < static_cast<int>(p.levels); ++l) {
          const LevelBox level = levels[l];
          if (!receives || !in_range(pixel - level.start, static_cast<int64_t>(level.height) * level.width)) continue;
          pixel_sum.add(FourLists(begins, level, static_cast<int32_t>(pixel)), l * points, points, part, parts);
        }
        A(&sum)[W] = pixel_sum.sum;
        for (int mask = lanes; mask < width; mask *= 2) {
#pragma unroll
          for (int j = 0; j < W; ++j) sum[j] += warp_shuffle_xor(sum[j], mask);
        }
        if (part != 0 || !exists || !inside) continue;
        Pack<T, W> out;
#pragma unroll
        for (int j = 0; j < W; ++j) out.v[j] = from_acc<T>(sum[j]);
        store_pack(static_cast<T*>(p.grad_value) + ((b * p.tokens + pixel) * p.heads + m) * p.dim + c, out);
      }
    }
  }
}

template <typename T>
bool value_grad_packable(const DeformParams& p) {
  return grads_packable<T>(p) && packable<T>(p.grad_value, p.dim);
}

template <typename T, int W, typename Launch>
void launch_sums_as(const Launch& launch, const DeformParams& p, const LevelArgs& args,
                    const DeformLists<Acc<T>>& lists) {
  const SumTile tile = sum_tile(p, W);
  const int64_t segments = p.batch * p.heads;
  const dim3 grid(grid_for(p.tokens, kBlock >> tile.log_width), segments < kMostGridY ? segments : kMostGridY);
  launch(&sum_value_grad<T, W>, grid, kBlock, p.levels * sizeof(LevelBox), p, args, lists, tile,
         Divider(p.levels * p.points));
}

// The whole backward. ScanBlock: fewer threads suit the host model.
template <typename T, int ScanBlock = 1024, typename Launch>
void launch_deform_backward(const Launch& launch, const DeformParams& p, const DeformLists<Acc<T>>& lists,
                            int64_t* level_workspace) {
  using A = Acc<T>;
  const int64_t segments = p.batch * p.heads, cells = segments * (p.tokens + 1);
  const LevelArgs args = level_args(launch, p, level_workspace);
  if (segments == 0) return launch_backward_points<T>(launch, p, args, lists);
  const int64_t per_segment = p.queries * p.levels * p.points, rows = segments < kMostGridY ? segments : kMostGridY;
  launch(&fill_cells<CountSources>, grid_for(cells, kBlock), kBlock, 0, cells, CountSources{lists.start});
  launch_backward_points<T>(launch, p, args, lists);
  if (p.tokens == 0 || p.dim == 0) return;
  if (per_segment > 0) {
    launch(&scan_lists<ScanBlock>, rows, ScanBlock, 0, lists.start, segments, p.tokens);
    launch(&fill_lists<A>, dim3(grid_for(per_segment, kBlock), rows), kBlock, 0, lists, segments, p.tokens,
           per_segment);
    launch(&sort_short_lists<kBlock>, dim3(grid_for(p.tokens, kBlock), rows), kBlock, 0, lists.member, lists.start,
           segments, p.tokens, per_segment);
    const int64_t blocks = (p.tokens + kWarpList - 1) / kWarpList;
    launch(&sort_long_lists<kSortBlock>, dim3(blocks < 256 ? blocks : 256, rows), kSortBlock, 0, lists.member,
           lists.start, segments, p.tokens, per_segment);
  }
  if (value_grad_packable<T>(p)) {
    launch_sums_as<T, kPack<T>>(launch, p, args, lists);
  } else {
    launch_sums_as<T, 1>(launch, p, args, lists);
  }
}

}  // namespace tokenprune
