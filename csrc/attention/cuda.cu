// SPDX-License-Identifier: Apache-2.0
// CUDA registration: checks, allocation, launches.
#include "../common/launch.h"
#include "checks.h"
#include "kernel_launch.cuh"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

void check_head_dim(const char* op, int64_t dim) {
  TP_CHECK(dim <= attention::kMostDim, op, "the head dimension on CUDA must be <= ", attention::kMostDim, ", got ",
           dim);
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
                                                    int64_t max_k, const Optional& key_bias, const Optional& q_index,
                                                    const Optional& kv_index, double scale, bool want_cls) {
  const char* op = "sparse_attention";
  AttentionCall call(op, q, k, v, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  AttentionParams& p = call.p;
  check_head_dim(op, p.dim);
  Tensor out = call.new_values(p.total_q), lse = call.new_stats(p.total_q),
         cls = call.new_stats(want_cls ? p.total_k : 0);
  p.o = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  p.cls = want_cls && p.total_k > 0 ? cls.mutable_data_ptr() : nullptr;
  const Launcher launch(q);
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  visit_floating_cuda(op, call.dtype, [&]<typename T>() { attention::launch_forward<T>(launch, p, processors); });
  return {out, lse, cls};
}

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

void run_scores(const char* op, const AttentionCall& call) {
  check_head_dim(op, call.p.dim);
  const Launcher launch(call.like);
  visit_floating_cuda(op, call.dtype, [&]<typename T>() { attention::launch_scores<T>(launch, call.p); });
}

Tensor attention_scores(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                        int64_t max_q, int64_t max_k, const Optional& key_bias, const Optional& q_index,
                        const Optional& kv_index, double scale, int64_t kind) {
  const char* op = "attention_scores";
  AttentionCall call(op, q, k, std::nullopt, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  call.set_kind(op, kind);
  call.p.lse_in = call.set_stat(op, "lse", lse, call.p.total_q);
  Tensor scores = call.new_stats(call.p.total_k);
  if (scores.numel() == 0) return scores;
  call.p.scores = scores.mutable_data_ptr();
  run_scores(op, call);
  return scores;
}

Tensor attention_scores_grad_lse(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& lse,
                                 const Tensor& cu_q, const Tensor& cu_k, int64_t max_q, int64_t max_k,
                                 const Optional& key_bias, const Optional& q_index, const Optional& kv_index,
                                 double scale, int64_t kind) {
  const char* op = "attention_scores_grad_lse";
  AttentionCall call(op, q, k, std::nullopt, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  call.set_kind(op, kind);
  call.p.lse_in = call.set_stat(op, "lse", lse, call.p.total_q);
  call.p.grad_scores = call.set_stat(op, "grad", grad, call.p.total_k);
  Tensor grad_lse = call.new_stats(call.p.total_q);
  call.p.grad_lse_out = grad_lse.mutable_data_ptr();
  run_scores(op, call);
  return grad_lse;
}

Tensor new_stats_of(const PolicyCall& call, int64_t last, ScalarType dtype) {
  return torch::stable::new_empty(call.like, {call.p.batch, call.p.heads, last}, dtype);
}

std::tuple<Tensor, Tensor, Tensor> policy_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& policy, double eps, double scale) {
  const char* op = "policy_attention";
  PolicyCall call(op, q, k, v, policy, eps, scale);
  PolicyParams& p = call.p;
  check_head_dim(op, p.dim);
  Tensor out = call.new_values(), row_max = call.new_stats(), row_sum = call.new_stats();
  Tensor value_sum = new_stats_of(call, p.dim, stat_dtype(call.dtype));
  p.o = out.mutable_data_ptr(), p.row_max = row_max.mutable_data_ptr(), p.row_sum = row_sum.mutable_data_ptr();
  attention::PolicyWorkspace workspace;
  if (eps != 0) workspace.value_sum = value_sum.mutable_data_ptr();
  const Launcher launch(q);
  visit_floating_cuda(op, call.dtype, [&]<typename T>() { attention::launch_policy<T>(launch, p, workspace); });
  return {out, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_attention_backward(const Tensor& grad_out, const Tensor& q,
                                                                     const Tensor& k, const Tensor& v,
                                                                     const Tensor& policy, const Tensor& out,
                                                                     const Tensor& row_max, const Tensor& row_sum,
                                                                     double eps, double scale) {
  const char* op = "policy_attention_backward";
  PolicyCall call(op, q, k, v, policy, eps, scale);
  PolicyParams& p = call.p;
  check_head_dim(op, p.dim);
  call.set_rows(op, "grad_out", grad_out, p.grad_out, p.grad_out_batch);
  call.set_rows(op, "out", out, p.out, p.out_batch);
  p.row_max = call.set_rowstat(op, "row_max", row_max);
  p.row_sum = call.set_rowstat(op, "row_sum", row_sum);
  Tensor grad_q = call.new_values(), grad_k = call.new_values(), grad_v = call.new_values(),
         grad_policy = call.new_stats();
  Tensor value_sum = new_stats_of(call, p.dim, stat_dtype(call.dtype)), row_grad = call.new_stats(),
         top_grad = call.new_stats(), top = new_stats_of(call, p.tokens, ScalarType::Int);
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.grad_policy = grad_policy.mutable_data_ptr();
  attention::PolicyWorkspace workspace{nullptr, row_grad.mutable_data_ptr(), top_grad.mutable_data_ptr(),
                                       mutable_data<int32_t>(top)};
  if (eps != 0) workspace.value_sum = value_sum.mutable_data_ptr();
  const Launcher launch(q);
  visit_floating_cuda(op, call.dtype,
                      [&]<typename T>() { attention::launch_policy_backward<T>(launch, p, workspace); });
  return {grad_q, grad_k, grad_v, grad_policy};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward));
  m.impl("attention_scores", TORCH_BOX(&attention_scores));
  m.impl("attention_scores_grad_lse", TORCH_BOX(&attention_scores_grad_lse));
  m.impl("policy_attention", TORCH_BOX(&policy_attention));
  m.impl("policy_attention_backward", TORCH_BOX(&policy_attention_backward));
}

}  // namespace
}  // namespace tokenprune
