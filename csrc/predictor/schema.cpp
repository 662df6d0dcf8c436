// SPDX-License-Identifier: Apache-2.0
// Learned scores of tokens (DynamicViT, SPViT) in one call, from packed weights: inference on the CPU.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // x [B, N, C], or [T, C] with cu_seqlens int32 [B + 1]; each of the num_heads parts of its channels (W of them) by
  // itself: f = gelu(LN(x) W0^T + b0); the channels of f from W / 2 on become their mean over the tokens of the image
  // where counted (bool, one per token; absent: all; rows behind the last sequence belong to it); (l0, l1) =
  // gelu(gelu(f W1^T + b1) W2^T + b2) W3^T + b3. scores and probabilities [..., 2] (float32; float64 beside float64):
  // log-softmax and softmax of (l0, l1), averaged over the heads, weighted with sigmoid(gelu(m S0^T + s0) S1^T + s1) of
  // the heads' channel means m where packed_s0 and packed_s1 are given. packed_* of pack_linear: [W, W], [W / 2, W], [W
  // / 4, W / 2], [2, W / 4]; [H / 2, H], [H, H / 2].
  m.def(
      "packed_predictor(Tensor x, Tensor? counted, Tensor? cu_seqlens, SymInt num_heads, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps, Tensor packed_0, Tensor? bias_0, Tensor packed_1, Tensor? bias_1, "
      "Tensor packed_2, Tensor? bias_2, Tensor packed_3, Tensor? bias_3, Tensor? packed_s0, Tensor? bias_s0, "
      "Tensor? packed_s1, Tensor? bias_s1) -> (Tensor scores, Tensor probabilities)");
}
