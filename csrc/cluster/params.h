// SPDX-License-Identifier: Apache-2.0
// Arguments of the clustering and reconstruction kernels, filled and checked once (checks.h) for both devices.
//
// Distances, affinities, weights and sums are float32 (float64 for float64 values): the "stat" dtype.
#pragma once

#include "math.h"

namespace tokenprune {

struct ClusterParams {
  const void* x = nullptr;  // [batch, tokens, channels], unit inner stride
  int64_t batch = 0, tokens = 0, channels = 0, batch_stride = 0, token_stride = 0;
  ClusterAxis y_axis, x_axis;  // rows and columns of the map; tokens = y_axis.size * x_axis.size, row-major
  int64_t clusters = 0;        // y_axis.cells * x_axis.cells, row-major
  int64_t slots = 0;           // candidates per token: window_width(y_axis) * window_width(x_axis)
  int64_t iters = 0;
  double temperature = 1;
  void* centers = nullptr;  // [batch, clusters, channels]
  void* mass = nullptr;     // [batch, clusters] stat: sum of the last affinities; iters = 0: tokens in the pooling cell
  void* affinity = nullptr;  // [batch, tokens, slots] stat, of the last iteration, or null
};

// Every token gathers from its candidates: grad_x = sum_k affinity / max(mass, kMassFloor) * grad_k.
struct ClusterBackwardParams {
  const void *grad = nullptr, *mass = nullptr, *affinity = nullptr;  // contiguous; affinity null when iters = 0
  int64_t batch = 0, tokens = 0, channels = 0, clusters = 0, slots = 0, iters = 0;
  ClusterAxis y_axis, x_axis;
  void* grad_x = nullptr;  // [batch, tokens, channels]
};

constexpr double kMassFloor = 1e-16;  // a center of less affinity shrinks towards zero
constexpr double kNormFloor = 1e-12;  // of the weights of a reconstructed row; its gradient is 0 where it is active

// features [batch, tokens, channels], centers [batch, clusters, channels], values [batch, clusters, width]; unit inner
// strides.
struct ReconstructParams {
  const void *features = nullptr, *centers = nullptr, *values = nullptr;
  int64_t features_batch = 0, features_row = 0, centers_batch = 0, centers_row = 0, values_batch = 0, values_row = 0;
  int64_t batch = 0, tokens = 0, clusters = 0, channels = 0, width = 0;
  int64_t k = 0;  // in [1, clusters]; clusters = keep all
  double temperature = 1;
  bool l1 = false;
  void* out = nullptr;         // [batch, tokens, width]
  int64_t* nearest = nullptr;  // nearest_centers: [batch, tokens]
  bool backward = false;       // the rest; all contiguous and of the values' dtype
  const void* grad = nullptr;  // [batch, tokens, width]
  void *grad_features = nullptr, *grad_centers = nullptr, *grad_values = nullptr;  // like features, centers, values
};

}  // namespace tokenprune
