// SPDX-License-Identifier: Apache-2.0
// What families that build on this one call on the CPU.
#pragma once

#include "../common/check.h"

namespace tokenprune {

Tensor argsort_rows(const Tensor& x);

// (rows, source, cu_seqlens)
std::tuple<Tensor, Tensor, Tensor> sample_tokens(const Tensor& attention, const Tensor& v, const Tensor& initial,
                                                 const Tensor& cu_seqlens, int64_t max_seqlen,
                                                 const std::optional<Tensor>& key_bias, int64_t num_prefix, bool padded,
                                                 bool drop);

// Groups of the tokens of every head of every sequence. x [T, H, D]; ids int32 [B * H, max_seqlen]; the means of all
// groups [G, D], those of each row from cu_groups [B * H + 1] on.
struct HeadGroups {
  Tensor ids, cu_groups, means;
};
HeadGroups group_heads(const char* op, const Tensor& x, const Tensor& cu_seqlens, int64_t max_seqlen,
                       const Tensor& projection, const Tensor& offset, double width, double scale);

}  // namespace tokenprune
