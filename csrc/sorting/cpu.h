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

}  // namespace tokenprune
