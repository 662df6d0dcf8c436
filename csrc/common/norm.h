// SPDX-License-Identifier: Apache-2.0
// LayerNorm of one row, for the kernels that fold it into something else.
#pragma once

#include "vec.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// Statistics in two passes over a row that sits in the first-level cache: exact where the mean is far from zero.
// Lane-wise partial sums: the order of additions depends on the length alone. 16-bit rows are widened once.
template <typename T>
class NormedRow {
 public:
  using C = Compute<T>;
  C mean, rstd;

  NormedRow(const T* x, int64_t n, const T* weight, const T* bias, double eps)
      : x_(x), weight_(weight), bias_(bias), held_(kWidens && n <= kMost) {
    int64_t c = 0;
    Vec<C> sums{};
    for (; c + kW <= n; c += kW) {
      const Vec<C> v = load_wide(x + c);
      if constexpr (kWidens) {
        if (held_) store(row_ + c, v);
      }
      sums += v;
    }
    C sum = reduce_add<C>(sums);
    for (; c < n; ++c) sum += to_float(x[c]);
    mean = n > 0 ? sum / static_cast<C>(n) : C(0);
    Vec<C> squares{};
    for (c = 0; c + kW <= n; c += kW) {
      const Vec<C> v = at(c) - mean;
      squares += v * v;
    }
    C square = reduce_add<C>(squares);
    for (; c < n; ++c) square += (to_float(x[c]) - mean) * (to_float(x[c]) - mean);
    const double variance = n > 0 ? static_cast<double>(square) / static_cast<double>(n) : 0;
    rstd = static_cast<C>(1 / __builtin_sqrt(variance + eps));
  }

  // The normalised row, rounded to S.
  template <typename S>
  void write(S* to, int64_t n) const {
    int64_t c = 0;
    if (weight_ != nullptr && bias_ != nullptr) {  // the usual case, free of branches in the loop
      for (; c + kW <= n; c += kW) {
        store_narrow<S>(to + c, (at(c) - mean) * rstd * load_wide(weight_ + c) + load_wide(bias_ + c));
      }
    }
    for (; c < n; ++c) {
      C y = (to_float(x_[c]) - mean) * rstd;
      if (weight_ != nullptr) y *= to_float(weight_[c]);
      if (bias_ != nullptr) y += to_float(bias_[c]);
      to[c] = from_float<S, C>(y);
    }
  }

 private:
  static constexpr int kW = kLanes<C>;
  static constexpr bool kWidens = sizeof(T) != sizeof(C);
  static constexpr int64_t kMost = 4096;

  Vec<C> at(int64_t c) const {
    if constexpr (kWidens) {
      if (held_) return load(row_ + c);
    }
    return load_wide(x_ + c);
  }

  const T *x_, *weight_, *bias_;
  bool held_;
  C row_[kWidens ? kMost : 1];
};

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
