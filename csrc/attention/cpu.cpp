// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, and the loop over independent items.
#include "cpu.h"

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const AttentionKernels& kernels(Dtype dtype) {
  return dtype == kFloat64 ? attention_kernels_generic : attention_kernels();
}

void fill(const Tensor& t, double value) {
  Tensor target = t;
  torch::stable::fill_(target, value);
}

// Whether the sequences cover all rows; otherwise the uncovered ones need their defined values.
bool covers(const int32_t* cu, int64_t batch, int64_t total) { return cu[batch] == total; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
                                                    int64_t max_k, const Optional& key_bias, const Optional& q_index,
                                                    const Optional& kv_index, double scale, bool want_cls) {
  AttentionCall call("sparse_attention", q, k, v, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  AttentionParams& p = call.p;
  const Dtype dtype = kernel_dtype("sparse_attention", call.dtype);
  Tensor out = call.new_values(p.total_q), lse = call.new_stats(p.total_q),
         cls = call.new_stats(want_cls ? p.total_k : 0);
  if (!covers(p.cu_q, p.batch, p.total_q)) fill(out, 0), fill(lse, -std::numeric_limits<double>::infinity());
  // Keys that no query sees keep the value 0: those of sequences without queries, and beyond the last sequence.
  if (want_cls) fill(cls, 0);
  p.o = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr(), p.cls = want_cls ? cls.mutable_data_ptr() : nullptr;
  const int64_t pairs = p.batch * p.heads, threads = torch::stable::get_num_threads();
  // With few heads per thread, halves of the queries balance better than they cost in packing keys twice.
  const int64_t chunks = pairs >= 4 * threads || pairs % threads == 0 ? 1 : 2;
  const AttentionKernels& table = kernels(dtype);
  const int64_t bytes = table.forward_scratch(p);
  parallel_items(pairs * chunks, p.max_q * p.max_k * p.dim / 8,
                 [&](int64_t item) { table.forward(dtype, p, item, chunks, thread_scratch(bytes)); });
  return {out, lse, cls};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    const Optional& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& out, const Tensor& lse,
    const Optional& grad_lse, const Optional& grad_scores, int64_t scores_kind, const Tensor& cu_q, const Tensor& cu_k,
    int64_t max_q, int64_t max_k, const Optional& key_bias, const Optional& q_index, const Optional& kv_index,
    double scale) {
  const char* op = "sparse_attention_backward";
  AttentionCall call(op, q, k, v, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  AttentionParams& p = call.p;
  call.set_kind(op, scores_kind);
  set_backward_inputs(op, call, grad_out, out, lse, grad_lse, grad_scores);
  const Dtype dtype = kernel_dtype(op, call.dtype);
  Tensor grad_q = call.new_values(p.total_q), grad_k = call.new_values(p.total_k), grad_v = call.new_values(p.total_k),
         grad_bias = call.new_stats(p.total_k);
  if (!covers(p.cu_q, p.batch, p.total_q)) fill(grad_q, 0);
  if (!covers(p.cu_k, p.batch, p.total_k)) fill(grad_k, 0), fill(grad_v, 0), fill(grad_bias, 0);
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  const AttentionKernels& table = kernels(dtype);
  const int64_t bytes = table.backward_scratch(p);
  parallel_items(p.batch * p.heads, p.max_q * p.max_k * p.dim / 4,
                 [&](int64_t item) { table.backward(dtype, p, item, thread_scratch(bytes)); });
  return {grad_q, grad_k, grad_v, grad_bias};
}

void run_scores(const AttentionCall& call, const char* op) {
  const AttentionParams& p = call.p;
  const Dtype dtype = kernel_dtype(op, call.dtype);
  const AttentionKernels& table = kernels(dtype);
  const int64_t bytes = table.backward_scratch(p);
  parallel_items(p.batch * p.heads, (p.scores_kind == 0 ? 1 : p.max_q) * p.max_k * p.dim / 16,
                 [&](int64_t item) { table.scores(dtype, p, item, thread_scratch(bytes)); });
}

Tensor attention_scores(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
                        int64_t max_q, int64_t max_k, const Optional& key_bias, const Optional& q_index,
                        const Optional& kv_index, double scale, int64_t kind) {
  const char* op = "attention_scores";
  AttentionCall call(op, q, k, std::nullopt, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale);
  call.set_kind(op, kind);
  call.p.lse_in = call.set_stat(op, "lse", lse, call.p.total_q);
  Tensor scores = call.new_stats(call.p.total_k);
  if (!covers(call.p.cu_k, call.p.batch, call.p.total_k)) fill(scores, 0);
  call.p.scores = scores.mutable_data_ptr();
  run_scores(call, op);
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
  if (!covers(call.p.cu_q, call.p.batch, call.p.total_q)) fill(grad_lse, 0);
  call.p.grad_lse_out = grad_lse.mutable_data_ptr();
  run_scores(call, op);
  return grad_lse;
}

std::tuple<Tensor, Tensor, Tensor> policy_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& policy, double eps, double scale) {
  PolicyCall call("policy_attention", q, k, v, policy, eps, scale);
  PolicyParams& p = call.p;
  Tensor out = call.new_values(), row_max = call.new_stats(), row_sum = call.new_stats();
  p.o = out.mutable_data_ptr(), p.row_max = row_max.mutable_data_ptr(), p.row_sum = row_sum.mutable_data_ptr();
  const Dtype dtype = kernel_dtype("policy_attention", call.dtype);
  const AttentionKernels& table = kernels(dtype);
  const int64_t bytes = table.policy_scratch(p);
  parallel_items(p.batch * p.heads, p.tokens * p.tokens * p.dim / 8,
                 [&](int64_t item) { table.policy_forward(dtype, p, item, thread_scratch(bytes)); });
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
  call.set_rows(op, "grad_out", grad_out, p.grad_out, p.grad_out_batch);
  call.set_rows(op, "out", out, p.out, p.out_batch);
  p.row_max = call.set_rowstat(op, "row_max", row_max);
  p.row_sum = call.set_rowstat(op, "row_sum", row_sum);
  Tensor grad_q = call.new_values(), grad_k = call.new_values(), grad_v = call.new_values(),
         grad_policy = call.new_stats();
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.grad_policy = grad_policy.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, call.dtype);
  const AttentionKernels& table = kernels(dtype);
  const int64_t bytes = table.policy_scratch(p);
  parallel_items(p.batch * p.heads, p.tokens * p.tokens * p.dim / 4,
                 [&](int64_t item) { table.policy_backward(dtype, p, item, thread_scratch(bytes)); });
  return {grad_q, grad_k, grad_v, grad_policy};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("sparse_attention_backward", TORCH_BOX(&sparse_attention_backward));
  m.impl("attention_scores", TORCH_BOX(&attention_scores));
  m.impl("attention_scores_grad_lse", TORCH_BOX(&attention_scores_grad_lse));
  m.impl("policy_attention", TORCH_BOX(&policy_attention));
  m.impl("policy_attention_backward", TORCH_BOX(&policy_attention_backward));
}

}  // namespace
}  // namespace tokenprune
