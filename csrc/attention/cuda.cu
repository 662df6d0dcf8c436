// SPDX-License-Identifier: Apache-2.0
// CUDA registration of the forward and the scores: checks, allocation, launches. One file per direction: they compile
// side by side.
#include "cuda_common.h"
#include "hopper.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

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
  if (!hopper_attention(launch, p, call.dtype, q.get_device_index(), processors)) {
    visit_floating_cuda(op, call.dtype, [&]<typename T>() { attention::launch_forward<T>(launch, p, processors); });
  }
  return {out, lse, cls};
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

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("attention_scores", TORCH_BOX(&attention_scores));
  m.impl("attention_scores_grad_lse", TORCH_BOX(&attention_scores_grad_lse));
}

}  // namespace
}  // namespace tokenprune
