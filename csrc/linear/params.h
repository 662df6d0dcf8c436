// SPDX-License-Identifier: Apache-2.0
// Arguments of the linear kernels, filled and checked once (checks.h). Strides count elements.
#pragma once

#include <cstdint>

namespace tokenprune {

constexpr int64_t kNoActivation = 0, kGelu = 1;

struct LinearParams {
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;  // [rows, width], [features, width], [features] or null
  int64_t rows = 0, x_stride = 0, weight_stride = 0;
  int64_t count = 0, width = 0, features = 0;          // tokens; summed over; columns of the result
  const int32_t *index = nullptr, *scatter = nullptr;  // [count] or null: row of x, row of out
  const void* add = nullptr;                           // [out_rows, features] or null, contiguous
  void* out = nullptr;                                 // [out_rows, features], contiguous
  int64_t out_rows = 0, activation = kNoActivation;
};

}  // namespace tokenprune
