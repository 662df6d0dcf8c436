// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of the token ops: compaction of a mask, gather, scatter and their adjoints; kernel_norm.cuh holds the
// gather with LayerNorm. An index outside the rows counts as "no token". Nothing depends on timing: where several
// tokens name one row, a gather's adjoint sums them in order and the last one wins a scatter.
#pragma once

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune {

// ---- select: count per image, prefix sum over the images, write
// ------------------------------------------------------

constexpr int kSelectBlock = 512;
constexpr int kFlags = 8;  // mask entries per thread and pass

// The flags of tokens first .. first + 7 as bits.
__device__ __forceinline__ uint32_t load_flags(const uint8_t* mask, int64_t first, int64_t tokens) {
  uint32_t bits = 0;
  if (first + kFlags <= tokens && reinterpret_cast<uintptr_t>(mask + first) % kFlags == 0) {
    const Pack<uint8_t, kFlags> flags = load_pack<kFlags>(mask + first);
#pragma unroll
    for (int i = 0; i < kFlags; ++i) bits |= static_cast<uint32_t>(flags.v[i] != 0) << i;
  } else {
    for (int i = 0; i < kFlags && first + i < tokens; ++i) bits |= static_cast<uint32_t>(mask[first + i] != 0) << i;
  }
  return bits;
}

template <int Block>
__global__ void __launch_bounds__(Block, 1) select_count(SelectParams p) {
  TP_SHARED(int, warp_sums, [Block / 32]);
  const uint8_t* mask = reinterpret_cast<const uint8_t*>(p.mask) + blockIdx.x * p.tokens;
  int count = 0, total = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kFlags; i < p.tokens; i += Block * kFlags) {
    count += popcount(load_flags(mask, i, p.tokens));
  }
  block_scan(count, warp_sums, total);
  if (threadIdx.x == 0) p.cu_seqlens[blockIdx.x + 1] = total;
}

// Counts -> cu_seqlens in place, by one block. It never exceeds the capacity.
template <int Block>
__global__ void __launch_bounds__(Block, 1) select_prefix(SelectParams p) {
  TP_SHARED(int, warp_sums, [Block / 32]);
  int before = 0;
  for (int64_t first = 0; first < p.batch; first += Block) {
    const int64_t b = first + threadIdx.x;
    const int count = b < p.batch ? p.cu_seqlens[b + 1] : 0;
    int total = 0;
    const int64_t end = before + block_scan(count, warp_sums, total) + count;
    if (b < p.batch) p.cu_seqlens[b + 1] = static_cast<int32_t>(end < p.capacity ? end : p.capacity);
    before += total;
  }
  if (threadIdx.x == 0) p.cu_seqlens[0] = 0;
}

template <int Block>
__global__ void __launch_bounds__(Block, 1) select_write(SelectParams p) {
  TP_SHARED(int, warp_sums, [Block / 32]);
  const int64_t b = blockIdx.x;
  if (b < p.batch) {
    const uint8_t* mask = reinterpret_cast<const uint8_t*>(p.mask) + b * p.tokens;
    int64_t written = p.cu_seqlens[b];
    for (int64_t first = 0; first < p.tokens; first += Block * kFlags) {
      const int64_t i = first + static_cast<int64_t>(threadIdx.x) * kFlags;
      uint32_t bits = i < p.tokens ? load_flags(mask, i, p.tokens) : 0;
      int total = 0;
      int64_t slot = written + block_scan(popcount(bits), warp_sums, total);
      for (; bits != 0 && slot < p.capacity; bits &= bits - 1) {
        p.indices[slot++] = static_cast<int32_t>(b * p.tokens + i + lowest_bit(bits));
      }
      written += total;
    }
  }
  const int64_t used = p.batch > 0 ? p.cu_seqlens[p.batch] : 0;
  for (int64_t slot = used + global_thread(); slot < p.capacity; slot += grid_threads()) p.indices[slot] = -1;
}

