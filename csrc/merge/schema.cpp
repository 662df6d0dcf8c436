// SPDX-License-Identifier: Apache-2.0
// Bipartite soft matching and merging (ToMe). A merge is described by parent [B, T]: the output row of every token.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // metric [B, T, C], on the CPU also [B, T, H, D], averaged over H; r is the exact number of merges. unm [B,
  // ceil(T/2)-r] and src [B, r] count even tokens, dst [B, r] odd tokens; parent [B, T]. Ties: the lower index first.
  m.def(
      "bipartite_soft_matching(Tensor metric, SymInt r, bool class_token, bool distill_token, SymInt num_prefix) -> "
      "(Tensor unm, Tensor src, Tensor dst, Tensor parent)");
  // For every token of a_index [B, Na] the most similar (cosine) token of b_index [B, Nb]: score, position in b_index.
  m.def("nearest_tokens(Tensor metric, Tensor a_index, Tensor b_index) -> (Tensor score, Tensor nearest)");
  // mode 0 sum, 1 mean, 2 amax, 3 mean weighted by size [B, T]; parent -1 drops the token. size_out: sum of sizes.
  m.def("merge_tokens(Tensor x, Tensor parent, SymInt out_len, Tensor? size, int mode) -> (Tensor y, Tensor size_out)");
  m.def(
      "merge_tokens_backward(Tensor grad, Tensor x, Tensor y, Tensor parent, Tensor? size, Tensor size_out, "
      "Tensor? grad_size_out, int mode) -> (Tensor grad_x, Tensor grad_size)");
  // A whole step: matching by metric, merging weighted by size (absent: ones), log of the sizes for the next
  // attention.
  m.def(
      "match_and_merge(Tensor x, Tensor metric, SymInt r, Tensor? size, bool class_token, bool distill_token, "
      "SymInt num_prefix) -> (Tensor y, Tensor size_out, Tensor log_size, Tensor parent)");
}
