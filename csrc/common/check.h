// SPDX-License-Identifier: Apache-2.0
// Argument checks shared by the CPU and the CUDA side of every op.
//
// A message always names the op, the argument, the rule and the value, e.g.
//   tokenprune::gather_tokens: indices must be int32, got int64
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

namespace tokenprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define TP_CHECK(condition, op, ...) STD_TORCH_CHECK((condition), "tokenprune::", op, ": ", __VA_ARGS__)

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim, const char* shape) {
  TP_CHECK(t.dim() == dim, op, name, " must have shape ", shape, ", got ", shape_text(t));
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t size) {
  TP_CHECK(t.size(dim) == size, op, name, " must have size ", size, " in dimension ", dim, ", got ", shape_text(t));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  TP_CHECK(t.scalar_type() == dtype, op, name, " must be ", dtype_name(dtype), ", got ", dtype_name(t.scalar_type()));
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  TP_CHECK(is_floating(t.scalar_type()), op, name, " must be float32, float64, float16 or bfloat16, got ",
           dtype_name(t.scalar_type()));
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  TP_CHECK(t.is_cpu() == like.is_cpu() && (t.is_cpu() || t.get_device_index() == like.get_device_index()), op, name,
           " must be on the device of the other arguments");
}

// Scores, sizes, statistics: float32, or float64 beside float64 values.
inline ScalarType stat_dtype(ScalarType values) {
  return values == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A new contiguous tensor on the device of `like`. Straight from the allocator: torch::stable::new_empty takes two
// trips through the dispatcher, which small ops feel.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  constexpr size_t kMaxDims = 16;
  int64_t strides[kMaxDims];
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "tokenprune: tensors have at most 16 dimensions, got ", sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device_type, device_index, scalar;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  scalar = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype.value_or(like.scalar_type())));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         scalar, device_type, device_index, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Rows that our kernels read through (row stride, unit inner stride); anything else is copied, knowingly.
inline Tensor inner_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// The same memory, seen otherwise; sizes and strides count elements.
inline Tensor view(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                   torch::headeronly::IntHeaderOnlyArrayRef strides, int64_t offset) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

}  // namespace tokenprune
