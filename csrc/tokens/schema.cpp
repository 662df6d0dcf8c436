// SPDX-License-Identifier: Apache-2.0
// Selection, gather and scatter-back of tokens. Rows are [R, C]; indices are int32 rows, -1 means "no token".
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // mask bool [B, N] -> flat indices (b*N + i, ascending) of the true entries [T], cu_seqlens int32 [B+1].
  m.def("select_tokens(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)");
  // The same with a fixed number of slots: no host synchronisation; unused slots hold -1.
  m.def("select_tokens_capacity(Tensor mask, SymInt capacity) -> (Tensor indices, Tensor cu_seqlens)");
  // out[t] = x[indices[t]]; -1 gives a zero row.
  m.def("gather_tokens(Tensor x, Tensor indices) -> Tensor");
  // Adjoint of gather_tokens: rows with several takers are summed in the order of the indices.
  m.def("gather_tokens_backward(Tensor grad, Tensor indices, SymInt rows) -> Tensor");
  // LayerNorm of the gathered rows in one pass; mean and rstd [T] are saved for the backward.
  m.def(
      "gather_layer_norm(Tensor x, Tensor indices, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "gather_layer_norm_backward(Tensor grad, Tensor x, Tensor indices, Tensor? weight, Tensor mean, Tensor rstd) -> "
      "(Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)");
  // out = features, except out[indices[t]] = (add ? features[indices[t]] : 0) + scale[t] * tokens[t].
  m.def("scatter_tokens(Tensor features, Tensor tokens, Tensor indices, Tensor? scale, bool add) -> Tensor");
  m.def("scatter_tokens_(Tensor(a!) features, Tensor tokens, Tensor indices, Tensor? scale, bool add) -> ()");
  m.def(
      "scatter_tokens_backward(Tensor grad, Tensor? tokens, Tensor indices, Tensor? scale, bool add) -> "
      "(Tensor grad_features, Tensor grad_tokens, Tensor grad_scale)");
}
