// SPDX-License-Identifier: Apache-2.0
// Arguments of the attention kernels, filled and checked once (checks.h) for both devices. Strides count elements.
#pragma once

#include <cstdint>

namespace tokenprune {

struct Rows {  // [rows, heads, dim], unit inner stride
  const void* data = nullptr;
  int64_t rows = 0, row_stride = 0, head_stride = 0;
};

struct AttentionParams {
  Rows q, k, v, out, grad_out;                           // out and grad_out are inputs of the backward
  const int32_t *cu_q = nullptr, *cu_k = nullptr;        // [batch + 1]
  const int32_t *q_index = nullptr, *k_index = nullptr;  // [total_q], [total_k] or null
  const void* key_bias = nullptr;                        // [total_k] stat dtype or null
  int64_t batch = 0, heads = 0, dim = 0, total_q = 0, total_k = 0, max_q = 0, max_k = 0;
  double scale = 0;
  // forward results
  void *o = nullptr, *lse = nullptr, *cls = nullptr;  // [total_q, heads, dim], [heads, total_q], [heads, total_k]
  // scores and their gradients
  int64_t scores_kind = 0;  // 0 cls, 1 mean
  void* scores = nullptr;   // [heads, total_k]
  const void *lse_in = nullptr, *grad_lse = nullptr, *grad_scores = nullptr;
  void* grad_lse_out = nullptr;  // [heads, total_q]
  // backward results: contiguous [total, heads, dim], bias [heads, total_k]
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr, *grad_bias = nullptr;
};

struct PolicyParams {  // q, k, v [batch, tokens, heads, dim]: batch stride in *_batch
  Rows q, k, v, out, grad_out;
  int64_t q_batch = 0, k_batch = 0, v_batch = 0, out_batch = 0, grad_out_batch = 0;
  const void* policy = nullptr;  // [batch, tokens] stat dtype, contiguous
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0;
  double eps = 0, scale = 0;
  void *o = nullptr, *row_max = nullptr, *row_sum = nullptr;  // [batch, tokens, heads, dim], 2 x [batch, heads, tokens]
  void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr,
       *grad_policy = nullptr;  // grad_policy [batch, heads, tokens]
};

}  // namespace tokenprune
