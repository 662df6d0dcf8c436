// SPDX-License-Identifier: Apache-2.0
// Checks of tensor contents that sit in host memory. On the CPU they always run; CUDA tensors are copied to the host
// for them only under TOKENPRUNE_VALIDATE=1 (that synchronises). They run before any parallel region: a message thrown
// inside one would be lost with torch 2.11.
#pragma once

#include <cstdlib>

#include "check.h"

namespace tokenprune {

inline bool validate_contents() {
  static const bool on = [] {
    const char* value = std::getenv("TOKENPRUNE_VALIDATE");
    return value != nullptr && value[0] != '\0' && value[0] != '0';
  }();
  return on;
}

// The tensor itself on the CPU, a copy under TOKENPRUNE_VALIDATE=1, nothing otherwise.
inline std::optional<Tensor> readable(const Tensor& t) {
  if (t.is_cpu()) return t;
  if (!validate_contents()) return std::nullopt;
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

inline void check_cu_seqlens(const char* op, const char* name, const Tensor& cu, int64_t total, int64_t max_length,
                             const char* max_name) {
  const std::optional<Tensor> host = readable(cu);
  if (!host.has_value()) return;
  const int32_t* c = data<int32_t>(*host);
  const int64_t n = cu.numel();
  TP_CHECK(c[0] == 0, op, name, " must start at 0, got ", c[0]);
  for (int64_t i = 1; i < n; ++i) {
    TP_CHECK(c[i] >= c[i - 1], op, name, " must not decrease, got ", c[i - 1], " then ", c[i], " at ", i);
    TP_CHECK(c[i] - c[i - 1] <= max_length, op, max_name, " must be at least every sequence length, got ", max_length,
             " for a length of ", c[i] - c[i - 1], " at ", i - 1);
  }
  TP_CHECK(c[n - 1] <= total, op, name, " must end within the ", total, " rows, got ", c[n - 1]);
}

// -1 means "no token".
inline void check_indices(const char* op, const char* name, const Tensor& indices, int64_t rows) {
  const std::optional<Tensor> host = readable(indices);
  if (!host.has_value()) return;
  const int32_t* p = data<int32_t>(*host);
  const int64_t n = indices.numel();
  int64_t bad = -1;
  for (int64_t i = n - 1; i >= 0; --i) {
    if (p[i] < -1 || p[i] >= rows) bad = i;
  }
  TP_CHECK(bad < 0, op, name, " must be -1 or in [0, ", rows, "), got ", p[bad], " at ", bad);
}

inline void check_unique(const char* op, const char* name, const Tensor& indices, int64_t rows) {
  const std::optional<Tensor> host = readable(indices);
  if (!host.has_value()) return;
  const int32_t* p = data<int32_t>(*host);
  const int64_t n = indices.numel();
  bool ascending = true;  // the usual case needs no bitmap
  for (int64_t i = 1; i < n; ++i) ascending &= p[i] > p[i - 1];
  if (ascending) return;
  std::vector<bool> seen(rows, false);
  for (int64_t i = 0; i < n; ++i) {
    if (p[i] < 0) continue;
    TP_CHECK(!seen[p[i]], op, name, " must not contain duplicates, got ", p[i], " again at ", i);
    seen[p[i]] = true;
  }
}

}  // namespace tokenprune
