// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, ranking of the matches, and the loops over rows.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const MergeKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? merge_kernels_generic : merge_kernels(); }

void run_match(const char* op, MatchCall& call, Tensor& score, Tensor& nearest) {
  MatchParams& p = call.p;
  p.score = score.mutable_data_ptr(), p.nearest = mutable_data<int32_t>(nearest);
  const Dtype dtype = kernel_dtype(op, call.metric.scalar_type());
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks =
      p.batch >= 2 * threads || p.batch % threads == 0 ? 1 : std::min<int64_t>(threads, (p.na + 47) / 48);
  const MergeKernels& table = kernels(dtype);
  const int64_t bytes = table.match_scratch(p);
  if (p.na == 0) return;
  parallel_items(p.batch * chunks, p.na * p.nb * p.channels / 16 / chunks,
                 [&](int64_t item) { table.match(dtype, p, item, chunks, thread_scratch(bytes)); });
}

// Order by score, best first; equal scores by index. Protected tokens stay behind all others.
template <typename C>
void rank_image(const SelectMergeParams& p, const C* score, const int32_t* nearest, int64_t image,
                std::vector<int32_t>& order) {
  order.resize(p.na);
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; };
  const auto free_begin = order.begin() + std::min(p.protect_a, p.na);
  if (p.sort_unmerged) {  // only the r best are needed in order
    std::partial_sort(free_begin, free_begin + p.r, order.end(), before);
  } else {
    std::sort(free_begin, order.end(), before);
  }
  int32_t *unm = p.unm + image * (p.na - p.r), *src = p.src + image * p.r, *dst = p.dst + image * p.r;
  std::copy(free_begin, free_begin + p.r, src);
  std::copy(order.begin(), free_begin, unm);
  std::copy(free_begin + p.r, order.end(), unm + (free_begin - order.begin()));
  if (p.sort_unmerged) std::sort(unm, unm + (p.na - p.r));

  // Output rows: the interleaved front keeps its places, then the other unmerged tokens, then the other b-tokens.
  const int64_t front_a = (p.interleave + 1) / 2, front_b = p.interleave / 2, kept = p.na - p.r;
  const auto b_row = [&](int64_t j) { return static_cast<int32_t>(j < front_b ? 2 * j + 1 : kept + j); };
  int32_t* parent = p.parent + image * p.tokens;
  for (int64_t i = 0; i < kept; ++i) parent[2 * unm[i]] = static_cast<int32_t>(i < front_a ? 2 * i : i + front_b);
  for (int64_t j = 0; j < p.nb; ++j) parent[2 * j + 1] = b_row(j);
  for (int64_t i = 0; i < p.r; ++i) {
    dst[i] = nearest[src[i]];
    parent[2 * src[i]] = b_row(dst[i]);
  }
}

// A metric per head [B, T, H, D] -> its mean [B, T, D]; a plain metric as it is.
Tensor without_heads(const char* op, const Tensor& metric) {
  if (metric.dim() != 4) return metric;
  check_floating(op, "metric", metric);
  TP_CHECK(metric.size(2) > 0, op, "metric must have at least one head, got ", shape_text(metric));
  const Tensor keys = inner_contiguous(metric);
  Tensor mean = allocate(keys, {keys.size(0), keys.size(1), keys.size(3)});
  HeadsParams p;
  p.keys = keys.const_data_ptr(), p.mean = mean.mutable_data_ptr();
  p.tokens = keys.size(1), p.heads = keys.size(2), p.dim = keys.size(3);
  p.batch_stride = keys.stride(0), p.token_stride = keys.stride(1), p.head_stride = keys.stride(2);
  const Dtype dtype = kernel_dtype(op, keys.scalar_type());
  parallel_ranges(keys.size(0) * p.tokens, p.heads * p.dim / 8,
                  [&](int64_t begin, int64_t end) { kernels(dtype).mean_heads(dtype, p, begin, end); });
  return mean;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_soft_matching(const Tensor& metric, int64_t r, bool class_token,
                                                                   bool distill_token, int64_t num_prefix) {
  const char* op = "bipartite_soft_matching";
  MatchCall call(op, without_heads(op, metric));
  SelectMergeParams s = bipartite_rules(op, call.p, r, class_token, distill_token, num_prefix);
  Tensor score = call.new_scores(), nearest = call.new_ints(call.p.na);
  run_match(op, call, score, nearest);
  Tensor unm = call.new_ints(s.na - r), src = call.new_ints(r), dst = call.new_ints(r),
         parent = call.new_ints(s.tokens);
  s.unm = mutable_data<int32_t>(unm), s.src = mutable_data<int32_t>(src), s.dst = mutable_data<int32_t>(dst);
  s.parent = mutable_data<int32_t>(parent);
  const int32_t* near = call.p.nearest;
  const bool is_double = call.metric.scalar_type() == ScalarType::Double;
  parallel_items(s.batch, s.na * 16, [&](int64_t image) {
    std::vector<int32_t> order;
    if (is_double) {
      rank_image(s, static_cast<const double*>(call.p.score) + image * s.na, near + image * s.na, image, order);
    } else {
      rank_image(s, static_cast<const float*>(call.p.score) + image * s.na, near + image * s.na, image, order);
    }
  });
  return {unm, src, dst, parent};
}

std::tuple<Tensor, Tensor> nearest_tokens(const Tensor& metric, const Tensor& a_index, const Tensor& b_index) {
  const char* op = "nearest_tokens";
  MatchCall call(op, metric);
  call.set_indices(op, a_index, b_index);
  Tensor score = call.new_scores(), nearest = call.new_ints(call.p.na);
  run_match(op, call, score, nearest);
  return {score, nearest};
}

// Member lists per output row, ascending: counting sort of the parents.
void fill_members(const MergeParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* parent = p.parent + b * p.tokens;
    int32_t *offsets = p.offsets + b * (p.out_len + 1), *members = p.members + b * p.tokens;
    std::memset(offsets, 0, (p.out_len + 1) * sizeof(int32_t));
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (parent[t] >= 0) ++offsets[parent[t] + 1];
    }
    for (int64_t o = 0; o < p.out_len; ++o) offsets[o + 1] += offsets[o];
    for (int64_t t = 0; t < p.tokens; ++t) {
      if (parent[t] >= 0) members[offsets[parent[t]]++] = static_cast<int32_t>(t);
    }
    for (int64_t o = p.out_len; o > 0; --o) offsets[o] = offsets[o - 1];  // undo the advance
    offsets[0] = 0;
  }
}

