// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "../common/pack.h"
#include "cpu_kernels.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

template <typename T>
void pool_rows(const PredictorParams& p, int64_t begin, int64_t end, Compute<T>* sums) {
  using C = Compute<T>;
  const int64_t row = p.heads * p.width, first = p.width / 2, pooled = p.width - first;
  T* features = static_cast<T*>(p.features);
  int64_t count = 0;
  for (int64_t i = 0; i < p.heads * pooled; ++i) sums[i] = 0;
  for (int64_t t = begin; t < end; ++t) {
    if (p.counted != nullptr && !p.counted[t]) continue;
    ++count;
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* from = features + t * row + h * p.width + first;
      for (int64_t c = 0; c < pooled; ++c) sums[h * pooled + c] += to_float(from[c]);
    }
  }
  const C factor = count == 0 ? C(0) : C(1) / static_cast<C>(count);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < p.heads; ++h) {
      narrow<T>(sums + h * pooled, features + t * row + h * p.width + first, pooled, factor);
    }
  }
}

template <typename T>
void mean_rows(const PredictorParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const C factor = C(1) / static_cast<C>(p.width);
  for (int64_t i = begin * p.heads; i < end * p.heads; ++i) {
    const T* x = static_cast<const T*>(p.x) + i * p.width;
    Vec<C> sums{};
    C rest = 0;
    int64_t c = 0;
    for (; c + w <= p.width; c += w) sums += load_wide(x + c);
    for (; c < p.width; ++c) rest += to_float(x[c]);
    static_cast<T*>(p.means)[i] = from_float<T, C>((reduce_add<C>(sums) + rest) * factor);
  }
}

inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

template <typename T>
void finish_rows(const PredictorParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const T *logits = static_cast<const T*>(p.logits), *importance = static_cast<const T*>(p.importance);
  C *scores = static_cast<C*>(p.scores), *chance = static_cast<C*>(p.chance);
  for (int64_t t = begin; t < end; ++t) {
    C score[2] = {0, 0}, share[2] = {0, 0}, total = 0;
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t i = t * p.heads + h;
      const C keep = to_float(logits[2 * i]), drop = to_float(logits[2 * i + 1]), most = keep > drop ? keep : drop;
      const C both[2] = {exponential(keep - most), exponential(drop - most)}, sum = both[0] + both[1];
      const C weight = importance == nullptr ? C(1) : C(1) / (C(1) + exponential(-to_float(importance[i])));
      const C log_sum = most + logarithm(sum);
      score[0] += weight * (keep - log_sum), score[1] += weight * (drop - log_sum);
      share[0] += weight * (both[0] / sum), share[1] += weight * (both[1] / sum);
      total += weight;
    }
    for (int i = 0; i < 2; ++i) scores[2 * t + i] = score[i] / total, chance[2 * t + i] = share[i] / total;
  }
}

bool pool(Dtype d, const PredictorParams& p, int64_t begin, int64_t end, char* scratch) {
  return visit(d, [&]<typename T>() { pool_rows<T>(p, begin, end, reinterpret_cast<Compute<T>*>(scratch)); });
}
bool head_means(Dtype d, const PredictorParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { mean_rows<T>(p, begin, end); });
}
bool finish(Dtype d, const PredictorParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { finish_rows<T>(p, begin, end); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const PredictorKernels TP_TABLE(predictor_kernels) = {pool, head_means, finish};

}  // namespace tokenprune
