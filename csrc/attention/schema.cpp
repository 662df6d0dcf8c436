// SPDX-License-Identifier: Apache-2.0
// Attention over ragged batches. q [Rq, H, D], k and v [Rk, H, D] with any row and head stride; sequences are given by
// cu_seqlens int32 [B+1]; q_index [Tq] and kv_index [Tk] address rows without a gather copy; key_bias [Tk] is added to
// the logits of every query (log of the token size, or -inf for a hidden key).
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // out [Tq, H, D]; lse [H, Tq] natural log; cls [H, Tk]: probabilities of the first query of each sequence, from the
  // same pass ([H, 0] when not wanted). A query without keys gives out 0, lse -inf.
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, Tensor? key_bias, Tensor? q_index, Tensor? kv_index, float scale, bool want_cls) -> "
      "(Tensor out, Tensor lse, Tensor cls)");
  // Packed gradients. dS_ij = P_ij (dO_i v_j - dO_i out_i + dlse_i + w_i g_j), where g is the gradient of
  // attention_scores (w as there). grad_bias [H, Tk].
  m.def(
      "sparse_attention_backward(Tensor? grad_out, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, "
      "Tensor? grad_lse, Tensor? grad_scores, int scores_kind, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? key_bias, Tensor? q_index, Tensor? kv_index, float scale) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)");
  // Column statistics of the probabilities [H, Tk], recomputed from lse. kind 0: row of the first query (w = 1 there);
  // kind 1: mean over the queries of the sequence (w = 1 / n).
  m.def(
      "attention_scores(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, Tensor? key_bias, Tensor? q_index, Tensor? kv_index, float scale, int kind) -> Tensor");
  // Gradient of attention_scores with respect to lse: -w_i sum_j P_ij g_j, [H, Tq].
  m.def(
      "attention_scores_grad_lse(Tensor grad, Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? key_bias, Tensor? q_index, "
      "Tensor? kv_index, float scale, int kind) -> Tensor");
  // Attention under a key policy in [0, 1] with straight-through gradients (DynamicViT, SPViT): q, k, v [B, N, H, D],
  // policy [B, N]; every token sees itself. row_max, row_sum [B, H, N] are saved for the backward.
  m.def(
      "policy_attention(Tensor q, Tensor k, Tensor v, Tensor policy, float eps, float scale) -> "
      "(Tensor out, Tensor row_max, Tensor row_sum)");
  m.def(
      "policy_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor policy, Tensor out, "
      "Tensor row_max, Tensor row_sum, float eps, float scale) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_policy)");
}
