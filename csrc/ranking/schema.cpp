// SPDX-License-Identifier: Apache-2.0
// Tokens by rank (the first num_prefix tokens, then the others by descending score; ties as they stand, NaN last) or by
// mark, with the others fused.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // score [B, N] -> order int64 [B, N]: positions by rank; rows int32 [B * count]: the first `count` of every image as
  // flat rows b * N + i; cu_seqlens int32 [B + 1]: where each image's rows start.
  m.def("rank_tokens(Tensor score, SymInt num_prefix, SymInt count) -> (Tensor order, Tensor rows, Tensor cu_seqlens)");
  // y [B, num_prefix + keep (+ 1), C]: the best rows of x [B, N, C] by score [B, N] (float32; float64 beside float64),
  // by rank or in the order of x, and with fuse the sum of the others, each times its score. order int64 [B, num_prefix
  // + keep].
  m.def(
      "keep_top_tokens(Tensor x, Tensor score, SymInt num_prefix, SymInt keep, bool fuse, bool by_rank) -> "
      "(Tensor y, Tensor order)");
  // The rows of x [T, C] where keep (bool [T]) is true, in order, sequence by sequence (cu_seqlens int32 [B + 1]); with
  // weights [T] (float32; float64 beside float64) behind each sequence the sum of its other rows, each times its
  // weight. source int32 [S]: row of x of every row of y, -1 for the sums; cu_out int32 [B + 1]: where each sequence
  // starts in y.
  m.def(
      "keep_marked_tokens(Tensor x, Tensor keep, Tensor cu_seqlens, Tensor? weights) -> "
      "(Tensor y, Tensor source, Tensor cu_out)");
  // score [R] with score[i] + weight * (latest[t] - score[i]) at i = rows[t] (int32 [T], without duplicates, -1
  // nowhere; absent: i = t). float32 or float64.
  m.def("running_scores(Tensor score, Tensor latest, Tensor? rows, float weight) -> Tensor");
}
