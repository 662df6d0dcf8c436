// SPDX-License-Identifier: Apache-2.0
// The door between the always-present CUDA kernels and the sm_90a unit, which is built where the CUTLASS headers are.
#pragma once

#include "../common/check.h"
#include "../common/launch.h"
#include "params.h"

namespace tokenprune {

#ifdef TOKENPRUNE_WITH_HOPPER
// Runs the forward on the sm_90a kernel; false, with nothing done, where it is switched off or does not serve the call.
bool hopper_attention(const Launcher& launch, const AttentionParams& p, ScalarType dtype, int device, int processors);
#else
inline bool hopper_attention(const Launcher&, const AttentionParams&, ScalarType, int, int) { return false; }
#endif

}  // namespace tokenprune
