// SPDX-License-Identifier: Apache-2.0
// Check and fill: one function per op, called by the CPU and the CUDA side alike.
#pragma once

#include <cmath>

#include "../common/check.h"
#include "params.h"

namespace tokenprune {

inline ClusterAxis cluster_axis(int64_t size, int64_t cells, int64_t window) {
  ClusterAxis a;
  a.size = size, a.cells = cells;
  a.reach = window / 2 < cells - 1 ? window / 2 : cells - 1;
  a.scale = size > 0 ? static_cast<float>(cells) / static_cast<float>(size) : 0.f;
  return a;
}

inline void check_geometry(const char* op, int64_t height, int64_t width, int64_t rows, int64_t cols, int64_t iters,
                           int64_t window) {
  constexpr int64_t kMost = 1 << 24;  // positions are exact in float32
  TP_CHECK(height >= 0 && height <= kMost, op, "height must be in [0, ", kMost, "], got ", height);
  TP_CHECK(width >= 0 && width <= kMost, op, "width must be in [0, ", kMost, "], got ", width);
  TP_CHECK(rows >= 1 && rows <= kMost, op, "rows must be in [1, ", kMost, "], got ", rows);
  TP_CHECK(cols >= 1 && cols <= kMost, op, "cols must be in [1, ", kMost, "], got ", cols);
  TP_CHECK(iters >= 0, op, "iters must be >= 0, got ", iters);
  TP_CHECK(window >= 1 && window % 2 == 1, op, "window must be odd and >= 1, got ", window);
}

inline void check_temperature(const char* op, double temperature) {
  TP_CHECK(temperature > 0 && std::isfinite(temperature), op, "temperature must be positive and finite, got ",
           temperature);
}

struct ClusterCall {
  Tensor x;
  ClusterParams p;

  ClusterCall(const char* op, const Tensor& tokens, int64_t height, int64_t width, int64_t rows, int64_t cols,
              int64_t iters, double temperature, int64_t window)
      : x(tokens) {
    check_dim(op, "x", tokens, 3, "[B, N, C]");
    check_floating(op, "x", tokens);
    check_geometry(op, height, width, rows, cols, iters, window);
    check_temperature(op, temperature);
    check_size(op, "x", tokens, 1, height * width);
    x = inner_contiguous(tokens);
    p.x = x.const_data_ptr();
    p.batch = x.size(0), p.tokens = x.size(1), p.channels = x.size(2);
    p.batch_stride = x.stride(0), p.token_stride = x.stride(1);
    p.y_axis = cluster_axis(height, rows, window), p.x_axis = cluster_axis(width, cols, window);
    p.clusters = rows * cols, p.slots = window_width(p.y_axis) * window_width(p.x_axis);
    p.iters = iters, p.temperature = temperature;
  }

  Tensor new_centers() const { return torch::stable::new_empty(x, {p.batch, p.clusters, p.channels}); }
  Tensor new_mass() const { return torch::stable::new_empty(x, {p.batch, p.clusters}, stat_dtype(x.scalar_type())); }
  Tensor new_affinity(bool wanted) const {
    return torch::stable::new_empty(x, {p.batch, p.tokens, wanted && p.iters > 0 ? p.slots : 0},
                                    stat_dtype(x.scalar_type()));
  }
};

struct ClusterBackwardCall {
  Tensor grad, mass, affinity;
  ClusterBackwardParams p;

