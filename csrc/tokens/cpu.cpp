// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, and the loops over rows.
#include "cpu.h"

#include <cstring>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const TokenKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? token_kernels_generic : token_kernels(); }

int64_t fill_selection(const SelectParams& p) {
  int64_t total = 0;
  p.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    total += token_kernels().compact(p.mask + b * p.tokens, p.tokens, b * p.tokens,
                                     p.indices + (total < p.capacity ? total : p.capacity),
                                     total < p.capacity ? p.capacity - total : 0);
    p.cu_seqlens[b + 1] = static_cast<int32_t>(total);
  }
  return total;
}

// Eight flags at a time: 1 in every byte that is not 0, whatever else it holds, and the product sums the bytes of a
// word into its highest byte.
int64_t count_true(const bool* flags, int64_t n) {
  int64_t total = 0, i = 0;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, flags + i, 8);
    constexpr uint64_t low = 0x7f7f7f7f7f7f7f7fULL;
    word = (((word & low) + low) | word) >> 7 & 0x0101010101010101ULL;
    total += static_cast<int64_t>((word * 0x0101010101010101ULL) >> 56);
  }
  const uint8_t* rest = reinterpret_cast<const uint8_t*>(flags);
  for (; i < n; ++i) total += rest[i] != 0;
  return total;
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& mask) {
  check_mask("select_tokens", mask);
  const Tensor m = as_contiguous(mask);
  const bool* flags = data<bool>(m);
  const int64_t total = count_true(flags, m.numel());  // costs less than a temporary of the largest size
  Tensor indices = allocate(m, {total}, ScalarType::Int);
  Tensor cu = allocate(m, {m.size(0) + 1}, ScalarType::Int);
  fill_selection({flags, mutable_data<int32_t>(indices), mutable_data<int32_t>(cu), m.size(0), m.size(1), total});
  return {indices, cu};
}

std::tuple<Tensor, Tensor> select_tokens_capacity(const Tensor& mask, int64_t capacity) {
  const char* op = "select_tokens_capacity";
  check_mask(op, mask);
  TP_CHECK(capacity >= 0, op, "capacity must be >= 0, got ", capacity);
  const Tensor m = as_contiguous(mask);
  Tensor indices = allocate(m, {capacity}, ScalarType::Int);
  Tensor cu = allocate(m, {m.size(0) + 1}, ScalarType::Int);
  int32_t* slots = mutable_data<int32_t>(indices);
  const int64_t total =
      fill_selection({data<bool>(m), slots, mutable_data<int32_t>(cu), m.size(0), m.size(1), capacity});
  TP_CHECK(total <= capacity, op, "capacity must hold all ", total, " kept tokens, got ", capacity);
  for (int64_t i = total; i < capacity; ++i) slots[i] = -1;
  return {indices, cu};
}

}  // namespace

Tensor gather_tokens(const Tensor& x, const Tensor& indices) {
  RowCall call("gather_tokens", x, indices);
  const RowParams& p = call.p;
  Tensor out = allocate(call.map, {p.count, p.channels});
  const int64_t size = call.map.element_size();
  parallel_ranges(p.count, p.channels * size / 8, [&](int64_t begin, int64_t end) {
    token_kernels().gather(p, size, out.mutable_data_ptr(), begin, end);
  });
  return out;
}

