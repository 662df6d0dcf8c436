// SPDX-License-Identifier: Apache-2.0
// CUDA side of the token ops.
#include "../common/launch.h"
#include "checks.h"
#include "kernel.cuh"
#include "kernel_norm.cuh"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

Tensor new_rows(const Tensor& like, int64_t rows, int64_t columns) { return allocate(like, {rows, columns}); }
Tensor new_ints(const Tensor& like, int64_t count) { return allocate(like, {count}, ScalarType::Int); }

SelectParams select_params(const Tensor& mask, const Tensor& cu_seqlens, int64_t capacity) {
  return {data<bool>(mask), nullptr, mutable_data<int32_t>(cu_seqlens), mask.size(0), mask.size(1), capacity};
}

std::tuple<Tensor, Tensor> select_tokens(const Tensor& mask_in) {
  check_mask("select_tokens", mask_in);
  const Tensor mask = as_contiguous(mask_in);
  const Launcher launch(mask);
  Tensor cu_seqlens = new_ints(mask, mask.size(0) + 1);
  SelectParams p = select_params(mask, cu_seqlens, INT32_MAX);
  launch_select_counts(launch, p);
  p.capacity = launch.read(p.cu_seqlens + p.batch);  // the size of the result: the one synchronisation
  Tensor indices = new_ints(mask, p.capacity);
  p.indices = mutable_data<int32_t>(indices);
  launch_select_write(launch, p);
  return {indices, cu_seqlens};
}

std::tuple<Tensor, Tensor> select_tokens_capacity(const Tensor& mask_in, int64_t capacity) {
  const char* op = "select_tokens_capacity";
  check_mask(op, mask_in);
  TP_CHECK(capacity >= 0 && capacity <= INT32_MAX, op, "capacity must be in [0, 2^31), got ", capacity);
  const Tensor mask = as_contiguous(mask_in);
  const Launcher launch(mask);
  Tensor cu_seqlens = new_ints(mask, mask.size(0) + 1), indices = new_ints(mask, capacity);
  SelectParams p = select_params(mask, cu_seqlens, capacity);
  p.indices = mutable_data<int32_t>(indices);
  launch_select_counts(launch, p);
  launch_select_write(launch, p);
  return {indices, cu_seqlens};
}

Tensor gather_tokens(const Tensor& x, const Tensor& indices) {
  RowCall call("gather_tokens", x, indices);
  const Launcher launch(x);
  Tensor out = new_rows(x, call.p.count, call.p.channels);
  call.p.tokens_out = out.mutable_data_ptr();
  launch_gather(launch, call.p, x.element_size());
  return out;
}

