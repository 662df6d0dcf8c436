// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "cpu_forward.h"
#include "cpu_scatter.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

bool forward(Dtype dtype, const DeformParams& p, QueryRange range, char* scratch) {
  return visit(dtype, [&]<typename T>() { forward_queries<T>(p, range, scratch); });
}
bool backward_points(Dtype dtype, const DeformParams& p, const PointStreams& s, QueryRange range, char* scratch) {
  return visit(dtype, [&]<typename T>() { backward_queries<T>(p, s, range, scratch); });
}
bool backward_values(Dtype dtype, const DeformParams& p, const PointStreams& s, int64_t item, int64_t bands,
                     char* scratch) {
  return visit(dtype, [&]<typename T>() { backward_values_item<T>(p, s, item, bands, scratch); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const DeformKernels TP_TABLE(deform_kernels) = {
    forward_scratch, forward, backward_points_scratch, backward_points, backward_values_scratch, backward_values,
};

}  // namespace tokenprune
