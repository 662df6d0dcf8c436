// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp. `order` lists the queries of an image so that neighbours in
// the image follow one another; results do not depend on it, nor on how the work is cut.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

// Coordinates, weights and gradients of the points of some images, by (image, head, level), queries in their order.
struct DeformStreams {
  void *pixels = nullptr, *weights = nullptr;  // [images, heads, levels, queries, points (, 2)] compute type
  void *grad_pixels = nullptr, *grad_weights = nullptr;
  int64_t first_image = 0;
  const int32_t* order = nullptr;  // [images, queries], rows order_stride apart
  int64_t order_stride = 0;
};

struct DeformKernels {
  // Output rows of the queries order[0, count) of one image.
  int64_t (*forward_scratch)(const DeformParams&, int64_t count);
  bool (*forward)(Dtype, const DeformParams&, int64_t image, const int32_t* order, int64_t count, char* scratch);
  // Backward, three steps: points to streams; streams to gradients of the values and of the streams; gradients of the
  // streams to those of the inputs. The first and the last take positions [begin, begin + count) of the order.
  bool (*stream_points)(Dtype, const DeformParams&, const DeformStreams&, int64_t image, int64_t begin, int64_t count,
                        char* scratch);
  int64_t (*backward_scratch)(const DeformParams&, int64_t bands);
  bool (*backward)(Dtype, const DeformParams&, const DeformStreams&, int64_t item, int64_t bands, char* scratch);
  bool (*point_gradients)(Dtype, const DeformParams&, const DeformStreams&, int64_t image, int64_t begin, int64_t count,
                          char* scratch);
};

TP_DECLARE_TABLES(DeformKernels, deform_kernels)

}  // namespace tokenprune
