// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct PredictorKernels {
  // The pooled channels of the tokens [begin, end) of one image; scratch: heads * width compute values.
  bool (*pool)(Dtype, const PredictorParams&, int64_t begin, int64_t end, char* scratch);
  // Channel means, or scores, of the tokens [begin, end).
  bool (*head_means)(Dtype, const PredictorParams&, int64_t begin, int64_t end);
  bool (*finish)(Dtype, const PredictorParams&, int64_t begin, int64_t end);
};

TP_DECLARE_TABLES(PredictorKernels, predictor_kernels)

}  // namespace tokenprune
