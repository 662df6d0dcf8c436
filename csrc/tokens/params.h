// SPDX-License-Identifier: Apache-2.0
// Arguments of the token kernels, filled and checked once (checks.h) for both devices.
#pragma once

#include <cstdint>

namespace tokenprune {

struct SelectParams {
  const bool* mask;     // [batch, tokens]
  int32_t* indices;     // [capacity]
  int32_t* cu_seqlens;  // [batch + 1]
  int64_t batch, tokens, capacity;
};

// One struct serves gather, gather + LayerNorm and scatter: rows of a map addressed through `indices`.
struct RowParams {
  const void* map = nullptr;     // [rows, channels], row stride map_stride (elements)
  void* map_out = nullptr;       // scatter: [rows, channels] contiguous
  const void* tokens = nullptr;  // [count, channels], row stride token_stride
  void* tokens_out = nullptr;    // gather: [count, channels] contiguous
  const int32_t* indices = nullptr;
  int64_t rows = 0, count = 0, channels = 0, map_stride = 0, token_stride = 0;
  // LayerNorm (stat dtype = float, or double for double values; weight and bias have the dtype of the values)
  const void *weight = nullptr, *bias = nullptr;
  void *mean = nullptr, *rstd = nullptr;
  double eps = 0;
  // scatter
  const void* scale = nullptr;  // [count] stat dtype
  void* scale_grad = nullptr;   // [count] stat dtype
  bool add = false;
};

}  // namespace tokenprune
