// SPDX-License-Identifier: Apache-2.0
// CUDA registration of policy_attention: checks, allocation, launches.
#include "cuda_common.h"

namespace tokenprune {
namespace {

Tensor new_stats_of(const PolicyCall& call, int64_t last, ScalarType dtype) {
  return allocate(call.like, {call.p.batch, call.p.heads, last}, dtype);
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
  Tensor pivot = call.new_stats(), row_grad = call.new_stats(), top_grad = call.new_stats(),
         top = new_stats_of(call, p.tokens, ScalarType::Int);
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.grad_policy = grad_policy.mutable_data_ptr();
  const attention::PolicyWorkspace workspace{nullptr, pivot.mutable_data_ptr(), row_grad.mutable_data_ptr(),
                                             top_grad.mutable_data_ptr(), mutable_data<int32_t>(top)};
  const Launcher launch(q);
  visit_floating_cuda(op, call.dtype,
                      [&]<typename T>() { attention::launch_policy_backward<T>(launch, p, workspace); });
  return {grad_q, grad_k, grad_v, grad_policy};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("policy_attention", TORCH_BOX(&policy_attention));
  m.impl("policy_attention_backward", TORCH_BOX(&policy_attention_backward));
}

}  // namespace
}  // namespace tokenprune
