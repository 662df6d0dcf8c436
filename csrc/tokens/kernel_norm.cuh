// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of gather + LayerNorm: one warp per token, the row in registers where it fits.
#pragma once

#include "../common/cuda.h"
#include "../common/rows.cuh"
#include "params.h"

namespace tokenprune {

// The part of a row that a lane holds: K packs in registers, or (K = 0) the memory itself, read again in every pass.
template <typename T, int W, int K>
struct LaneRow {
  const T* row;
  int64_t channels;
  int lane;
  Pack<T, W> held[K > 0 ? K : 1];

  __device__ __forceinline__ LaneRow(const T* r, int64_t n, int l) : row(r), channels(n), lane(l) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t c = static_cast<int64_t>(k * 32 + lane) * W;
      held[k] = c < channels ? load_pack<W>(row + c) : Pack<T, W>{};
    }
  }
  // f(channel, pack) for every pack of this lane.
  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
    if constexpr (K > 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t c = static_cast<int64_t>(k * 32 + lane) * W;
        if (c < channels) f(c, held[k]);
      }
    } else {
      for (int64_t c = static_cast<int64_t>(lane) * W; c < channels; c += 32 * W) f(c, load_pack<W>(row + c));
    }
  }
};

template <typename T, int W>
__device__ __forceinline__ void zero_row(T* out, int64_t channels, int lane) {
  for (int64_t c = static_cast<int64_t>(lane) * W; c < channels; c += 32 * W) store_pack(out + c, Pack<T, W>{});
}

template <typename T, int W, int K>
__global__ void __launch_bounds__(kBlock, 4) gather_norm_rows(RowParams p) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const A inverse = p.channels > 0 ? A(1) / static_cast<A>(p.channels) : A(0);
  for (int64_t t = global_thread() / 32; t < p.count; t += grid_threads() / 32) {
    const int64_t source = p.indices[t];
    T* out = static_cast<T*>(p.tokens_out) + t * p.channels;
    A mean = 0, rstd = 0;
    if (in_range(source, p.rows)) {
      const LaneRow<T, W, K> row(static_cast<const T*>(p.map) + source * p.map_stride, p.channels, lane);
      A sum = 0;
      row.each([&](int64_t, const Pack<T, W>& x) {
#pragma unroll
        for (int i = 0; i < W; ++i) sum += to_acc(x.v[i]);
      });
      mean = warp_sum(sum) * inverse;
      A squares = 0;
      row.each([&](int64_t, const Pack<T, W>& x) {
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const A d = to_acc(x.v[i]) - mean;
          squares += d * d;
        }
      });
      rstd = rsqrt_of(warp_sum(squares) * inverse + static_cast<A>(p.eps));
      row.each([&](int64_t c, const Pack<T, W>& x) {
        Pack<T, W> weight = {}, bias = {}, y;
        if (p.weight != nullptr) weight = load_pack<W>(static_cast<const T*>(p.weight) + c);
        if (p.bias != nullptr) bias = load_pack<W>(static_cast<const T*>(p.bias) + c);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          A v = (to_acc(x.v[i]) - mean) * rstd;
          if (p.weight != nullptr) v *= to_acc(weight.v[i]);
          if (p.bias != nullptr) v += to_acc(bias.v[i]);
          y.v[i] = from_acc<T>(v);
        }
        store_pack(out + c, y);
      });
    } else {
      zero_row<T, W>(out, p.channels, lane);
    }
    if (lane == 0) {
      static_cast<A*>(p.mean)[t] = mean;
      static_cast<A*>(p.rstd)[t] = rstd;
    }
  }
}

// tokens = gradient of the output, tokens_out = gradient of the gathered rows.
template <typename T, int W, int K>
__global__ void __launch_bounds__(kBlock, 2) gather_norm_backward_rows(RowParams p) {
  using A = Acc<T>;
  const int lane = threadIdx.x % 32;
  const A inverse = p.channels > 0 ? A(1) / static_cast<A>(p.channels) : A(0);
  for (int64_t t = global_thread() / 32; t < p.count; t += grid_threads() / 32) {
    const int64_t source = p.indices[t];
    T* out = static_cast<T*>(p.tokens_out) + t * p.channels;
    if (!in_range(source, p.rows)) {
      zero_row<T, W>(out, p.channels, lane);
      continue;
    }
    const A mean = at<A>(p.mean, t), rstd = at<A>(p.rstd, t);
    const T* x_row = static_cast<const T*>(p.map) + source * p.map_stride;
    const LaneRow<T, W, K> grad(static_cast<const T*>(p.tokens) + t * p.token_stride, p.channels, lane);
    // g = grad * weight and xhat = (x - mean) * rstd; dx = rstd * (g - mean(g) - xhat * mean(g * xhat)).
    auto pair = [&](int64_t c, const Pack<T, W>& g, auto&& f) {
      const Pack<T, W> x = load_pack<W>(x_row + c);
      Pack<T, W> weight = {};
      if (p.weight != nullptr) weight = load_pack<W>(static_cast<const T*>(p.weight) + c);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A scaled = p.weight != nullptr ? to_acc(g.v[i]) * to_acc(weight.v[i]) : to_acc(g.v[i]);
        f(i, scaled, (to_acc(x.v[i]) - mean) * rstd);
      }
    };
    A sum = 0, product = 0;
    grad.each([&](int64_t c, const Pack<T, W>& g) {
      pair(c, g, [&](int, A scaled, A xhat) {
        sum += scaled;
        product += scaled * xhat;
      });
    });
    sum = warp_sum(sum) * inverse;
    product = warp_sum(product) * inverse;
    grad.each([&](int64_t c, const Pack<T, W>& g) {
      Pack<T, W> y;
      pair(c, g, [&](int i, A scaled, A xhat) { y.v[i] = from_acc<T>(rstd * (scaled - sum - xhat * product)); });
      store_pack(out + c, y);
    });
  }
}

