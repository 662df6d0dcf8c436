// SPDX-License-Identifier: Apache-2.0
// From torch's scalar types to the kernels' own.
#pragma once

#include "check.h"
#include "half.h"

namespace tokenprune {

inline Dtype kernel_dtype(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Double: return kFloat64;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: break;
  }
  TP_CHECK(false, op, "dtype must be float32, float64, float16 or bfloat16, got ", dtype_name(dtype));
  return kFloat32;
}

}  // namespace tokenprune
