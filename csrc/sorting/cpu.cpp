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

template <typename C>
void sample_sequences(const SequenceParams& p, Dtype dtype, int32_t* rows, int64_t* counts) {
  const SortingKernels& table = kernels(dtype);
  std::vector<C> significance(p.total);
  parallel_ranges(p.total, p.heads * p.dim / 4,
                  [&](int64_t begin, int64_t end) { table.significance(dtype, p, begin, end, significance.data()); });
  const auto sort = [&](const C* x, int64_t n, int32_t* order) {
    table.argsort(sizeof(C) == 8 ? kFloat64 : kFloat32, x, n, order, thread_scratch(table.argsort_scratch(n)));
  };
  parallel_items(p.batch, (p.max_seqlen + p.points) * 60, [&](int64_t b) {
    counts[b] = sample_sequence<C>(p, b, significance.data(), sort, rows + b * p.max_seqlen);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_tokens(const Tensor& attention, const Tensor& v, const Tensor& initial,
                                                 const Tensor& cu_seqlens, int64_t max_seqlen, const Optional& key_bias,
                                                 int64_t num_prefix, bool padded, bool drop) {
  const char* op = "sample_tokens";
  SequenceCall call(op, attention, v, initial, cu_seqlens, max_seqlen, key_bias, num_prefix);
  const SequenceParams& p = call.p;
  Tensor rows = allocate(v, {p.batch, max_seqlen}, ScalarType::Int),
         starts = allocate(v, {p.batch + 1}, ScalarType::Int);
  std::vector<int64_t> counts(p.batch);
  const Dtype dtype = kernel_dtype(op, v.scalar_type());
  (dtype == kFloat64 ? sample_sequences<double> : sample_sequences<float>)(p, dtype, mutable_data<int32_t>(rows),
                                                                           counts.data());
  int64_t columns = max_seqlen;
  if (padded && drop && p.batch > 0) {
    columns = *std::max_element(counts.begin(), counts.end());
    const Tensor all = rows;
    rows = allocate(v, {p.batch, columns}, ScalarType::Int);
    for (int64_t b = 0; b < p.batch; ++b) {
      std::copy_n(data<int32_t>(all) + b * max_seqlen, columns, mutable_data<int32_t>(rows) + b * columns);
    }
  }
  int32_t *to = mutable_data<int32_t>(starts), total = 0;
  for (int64_t b = 0; b <= p.batch; ++b) {
    to[b] = total;
    if (b < p.batch) total += static_cast<int32_t>(padded ? columns : counts[b]);
  }
  Tensor source = allocate(v, {total}, ScalarType::Int);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* from = data<int32_t>(rows) + b * columns;
    for (int32_t i = 0; i < to[b + 1] - to[b]; ++i) {
      mutable_data<int32_t>(source)[to[b] + i] = from[i] < 0 ? -1 : p.cu_seqlens[b] + from[i];
    }
  }
  return {rows, source, starts};
}

namespace {

void find_groups(GroupParams& p, Dtype dtype) {
  const SortingKernels& table = kernels(dtype);
  const int64_t bytes = table.group_scratch(dtype, p);
  parallel_items(p.rows, p.tokens * (p.dim * p.hashes / 16 + 100),
                 [&](int64_t row) { table.group(dtype, p, row, thread_scratch(bytes)); });
}

std::tuple<Tensor, Tensor> hash_groups(const Tensor& x, const Tensor& projection, const Tensor& offset, double width,
                                       double scale, const Optional& valid) {
  const char* op = "hash_groups";
  GroupCall call(op, x, projection, offset, width, scale, valid);
  find_groups(call.p, kernel_dtype(op, x.scalar_type()));
  return {call.ids, call.counts};
}

}  // namespace

HeadGroups group_heads(const char* op, const Tensor& x, const Tensor& cu_seqlens, int64_t max_seqlen,
                       const Tensor& projection, const Tensor& offset, double width, double scale) {
  GroupCall call(op, x, cu_seqlens, max_seqlen, projection, offset, width, scale);
  const GroupParams& p = call.p;
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  find_groups(call.p, dtype);
  Tensor starts = allocate(x, {p.rows + 1}, ScalarType::Int);
  int32_t* to = mutable_data<int32_t>(starts);
  to[0] = 0;
  for (int64_t r = 0; r < p.rows; ++r) to[r + 1] = to[r] + p.found[r];
  Tensor means = allocate(x, {to[p.rows], p.dim});
  const SortingKernels& table = kernels(dtype);
  const int64_t bytes = table.group_scratch(dtype, p), row_bytes = p.dim * x.element_size();
  char* out = static_cast<char*>(means.mutable_data_ptr());
  parallel_items(p.rows, p.tokens * p.dim / 4,
                 [&](int64_t r) { table.group_means(dtype, p, r, out + to[r] * row_bytes, thread_scratch(bytes)); });
  return {call.ids, starts, means};
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("argsort_rows", TORCH_BOX(&argsort_rows));
  m.impl("sample_rows", TORCH_BOX(&sample_rows));
  m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
  m.impl("hash_groups", TORCH_BOX(&hash_groups));
  m.impl("balanced_attention", TORCH_BOX(&balanced_attention));
}

}  // namespace
}  // namespace tokenprune