// Gradients of weight and bias: sums over the tokens, in two launches with a fixed split, so deterministic.
constexpr int kMostSlices = 128;
inline int64_t norm_slices(int64_t count) {
  const int64_t slices = (count + 63) / 64;
  return slices < 1 ? 1 : slices < kMostSlices ? slices : kMostSlices;
}

// partial [slices, 2, channels]. A block sums a slice of the tokens for 32 * W channels; its warps share the tokens.
template <typename T, int W>
__global__ void __launch_bounds__(kBlock, 4) norm_column_sums(RowParams p, Acc<T>* partial) {
  using A = Acc<T>;
  TP_SHARED(A, sums, [kWarps][2][32 * W + 1]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * 32 * W, c = first + lane * W;
  const int64_t slices = gridDim.y, begin = p.count * blockIdx.y / slices, end = p.count * (blockIdx.y + 1) / slices;
  A weight[W] = {}, bias[W] = {};
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    const int64_t source = p.indices[t];
    if (!in_range(source, p.rows) || c >= p.channels) continue;
    const A mean = at<A>(p.mean, t), rstd = at<A>(p.rstd, t);
    const Pack<T, W> x = load_pack<W>(static_cast<const T*>(p.map) + source * p.map_stride + c);
    const Pack<T, W> g = load_pack<W>(static_cast<const T*>(p.tokens) + t * p.token_stride + c);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      weight[i] += to_acc(g.v[i]) * ((to_acc(x.v[i]) - mean) * rstd);
      bias[i] += to_acc(g.v[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    sums[warp][0][lane * W + i] = weight[i];
    sums[warp][1][lane * W + i] = bias[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * 32 * W; i += kBlock) {
    const int which = i / (32 * W), column = i % (32 * W);
    if (first + column >= p.channels) continue;
    A sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][which][column];
    partial[(blockIdx.y * 2 + which) * p.channels + first + column] = sum;
  }
}

template <typename A>
__global__ void __launch_bounds__(kBlock, 4)
    add_slices(const A* partial, int64_t slices, int64_t channels, A* weight, A* bias) {
  for (int64_t i = global_thread(); i < 2 * channels; i += grid_threads()) {
    A sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += partial[s * 2 * channels + i];
    (i < channels ? weight[i] : bias[i - channels]) = sum;
  }
}

template <typename T, template <int, int> class Kernel>
auto norm_kernel(bool packed, int64_t channels) {
  constexpr int kP = kPack<T>;
  const int64_t packs = (channels + 32 * kP - 1) / (32 * kP);
  if (!packed) return Kernel<1, 0>::get();
  return packs <= 2 ? Kernel<kP, 2>::get() : packs <= 4 ? Kernel<kP, 4>::get() : Kernel<kP, 0>::get();
}

template <typename T>
struct NormKernels {
  template <int W, int K>
  struct Forward {
    static auto get() { return &gather_norm_rows<T, W, K>; }
  };
  template <int W, int K>
  struct Backward {
    static auto get() { return &gather_norm_backward_rows<T, W, K>; }
  };
};

template <typename T, typename Launch>
void launch_gather_norm(const Launch& launch, const RowParams& p) {
  if (p.count == 0) return;
  const bool packed = packable<T>(p.map, p.map_stride) && packable<T>(p.tokens_out, p.channels) &&
                      packable<T>(p.weight, 0) && packable<T>(p.bias, 0);
  launch(norm_kernel<T, NormKernels<T>::template Forward>(packed, p.channels), grid_for(p.count, kWarps), kBlock, 0, p);
}

// Workspace: partial [norm_slices(count), 2, channels].
template <typename T, typename Launch>
void launch_gather_norm_backward(const Launch& launch, const RowParams& p, Acc<T>* partial, Acc<T>* grad_weight,
                                 Acc<T>* grad_bias) {
  if (p.channels == 0) return;
  const bool packed = packable<T>(p.map, p.map_stride) && packable<T>(p.tokens, p.token_stride) &&
                      packable<T>(p.tokens_out, p.channels) && packable<T>(p.weight, 0);
  if (p.count > 0) {
    launch(norm_kernel<T, NormKernels<T>::template Backward>(packed, p.channels), grid_for(p.count, kWarps), kBlock, 0,
           p);
  }
  const int64_t width = 32 * (packed ? kPack<T> : 1), slices = norm_slices(p.count);
  launch(packed ? &norm_column_sums<T, kPack<T>> : &norm_column_sums<T, 1>,
         dim3((p.channels + width - 1) / width, slices), kBlock, 0, p, partial);
  launch(&add_slices<Acc<T>>, grid_for(2 * p.channels, kBlock), kBlock, 0, partial, slices, p.channels, grad_weight,
         grad_bias);
}

}  // namespace tokenprune