// The prefix sum clamps to p.capacity; a caller that sizes `indices` by cu_seqlens passes INT32_MAX here.
template <int Block = kSelectBlock, typename Launch>
void launch_select_counts(const Launch& launch, const SelectParams& p) {
  if (p.batch > 0) launch(&select_count<Block>, p.batch, Block, 0, p);
  launch(&select_prefix<Block>, 1, Block, 0, p);
}
template <int Block = kSelectBlock, typename Launch>
void launch_select_write(const Launch& launch, const SelectParams& p) {
  if (p.capacity > 0) launch(&select_write<Block>, p.batch > 0 ? p.batch : 1, Block, 0, p);
}

// ---- gather
// ----------------------------------------------------------------------------------------------------------

// A plain copy: Unit is the widest access that the pointers, the stride and the row length allow.
template <typename Unit>
__global__ void __launch_bounds__(kBlock, 4)
    gather_rows(const Unit* map, int64_t stride, Unit* out, const int32_t* indices, int64_t rows, int64_t count,
                int64_t width, int log_lanes) {
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t t = global_thread() >> log_lanes; t < count; t += grid_threads() >> log_lanes) {
    const int64_t row = indices[t];
    const bool valid = in_range(row, rows);
    const Unit* from = map + (valid ? row : 0) * stride;
    Unit* to = out + t * width;
    int64_t i = lane;
    for (; i + 3 * lanes < width; i += 4 * lanes) {  // four accesses in flight
      Unit v[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) v[k] = valid ? from[i + k * lanes] : Unit{};
#pragma unroll
      for (int k = 0; k < 4; ++k) to[i + k * lanes] = v[k];
    }
    for (; i < width; i += lanes) to[i] = valid ? from[i] : Unit{};
  }
}

template <typename Unit, typename Launch>
bool launch_gather_as(const Launch& launch, const RowParams& p, int64_t element_bytes) {
  const auto address = reinterpret_cast<uintptr_t>(p.map) | reinterpret_cast<uintptr_t>(p.tokens_out);
  const int64_t row_bytes = p.channels * element_bytes, stride_bytes = p.map_stride * element_bytes;
  if ((address | static_cast<uintptr_t>(row_bytes | stride_bytes)) % sizeof(Unit) != 0) return false;
  const int64_t unit = sizeof(Unit), width = row_bytes / unit;
  const int log_lanes = log_lanes_for(width);
  launch(&gather_rows<Unit>, grid_for(p.count << log_lanes, kBlock), kBlock, 0, static_cast<const Unit*>(p.map),
         stride_bytes / unit, static_cast<Unit*>(p.tokens_out), p.indices, p.rows, p.count, width, log_lanes);
  return true;
}

template <typename Launch>
void launch_gather(const Launch& launch, const RowParams& p, int64_t element_bytes) {
  if (p.count == 0 || p.channels == 0) return;
  launch_gather_as<uint4>(launch, p, element_bytes) || launch_gather_as<uint2>(launch, p, element_bytes) ||
      launch_gather_as<uint32_t>(launch, p, element_bytes) || launch_gather_as<uint16_t>(launch, p, element_bytes);
}

// The adjoint: map_out[row] = sum of the tokens that name the row, ascending. One warp per row.
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 3) sum_rows(RowParams p, RowTargets targets, LinkSources links) {
  constexpr int kChunks = 2;
  const int lane = threadIdx.x % 32;
  const T* tokens = static_cast<const T*>(p.tokens);
  T* out = static_cast<T*>(p.map_out);
  for (int64_t row = global_thread() / 32; row < p.rows; row += grid_threads() / 32) {
    const RowList list(links, row);
    for (int64_t first = 0; first < p.channels; first += 32 * W * kChunks) {
      Acc<T> sum[kChunks][W] = {};
      list.each(targets, [&](int64_t t) {
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const int64_t c = first + (k * 32 + lane) * W;
          if (c >= p.channels) continue;
          const Pack<T, W> v = load_pack<W>(tokens + t * p.token_stride + c);
#pragma unroll
          for (int i = 0; i < W; ++i) sum[k][i] += to_acc(v.v[i]);
        }
      });
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int64_t c = first + (k * 32 + lane) * W;
        if (c >= p.channels) continue;
        Pack<T, W> v;
#pragma unroll
        for (int i = 0; i < W; ++i) v.v[i] = from_acc<T>(sum[k][i]);
        store_pack(out + row * p.channels + c, v);
      }
    }
  }
}