struct Members {
  std::vector<int32_t> offsets, members;
  explicit Members(MergeParams& p) : offsets(p.batch * (p.out_len + 1)), members(p.batch * p.tokens) {
    p.offsets = offsets.data(), p.members = members.data();
    fill_members(p);
  }
};

std::tuple<Tensor, Tensor> merge_tokens(const Tensor& x, const Tensor& parent, int64_t out_len, const Optional& size,
                                        int64_t mode) {
  const char* op = "merge_tokens";
  MergeCall call(op, x, parent, out_len, size, mode);
  MergeParams& p = call.p;
  Tensor y = allocate(call.x, {p.batch, out_len, p.channels}), size_out = call.new_stat(out_len);
  p.y = y.mutable_data_ptr(), p.size_out = size_out.mutable_data_ptr();
  const Members lists(p);
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  parallel_ranges(p.batch * out_len, p.channels / 2,
                  [&](int64_t begin, int64_t end) { kernels(dtype).merge(dtype, p, begin, end); });
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
  Tensor grad_x = torch::stable::new_zeros(call.x, {p.batch, p.tokens, p.channels});  // dropped tokens keep 0
  Tensor grad_size = torch::stable::new_zeros(call.x, {p.batch, p.tokens}, stat_dtype(x.scalar_type()));
  p.grad_x = grad_x.mutable_data_ptr(), p.grad_size = grad_size.mutable_data_ptr();
  const Members lists(p);
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  parallel_ranges(p.batch * p.out_len, p.channels,
                  [&](int64_t begin, int64_t end) { kernels(dtype).merge_backward(dtype, p, begin, end); });
  return {grad_x, grad_size};
}

template <typename C>
void fill_log(const Tensor& sizes, const Tensor& logs) {
  const C* size = data<C>(sizes);
  C* to = mutable_data<C>(logs);
  for (int64_t i = 0; i < sizes.numel(); ++i) to[i] = std::log(size[i]);
}

}  // namespace

// Without the way back to Python in between, which small models at batch 1 feel.
std::tuple<Tensor, Tensor, Tensor, Tensor> match_and_merge(const Tensor& x, const Tensor& metric, int64_t r,
                                                           const Optional& size, bool class_token, bool distill_token,
                                                           int64_t num_prefix) {
  const char* op = "match_and_merge";
  check_dim(op, "x", x, 3, "[B, T, C]");
  TP_CHECK(metric.dim() >= 3 && metric.size(0) == x.size(0) && metric.size(1) == x.size(1), op,
           "metric must have shape [", x.size(0), ", ", x.size(1), ", ...] as x, got ", shape_text(metric));
  const Tensor parent = std::get<3>(bipartite_soft_matching(metric, r, class_token, distill_token, num_prefix));
  auto [y, size_out] = merge_tokens(x, parent, x.size(1) - r, size, size.has_value() ? kMergeWeighted : kMergeMean);
  Tensor log_size = allocate(size_out, {size_out.size(0), size_out.size(1)});
  size_out.scalar_type() == ScalarType::Double ? fill_log<double>(size_out, log_size)
                                               : fill_log<float>(size_out, log_size);
  return {y, size_out, log_size, parent};
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("match_and_merge", TORCH_BOX(&match_and_merge));
  m.impl("bipartite_soft_matching", TORCH_BOX(&bipartite_soft_matching));
  m.impl("nearest_tokens", TORCH_BOX(&nearest_tokens));
  m.impl("merge_tokens", TORCH_BOX(&merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&merge_tokens_backward));
}

}  // namespace
}  // namespace tokenprune
