// SPDX-License-Identifier: Apache-2.0
// Linear layers for inference on the CPU: weights packed once, norm and activation and residual in the same pass.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // weight [N, K] in the layout of packed_linear's kernel: opaque uint8, valid in this process only.
  m.def("pack_linear(Tensor weight) -> Tensor");
  // y [..., N] = residual + scale * act(LN(x) W^T + bias), every part but the product optional. x [..., K], or with
  // indices (int32 [M], -1 gives a zero input row) x [R, K] and y [M, N]; norm: LayerNorm with norm_weight, norm_bias
  // [K] and norm_eps; act 0 none, 1 gelu (erf), 2 gelu (tanh), 3 quick gelu; scale [N]; residual like y.
  m.def(
      "packed_linear(Tensor x, Tensor packed, SymInt out_features, Tensor? bias, bool norm, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps, int act, Tensor? scale, Tensor? residual, Tensor? indices) -> Tensor");
}
