// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of merging and its adjoint. kernel_match.cuh finds the best matches, kernel_select.cuh chooses the
// pairs. One warp per output row gathers its tokens in ascending order, so nothing depends on timing.
#pragma once

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune {

template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4) merge_rows(MergeParams p, RowTargets targets, LinkSources links) {
  using A = Acc<T>;
  constexpr int kChunks = 2;
  const int lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(p.x);
  const A* sizes = static_cast<const A*>(p.size);
  const bool weighted = p.mode == kMergeWeighted, largest = p.mode == kMergeAmax;
  for (int64_t row = global_thread() / 32; row < p.batch * p.out_len; row += grid_threads() / 32) {
    const RowList list(links, row);
    A size = 0, count = 0;
    list.each(targets, [&](int64_t t) {
      size += sizes != nullptr ? sizes[t] : A(1);
      count += A(1);
    });
    A divisor = weighted ? size : p.mode == kMergeMean && count > A(0) ? count : A(1);
    const bool lone = list.count == 1 && divisor != A(0);  // its own mean; x * size / size would only round it twice
    if (lone) divisor = 1;
    for (int64_t first = 0; first < p.channels; first += 32 * W * kChunks) {
      A sum[kChunks][W] = {};
      bool started = false;
      list.each(targets, [&](int64_t t) {
        const A scale = weighted && !lone ? sizes[t] : A(1);
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const int64_t c = first + (k * 32 + lane) * W;
          if (c >= p.channels) continue;
          const Pack<T, W> v = load_pack<W>(x + t * p.channels + c);
#pragma unroll
          for (int i = 0; i < W; ++i) {
            const A value = to_acc(v.v[i]);
            if (!largest) {
              sum[k][i] += scale * value;
            } else if (!started || value > sum[k][i] || value != value) {  // NaN stays
              sum[k][i] = value;
            }
          }
        }
        started = true;
      });
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        const int64_t c = first + (k * 32 + lane) * W;
        if (c >= p.channels) continue;
        Pack<T, W> v;
#pragma unroll
        for (int i = 0; i < W; ++i) v.v[i] = from_acc<T>(divisor == A(0) ? A(0) : sum[k][i] / divisor);
        store_pack(static_cast<T*>(p.y) + row * p.channels + c, v);
      }
    }
    if (lane == 0) static_cast<A*>(p.size_out)[row] = size;
  }
}

// Sum, mean and weighted mean: one warp per token. `count` [batch * out_len] serves the mean.
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4)
    merge_backward_tokens(MergeParams p, RowTargets targets, const int32_t* count) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const bool weighted = p.mode == kMergeWeighted;
  for (int64_t t = global_thread() / 32; t < targets.sources(); t += grid_threads() / 32) {
    const int64_t row = targets.row_of(t);
    A factor = row < 0 ? 0 : 1, inverse = 0;
    if (row >= 0 && p.mode == kMergeMean) factor = A(1) / static_cast<A>(count[row]);
    if (row >= 0 && weighted) {
      const A size = at<A>(p.size_out_in, row);
      inverse = size == A(0) ? A(0) : A(1) / size;
      factor = at<A>(p.size, t) * inverse;
    }
    A dot = 0;
    for (int64_t c = static_cast<int64_t>(lane) * W; c < p.channels; c += 32 * W) {
      Pack<T, W> out = {};
      if (row >= 0) {
        const Pack<T, W> g = load_pack<W>(static_cast<const T*>(p.grad) + row * p.channels + c);
#pragma unroll
        for (int i = 0; i < W; ++i) out.v[i] = from_acc<T>(factor * to_acc(g.v[i]));
        if (weighted) {
          const Pack<T, W> x = load_pack<W>(static_cast<const T*>(p.x) + t * p.channels + c);
          const Pack<T, W> y = load_pack<W>(static_cast<const T*>(p.y_in) + row * p.channels + c);
#pragma unroll
          for (int i = 0; i < W; ++i) dot += to_acc(g.v[i]) * (to_acc(x.v[i]) - to_acc(y.v[i]));
        }
      }
      store_pack(static_cast<T*>(p.grad_x) + t * p.channels + c, out);
    }
    if (weighted) dot = warp_sum(dot);
    if (lane == 0) {
      const A direct = row >= 0 && p.grad_size_out != nullptr ? at<A>(p.grad_size_out, row) : A(0);
      static_cast<A*>(p.grad_size)[t] = direct + dot * inverse;
    }
  }
}

