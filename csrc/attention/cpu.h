// SPDX-License-Identifier: Apache-2.0
// sparse_attention on the CPU, for families that build on it.
#pragma once

#include "../common/check.h"

namespace tokenprune {

// (out, lse, cls)
std::tuple<Tensor, Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_q, const Tensor& cu_k, int64_t max_q,
                                                    int64_t max_k, const std::optional<Tensor>& key_bias,
                                                    const std::optional<Tensor>& q_index,
                                                    const std::optional<Tensor>& kv_index, double scale, bool want_cls);

}  // namespace tokenprune
