// SPDX-License-Identifier: Apache-2.0
// What each instruction set's object offers to cpu.cpp. Results do not depend on how the work is cut.
#pragma once

#include "../common/half.h"
#include "../common/isa.h"
#include "params.h"

namespace tokenprune {

// Some queries of one image: positions [begin, begin + count) of the order in which its queries are visited.
struct QueryRange {
  int64_t image = 0, begin = 0, count = 0;
  const int32_t* order = nullptr;
  // The part of the image, 0..1, whose values these queries are the first to read; empty when nothing is known.
  float left = 0, right = 0, top = 0, bottom = 0;
  int64_t query(int64_t i) const { return order[begin + i]; }
};

// Pixel coordinates and weights of the points of some images by (image, head, level), so that the gradient of one level
// of one head reads them in one piece.
struct PointStreams {
  void *xy = nullptr, *weight = nullptr;  // [images, heads, levels, queries, points (, 2)] compute type
  int64_t first_image = 0;
  const int32_t* order = nullptr;  // of the queries, [images, queries] with order_stride between images
  int64_t order_stride = 0;
};

struct DeformKernels {
  int64_t (*forward_scratch)(const DeformParams&);
  bool (*forward)(Dtype, const DeformParams&, QueryRange, char* scratch);
  // All gradients but that of the values, and the streams.
  int64_t (*backward_points_scratch)(const DeformParams&);
  bool (*backward_points)(Dtype, const DeformParams&, const PointStreams&, QueryRange, char* scratch);
  // Gradient of one band of pixel rows of the values;
  // item = (((image in the streams) * heads + head) * levels + level) * bands + band.
  int64_t (*backward_values_scratch)(const DeformParams&, int64_t bands);
  bool (*backward_values)(Dtype, const DeformParams&, const PointStreams&, int64_t item, int64_t bands, char* scratch);
};

TP_DECLARE_TABLES(DeformKernels, deform_kernels)

}  // namespace tokenprune
