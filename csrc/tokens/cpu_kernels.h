// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct TokenKernels {
  // Indices of the true entries of mask[0, n), plus `base`, to out; returns how many. Writes at most `room`.
  int64_t (*compact)(const bool* mask, int64_t n, int64_t base, int32_t* out, int64_t room);
  // Rows [begin, end) of p.count; gather: of values of `size` bytes.
  void (*gather)(const RowParams&, int64_t size, void* out, int64_t begin, int64_t end);
  bool (*gather_layer_norm)(Dtype, const RowParams&, int64_t begin, int64_t end);
  bool (*gather_layer_norm_backward)(Dtype, const RowParams&, int64_t begin, int64_t end);
  // Weight and bias gradients of all rows, channels [begin, end): fixed order, no atomics.
  bool (*layer_norm_parameters)(Dtype, const RowParams&, void* grad_weight, void* grad_bias, int64_t begin,
                                int64_t end);
  bool (*scatter)(Dtype, const RowParams&, int64_t begin, int64_t end);
  bool (*scatter_backward)(Dtype, const RowParams&, int64_t begin, int64_t end);
  // grad_map rows [begin, end) from lists (offsets [rows + 1], positions): sums in list order.
  bool (*sum_rows)(Dtype, const RowParams&, const int32_t* offsets, const int32_t* positions, int64_t begin,
                   int64_t end);
};

TP_DECLARE_TABLES(TokenKernels, token_kernels)

}  // namespace tokenprune