inline RowTargets row_targets(const RowParams& p) {
  RowTargets t;
  t.target = p.indices, t.per_group = p.count, t.rows = p.rows;
  return t;
}

// Uses map_out, tokens. Workspace: head [rows], next [count].
template <typename T, typename Launch>
void launch_gather_backward(const Launch& launch, const RowParams& p, int32_t* head, int32_t* next) {
  if (p.rows == 0 || p.channels == 0) return;
  const RowTargets targets = row_targets(p);
  const LinkSources links{head, next};
  launch_visit(launch, targets, links);
  const bool packed = packable<T>(p.tokens, p.token_stride) && packable<T>(p.map_out, p.channels);
  launch(packed ? &sum_rows<T, kPack<T>> : &sum_rows<T, 1>, grid_for(p.rows, kWarps), kBlock, 0, p, targets, links);
}

// ---- scatter
// ---------------------------------------------------------------------------------------------------------

// The new values of a row: (add ? features : 0) + scale * token.
template <typename T, int W>
__device__ __forceinline__ Pack<T, W> scattered(const RowParams& p, int64_t row, int64_t t, int64_t c) {
  using A = Acc<T>;
  const A scale = p.scale != nullptr ? at<A>(p.scale, t) : A(1);
  const Pack<T, W> token = load_pack<W>(static_cast<const T*>(p.tokens) + t * p.token_stride + c);
  Pack<T, W> v = {};
  if (p.add) v = load_pack<W>(static_cast<const T*>(p.map) + row * p.map_stride + c);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const A scaled = scale * to_acc(token.v[i]);
    v.v[i] = from_acc<T>(p.add ? to_acc(v.v[i]) + scaled : scaled);
  }
  return v;
}

template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4) scatter_rows(RowParams p, const int32_t* winner, int log_lanes) {
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  const T* map = static_cast<const T*>(p.map);
  T* out = static_cast<T*>(p.map_out);
  for (int64_t row = global_thread() >> log_lanes; row < p.rows; row += grid_threads() >> log_lanes) {
    const int32_t t = winner[row];
    for (int64_t c = static_cast<int64_t>(lane) * W; c < p.channels; c += lanes * W) {
      store_pack(out + row * p.channels + c,
                 t < 0 ? load_pack<W>(map + row * p.map_stride + c) : scattered<T, W>(p, row, t, c));
    }
  }
}

// In place: only the named rows are touched. map == map_out.
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4) scatter_rows_in_place(RowParams p, const int32_t* winner, int log_lanes) {
  const int lanes = 1 << log_lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t t = global_thread() >> log_lanes; t < p.count; t += grid_threads() >> log_lanes) {
    const int64_t row = p.indices[t];
    if (!in_range(row, p.rows) || winner[row] != t) continue;
    for (int64_t c = static_cast<int64_t>(lane) * W; c < p.channels; c += lanes * W) {
      store_pack(static_cast<T*>(p.map_out) + row * p.map_stride + c, scattered<T, W>(p, row, t, c));
    }
  }
}

