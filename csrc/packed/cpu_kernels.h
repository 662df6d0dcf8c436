// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct PackedKernels {
  int64_t (*packed_bytes)(Dtype, int64_t out_features, int64_t in_features);
  // Columns [begin, end) of the panels; both multiples of panel_width.
  bool (*pack)(Dtype, const void* weight, int64_t out_features, int64_t in_features, int64_t begin, int64_t end,
               void* out, char* scratch);
  int64_t (*pack_scratch)(int64_t in_features);
  int64_t (*panel_width)(Dtype);
  // Strip item / chunks of the rows, share item % chunks of the columns.
  bool (*linear)(Dtype, const PackedLinearParams&, int64_t item, int64_t chunks, char* scratch);
  int64_t (*linear_scratch)(const PackedLinearParams&);
};

TP_DECLARE_TABLES(PackedKernels, packed_kernels)

}  // namespace tokenprune
