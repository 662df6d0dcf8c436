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
  std::vector<int64_t> shape;  // of the result
  PackedLinearParams p;

  PackedLinearCall(const char* op, const Tensor& input, const Tensor& packed, int64_t out_features,
                   const std::optional<Tensor>& bias_, bool norm, const std::optional<Tensor>& norm_weight_,
                   const std::optional<Tensor>& norm_bias_, double norm_eps, int64_t act,
                   const std::optional<Tensor>& scale_, const std::optional<Tensor>& residual_,
                   const std::optional<Tensor>& indices_)
      : x(input) {
    TP_CHECK(input.dim() >= 1, op, "x must have shape [..., K], got ", shape_text(input));
    check_floating(op, "x", input);
    check_dim(op, "packed", packed, 1, "of pack_linear");
    check_dtype(op, "packed", packed, ScalarType::Byte);
    check_device(op, "packed", packed, input);
    TP_CHECK(packed.is_contiguous(), op, "packed must be contiguous, got gaps");
    TP_CHECK(out_features >= 0, op, "out_features must be >= 0, got ", out_features);
    TP_CHECK(act >= 0 && act < kActivations, op, "act must be in 0..3, got ", act);
    TP_CHECK(norm || (!norm_weight_.has_value() && !norm_bias_.has_value()), op,
             "norm must be true with norm_weight or norm_bias, got false");
    x = input.dim() == 2 ? inner_contiguous(input) : as_contiguous(input);
    const int64_t last = x.dim() - 1;
    p.in_features = x.size(last), p.x_rows = 1;
    for (int64_t d = 0; d < last; ++d) shape.push_back(x.size(d)), p.x_rows *= x.size(d);
    p.x = x.const_data_ptr(), p.x_stride = x.dim() == 2 ? x.stride(0) : p.in_features, p.rows = p.x_rows;
    p.out_features = out_features, p.packed = packed.const_data_ptr();
    p.norm = norm, p.norm_eps = norm_eps, p.act = act;
    if (indices_.has_value()) {
      check_dim(op, "x", input, 2, "[R, K] with indices");
      check_dim(op, "indices", *indices_, 1, "[M]");
      check_dtype(op, "indices", *indices_, ScalarType::Int);
      check_device(op, "indices", *indices_, x);
      indices = as_contiguous(*indices_);
      check_indices(op, "indices", *indices, p.x_rows);
      p.indices = data<int32_t>(*indices), p.rows = indices->numel();
      shape = {p.rows};
    }
    shape.push_back(out_features);
    p.bias = take(op, "bias", bias_, out_features, bias);
    p.scale = take(op, "scale", scale_, out_features, scale);
    p.norm_weight = take(op, "norm_weight", norm_weight_, p.in_features, norm_weight);
    p.norm_bias = take(op, "norm_bias", norm_bias_, p.in_features, norm_bias);
    if (residual_.has_value()) {
      bool same = residual_->dim() == static_cast<int64_t>(shape.size());
      for (size_t d = 0; same && d < shape.size(); ++d) same = residual_->size(d) == shape[d];
      TP_CHECK(same, op, "residual must have the shape of the result, got ", shape_text(*residual_));
      check_dtype(op, "residual", *residual_, x.scalar_type());
      check_device(op, "residual", *residual_, x);
      residual = residual_->dim() == 2 ? inner_contiguous(*residual_) : as_contiguous(*residual_);
      p.residual = residual->const_data_ptr();
      p.residual_stride = residual->dim() == 2 ? residual->stride(0) : out_features;
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
