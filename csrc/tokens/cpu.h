// SPDX-License-Identifier: Apache-2.0
// gather_tokens on the CPU, for families that build on it.
#pragma once

#include "../common/check.h"

namespace tokenprune {

Tensor gather_tokens(const Tensor& x, const Tensor& indices);

}  // namespace tokenprune