// Maximum: the gradient is shared evenly by the tokens that reach it. The first batch * out_len warps serve the output
// rows, the others give the dropped tokens their zeros.
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 2) merge_backward_amax(MergeParams p, RowTargets targets, LinkSources links) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const int64_t rows = p.batch * p.out_len, jobs = rows + targets.sources();
  const T* x = static_cast<const T*>(p.x);
  T* grad_x = static_cast<T*>(p.grad_x);
  A* grad_size = static_cast<A*>(p.grad_size);
  for (int64_t job = global_thread() / 32; job < jobs; job += grid_threads() / 32) {
    if (job >= rows) {
      const int64_t t = job - rows;
      if (targets.row_of(t) >= 0) continue;
      for (int64_t c = static_cast<int64_t>(lane) * W; c < p.channels; c += 32 * W) {
        store_pack(grad_x + t * p.channels + c, Pack<T, W>{});
      }
      if (lane == 0) grad_size[t] = 0;
      continue;
    }
    const RowList list(links, job);
    const A direct = p.grad_size_out != nullptr ? at<A>(p.grad_size_out, job) : A(0);
    list.each(targets, [&](int64_t t) {
      if (lane == 0) grad_size[t] = direct;
    });
    for (int64_t first = 0; first < p.channels; first += 32 * W) {
      const int64_t c = first + lane * W;
      const bool inside = c < p.channels;
      Pack<T, W> y = {}, g = {};
      if (inside) {
        y = load_pack<W>(static_cast<const T*>(p.y_in) + job * p.channels + c);
        g = load_pack<W>(static_cast<const T*>(p.grad) + job * p.channels + c);
      }
      A ties[W] = {};
      list.each(targets, [&](int64_t t) {
        if (!inside) return;
        const Pack<T, W> v = load_pack<W>(x + t * p.channels + c);
#pragma unroll
        for (int i = 0; i < W; ++i) ties[i] += to_acc(v.v[i]) == to_acc(y.v[i]) ? A(1) : A(0);
      });
      list.each(targets, [&](int64_t t) {
        if (!inside) return;
        const Pack<T, W> v = load_pack<W>(x + t * p.channels + c);
        Pack<T, W> out;
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const bool hit = to_acc(v.v[i]) == to_acc(y.v[i]);
          out.v[i] = from_acc<T>(hit ? to_acc(g.v[i]) / ties[i] : A(0));
        }
        store_pack(grad_x + t * p.channels + c, out);
      });
    }
  }
}

inline RowTargets merge_targets(const MergeParams& p) {
  RowTargets t;
  t.target = p.parent, t.groups = p.batch, t.per_group = p.tokens, t.rows = p.out_len;
  return t;
}

// Workspace of both: p.offsets [batch * out_len] ints (heads of lists, or counts), p.members [batch * tokens].
template <typename T, typename Launch>
void launch_merge(const Launch& launch, const MergeParams& p) {
  const int64_t rows = p.batch * p.out_len;
  if (rows == 0) return;
  const RowTargets targets = merge_targets(p);
  const LinkSources links{p.offsets, p.members};
  launch_visit(launch, targets, links);
  const bool packed = packable<T>(p.x, p.channels) && packable<T>(p.y, p.channels);
  launch(packed ? &merge_rows<T, kPack<T>> : &merge_rows<T, 1>, grid_for(rows, kWarps), kBlock, 0, p, targets, links);
}

template <typename T, typename Launch>
void launch_merge_backward(const Launch& launch, const MergeParams& p) {
  const RowTargets targets = merge_targets(p);
  if (targets.sources() == 0) return;
  const bool packed = packable<T>(p.x, p.channels) && packable<T>(p.y_in, p.channels) &&
                      packable<T>(p.grad, p.channels) && packable<T>(p.grad_x, p.channels);
  if (p.mode == kMergeAmax) {
    const LinkSources links{p.offsets, p.members};
    launch_visit(launch, targets, links);
    launch(packed ? &merge_backward_amax<T, kPack<T>> : &merge_backward_amax<T, 1>,
           grid_for(p.batch * p.out_len + targets.sources(), kWarps), kBlock, 0, p, targets, links);
    return;
  }
  if (p.mode == kMergeMean) launch_visit(launch, targets, CountSources{p.offsets});
  launch(packed ? &merge_backward_tokens<T, kPack<T>> : &merge_backward_tokens<T, 1>,
         grid_for(targets.sources(), kWarps), kBlock, 0, p, targets, p.offsets);
}

}  // namespace tokenprune
