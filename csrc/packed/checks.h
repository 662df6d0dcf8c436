// SPDX-License-Identifier: Apache-2.0
// Check and fill: the rules of packed_linear.
#pragma once

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

inline void check_vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size,
                         const Tensor& like) {
  if (!t.has_value()) return;
  check_dim(op, name, *t, 1, "[N]");
  check_size(op, name, *t, 0, size);
  check_dtype(op, name, *t, like.scalar_type());
  check_device(op, name, *t, like);
}

// Tensors kept alive while the kernel runs, and the parameters that point into them.
struct PackedLinearCall {
  Tensor x;
  std::optional<Tensor> indices, bias, norm_weight, norm_bias, scale, residual;
  PackedLinearParams p;

  PackedLinearCall(const char* op, const Tensor& input, const Tensor& packed, int64_t out_features,
                   const std::optional<Tensor>& bias_, bool norm, const std::optional<Tensor>& norm_weight_,
                   const std::optional<Tensor>& norm_bias_, double norm_eps, int64_t act,
                   const std::optional<Tensor>& scale_, const std::optional<Tensor>& residual_,
                   const std::optional<Tensor>& indices_)
      : x(input) {
    check_dim(op, "x", input, 2, "[R, K]");
    check_floating(op, "x", input);
    check_dim(op, "packed", packed, 1, "of pack_linear");
    check_dtype(op, "packed", packed, ScalarType::Byte);
    check_device(op, "packed", packed, input);
    TP_CHECK(packed.is_contiguous(), op, "packed must be contiguous, got gaps");
    TP_CHECK(out_features >= 0, op, "out_features must be >= 0, got ", out_features);
    TP_CHECK(act >= 0 && act < kActivations, op, "act must be in 0..3, got ", act);
    TP_CHECK(norm || (!norm_weight_.has_value() && !norm_bias_.has_value()), op,
             "norm must be true with norm_weight or norm_bias, got false");
    x = inner_contiguous(input);
    p.x = x.const_data_ptr(), p.x_rows = x.size(0), p.x_stride = x.stride(0), p.rows = p.x_rows;
    p.in_features = x.size(1), p.out_features = out_features, p.packed = packed.const_data_ptr();
    p.norm = norm, p.norm_eps = norm_eps, p.act = act;
    if (indices_.has_value()) {
      check_dim(op, "indices", *indices_, 1, "[M]");
      check_dtype(op, "indices", *indices_, ScalarType::Int);
      check_device(op, "indices", *indices_, x);
      indices = as_contiguous(*indices_);
      check_indices(op, "indices", *indices, p.x_rows);
      p.indices = data<int32_t>(*indices), p.rows = indices->numel();
    }
    p.bias = take(op, "bias", bias_, out_features, bias);
    p.scale = take(op, "scale", scale_, out_features, scale);
    p.norm_weight = take(op, "norm_weight", norm_weight_, p.in_features, norm_weight);
    p.norm_bias = take(op, "norm_bias", norm_bias_, p.in_features, norm_bias);
    if (residual_.has_value()) {
      check_dim(op, "residual", *residual_, 2, "[M, N]");
      check_size(op, "residual", *residual_, 0, p.rows);
      check_size(op, "residual", *residual_, 1, out_features);
      check_dtype(op, "residual", *residual_, x.scalar_type());
      check_device(op, "residual", *residual_, x);
      residual = inner_contiguous(*residual_);
      p.residual = residual->const_data_ptr(), p.residual_stride = residual->stride(0);
    }
  }

 private:
  const void* take(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size,
                   std::optional<Tensor>& keep) {
    check_vector(op, name, t, size, x);
    if (!t.has_value()) return nullptr;
    keep = as_contiguous(*t);
    return keep->const_data_ptr();
  }
};

}  // namespace tokenprune
