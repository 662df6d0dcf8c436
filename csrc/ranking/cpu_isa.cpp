// SPDX-License-Identifier: Apache-2.0
// The CPU kernel of this family, compiled once per instruction set.
#include "../common/pack.h"
#include "cpu_kernels.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

template <typename T>
void fuse_rows(const FuseParams& p) {
  using C = Compute<T>;
  constexpr int64_t kPart = 512;
  const T* x = static_cast<const T*>(p.x);
  const C* weights = static_cast<const C*>(p.weights);
  for (int64_t c0 = 0; c0 < p.channels; c0 += kPart) {
    const int64_t part = p.channels - c0 < kPart ? p.channels - c0 : kPart;
    C sum[kPart];
    for (int64_t c = 0; c < part; ++c) sum[c] = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      const T* row = x + p.dropped[i] * p.channels + c0;
      const C weight = weights[p.dropped[i]];
      for (int64_t c = 0; c < part; ++c) sum[c] += weight * to_float(row[c]);
    }
    narrow<T>(sum, static_cast<T*>(p.out) + c0, part);
  }
}

bool fuse(Dtype d, const FuseParams& p) {
  return visit(d, [&]<typename T>() { fuse_rows<T>(p); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const RankingKernels TP_TABLE(ranking_kernels) = {fuse};

}  // namespace tokenprune
