// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one sampling point, for both devices. V is a scalar, or a vector of the compiler's vector
// extension.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define TP_DEFORM_FN __host__ __device__ __forceinline__
#else
#define TP_DEFORM_FN inline
#endif

namespace tokenprune {
#if defined(TOKENPRUNE_ISA)
inline namespace TOKENPRUNE_ISA {
#endif

// Pixel coordinate of a location in [0, 1]: pixel i has its centre at (i + 0.5) / size.
template <typename V>
TP_DEFORM_FN V pixel_of_location(V location, V size) {
  return location * size - V(0.5);
}
// Pixel coordinate of reference + offset / size: the offset counts pixels of the level that it samples.
template <typename V>
TP_DEFORM_FN V pixel_of_offset(V reference, V offset, V size) {
  return reference * size + (offset - V(0.5));
}
// Pixel coordinate of centre + offset / points * extent / 2, for a reference box.
template <typename V>
TP_DEFORM_FN V pixel_of_box_offset(V centre, V extent, V offset, V inverse_points, V size) {
  return (centre + offset * inverse_points * extent * V(0.5)) * size - V(0.5);
}

// Whether a point touches its level at all; false for NaN.
template <typename A>
TP_DEFORM_FN bool point_reads(A x, A y, A width, A height) {
  return x > A(-1) && y > A(-1) && x < width && y < height;
}

// Whether a level given by the device lies within the tokens.
TP_DEFORM_FN bool level_fits(int64_t height, int64_t width, int64_t start, int64_t tokens) {
  return height > 0 && width > 0 && start >= 0 && start < tokens && height <= tokens && width <= tokens &&
         height <= (tokens - start) / width;
}

// Bilinear weights of the corners (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1), times the attention weight.
template <typename V>
struct CornerWeights {
  V w00, w01, w10, w11;
};
template <typename V>
TP_DEFORM_FN CornerWeights<V> corner_weights(V fx, V fy, V weight) {
  const V lower = weight * fy, upper = weight - lower;  // rows y0 + 1 and y0
  const V w01 = upper * fx, w11 = lower * fx;
  return {upper - w01, w01, lower - w11, w11};
}

// From the dot products g.v of the four corners to the derivatives of weight * g.sample.
template <typename V>
struct PointGradient {
  V weight, x, y;  // with respect to the attention weight, and to the pixel coordinates
};
template <typename V>
TP_DEFORM_FN PointGradient<V> point_gradient(V fx, V fy, V weight, V d00, V d01, V d10, V d11) {
  const V upper = d01 - d00, lower = d11 - d10;               // slopes along x
  const V top = d00 + fx * upper, bottom = d10 + fx * lower;  // values at x
  const V slope = bottom - top;
  return {top + fy * slope, weight * (upper + fy * (lower - upper)), weight * slope};
}

#if defined(TOKENPRUNE_ISA)
}  // namespace TOKENPRUNE_ISA
#endif
}  // namespace tokenprune
