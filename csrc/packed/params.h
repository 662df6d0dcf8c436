// SPDX-License-Identifier: Apache-2.0
// Arguments of the packed linear kernel, filled and checked once (checks.h).
#pragma once

#include <cstdint>

namespace tokenprune {

enum Activation : int64_t { kNoActivation = 0, kGelu = 1, kGeluTanh = 2, kQuickGelu = 3, kActivations = 4 };

struct PackedLinearParams {
  const void* x = nullptr;  // [x_rows, in_features], unit inner stride
  int64_t x_rows = 0, x_stride = 0, rows = 0, in_features = 0, out_features = 0;
  const int32_t* indices = nullptr;  // [rows] or null
  const void* packed = nullptr;
  const void *bias = nullptr, *scale = nullptr;  // [out_features] or null
  const void* residual = nullptr;                // [rows, out_features] or null
  int64_t residual_stride = 0;
  bool norm = false;
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // [in_features] or null
  double norm_eps = 0;
  int64_t act = kNoActivation;
  void* y = nullptr;  // [rows, out_features]
  int64_t strip = 0;  // rows per item
};

}  // namespace tokenprune
