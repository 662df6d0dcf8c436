// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, and the loops over rows.
#include "cpu.h"

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"
#include "sample.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const SortingKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? sorting_kernels_generic : sorting_kernels(); }

}  // namespace

Tensor argsort_rows(const Tensor& input) {
  const char* op = "argsort_rows";
  check_sortable(op, input);
  const Tensor x = inner_contiguous(input);
  const int64_t n = x.size(1), stride = x.stride(0) * x.element_size();
  Tensor order = allocate(x, {x.size(0), n}, ScalarType::Int);
  int32_t* to = mutable_data<int32_t>(order);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  const SortingKernels& table = kernels(dtype);
  const int64_t bytes = table.argsort_scratch(n);
  parallel_ranges(x.size(0), n * 16, [&](int64_t begin, int64_t end) {
    char* scratch = thread_scratch(bytes);
    for (int64_t r = begin; r < end; ++r) table.argsort(dtype, from + r * stride, n, to + r * n, scratch);
  });
  return order;
}

namespace {

std::tuple<Tensor, Tensor> balanced_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_order,
                                              const Tensor& k_order, const Optional& q_lengths,
                                              const Optional& k_lengths, const Optional& key_bias, int64_t q_size,
                                              int64_t k_size, bool per_row, double scale) {
  const char* op = "balanced_attention";
  BalancedCall call(op, q, k, v, q_order, k_order, q_lengths, k_lengths, key_bias, q_size, k_size, per_row, scale);
  BalancedParams& p = call.p;
  Tensor out = allocate(q, {p.rows, p.q.tokens, p.dim}),
         lse = allocate(q, {p.rows, p.q.tokens}, stat_dtype(q.scalar_type()));
  p.out = out.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  const Dtype dtype = kernel_dtype(op, q.scalar_type());
  const SortingKernels& table = kernels(dtype);
  const int64_t bytes = table.attention_scratch(p);
  parallel_items(p.rows, p.rounds * p.q.tokens * std::min(p.k.size, p.k.tokens) * p.dim / 8,
                 [&](int64_t row) { table.attention(dtype, p, row, thread_scratch(bytes)); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sample_rows(const Tensor& scores, const Tensor& order,
                                                               int64_t grid_points, const Optional& grid_counts,
                                                               const Optional& valid, bool published) {
  const char* op = "sample_rows";
  SampleCall call(op, scores, order, grid_points, grid_counts, valid, published);
  SampleParams& p = call.p;
  Tensor cdf = allocate(scores, {p.batch, p.n}), grid = allocate(scores, {p.batch, p.points}),
         pick = allocate(scores, {p.batch, p.points}, ScalarType::Long),
         kept = allocate(scores, {p.batch, p.n}, ScalarType::Bool),
         rows = allocate(scores, {p.batch, p.n}, ScalarType::Int);
  p.pick = mutable_data<int64_t>(pick), p.cdf = cdf.mutable_data_ptr(), p.grid = grid.mutable_data_ptr();
  p.kept = mutable_data<bool>(kept), p.rows = mutable_data<int32_t>(rows);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  parallel_items(p.batch, (p.n + p.points) * 40,
                 [&](int64_t row) { wide ? SampleRow<double>(p, row).run(row) : SampleRow<float>(p, row).run(row); });
  return {cdf, grid, pick, kept, rows};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("argsort_rows", TORCH_BOX(&argsort_rows));
  m.impl("sample_rows", TORCH_BOX(&sample_rows));
  m.impl("balanced_attention", TORCH_BOX(&balanced_attention));
}

}  // namespace
}  // namespace tokenprune
