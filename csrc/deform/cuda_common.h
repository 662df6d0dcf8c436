// SPDX-License-Identifier: Apache-2.0
// What both CUDA units of deformable attention need.
#pragma once

#include "../common/launch.h"
#include "checks.h"
#include "kernel_points.cuh"

namespace tokenprune {

// The kernels count places within an image in 32 bits. Only a permuted view of a huge tensor needs more without being
// huge itself: it is copied.
inline Tensor narrow_rows(const Tensor& value) {
  const bool wide = value.dim() == 4 && value.size(1) > 0 && value.stride(1) > UINT32_MAX / value.size(1);
  return wide && !value.is_contiguous() ? torch::stable::contiguous(value) : value;
}

// Rows, queries and points are 32-bit numbers in the kernels; offsets into the tensors are not.
template <typename T>
inline void check_deform_sizes(const DeformCall& call) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const DeformParams& p = call.p;
  TP_CHECK(p.tokens <= kMost, call.op, "value must have at most 2^30 rows on CUDA, got ", p.tokens);
  TP_CHECK(p.queries <= kMost, call.op, "there must be at most 2^30 queries on CUDA, got ", p.queries);
  TP_CHECK(p.levels <= kMostLevels, call.op, "spatial_shapes must have at most ", kMostLevels, " levels on CUDA, got ",
           p.levels);
  TP_CHECK(p.points <= kMost / kMostLevels, call.op, "there must be at most ", kMost / kMostLevels,
           " points per level on CUDA, got ", p.points);
  TP_CHECK(p.heads <= INT32_MAX && p.batch <= INT32_MAX / (p.heads > 0 ? p.heads : 1), call.op,
           "batch * heads must be below 2^31 on CUDA, got ", p.batch, " * ", p.heads);
  TP_CHECK(value_places_fit<T>(p), call.op, "value must be at most 64 GiB per image on CUDA, got ", p.tokens,
           " rows at a stride of ", p.value_token);
}

inline Tensor new_level_workspace(const DeformCall& call) {
  const bool needed = call.p.shapes == nullptr && call.p.levels > kLevelArgs;
  return torch::stable::new_empty(call.like, {needed ? 3 * call.p.levels : 0}, ScalarType::Long);
}

}  // namespace tokenprune
