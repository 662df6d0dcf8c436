// SPDX-License-Identifier: Apache-2.0
// Arguments of the kernel that fuses dropped tokens.
#pragma once

#include <cstdint>

namespace tokenprune {

struct FuseParams {  // out[c] = sum over the dropped tokens t of weights[t] * x[t, c], in their order
  const void *x = nullptr, *weights = nullptr;  // [N, channels], [N] stat dtype
  const int32_t* dropped = nullptr;             // [count]
  int64_t count = 0, channels = 0;
  void* out = nullptr;  // [channels]
};

}  // namespace tokenprune
