// SPDX-License-Identifier: Apache-2.0
// Check and fill, for the compiled kernels of this family.
#pragma once

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

// Rows that start at multiples of 16 bytes; anything else is copied, knowingly.
inline Tensor aligned_rows(const Tensor& t) {
  const Tensor rows = inner_contiguous(t);
  const bool fits = rows.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  return fits ? rows : torch::stable::clone(as_contiguous(rows));
}

// Tensors kept alive while the kernel runs, and the parameters that point into them.
struct LinearCall {
  Tensor x, weight;
  std::optional<Tensor> bias, index, scatter, features;
  LinearParams p;

  LinearCall(const char* op, const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_,
             const std::optional<Tensor>& index_, const std::optional<Tensor>& features_,
             const std::optional<Tensor>& scatter_, bool add, int64_t activation)
      : x(x_), weight(weight_) {
    check_dim(op, "x", x, 2, "[R, C]");
    check_dim(op, "weight", weight, 2, "[M, C]");
    check_like(op, "weight", weight);
    check_size(op, "weight", weight, 1, x.size(1));
    TP_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, op,
             "x must be float16 or bfloat16, got ", dtype_name(x.scalar_type()));
    TP_CHECK(x.size(1) % 8 == 0 && weight.size(0) % 8 == 0, op, "weight must have sizes that are multiples of 8, got ",
             shape_text(weight));
    TP_CHECK(activation == kNoActivation || activation == kGelu, op, "activation must be 0 or 1, got ", activation);
    TP_CHECK(features_.has_value() == scatter_.has_value(), op, "features must come with scatter, got only ",
             scatter_.has_value() ? "scatter" : "features");
    p.rows = x.size(0), p.width = x.size(1), p.features = weight.size(0), p.activation = activation;
    if (bias_.has_value()) {
      check_dim(op, "bias", *bias_, 1, "[M]");
      check_size(op, "bias", *bias_, 0, p.features);
      check_like(op, "bias", *bias_);
      bias = as_contiguous(*bias_), p.bias = bias->const_data_ptr();
    }
    p.count = p.rows;
    if (index_.has_value()) {
      set_index(op, "index", *index_, p.rows, index);
      p.index = data<int32_t>(*index), p.count = index->numel();
    }
    p.out_rows = p.count;
    if (features_.has_value()) set_features(op, *features_, *scatter_, add);
    x = aligned_rows(x), weight = aligned_rows(weight);
    p.x = x.const_data_ptr(), p.x_stride = x.stride(0);
    p.weight = weight.const_data_ptr(), p.weight_stride = weight.stride(0);
  }

  void check_like(const char* op, const char* name, const Tensor& t) const {
    check_dtype(op, name, t, x.scalar_type());
    check_device(op, name, t, x);
  }
  void set_index(const char* op, const char* name, const Tensor& t, int64_t rows, std::optional<Tensor>& kept) const {
    check_dim(op, name, t, 1, "[T]");
    check_dtype(op, name, t, ScalarType::Int);
    check_device(op, name, t, x);
    kept = as_contiguous(t);
    check_indices(op, name, *kept, rows);
  }
  void set_features(const char* op, const Tensor& f, const Tensor& s, bool add) {
    check_dim(op, "features", f, 2, "[F, M]");
    check_size(op, "features", f, 1, p.features);
    check_like(op, "features", f);
    set_index(op, "scatter", s, f.size(0), scatter);
    check_unique(op, "scatter", *scatter, f.size(0));
    check_size(op, "scatter", s, 0, p.count);
    features = aligned_rows(as_contiguous(f));
    p.scatter = data<int32_t>(*scatter), p.out_rows = f.size(0);
    if (add) p.add = features->const_data_ptr();
  }
  // The result before the kernel: rows that no token goes to are those of the features.
  Tensor new_out() {
    Tensor out =
        features.has_value() ? torch::stable::clone(*features) : torch::stable::new_empty(x, {p.count, p.features});
    p.out = out.mutable_data_ptr();
    return out;
  }
};

}  // namespace tokenprune