// The adjoint of scatter; map is the gradient of the output. The first `rows` warps write the gradient of the features
// (map_out), the others that of the tokens (tokens_out) and of the scale (scale_grad).
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4) scatter_backward_rows(RowParams p, const int32_t* winner) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const T* grad = static_cast<const T*>(p.map);
  for (int64_t job = global_thread() / 32; job < p.rows + p.count; job += grid_threads() / 32) {
    if (job < p.rows) {
      const bool replaced = !p.add && winner[job] >= 0;
      for (int64_t c = lane * W; c < p.channels; c += 32 * W) {
        store_pack(static_cast<T*>(p.map_out) + job * p.channels + c,
                   replaced ? Pack<T, W>{} : load_pack<W>(grad + job * p.map_stride + c));
      }
      continue;
    }
    const int64_t t = job - p.rows, row = p.indices[t];
    const bool valid = in_range(row, p.rows) && winner[row] == t;
    const A scale = p.scale != nullptr ? at<A>(p.scale, t) : A(1);
    A dot = 0;
    for (int64_t c = lane * W; c < p.channels; c += 32 * W) {
      Pack<T, W> v = {};
      if (valid) {
        v = load_pack<W>(grad + row * p.map_stride + c);
        if (p.scale_grad != nullptr) {
          const Pack<T, W> token = load_pack<W>(static_cast<const T*>(p.tokens) + t * p.token_stride + c);
#pragma unroll
          for (int i = 0; i < W; ++i) dot += to_acc(token.v[i]) * to_acc(v.v[i]);
        }
#pragma unroll
        for (int i = 0; i < W; ++i) v.v[i] = from_acc<T>(scale * to_acc(v.v[i]));
      }
      store_pack(static_cast<T*>(p.tokens_out) + t * p.channels + c, v);
    }
    if (p.scale_grad != nullptr) {
      dot = warp_sum(dot);
      if (lane == 0) static_cast<A*>(p.scale_grad)[t] = dot;
    }
  }
}

// Workspace of the three: winner [rows].
template <typename T, typename Launch>
void launch_scatter(const Launch& launch, const RowParams& p, int32_t* winner) {
  if (p.rows == 0 || p.channels == 0) return;
  launch_visit(launch, row_targets(p), HighestSource{winner});
  const bool packed =
      packable<T>(p.map, p.map_stride) && packable<T>(p.map_out, p.channels) && packable<T>(p.tokens, p.token_stride);
  const int log_lanes = log_lanes_for(packed ? p.channels / kPack<T> : p.channels);
  launch(packed ? &scatter_rows<T, kPack<T>> : &scatter_rows<T, 1>, grid_for(p.rows << log_lanes, kBlock), kBlock, 0, p,
         winner, log_lanes);
}

template <typename T, typename Launch>
void launch_scatter_in_place(const Launch& launch, const RowParams& p, int32_t* winner) {
  if (p.rows == 0 || p.count == 0 || p.channels == 0) return;
  launch_visit(launch, row_targets(p), HighestSource{winner});
  const bool packed =
      packable<T>(p.map_out, p.map_stride) && packable<T>(p.tokens, p.token_stride) && p.channels % kPack<T> == 0;
  const int log_lanes = log_lanes_for(packed ? p.channels / kPack<T> : p.channels);
  launch(packed ? &scatter_rows_in_place<T, kPack<T>> : &scatter_rows_in_place<T, 1>,
         grid_for(p.count << log_lanes, kBlock), kBlock, 0, p, winner, log_lanes);
}

template <typename T, typename Launch>
void launch_scatter_backward(const Launch& launch, const RowParams& p, int32_t* winner) {
  if (p.rows + p.count == 0) return;  // with no channels the scale still gets its zeros
  launch_visit(launch, row_targets(p), HighestSource{winner});
  const bool packed = packable<T>(p.map, p.map_stride) && packable<T>(p.map_out, p.channels) &&
                      packable<T>(p.tokens_out, p.channels) && packable<T>(p.tokens, p.token_stride);
  launch(packed ? &scatter_backward_rows<T, kPack<T>> : &scatter_backward_rows<T, 1>,
         grid_for(p.rows + p.count, kWarps), kBlock, 0, p, winner);
}

}  // namespace tokenprune
