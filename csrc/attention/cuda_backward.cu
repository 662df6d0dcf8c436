// SPDX-License-Identifier: Apache-2.0
// CUDA registration of the backward: checks, allocation, launches.
#include "cuda_common.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    const Optional& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& out, const Tensor& lse,
    const Optional& grad_lse, const Optional& grad_scores, int64_t scores_kind, const Tensor& cu_q, const Tensor& cu_k,
    int64_t max_q, int64_t max_k, const Optional& key_bias, const Optional& q_index, const Optional& kv_index,
    double scale) {
  const char* op = "sparse_attention_backward";
  AttentionCall call(op, q, k, v, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  AttentionParams& p = call.p;
  check_head_dim(op, p.dim);
  call.set_kind(op, scores_kind);
  set_backward_inputs(op, call, grad_out, out, lse, grad_lse, grad_scores);
  Tensor grad_q = call.new_values(p.total_q), grad_k = call.new_values(p.total_k), grad_v = call.new_values(p.total_k),
         grad_bias = call.new_stats(p.total_k), delta = call.new_stats(p.total_q);
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  const Launcher launch(q);
  visit_floating_cuda(op, call.dtype,
                      [&]<typename T>() { attention::launch_backward<T>(launch, p, delta.mutable_data_ptr()); });
  return {grad_q, grad_k, grad_v, grad_bias};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward));
}

}  // namespace
}  // namespace tokenprune
