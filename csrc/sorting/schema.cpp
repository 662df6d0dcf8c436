// SPDX-License-Identifier: Apache-2.0
// Ops on sorted rows: the sort itself, sampling from sorted scores (ATS), groups of equal hash codes (ACT), and
// attention in balanced clusters, which are cut from rows sorted by a hash, several times over (rounds; SMYRF).
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // order int32 [R, N]: positions of every row of x [R, N] by ascending value; ties by position, NaN last.
  m.def("argsort_rows(Tensor x) -> Tensor");
  // Inverse transform sampling from scores [B, n] that sum to 1 (stat dtype, 0 where valid [B, n] is false) on a grid
  // of grid_points, or grid_counts int32 [B]. order int64 [B, n] ascending; cdf [B, n] in that order; grid [B, G]; pick
  // int64 [B, G]: nearest place in cdf; kept bool [B, n]: places kept; rows int32 [B, n]: kept positions, then -1.
  m.def(
      "sample_rows(Tensor scores, Tensor order, SymInt grid_points, Tensor? grid_counts, Tensor? valid, bool "
      "published) "
      "-> (Tensor cdf, Tensor grid, Tensor pick, Tensor kept, Tensor rows)");
  // Inverse transform sampling of the tokens of every sequence (cu_seqlens int32 [B + 1]). attention [H, T] is that of
  // each sequence's first token (stat dtype), v [T, H, D]: their product, norms for values, is the score. The first
  // num_prefix tokens are always kept, others where sampled; -inf in key_bias [T] hides one. initial bool [B, N]: the
  // tokens that the sequences had once (the prefix included), which make the grid. rows int32 [B, M]: kept rows within
  // each sequence, the prefix first, then by ascending score, then -1; M is max_seqlen, or with padded and drop the
  // largest number kept. source int32 [S]: the same as rows of v, those of each sequence from cu_seqlens [B + 1] on;
  // with padded every sequence has M, -1 behind the kept ones.
  m.def(
      "sample_tokens(Tensor attention, Tensor v, Tensor initial, Tensor cu_seqlens, SymInt max_seqlen, "
      "Tensor? key_bias, SymInt num_prefix, bool padded, bool drop) -> "
      "(Tensor rows, Tensor source, Tensor cu_seqlens)");
  // Tokens of x [R, N, D] by their code: hash l is floor((scale x . projection[:, l] + offset[l]) / width), and their
  // least ones of the row subtracted, the code is sum_l hash_l 4^l in wrapping 64-bit arithmetic. projection [D, L] and
  // offset [L] stat dtype, L in 1..32. ids int32 [R, N]: rank of a token's code among its row's, -1 where valid [R, N]
  // is false; counts int32 [R, N]: tokens of each code, then zeros.
  m.def(
      "hash_groups(Tensor x, Tensor projection, Tensor offset, float width, float scale, Tensor? valid) -> "
      "(Tensor ids, Tensor counts)");
  // q [R, Nq, D] attends to k, v [R, Nk, D] within its cluster of every round; q_order, k_order int32 [rounds, R, N]
  // list every token of a row once. All rounds are one softmax: a key met twice counts twice. per_row: the first
  // q_lengths[R] (k_lengths[R]) entries of each order are cut by themselves, into the fewest clusters that keep to both
  // sizes; otherwise the flat list [rounds * R * N] is cut every q_size (k_size). key_bias [R, Nk] is added to the
  // logits. out [R, Nq, D], lse [R, Nq] natural log; a query without keys gives out 0, lse -inf.
  m.def(
      "balanced_attention(Tensor q, Tensor k, Tensor v, Tensor q_order, Tensor k_order, Tensor? q_lengths, "
      "Tensor? k_lengths, Tensor? key_bias, SymInt q_size, SymInt k_size, bool per_row, float scale) -> "
      "(Tensor out, Tensor lse)");
}
