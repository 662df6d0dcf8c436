// SPDX-License-Identifier: Apache-2.0
// Check and fill: one function per op, called by the CPU and the CUDA side alike.
#pragma once

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

struct MatchCall {
  Tensor metric;
  std::optional<Tensor> a, b;
  MatchParams p;

  MatchCall(const char* op, const Tensor& m) : metric(m) {
    check_dim(op, "metric", m, 3, "[B, T, C]");
    check_floating(op, "metric", m);
    metric = inner_contiguous(m);
    p.metric = metric.const_data_ptr();
    p.batch = m.size(0), p.tokens = m.size(1), p.channels = m.size(2);
    p.batch_stride = metric.stride(0), p.token_stride = metric.stride(1);
    p.na = (p.tokens + 1) / 2, p.nb = p.tokens / 2;
  }

  void set_index(const char* op, const char* name, const Tensor& t, std::optional<Tensor>& held, int64_t& count) {
    check_dim(op, name, t, 2, "[B, n]");
    check_dtype(op, name, t, ScalarType::Int);
    check_device(op, name, t, metric);
    check_size(op, name, t, 0, p.batch);
    held = as_contiguous(t);
    check_indices(op, name, *held, p.tokens);
    count = t.size(1);
  }

  void set_indices(const char* op, const Tensor& a_index, const Tensor& b_index) {
    set_index(op, "a_index", a_index, a, p.na);
    set_index(op, "b_index", b_index, b, p.nb);
    p.a_index = data<int32_t>(*a), p.b_index = data<int32_t>(*b);
  }

  Tensor new_ints(int64_t columns) const { return allocate(metric, {p.batch, columns}, ScalarType::Int); }
  Tensor new_scores() const { return allocate(metric, {p.batch, p.na}, stat_dtype(metric.scalar_type())); }
};

// The rules of protection and output order of bipartite_soft_matching.
inline SelectMergeParams bipartite_rules(const char* op, MatchParams& m, int64_t r, bool class_token,
                                         bool distill_token, int64_t num_prefix) {
  TP_CHECK(num_prefix >= 0, op, "num_prefix must be >= 0, got ", num_prefix);
  TP_CHECK(num_prefix == 0 || !(class_token || distill_token), op,
           "num_prefix must be 0 beside class_token or distill_token, got ", num_prefix);
  const int64_t protected_tokens = num_prefix + class_token + distill_token;
  const int64_t most = m.tokens > protected_tokens ? (m.tokens - protected_tokens) / 2 : 0;
  TP_CHECK(r >= 0 && r <= most, op, "r must be in [0, ", most, "], got ", r);
  SelectMergeParams s;
  s.batch = m.batch, s.tokens = m.tokens, s.na = m.na, s.nb = m.nb, s.r = r;
  m.protect_a = s.protect_a = num_prefix > 0 ? num_prefix - num_prefix / 2 : class_token;
  m.protect_b = num_prefix > 0 ? num_prefix / 2 : distill_token;
  s.interleave = num_prefix > 0 ? num_prefix : (distill_token ? 2 : 0);
  if (s.interleave > m.tokens) s.interleave = m.tokens;
  s.sort_unmerged = class_token || num_prefix > 0;
  return s;
}

struct MergeCall {
  Tensor x, parent;
  std::optional<Tensor> y, grad, size, size_out, grad_size;
  MergeParams p;

  MergeCall(const char* op, const Tensor& tokens, const Tensor& parents, int64_t out_len,
            const std::optional<Tensor>& sizes, int64_t mode)
      : x(tokens), parent(parents) {
    check_dim(op, "x", tokens, 3, "[B, T, C]");
    check_floating(op, "x", tokens);
    check_dim(op, "parent", parents, 2, "[B, T]");
    check_dtype(op, "parent", parents, ScalarType::Int);
    check_device(op, "parent", parents, tokens);
    check_size(op, "parent", parents, 0, tokens.size(0));
    check_size(op, "parent", parents, 1, tokens.size(1));
    TP_CHECK(out_len >= 0, op, "out_len must be >= 0, got ", out_len);
    TP_CHECK(mode >= kMergeSum && mode <= kMergeWeighted, op,
             "mode must be 0 (sum), 1 (mean), 2 (amax) or 3 (weighted), got ", mode);
    TP_CHECK(mode != kMergeWeighted || sizes.has_value(), op, "size must be given in mode 3 (weighted), got none");
    x = as_contiguous(tokens), parent = as_contiguous(parents);
    check_indices(op, "parent", parent, out_len);
    p.x = x.const_data_ptr(), p.parent = data<int32_t>(parent);
    p.batch = x.size(0), p.tokens = x.size(1), p.channels = x.size(2), p.out_len = out_len, p.mode = mode;
    if (sizes.has_value()) set_stat(op, "size", *sizes, p.tokens, size, p.size);
  }

  void set_stat(const char* op, const char* name, const Tensor& t, int64_t columns, std::optional<Tensor>& held,
                const void*& pointer) {
    check_dim(op, name, t, 2, "[B, T]");
    check_size(op, name, t, 0, p.batch);
    check_size(op, name, t, 1, columns);
    check_dtype(op, name, t, stat_dtype(x.scalar_type()));
    check_device(op, name, t, x);
    held = as_contiguous(t);
    pointer = held->const_data_ptr();
  }

  void set_output_like(const char* op, const char* name, const Tensor& t, std::optional<Tensor>& held,
                       const void*& pointer) {
    check_dim(op, name, t, 3, "[B, T', C]");
    check_size(op, name, t, 0, p.batch);
    check_size(op, name, t, 1, p.out_len);
    check_size(op, name, t, 2, p.channels);
    check_dtype(op, name, t, x.scalar_type());
    check_device(op, name, t, x);
    held = as_contiguous(t);
    pointer = held->const_data_ptr();
  }

  Tensor new_stat(int64_t columns) const { return allocate(x, {p.batch, columns}, stat_dtype(x.scalar_type())); }
  Tensor new_ints(int64_t columns) const { return allocate(x, {p.batch, columns}, ScalarType::Int); }
};

}  // namespace tokenprune
