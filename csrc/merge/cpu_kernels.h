// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct MergeKernels {
  // Mean over the heads of tokens [begin, end) of all images: keys [B, T, H, D] (any strides but the last) -> [B, T,
  // D].
  bool (*mean_heads)(Dtype, const HeadsParams&, int64_t begin, int64_t end);
  int64_t (*match_scratch)(const MatchParams&);
  // One chunk of the a-tokens of one image; item = image * chunks + chunk.
  bool (*match)(Dtype, const MatchParams&, int64_t item, int64_t chunks, char* scratch);
  // Output rows [begin, end) of all images, from the member lists.
  bool (*merge)(Dtype, const MergeParams&, int64_t begin, int64_t end);
  bool (*merge_backward)(Dtype, const MergeParams&, int64_t begin, int64_t end);
};

TP_DECLARE_TABLES(MergeKernels, merge_kernels)

}  // namespace tokenprune
