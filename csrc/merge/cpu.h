// SPDX-License-Identifier: Apache-2.0
// What families that build on this one call on the CPU.
#pragma once

#include "../common/check.h"

namespace tokenprune {

// (y, size_out, log_size, parent)
std::tuple<Tensor, Tensor, Tensor, Tensor> match_and_merge(const Tensor& x, const Tensor& metric, int64_t r,
                                                           const std::optional<Tensor>& size, bool class_token,
                                                           bool distill_token, int64_t num_prefix);

}  // namespace tokenprune
