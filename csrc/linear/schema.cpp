// SPDX-License-Identifier: Apache-2.0
// Linear layers on kept tokens. x [R, C], weight [M, C], bias [M]; index int32 [T] takes rows of x (-1: a row of zeros;
// none: all rows in order); scatter int32 [T] names the row of features [F, M] that a result goes to (-1: nowhere).
//
// The CPU and CUDA kernels are compositions of gather_tokens, PyTorch's linear and scatter_tokens, registered from
// Python (ops/linear.py): large plain products belong to the vendor libraries. hopper.cu is the fused one for sm_90a.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // y[t] = act(x[index[t]] . weight^T + bias), activation 0: none, 1: GELU. Without features y [T, M]; with features a
  // copy of them, except out[scatter[t]] = (add ? features[scatter[t]] : 0) + y[t].
  m.def(
      "gather_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? index, Tensor? features, Tensor? scatter, bool "
      "add, "
      "int activation) -> Tensor");
  // grad_bias is [0] without bias, grad_features [0] without scatter.
  m.def(
      "gather_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? index, Tensor? scatter, "
      "bool add, int activation) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_features)");
}
