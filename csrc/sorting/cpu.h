// SPDX-License-Identifier: Apache-2.0
// argsort_rows on the CPU, for families that build on it.
#pragma once

#include "../common/check.h"

namespace tokenprune {

Tensor argsort_rows(const Tensor& x);

}  // namespace tokenprune