namespace {

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& indices, int64_t rows) {
  const char* op = "gather_tokens_backward";
  check_rows(op, "grad", grad);
  TP_CHECK(rows >= 0, op, "rows must be >= 0, got ", rows);
  check_row_indices(op, indices, grad, rows);
  check_size(op, "grad", grad, 0, indices.numel());
  const Tensor index = as_contiguous(indices), g = inner_contiguous(grad);
  RowParams p;
  p.tokens = g.const_data_ptr(), p.token_stride = g.stride(0);
  p.indices = data<int32_t>(index), p.rows = rows, p.count = index.numel(), p.channels = g.size(1);
  Tensor out = allocate(g, {rows, p.channels});
  p.map_out = out.mutable_data_ptr();
  // Lists of positions per row, ascending: counting sort.
  std::vector<int32_t> offsets(rows + 2, 0), positions(p.count);
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.indices[i] >= 0) ++offsets[p.indices[i] + 2];
  }
  for (int64_t r = 0; r < rows; ++r) offsets[r + 2] += offsets[r + 1];
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.indices[i] >= 0) positions[offsets[p.indices[i] + 1]++] = static_cast<int32_t>(i);
  }
  const Dtype dtype = kernel_dtype(op, g.scalar_type());
  parallel_ranges(rows, p.channels / 4, [&](int64_t begin, int64_t end) {
    kernels(dtype).sum_rows(dtype, p, offsets.data(), positions.data(), begin, end);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_layer_norm(const Tensor& x, const Tensor& indices, const Optional& weight,
                                                     const Optional& bias, double eps) {
  const char* op = "gather_layer_norm";
  RowCall call(op, x, indices);
  call.set_norm(op, weight, bias);
  RowParams& p = call.p;
  Tensor out = allocate(call.map, {p.count, p.channels}), mean = call.new_stat(p.count), rstd = call.new_stat(p.count);
  p.tokens_out = out.mutable_data_ptr(), p.mean = mean.mutable_data_ptr(), p.rstd = rstd.mutable_data_ptr();
  p.eps = eps;
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  parallel_ranges(p.count, p.channels,
                  [&](int64_t begin, int64_t end) { kernels(dtype).gather_layer_norm(dtype, p, begin, end); });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> gather_layer_norm_backward(const Tensor& grad, const Tensor& x,
                                                              const Tensor& indices, const Optional& weight,
                                                              const Tensor& mean, const Tensor& rstd) {
  const char* op = "gather_layer_norm_backward";
  RowCall call(op, x, indices);
  call.set_tokens(op, "grad", grad);
  call.set_norm(op, weight, std::nullopt);
  call.set_statistics(op, mean, rstd);
  RowParams& p = call.p;
  Tensor rows = allocate(call.map, {p.count, p.channels}), grad_weight = call.new_stat(p.channels),
         grad_bias = call.new_stat(p.channels);
  p.tokens_out = rows.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  parallel_ranges(p.count, p.channels * 2,
                  [&](int64_t begin, int64_t end) { kernels(dtype).gather_layer_norm_backward(dtype, p, begin, end); });
  void *gw = grad_weight.mutable_data_ptr(), *gb = grad_bias.mutable_data_ptr();
  parallel_ranges(p.channels, p.count, [&](int64_t begin, int64_t end) {
    kernels(dtype).layer_norm_parameters(dtype, p, gw, gb, begin, end);
  });
  return {rows, grad_weight, grad_bias};
}

void run_scatter(const char* op, const RowCall& call) {
  const RowParams& p = call.p;
  check_unique(op, "indices", call.indices, p.rows);
  const Dtype dtype = kernel_dtype(op, call.map.scalar_type());
  parallel_ranges(p.count, p.channels / 4,
                  [&](int64_t begin, int64_t end) { kernels(dtype).scatter(dtype, p, begin, end); });
}

Tensor scatter_tokens(const Tensor& features, const Tensor& tokens, const Tensor& indices, const Optional& scale,
                      bool add) {
  const char* op = "scatter_tokens";
  RowCall call(op, features, indices, "features");
  call.set_tokens(op, "tokens", tokens);
  call.set_scale(op, scale);
  Tensor out = allocate(call.map, {call.p.rows, call.p.channels});
  const int64_t bytes = call.p.channels * call.map.element_size(), stride = call.p.map_stride * call.map.element_size();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* from = static_cast<const char*>(call.p.map);
  parallel_ranges(call.p.rows, bytes / 8, [&](int64_t begin, int64_t end) {
    if (stride == bytes) {
      std::memcpy(to + begin * bytes, from + begin * bytes, (end - begin) * bytes);
      return;
    }
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + i * stride, bytes);
  });
  call.p.map_out = out.mutable_data_ptr(), call.p.add = add;
  run_scatter(op, call);
  return out;
}

void scatter_tokens_inplace(const Tensor& features, const Tensor& tokens, const Tensor& indices, const Optional& scale,
                            bool add) {
  const char* op = "scatter_tokens_";
  RowCall call(op, features, indices, "features");
  TP_CHECK(features.is_contiguous(), op, "features must be contiguous, got ", shape_text(features), " with gaps");
  call.set_tokens(op, "tokens", tokens);
  call.set_scale(op, scale);
  call.p.map_out = features.mutable_data_ptr(), call.p.add = add;
  run_scatter(op, call);
}

std::tuple<Tensor, Tensor, Tensor> scatter_tokens_backward(const Tensor& grad, const Optional& tokens,
                                                           const Tensor& indices, const Optional& scale, bool add) {
  const char* op = "scatter_tokens_backward";
  RowCall call(op, grad, indices, "grad");
  RowParams& p = call.p;
  TP_CHECK(!scale.has_value() || tokens.has_value(), op, "tokens must be given when scale is, got none");
  if (tokens.has_value()) call.set_tokens(op, "tokens", *tokens);
  call.set_scale(op, scale);
  Tensor grad_tokens = allocate(call.map, {p.count, p.channels}),
         grad_scale = call.new_stat(scale.has_value() ? p.count : 0),
         grad_features = allocate(call.map, {p.rows, p.channels});
  p.tokens_out = grad_tokens.mutable_data_ptr(), p.scale_grad = grad_scale.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, grad.scalar_type());
  parallel_ranges(p.count, p.channels / 4,
                  [&](int64_t begin, int64_t end) { kernels(dtype).scatter_backward(dtype, p, begin, end); });
  // Rows that were replaced, not added to, pass nothing on to the old features.
  torch::stable::copy_(grad_features, call.map);
  if (!add) {
    char* to = static_cast<char*>(grad_features.mutable_data_ptr());
    const int64_t bytes = p.channels * grad.element_size();
    for (int64_t i = 0; i < p.count; ++i) {
      if (p.indices[i] >= 0) std::memset(to + p.indices[i] * bytes, 0, bytes);
    }
  }
  return {grad_features, grad_tokens, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("select_tokens_capacity", TORCH_BOX(&select_tokens_capacity));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
  m.impl("gather_layer_norm", TORCH_BOX(&gather_layer_norm));
  m.impl("gather_layer_norm_backward", TORCH_BOX(&gather_layer_norm_backward));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens));
  m.impl("scatter_tokens_", TORCH_BOX(&scatter_tokens_inplace));
  m.impl("scatter_tokens_backward", TORCH_BOX(&scatter_tokens_backward));
}

}  // namespace
}  // namespace tokenprune
