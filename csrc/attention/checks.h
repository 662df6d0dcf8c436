// SPDX-License-Identifier: Apache-2.0
// Check and fill: one function per op, called by the CPU and the CUDA side alike.
#pragma once

#include <algorithm>

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

inline Rows rows_of(const Tensor& t) {  // [R, H, D]
  return {t.const_data_ptr(), t.size(0), t.stride(0), t.stride(1)};
}

// Tensors kept alive while the kernel runs, and the parameters that point into them.
struct AttentionCall {
  std::vector<Tensor> held;
  AttentionParams p;
  ScalarType dtype;
  Tensor like;

  const Tensor& hold(const Tensor& t) { return held.emplace_back(t); }

  AttentionCall(const char* op, const Tensor& q, const Tensor& k, const std::optional<Tensor>& v, const Tensor& cu_q,
                const Tensor& cu_k, int64_t max_q, int64_t max_k, const std::optional<Tensor>& key_bias,
                const std::optional<Tensor>& q_index, const std::optional<Tensor>& kv_index, double scale)
      : dtype(q.scalar_type()), like(q) {
    held.reserve(16);
    check_dim(op, "q", q, 3, "[Tq, H, D]");
    check_floating(op, "q", q);
    set_rows(op, "q", q, p.q);
    p.heads = q.size(1), p.dim = q.size(2), p.scale = scale;
    set_rows(op, "k", k, p.k);
    if (v.has_value()) {
      set_rows(op, "v", *v, p.v);
      check_size(op, "v", *v, 0, k.size(0));
    }
    p.total_q = p.q.rows, p.total_k = p.k.rows;
    if (q_index.has_value()) p.q_index = set_index(op, "q_index", *q_index, p.q.rows, p.total_q);
    if (kv_index.has_value()) p.k_index = set_index(op, "kv_index", *kv_index, p.k.rows, p.total_k);
    p.max_q = max_q, p.max_k = max_k;
    TP_CHECK(max_q >= 0, op, "max_seqlen_q must be >= 0, got ", max_q);
    TP_CHECK(max_k >= 0, op, "max_seqlen_k must be >= 0, got ", max_k);
    p.cu_q = set_cu(op, "cu_seqlens_q", cu_q, p.total_q, max_q, "max_seqlen_q");
    p.cu_k = set_cu(op, "cu_seqlens_k", cu_k, p.total_k, max_k, "max_seqlen_k");
    TP_CHECK(cu_k.numel() == cu_q.numel(), op, "cu_seqlens_k must have the length of cu_seqlens_q (", cu_q.numel(),
             "), got ", cu_k.numel());
    p.batch = cu_q.numel() - 1;
    p.max_q = std::min(max_q, p.total_q), p.max_k = std::min(max_k, p.total_k);  // a bound may be far too large
    if (key_bias.has_value()) {
      check_dim(op, "key_bias", *key_bias, 1, "[Tk]");
      check_size(op, "key_bias", *key_bias, 0, p.total_k);
      check_dtype(op, "key_bias", *key_bias, stat_dtype(dtype));
      check_device(op, "key_bias", *key_bias, like);
      p.key_bias = hold(as_contiguous(*key_bias)).const_data_ptr();
    }
  }

  void set_rows(const char* op, const char* name, const Tensor& t, Rows& rows) {
    check_dim(op, name, t, 3, "[T, H, D]");
    check_dtype(op, name, t, dtype);
    check_device(op, name, t, like);
    check_size(op, name, t, 1, like.size(1));
    check_size(op, name, t, 2, like.size(2));
    rows = rows_of(hold(inner_contiguous(t)));
  }

  const int32_t* set_index(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t& total) {
    check_dim(op, name, t, 1, "[T]");
    check_dtype(op, name, t, ScalarType::Int);
    check_device(op, name, t, like);
    const Tensor& index = hold(as_contiguous(t));
    check_indices(op, name, index, rows);
    total = t.numel();
    return data<int32_t>(index);
  }

  const int32_t* set_cu(const char* op, const char* name, const Tensor& t, int64_t total, int64_t max_length,
                        const char* max_name) {
    check_dim(op, name, t, 1, "[B + 1]");
    check_dtype(op, name, t, ScalarType::Int);
    check_device(op, name, t, like);
    TP_CHECK(t.numel() >= 1, op, name, " must have at least one entry, got ", shape_text(t));
    const Tensor& cu = hold(as_contiguous(t));
    check_cu_seqlens(op, name, cu, total, max_length, max_name);
    return data<int32_t>(cu);
  }

