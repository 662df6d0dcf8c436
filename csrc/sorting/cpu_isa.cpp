// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "cpu_argsort.h"
#include "cpu_balanced.h"
#include "cpu_kernels.h"
#include "cpu_significance.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

bool argsort(Dtype dtype, const void* x, int64_t n, int32_t* order, char* scratch) {
  return visit(dtype, [&]<typename T>() { argsort_row(static_cast<const T*>(x), n, scratch, order); });
}
bool attention(Dtype dtype, const BalancedParams& p, int64_t row, char* scratch) {
  return visit(dtype, [&]<typename T>() { balanced_row<T>(p, row, scratch); });
}
bool significance(Dtype dtype, const SequenceParams& p, int64_t begin, int64_t end, void* scores) {
  return visit(dtype, [&]<typename T>() { significance_rows<T>(p, begin, end, static_cast<Compute<T>*>(scores)); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const SortingKernels TP_TABLE(sorting_kernels) = {argsort_scratch_bytes, argsort, balanced_scratch_bytes,
                                                         attention, significance};

}  // namespace tokenprune
