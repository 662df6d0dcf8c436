// SPDX-License-Identifier: Apache-2.0
// Check and fill: one function per op, called by the CPU and the CUDA side alike.
#pragma once

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

inline void check_mask(const char* op, const Tensor& mask) {
  check_dim(op, "mask", mask, 2, "[B, N]");
  check_dtype(op, "mask", mask, ScalarType::Bool);
  TP_CHECK(mask.numel() < (int64_t{1} << 31), op, "mask must have less than 2^31 entries, got ", mask.numel());
}

inline void check_rows(const char* op, const char* name, const Tensor& x) {
  check_dim(op, name, x, 2, "[R, C]");
  check_floating(op, name, x);
}

inline void check_row_indices(const char* op, const Tensor& indices, const Tensor& like, int64_t rows) {
  check_dim(op, "indices", indices, 1, "[T]");
  check_dtype(op, "indices", indices, ScalarType::Int);
  check_device(op, "indices", indices, like);
  check_indices(op, "indices", as_contiguous(indices), rows);
}

inline void check_token_rows(const char* op, const char* name, const Tensor& t, const Tensor& indices,
                             const Tensor& map) {
  check_rows(op, name, t);
  check_dtype(op, name, t, map.scalar_type());
  check_device(op, name, t, map);
  check_size(op, name, t, 0, indices.numel());
  check_size(op, name, t, 1, map.size(1));
}

inline void check_stat_vector(const char* op, const char* name, const Tensor& t, int64_t size, const Tensor& like) {
  check_dim(op, name, t, 1, "[T]");
  check_size(op, name, t, 0, size);
  check_dtype(op, name, t, stat_dtype(like.scalar_type()));
  check_device(op, name, t, like);
}

inline void check_channel_vector(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value()) return;
  check_dim(op, name, *t, 1, "[C]");
  check_size(op, name, *t, 0, x.size(1));
  check_dtype(op, name, *t, x.scalar_type());
  check_device(op, name, *t, x);
}

// Tensors kept alive while the kernel runs, and the parameters that point into them.
struct RowCall {
  Tensor map, indices;
  std::optional<Tensor> tokens, weight, bias, scale, mean, rstd;
  RowParams p;

  RowCall(const char* op, const Tensor& map_rows, const Tensor& index, const char* name = "x")
      : map(map_rows), indices(index) {
    check_rows(op, name, map_rows);
    check_row_indices(op, index, map_rows, map_rows.size(0));
    map = inner_contiguous(map_rows), indices = as_contiguous(index);
    p.map = map.const_data_ptr();
    p.map_stride = map.stride(0);
    p.rows = map.size(0);
    p.channels = map.size(1);
    p.count = indices.numel();
    p.indices = data<int32_t>(indices);
  }

  void set_tokens(const char* op, const char* name, const Tensor& t) {
    check_token_rows(op, name, t, indices, map);
    tokens = inner_contiguous(t);
    p.tokens = tokens->const_data_ptr();
    p.token_stride = tokens->stride(0);
  }

  void set_norm(const char* op, const std::optional<Tensor>& w, const std::optional<Tensor>& b) {
    check_channel_vector(op, "weight", w, map);
    check_channel_vector(op, "bias", b, map);
    if (w.has_value()) weight = as_contiguous(*w), p.weight = weight->const_data_ptr();
    if (b.has_value()) bias = as_contiguous(*b), p.bias = bias->const_data_ptr();
  }

  void set_statistics(const char* op, const Tensor& m, const Tensor& r) {
    check_stat_vector(op, "mean", m, p.count, map);
    check_stat_vector(op, "rstd", r, p.count, map);
    mean = as_contiguous(m), rstd = as_contiguous(r);
    p.mean = const_cast<void*>(mean->const_data_ptr());
    p.rstd = const_cast<void*>(rstd->const_data_ptr());
  }

  void set_scale(const char* op, const std::optional<Tensor>& s) {
    if (!s.has_value()) return;
    check_stat_vector(op, "scale", *s, p.count, map);
    scale = as_contiguous(*s);
    p.scale = scale->const_data_ptr();
  }

  Tensor new_stat(int64_t size) const { return allocate(map, {size}, stat_dtype(map.scalar_type())); }
};

}  // namespace tokenprune
