// SPDX-License-Identifier: Apache-2.0
// What both CUDA units of deformable attention need.
#pragma once

#include "../common/launch.h"
#include "checks.h"
#include "kernel.cuh"

namespace tokenprune {

// The kernels multiply rows by 32-bit strides. Only a permuted view of a huge tensor has a longer one: it is copied.
inline Tensor narrow_rows(const Tensor& value) {
  const bool wide = value.dim() == 4 && value.stride(1) > UINT32_MAX / value.element_size();
  return wide ? torch::stable::contiguous(value) : value;
}

// Rows, queries and points of a pair are 32-bit numbers in the kernels; offsets are not.
inline void check_deform_sizes(const DeformCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const DeformParams& p = call.p;
  TP_CHECK(p.tokens <= kMost, call.op, "value must have at most 2^30 rows on CUDA, got ", p.tokens);
  TP_CHECK(p.queries <= kMost, call.op, "there must be at most 2^30 queries on CUDA, got ", p.queries);
  TP_CHECK(p.levels <= kMostLevels, call.op, "spatial_shapes must have at most ", kMostLevels, " levels on CUDA, got ",
           p.levels);
  TP_CHECK(p.points <= kMost / kMostLevels, call.op, "there must be at most ", kMost / kMostLevels,
           " points per level on CUDA, got ", p.points);
}

inline Tensor new_level_workspace(const DeformCall& call) {
  const bool needed = call.p.shapes == nullptr && call.p.levels > kLevelArgs;
  return torch::stable::new_empty(call.like, {needed ? 3 * call.p.levels : 0}, ScalarType::Long);
}

}  // namespace tokenprune