Tensor gather_tokens_backward(const Tensor& grad, const Tensor& indices, int64_t rows) {
  const char* op = "gather_tokens_backward";
  check_rows(op, "grad", grad);
  TP_CHECK(rows >= 0, op, "rows must be >= 0, got ", rows);
  check_row_indices(op, indices, grad, rows);
  check_size(op, "grad", grad, 0, indices.numel());
  const Launcher launch(grad);
  const Tensor index = as_contiguous(indices), g = inner_contiguous(grad);
  Tensor out = new_rows(g, rows, g.size(1)), head = new_ints(g, rows), next = new_ints(g, index.numel());
  RowParams p;
  p.map_out = out.mutable_data_ptr();
  p.tokens = g.const_data_ptr(), p.token_stride = g.stride(0);
  p.indices = data<int32_t>(index);
  p.rows = rows, p.count = index.numel(), p.channels = g.size(1);
  visit_floating_cuda(op, g.scalar_type(), [&]<typename T>() {
    launch_gather_backward<T>(launch, p, mutable_data<int32_t>(head), mutable_data<int32_t>(next));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gather_layer_norm(const Tensor& x, const Tensor& indices, const Optional& weight,
                                                     const Optional& bias, double eps) {
  const char* op = "gather_layer_norm";
  RowCall call(op, x, indices);
  call.set_norm(op, weight, bias);
  const Launcher launch(x);
  Tensor out = new_rows(x, call.p.count, call.p.channels);
  Tensor mean = call.new_stat(call.p.count), rstd = call.new_stat(call.p.count);
  call.p.tokens_out = out.mutable_data_ptr();
  call.p.mean = mean.mutable_data_ptr(), call.p.rstd = rstd.mutable_data_ptr();
  call.p.eps = eps;
  visit_floating_cuda(op, x.scalar_type(), [&]<typename T>() { launch_gather_norm<T>(launch, call.p); });
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
  const Launcher launch(x);
  Tensor grad_rows = new_rows(x, call.p.count, call.p.channels);
  Tensor grad_weight = call.new_stat(call.p.channels), grad_bias = call.new_stat(call.p.channels);
  Tensor partial = call.new_stat(norm_slices(call.p.count) * 2 * call.p.channels);
  call.p.tokens_out = grad_rows.mutable_data_ptr();
  visit_floating_cuda(op, x.scalar_type(), [&]<typename T>() {
    using A = Acc<T>;
    launch_gather_norm_backward<T>(launch, call.p, mutable_data<A>(partial), mutable_data<A>(grad_weight),
                                   mutable_data<A>(grad_bias));
  });
  return {grad_rows, grad_weight, grad_bias};
}

RowCall scatter_call(const char* op, const Tensor& features, const Tensor& tokens, const Tensor& indices,
                     const Optional& scale, bool add) {
  RowCall call(op, features, indices, "features");
  call.set_tokens(op, "tokens", tokens);
  call.set_scale(op, scale);
  check_unique(op, "indices", call.indices, call.p.rows);
  call.p.add = add;
  return call;
}

Tensor scatter_tokens(const Tensor& features, const Tensor& tokens, const Tensor& indices, const Optional& scale,
                      bool add) {
  const char* op = "scatter_tokens";
  RowCall call = scatter_call(op, features, tokens, indices, scale, add);
  const Launcher launch(features);
  Tensor out = new_rows(features, call.p.rows, call.p.channels), winner = new_ints(features, call.p.rows);
  call.p.map_out = out.mutable_data_ptr();
  visit_floating_cuda(op, features.scalar_type(),
                      [&]<typename T>() { launch_scatter<T>(launch, call.p, mutable_data<int32_t>(winner)); });
  return out;
}

void scatter_tokens_(const Tensor& features, const Tensor& tokens, const Tensor& indices, const Optional& scale,
                     bool add) {
  const char* op = "scatter_tokens_";
  RowCall call = scatter_call(op, features, tokens, indices, scale, add);
  TP_CHECK(features.is_contiguous(), op, "features must be contiguous, got ", shape_text(features), " with gaps");
  const Launcher launch(features);
  Tensor winner = new_ints(features, call.p.rows);
  call.p.map_out = features.mutable_data_ptr();
  visit_floating_cuda(op, features.scalar_type(),
                      [&]<typename T>() { launch_scatter_in_place<T>(launch, call.p, mutable_data<int32_t>(winner)); });
}

std::tuple<Tensor, Tensor, Tensor> scatter_tokens_backward(const Tensor& grad, const Optional& tokens,
                                                           const Tensor& indices, const Optional& scale, bool add) {
  const char* op = "scatter_tokens_backward";
  RowCall call(op, grad, indices, "grad");
  TP_CHECK(!scale.has_value() || tokens.has_value(), op, "tokens must be given when scale is, got none");
  if (tokens.has_value()) call.set_tokens(op, "tokens", *tokens);
  call.set_scale(op, scale);
  check_unique(op, "indices", call.indices, call.p.rows);
  call.p.add = add;
  const Launcher launch(grad);
  Tensor grad_features = new_rows(grad, call.p.rows, call.p.channels);
  Tensor grad_tokens = new_rows(grad, call.p.count, call.p.channels);
  Tensor grad_scale = call.new_stat(scale.has_value() ? call.p.count : 0), winner = new_ints(grad, call.p.rows);
  call.p.map_out = grad_features.mutable_data_ptr(), call.p.tokens_out = grad_tokens.mutable_data_ptr();
  call.p.scale_grad = scale.has_value() ? grad_scale.mutable_data_ptr() : nullptr;
  visit_floating_cuda(op, grad.scalar_type(),
                      [&]<typename T>() { launch_scatter_backward<T>(launch, call.p, mutable_data<int32_t>(winner)); });
  return {grad_features, grad_tokens, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("select_tokens", TORCH_BOX(&select_tokens));
  m.impl("select_tokens_capacity", TORCH_BOX(&select_tokens_capacity));
  m.impl("gather_tokens", TORCH_BOX(&gather_tokens));
  m.impl("gather_tokens_backward", TORCH_BOX(&gather_tokens_backward));
  m.impl("gather_layer_norm", TORCH_BOX(&gather_layer_norm));
  m.impl("gather_layer_norm_backward", TORCH_BOX(&gather_layer_norm_backward));
  m.impl("scatter_tokens", TORCH_BOX(&scatter_tokens));
  m.impl("scatter_tokens_", TORCH_BOX(&scatter_tokens_));
  m.impl("scatter_tokens_backward", TORCH_BOX(&scatter_tokens_backward));
}

}  // namespace
}  // namespace tokenprune
