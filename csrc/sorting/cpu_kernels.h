// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

struct SortingKernels {
  // One row of n values.
  int64_t (*argsort_scratch)(int64_t n);
  bool (*argsort)(Dtype, const void* x, int64_t n, int32_t* order, char* scratch);
  // One row: its queries in all rounds. Rows are independent.
  int64_t (*attention_scratch)(const BalancedParams&);
  bool (*attention)(Dtype, const BalancedParams&, int64_t row, char* scratch);
  // Attention received, times the norm of the values, of the tokens [begin, end); stat dtype.
  bool (*significance)(Dtype, const SequenceParams&, int64_t begin, int64_t end, void* scores);
  // One row: its groups; then their means, [groups, dim].
  int64_t (*group_scratch)(Dtype, const GroupParams&);
  bool (*group)(Dtype, const GroupParams&, int64_t row, char* scratch);
  bool (*group_means)(Dtype, const GroupParams&, int64_t row, void* means, char* scratch);
};

TP_DECLARE_TABLES(SortingKernels, sorting_kernels)

}  // namespace tokenprune
