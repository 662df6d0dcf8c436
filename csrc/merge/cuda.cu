// SPDX-License-Identifier: Apache-2.0
// CUDA side of matching and merging.
#include "../common/launch.h"
#include "checks.h"
#include "kernel.cuh"
#include "kernel_match.cuh"
#include "kernel_select.cuh"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

void run_match(const char* op, const Launcher& launch, MatchCall& call, Tensor& score, Tensor& nearest) {
  MatchParams& p = call.p;
  p.score = score.mutable_data_ptr(), p.nearest = mutable_data<int32_t>(nearest);
  visit_floating_cuda(op, call.metric.scalar_type(), [&]<typename T>() {
    using A = Acc<T>;
    const ScalarType stat = stat_dtype(call.metric.scalar_type());
    Tensor inverse = allocate(call.metric, {p.batch, p.tokens}, stat);
    const int64_t parts = match_parts<T>(p), shared_rows = parts > 1 ? parts * p.batch : 0;
    Tensor part_score = allocate(call.metric, {shared_rows, p.na}, stat);
    Tensor part_nearest = allocate(call.metric, {shared_rows, p.na}, ScalarType::Int);
    MatchParts<A> where;
    where.score = mutable_data<A>(part_score), where.nearest = mutable_data<int32_t>(part_nearest);
    launch_match<T>(launch, p, where, mutable_data<A>(inverse));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_soft_matching(const Tensor& metric, int64_t r, bool class_token,
                                                                   bool distill_token, int64_t num_prefix) {
  const char* op = "bipartite_soft_matching";
  MatchCall call(op, metric);
  SelectMergeParams s = bipartite_rules(op, call.p, r, class_token, distill_token, num_prefix);
  const Launcher launch(metric);
  Tensor score = call.new_scores(), nearest = call.new_ints(call.p.na), rank = call.new_ints(call.p.na);
  run_match(op, launch, call, score, nearest);
  Tensor unm = call.new_ints(s.na - r), src = call.new_ints(r), dst = call.new_ints(r),
         parent = call.new_ints(s.tokens);
  s.score = call.p.score, s.nearest = call.p.nearest;
  s.unm = mutable_data<int32_t>(unm), s.src = mutable_data<int32_t>(src), s.dst = mutable_data<int32_t>(dst);
  s.parent = mutable_data<int32_t>(parent);
  if (metric.scalar_type() == ScalarType::Double) {
    launch_select_merge<double>(launch, s, mutable_data<int32_t>(rank));
  } else {
    launch_select_merge<float>(launch, s, mutable_data<int32_t>(rank));
  }
  return {unm, src, dst, parent};
}

std::tuple<Tensor, Tensor> nearest_tokens(const Tensor& metric, const Tensor& a_index, const Tensor& b_index) {
  const char* op = "nearest_tokens";
  MatchCall call(op, metric);
  call.set_indices(op, a_index, b_index);
  const Launcher launch(metric);
  Tensor score = call.new_scores(), nearest = call.new_ints(call.p.na);
  run_match(op, launch, call, score, nearest);
  return {score, nearest};
}

// Workspace of merge and its backward.
struct Lists {
  Tensor heads, members;
  explicit Lists(MergeCall& call) : heads(call.new_ints(call.p.out_len)), members(call.new_ints(call.p.tokens)) {
    call.p.offsets = mutable_data<int32_t>(heads), call.p.members = mutable_data<int32_t>(members);
  }
};

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& parent, int64_t out_len, const Optional& size,
                                        int64_t mode) {
  const char* op = "merge_tokens";
  MergeCall call(op, x, parent, out_len, size, mode);
  MergeParams& p = call.p;
  const Launcher launch(x);
  Tensor y = allocate(call.x, {p.batch, out_len, p.channels}), size_out = call.new_stat(out_len);
  p.y = y.mutable_data_ptr(), p.size_out = size_out.mutable_data_ptr();
  const Lists lists(call);
  visit_floating_cuda(op, x.scalar_type(), [&]<typename T>() { launch_merge<T>(launch, p); });
  return {y, size_out};
}

std::tuple<Tensor, Tensor> merge_tokens_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                 const Tensor& parent, const Optional& size, const Tensor& size_out,
                                                 const Optional& grad_size_out, int64_t mode) {
  const char* op = "merge_tokens_backward";
  check_dim(op, "y", y, 3, "[B, T', C]");
  MergeCall call(op, x, parent, y.size(1), size, mode);
  MergeParams& p = call.p;
  call.set_output_like(op, "y", y, call.y, p.y_in);
  call.set_output_like(op, "grad", grad, call.grad, p.grad);
  call.set_stat(op, "size_out", size_out, p.out_len, call.size_out, p.size_out_in);
  if (grad_size_out.has_value()) {
    call.set_stat(op, "grad_size_out", *grad_size_out, p.out_len, call.grad_size, p.grad_size_out);
  }
  const Launcher launch(x);
  Tensor grad_x = allocate(call.x, {p.batch, p.tokens, p.channels});
  Tensor grad_size = call.new_stat(p.tokens);
  p.grad_x = grad_x.mutable_data_ptr(), p.grad_size = grad_size.mutable_data_ptr();
  const Lists lists(call);
  visit_floating_cuda(op, x.scalar_type(), [&]<typename T>() { launch_merge_backward<T>(launch, p); });
  return {grad_x, grad_size};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("bipartite_soft_matching", TORCH_BOX(&bipartite_soft_matching));
  m.impl("nearest_tokens", TORCH_BOX(&nearest_tokens));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward));
}

}  // namespace
}  // namespace tokenprune
