// SPDX-License-Identifier: Apache-2.0
// Arguments of the matching and merge kernels, filled and checked once (checks.h) for both devices.
#pragma once

#include <cstdint>

namespace tokenprune {

// Best match of the a-tokens among the b-tokens. Without index arrays the split is bipartite: a = even, b = odd tokens.
struct MatchParams {
  const void* metric = nullptr;  // [batch, tokens, channels], unit inner stride
  int64_t batch = 0, tokens = 0, channels = 0, batch_stride = 0, token_stride = 0;
  const int32_t *a_index = nullptr, *b_index = nullptr;  // [batch, na], [batch, nb] or null
  int64_t na = 0, nb = 0;
  int64_t protect_a = 0, protect_b = 0;  // the first protect_* a (b) tokens never merge (are never chosen)
  void* score = nullptr;                 // [batch, na] stat dtype, -inf where nothing may be chosen
  int32_t* nearest = nullptr;            // [batch, na]
};

// A metric per head, averaged before matching.
struct HeadsParams {
  const void* keys = nullptr;  // [batch, tokens, heads, dim], unit inner stride
  int64_t tokens = 0, heads = 0, dim = 0, batch_stride = 0, token_stride = 0, head_stride = 0;
  void* mean = nullptr;  // [batch, tokens, dim]
};

struct SelectMergeParams {  // from scores to unm, src, dst, parent
  const void* score = nullptr;
  const int32_t* nearest = nullptr;
  int64_t batch = 0, tokens = 0, na = 0, nb = 0, r = 0, protect_a = 0;
  int64_t interleave = 0;      // the first `interleave` tokens keep their places 0.. in the output
  bool sort_unmerged = false;  // ascending, otherwise descending similarity
  int32_t *unm = nullptr, *src = nullptr, *dst = nullptr, *parent = nullptr;
};

enum MergeMode : int64_t { kMergeSum = 0, kMergeMean = 1, kMergeAmax = 2, kMergeWeighted = 3 };

struct MergeParams {
  const void *x = nullptr, *y_in = nullptr, *grad = nullptr;  // contiguous [batch, tokens, C], [batch, out_len, C] x 2
  const int32_t* parent = nullptr;                            // [batch, tokens]
  const void *size = nullptr, *size_out_in = nullptr, *grad_size_out = nullptr;  // stat dtype
  int64_t batch = 0, tokens = 0, channels = 0, out_len = 0, mode = 0;
  void *y = nullptr, *size_out = nullptr, *grad_x = nullptr, *grad_size = nullptr;
  int32_t *offsets = nullptr, *members = nullptr;  // workspace [batch, out_len + 1], [batch, tokens]
};

}  // namespace tokenprune
