// SPDX-License-Identifier: Apache-2.0
// Windowed soft k-means over a token map, and reconstruction of the map from refined centers (arXiv 2210.01035).
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // x [B, height * width, C], a row-major map; centers [B, rows * cols, C]. mass [B, rows * cols], float32 (float64):
  // the summed affinity of the last iteration; with iters = 0 the number of tokens averaged. affinity [B, N, S] of the
  // last iteration, S = (2 min(window / 2, rows - 1) + 1) (2 min(window / 2, cols - 1) + 1): slot (i, j) of a token
  // belongs to the center at its home cell + (i, j) - reach, 0 where there is none; [B, N, 0] when not asked for or
  // iters = 0.
  m.def(
      "cluster_tokens(Tensor x, SymInt height, SymInt width, SymInt rows, SymInt cols, SymInt iters, float "
      "temperature, "
      "SymInt window, bool affinity) -> (Tensor centers, Tensor mass, Tensor affinity)");
  // Gradient of the last weighted mean for fixed affinities; of adaptive average pooling with iters = 0.
  m.def(
      "cluster_tokens_backward(Tensor grad, Tensor mass, Tensor affinity, SymInt height, SymInt width, SymInt rows, "
      "SymInt cols, SymInt iters, SymInt window) -> Tensor");
  // Index of the nearest of all centers [B, K, C] for every row of features [B, N, C], int64; ties: the lower index.
  m.def("nearest_centers(Tensor features, Tensor centers) -> Tensor");
  // features [B, N, C], centers [B, K, C], values [B, K, V] -> [B, N, V]: weights exp(-temperature * squared distance)
  // of the k nearest centers (k < 0: all; at a tie all of them), divided by their L2 (l1: L1) norm, times the values.
  m.def(
      "reconstruct_tokens(Tensor features, Tensor centers, Tensor values, SymInt k, float temperature, bool l1) -> "
      "Tensor");
  m.def(
      "reconstruct_tokens_backward(Tensor grad, Tensor features, Tensor centers, Tensor values, SymInt k, "
      "float temperature, bool l1) -> (Tensor grad_features, Tensor grad_centers, Tensor grad_values)");
}
