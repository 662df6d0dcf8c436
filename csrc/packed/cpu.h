// SPDX-License-Identifier: Apache-2.0
// packed_linear on the CPU, for families that build on it.
#pragma once

#include "../common/check.h"

namespace tokenprune {

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias,
                     bool norm, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                     double norm_eps, int64_t act, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& residual, const std::optional<Tensor>& indices);

}  // namespace tokenprune
