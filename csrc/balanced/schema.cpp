// SPDX-License-Identifier: Apache-2.0
// Attention in balanced clusters: rows of tokens are sorted by a hash, and the sorted lists are cut into clusters of
// equal size, several times over (rounds).
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // order int32 [R, N]: positions of every row of x [R, N] by ascending value; ties by position, NaN last.
  m.def("argsort_rows(Tensor x) -> Tensor");
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
