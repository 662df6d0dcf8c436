// SPDX-License-Identifier: Apache-2.0
// The two halves of a pre-norm transformer block, each in one call, from packed weights: inference on the CPU.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // (y, qkv, lse, cls): y = x + layer_scale * (attention(LN(x) Wqkv^T + bqkv) Wproj^T + bproj). x is [B, N, C], or [T,
  // C] with cu_seqlens int32 [B + 1] and max_seqlen; with indices too (int32 [T], -1 for a zero row), x is [R, C] and
  // its rows x[indices] are meant. packed_* of pack_linear: [3 * H * D, C] (columns q, k, v, then by head) and [C, H *
  // D]; norm_weight, norm_bias [C] may be absent; layer_scale [C]; key_bias [T] float32 (float64 beside float64). qkv
  // is [..., 3 * H * D]; lse [H, T] that of sparse_attention; cls [T] (empty unless want_cls) its mean over the heads.
  m.def(
      "packed_attention(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
      "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, "
      "SymInt head_dim, Tensor? indices, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_bias, float scale, "
      "bool want_cls) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same of padded tokens x [B, N, C], then match_and_merge by the keys, with its r, size, protection and outputs.
  m.def(
      "packed_attention_merged(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
      "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, "
      "SymInt head_dim, Tensor? key_bias, float scale, SymInt r, Tensor? size, bool class_token, bool distill_token, "
      "SymInt num_prefix) -> (Tensor y, Tensor size_out, Tensor log_size, Tensor parent)");
  // (y, rows, source, cu_seqlens): packed_attention with the queries and rows that sample_tokens keeps of x [B, N, C],
  // or [T, C] with cu_seqlens and max_seqlen: y [B, M, C] (zeros behind the kept rows) or [S, C]. The first token of
  // every sequence scores the others; initial, num_prefix and drop, rows, source and the new cu_seqlens are those of
  // sample_tokens.
  m.def(
      "packed_attention_sampled(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
      "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, "
      "SymInt head_dim, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_bias, float scale, Tensor initial, "
      "SymInt num_prefix, bool drop) -> (Tensor y, Tensor rows, Tensor source, Tensor cu_seqlens)");
  // (y, ids): packed_attention of x [B, N, C], or [T, C] with cu_seqlens and max_seqlen, in which the queries of a head
  // that hash alike (hash_groups, with scale) act as their mean; ids int32 [B, H, N] (max_seqlen when packed).
  m.def(
      "packed_attention_grouped(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
      "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, "
      "SymInt head_dim, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_bias, float scale, Tensor projection, "
      "Tensor offset, float width) -> (Tensor y, Tensor ids)");
  // x + layer_scale * (act(LN(x) W1^T + b1) W2^T + b2). x [..., C]; packed_* of pack_linear: [hidden, C] and [C,
  // hidden]; act 0 none, 1 gelu (erf), 2 gelu (tanh), 3 quick gelu.
  m.def(
      "packed_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_1, Tensor? bias_1, "
      "SymInt hidden, int act, Tensor packed_2, Tensor? bias_2, Tensor? layer_scale) -> Tensor");
}
