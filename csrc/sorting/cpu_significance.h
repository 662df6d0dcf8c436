// SPDX-License-Identifier: Apache-2.0
// What ATS ranks tokens by: attention of the class token, summed over heads, times the norm of the values.
#pragma once

#include "../common/vec.h"
#include "params.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

template <typename T>
void significance_rows(const SequenceParams& p, int64_t begin, int64_t end, Compute<T>* scores) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const C* attention = static_cast<const C*>(p.attention);
  for (int64_t t = begin; t < end; ++t) {
    Vec<C> squares{};
    C rest = 0, seen = 0;
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* v = static_cast<const T*>(p.values) + t * p.row_stride + h * p.head_stride;
      int64_t d = 0;
      for (; d + w <= p.dim; d += w) {
        const Vec<C> x = load_wide(v + d);
        squares += x * x;
      }
      for (; d < p.dim; ++d) rest += to_float(v[d]) * to_float(v[d]);
      seen += attention[h * p.total + t];
    }
    scores[t] = seen * static_cast<C>(__builtin_sqrt(static_cast<double>(reduce_add<C>(squares) + rest)));
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
