// SPDX-License-Identifier: Apache-2.0
// What the CUDA units of this family share.
#pragma once

#include "../common/launch.h"
#include "checks.h"
#include "kernel_launch.cuh"

namespace tokenprune {

inline void check_head_dim(const char* op, int64_t dim) {
  TP_CHECK(dim <= attention::kMostDim, op, "the head dimension on CUDA must be <= ", attention::kMostDim, ", got ",
           dim);
}

}  // namespace tokenprune
