// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "cpu_argsort.h"
#include "cpu_balanced.h"
#include "cpu_groups.h"
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
int64_t group_scratch(Dtype dtype, const GroupParams& p) {
  int64_t bytes = 0;
  visit(dtype, [&]<typename T>() {
    const int64_t sums = p.longest * p.dim * static_cast<int64_t>(sizeof(Compute<T>));
    bytes = GroupScratch<Compute<T>>(p, nullptr).bytes;
    bytes = bytes > sums ? bytes : sums;
  });
  return bytes;
}
bool group(Dtype dtype, const GroupParams& p, int64_t row, char* scratch) {
  return visit(dtype, [&]<typename T>() { group_row<T>(p, row, scratch); });
}
bool group_means(Dtype dtype, const GroupParams& p, int64_t row, void* means, char* scratch) {
  return visit(dtype, [&]<typename T>() { group_means<T>(p, row, static_cast<T*>(means), scratch); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const SortingKernels TP_TABLE(sorting_kernels) = {
    argsort_scratch_bytes, argsort, balanced_scratch_bytes, attention, significance, group_scratch, group, group_means};

}  // namespace tokenprune
