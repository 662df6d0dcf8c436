// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct RankingKernels {
  bool (*fuse)(Dtype, const FuseParams&);
};

TP_DECLARE_TABLES(RankingKernels, ranking_kernels)

}  // namespace tokenprune
