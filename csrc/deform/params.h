// SPDX-License-Identifier: Apache-2.0
// Arguments of the deformable attention kernels, filled and checked once (checks.h) for both devices. Strides count
// elements. "stat" is float, or double beside double values.
#pragma once

#include <cstdint>

namespace tokenprune {

struct Level {
  int64_t height = 0, width = 0, start = 0;
};

// One row per (image, query); what a row holds is contiguous.
struct QueryRows {
  const void* data = nullptr;
  int64_t batch_stride = 0, query_stride = 0;
};

struct DeformParams {
  const void* value = nullptr;  // [batch, tokens, heads, dim], unit inner stride
  int64_t value_batch = 0, value_token = 0, value_head = 0;
  const bool* mask = nullptr;  // [batch, tokens] contiguous or null: true reads as 0 and receives no gradient
  int64_t batch = 0, tokens = 0, heads = 0, dim = 0, queries = 0, levels = 0, points = 0;

  // Exactly one of the two is set. On the host (list, or tensors of the CPU): checked, they add up to `tokens`.
  const Level* level = nullptr;  // [levels], host memory
  // On the device: contents unknown. A level that is not within the tokens (see level_fits in math.h) reads as 0.
  const int64_t *shapes = nullptr, *starts = nullptr;  // [levels, 2] (H, W); [levels]

  // Classic form: locations [heads, levels, points, 2] and weights [heads, levels, points], both stat.
  // Fused form: offsets and logits in their place (dtype of the values if offsets_are_values, otherwise stat), and
  // reference rows [reference_levels, reference_columns] stat; reference_levels is `levels` or 1, columns 2 or 4.
  bool fused = false, offsets_are_values = false;
  QueryRows locations, weights, reference;
  int64_t reference_levels = 1, reference_columns = 2;

  void* out = nullptr;  // [batch, queries, heads * dim] contiguous

  QueryRows grad_out;  // [heads * dim], dtype of the values
  // Backward results, contiguous, shaped as the inputs; grad_locations and grad_weights in the dtype of theirs.
  void *grad_value = nullptr, *grad_locations = nullptr, *grad_weights = nullptr;
  void* grad_reference = nullptr;  // [batch, queries, reference_levels, reference_columns] stat, or null: not wanted
};

}  // namespace tokenprune