  ClusterBackwardCall(const char* op, const Tensor& grads, const Tensor& masses, const Tensor& affinities,
                      int64_t height, int64_t width, int64_t rows, int64_t cols, int64_t iters, int64_t window)
      : grad(as_contiguous(grads)), mass(as_contiguous(masses)), affinity(as_contiguous(affinities)) {
    check_dim(op, "grad", grads, 3, "[B, K, C]");
    check_floating(op, "grad", grads);
    check_geometry(op, height, width, rows, cols, iters, window);
    check_size(op, "grad", grads, 1, rows * cols);
    p.batch = grads.size(0), p.tokens = height * width, p.channels = grads.size(2), p.clusters = rows * cols;
    p.y_axis = cluster_axis(height, rows, window), p.x_axis = cluster_axis(width, cols, window);
    p.slots = window_width(p.y_axis) * window_width(p.x_axis), p.iters = iters;
    check_dim(op, "mass", masses, 2, "[B, K]");
    check_size(op, "mass", masses, 0, p.batch);
    check_size(op, "mass", masses, 1, p.clusters);
    check_dtype(op, "mass", masses, stat_dtype(grads.scalar_type()));
    check_device(op, "mass", masses, grads);
    check_dim(op, "affinity", affinities, 3, "[B, N, S]");
    check_size(op, "affinity", affinities, 0, p.batch);
    check_size(op, "affinity", affinities, 1, p.tokens);
    check_size(op, "affinity", affinities, 2, iters > 0 ? p.slots : 0);
    check_dtype(op, "affinity", affinities, stat_dtype(grads.scalar_type()));
    check_device(op, "affinity", affinities, grads);
    p.grad = grad.const_data_ptr(), p.mass = mass.const_data_ptr();
    if (iters > 0) p.affinity = affinity.const_data_ptr();
  }

  Tensor new_grad_x() const { return torch::stable::new_empty(grad, {p.batch, p.tokens, p.channels}); }
};

// Reconstruction and its backward, and (without values) the nearest centers.
struct ReconstructCall {
  Tensor features, centers;
  std::optional<Tensor> values, grad;
  ReconstructParams p;

  ReconstructCall(const char* op, const Tensor& f, const Tensor& s) : features(f), centers(s) {
    check_dim(op, "features", f, 3, "[B, N, C]");
    check_floating(op, "features", f);
    p.batch = f.size(0), p.tokens = f.size(1), p.channels = f.size(2);
    check_rows(op, "centers", s);
    check_size(op, "centers", s, 2, p.channels);
    p.clusters = s.size(1);
    TP_CHECK(p.clusters >= 1 || p.tokens == 0, op, "centers must have at least one row, got ", shape_text(s));
    features = inner_contiguous(f), centers = inner_contiguous(s);
    p.features = features.const_data_ptr(), p.centers = centers.const_data_ptr();
    p.features_batch = features.stride(0), p.features_row = features.stride(1);
    p.centers_batch = centers.stride(0), p.centers_row = centers.stride(1);
  }

  void set_values(const char* op, const Tensor& v, int64_t k, double temperature, bool l1) {
    check_rows(op, "values", v);
    check_size(op, "values", v, 1, p.clusters);
    TP_CHECK(k != 0, op, "k must be positive, or negative for all centers, got 0");
    check_temperature(op, temperature);
    values = inner_contiguous(v);
    p.values = values->const_data_ptr(), p.values_batch = values->stride(0), p.values_row = values->stride(1);
    p.width = v.size(2);
    p.k = k < 0 || k > p.clusters ? p.clusters : k;
    p.temperature = temperature, p.l1 = l1;
  }

  void set_grad(const char* op, const Tensor& g) {
    check_rows(op, "grad", g);
    check_size(op, "grad", g, 1, p.tokens);
    check_size(op, "grad", g, 2, p.width);
    grad = as_contiguous(g);
    p.grad = grad->const_data_ptr(), p.backward = true;
  }

  void check_rows(const char* op, const char* name, const Tensor& t) const {
    check_dim(op, name, t, 3, "[B, rows, channels]");
    check_dtype(op, name, t, features.scalar_type());
    check_device(op, name, t, features);
    check_size(op, name, t, 0, p.batch);
  }

  Tensor new_out() const { return torch::stable::new_empty(features, {p.batch, p.tokens, p.width}); }
  Tensor new_nearest() const { return torch::stable::new_empty(features, {p.batch, p.tokens}, ScalarType::Long); }
  Tensor new_grad_features() const { return torch::stable::new_empty(features, {p.batch, p.tokens, p.channels}); }
  Tensor new_grad_centers() const { return torch::stable::new_empty(features, {p.batch, p.clusters, p.channels}); }
  Tensor new_grad_values() const { return torch::stable::new_empty(features, {p.batch, p.clusters, p.width}); }
};

}  // namespace tokenprune