  // [heads, size] statistics given by the caller.
  const void* set_stat(const char* op, const char* name, const Tensor& t, int64_t size) {
    check_dim(op, name, t, 2, "[H, T]");
    check_size(op, name, t, 0, p.heads);
    check_size(op, name, t, 1, size);
    check_dtype(op, name, t, stat_dtype(dtype));
    check_device(op, name, t, like);
    return hold(as_contiguous(t)).const_data_ptr();
  }

  void set_kind(const char* op, int64_t kind) {
    TP_CHECK(kind == 0 || kind == 1, op, "kind must be 0 (cls) or 1 (mean), got ", kind);
    p.scores_kind = kind;
  }

  Tensor new_values(int64_t rows) const { return allocate(like, {rows, p.heads, p.dim}); }
  Tensor new_stats(int64_t size) const { return allocate(like, {p.heads, size}, stat_dtype(dtype)); }
};

inline void set_backward_inputs(const char* op, AttentionCall& call, const std::optional<Tensor>& grad_out,
                                const std::optional<Tensor>& out, const Tensor& lse,
                                const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& grad_scores) {
  AttentionParams& p = call.p;
  TP_CHECK(grad_out.has_value() == out.has_value(), op, "out must be given exactly when grad_out is, got one of them");
  if (grad_out.has_value()) {
    check_dim(op, "grad_out", *grad_out, 3, "[Tq, H, D]");
    check_size(op, "grad_out", *grad_out, 0, p.total_q);
    check_dim(op, "out", *out, 3, "[Tq, H, D]");
    check_size(op, "out", *out, 0, p.total_q);
    call.set_rows(op, "grad_out", *grad_out, p.grad_out);
    call.set_rows(op, "out", *out, p.out);
  }
  p.lse_in = call.set_stat(op, "lse", lse, p.total_q);
  if (grad_lse.has_value()) p.grad_lse = call.set_stat(op, "grad_lse", *grad_lse, p.total_q);
  if (grad_scores.has_value()) p.grad_scores = call.set_stat(op, "grad_scores", *grad_scores, p.total_k);
}

struct PolicyCall {
  std::vector<Tensor> held;
  PolicyParams p;
  ScalarType dtype;
  Tensor like;

  PolicyCall(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& policy, double eps,
             double scale)
      : dtype(q.scalar_type()), like(q) {
    held.reserve(8);
    check_dim(op, "q", q, 4, "[B, N, H, D]");
    check_floating(op, "q", q);
    set_rows(op, "q", q, p.q, p.q_batch);
    set_rows(op, "k", k, p.k, p.k_batch);
    set_rows(op, "v", v, p.v, p.v_batch);
    p.batch = q.size(0), p.tokens = q.size(1), p.heads = q.size(2), p.dim = q.size(3);
    p.eps = eps, p.scale = scale;
    TP_CHECK(eps >= 0, op, "eps must be >= 0, got ", eps);
    check_dim(op, "policy", policy, 2, "[B, N]");
    check_size(op, "policy", policy, 0, p.batch);
    check_size(op, "policy", policy, 1, p.tokens);
    check_dtype(op, "policy", policy, stat_dtype(dtype));
    check_device(op, "policy", policy, like);
    p.policy = held.emplace_back(as_contiguous(policy)).const_data_ptr();
  }

  void set_rows(const char* op, const char* name, const Tensor& t, Rows& rows, int64_t& batch_stride) {
    check_dim(op, name, t, 4, "[B, N, H, D]");
    check_dtype(op, name, t, dtype);
    check_device(op, name, t, like);
    for (int64_t d = 0; d < 4; ++d) check_size(op, name, t, d, like.size(d));
    const Tensor& kept = held.emplace_back(inner_contiguous(t));
    rows = {kept.const_data_ptr(), t.size(1), kept.stride(1), kept.stride(2)};
    batch_stride = kept.stride(0);
  }

  void* set_rowstat(const char* op, const char* name, const Tensor& t) {
    check_dim(op, name, t, 3, "[B, H, N]");
    check_size(op, name, t, 0, p.batch);
    check_size(op, name, t, 1, p.heads);
    check_size(op, name, t, 2, p.tokens);
    check_dtype(op, name, t, stat_dtype(dtype));
    check_device(op, name, t, like);
    return const_cast<void*>(held.emplace_back(as_contiguous(t)).const_data_ptr());
  }

  Tensor new_values() const { return allocate(like, {p.batch, p.tokens, p.heads, p.dim}); }
  Tensor new_stats() const { return allocate(like, {p.batch, p.heads, p.tokens}, stat_dtype(dtype)); }
};

}  // namespace tokenprune
