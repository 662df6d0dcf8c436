// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "cpu_kernels.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

bool forward(Dtype dtype, const DeformParams& p, int64_t image, const int32_t* order, int64_t count, char* scratch) {
  return visit(dtype, [&]<typename T>() { forward_queries<T>(p, image, order, count, scratch); });
}
bool stream_points(Dtype dtype, const DeformParams& p, const DeformStreams& s, int64_t image, int64_t begin,
                   int64_t count, char* scratch) {
  return visit(dtype, [&]<typename T>() { stream_queries<T>(p, s, image, begin, count, scratch); });
}
bool backward(Dtype dtype, const DeformParams& p, const DeformStreams& s, int64_t item, int64_t bands, char* scratch) {
  return visit(dtype, [&]<typename T>() { backward_item<T>(p, s, item, bands, scratch); });
}
bool point_gradients(Dtype dtype, const DeformParams& p, const DeformStreams& s, int64_t image, int64_t begin,
                     int64_t count, char* scratch) {
  return visit(dtype, [&]<typename T>() { point_gradients_of<T>(p, s, image, begin, count, scratch); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const DeformKernels TP_TABLE(deform_kernels) = {
    forward_scratch, forward, stream_points, backward_scratch, backward, point_gradients,
};

}  // namespace tokenprune
