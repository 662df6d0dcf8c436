// SPDX-License-Identifier: Apache-2.0
// Tokens by rank: the first num_prefix tokens, then the others by descending score; ties as they stand, NaN last.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // score [B, N] -> order int64 [B, N]: positions by rank; rows int32 [B * count]: the first `count` of every image as
  // flat rows b * N + i; cu_seqlens int32 [B + 1]: where each image's rows start.
  m.def("rank_tokens(Tensor score, SymInt num_prefix, SymInt count) -> (Tensor order, Tensor rows, Tensor cu_seqlens)");
  // y [B, num_prefix + keep (+ 1), C]: rows of x [B, N, C] by rank of score [B, N] (float32; float64 beside float64),
  // and with fuse the sum of the others, each times its score. order int64 [B, num_prefix + keep].
  m.def(
      "keep_top_tokens(Tensor x, Tensor score, SymInt num_prefix, SymInt keep, bool fuse) -> (Tensor y, Tensor order)");
  // score [R] with score[i] + weight * (latest[t] - score[i]) at i = rows[t] (int32 [T], without duplicates, -1
  // nowhere; absent: i = t). float32 or float64.
  m.def("running_scores(Tensor score, Tensor latest, Tensor? rows, float weight) -> Tensor");
}
