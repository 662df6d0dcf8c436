// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "../common/pack.h"
#include "cpu_kernels.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

constexpr int64_t kRows = 48;  // a-tokens per strip

template <typename T>
void mean_rows(const HeadsParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const C factor = C(1) / static_cast<C>(p.heads);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = static_cast<const T*>(p.keys) + i / p.tokens * p.batch_stride + i % p.tokens * p.token_stride;
    T* to = static_cast<T*>(p.mean) + i * p.dim;
    int64_t d = 0;
    for (; d + w <= p.dim; d += w) {
      Vec<C> sum{};
      for (int64_t h = 0; h < p.heads; ++h) sum += load_wide(x + h * p.head_stride + d);
      store_narrow<T>(to + d, sum * factor);
    }
    for (; d < p.dim; ++d) {
      C sum = 0;
      for (int64_t h = 0; h < p.heads; ++h) sum += to_float(x[h * p.head_stride + d]);
      to[d] = from_float<T, C>(sum * factor);
    }
  }
}

// ---- matching: scores of a strip against one panel of b-tokens live in the first-level cache and are never stored

int64_t match_scratch(const MatchParams& p) {
  const int64_t channels = p.channels + 32;
  return 8 * ((p.nb + 64) * (channels + 1) + 80 * channels + kRows * (channels + 64 + 2 * 16)) + 8192;
}

template <typename T>
RowView<T> metric_rows(const MatchParams& p, int64_t image, const int32_t* index, int64_t count, int64_t odd) {
  const T* base = static_cast<const T*>(p.metric) + image * p.batch_stride;
  if (index != nullptr) return {base, p.token_stride, 0, p.tokens, index + image * count};
  return {base + odd * p.token_stride, 2 * p.token_stride, 0, odd ? p.tokens / 2 : (p.tokens + 1) / 2, nullptr};
}

template <typename T>
Compute<T> inverse_norm(const T* x, int64_t n) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  Vec<C> sums{};
  int64_t c = 0;
  for (; c + w <= n; c += w) {
    const Vec<C> v = load_wide(x + c);
    sums += v * v;
  }
  C sum = reduce_add<C>(sums);
  for (; c < n; ++c) sum += to_float(x[c]) * to_float(x[c]);
  return C(1) / static_cast<C>(__builtin_sqrt(static_cast<double>(sum)));
}

// Running best of one row: lane-wise maximum and the first column that attains it. NaN never wins.
template <typename C>
struct Best {
  Vec<C> score;
  typename VecTypes<C>::integer column;
};

template <typename C>
void update_best(Best<C>& best, const C* scores, const C* inverse, int64_t first, int64_t width) {
  constexpr int w = kLanes<C>;
  typename VecTypes<C>::integer column;
  for (int l = 0; l < w; ++l) column[l] = first + l;
  for (int64_t j = 0; j < width; j += w) {
    const Vec<C> s = load(scores + j) * load(inverse + first + j);  // padding columns have inverse NaN
    const auto better = s > best.score;
    best.score = better ? s : best.score;
    best.column = better ? column : best.column;
    column += w;
  }
}

template <typename T>
void match_item(const MatchParams& p, int64_t item, int64_t chunks, char* scratch) {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  constexpr int64_t kPer = sizeof(U) / sizeof(T) > 1 && kUsesPairs<T> ? 2 : 1;
  constexpr int64_t kPanel = kTileVecs * kLanes<U>;
  const int64_t image = item / chunks, chunk = item % chunks, units = ceil_div(p.channels, kPer);
  const int64_t strips = ceil_div(p.na, kRows), first = strips * chunk / chunks, last = strips * (chunk + 1) / chunks;
  const int64_t padded = round_up(p.nb, kLanes<U>);
  Arena arena{scratch};
  U* panels = arena.take<U>(padded * units);
  C* inverse = arena.take<C>(padded);
  U* staged = arena.take<U>(kPanel * units);
  U* rows = arena.take<U>(kRows * units);
  C* tile = arena.take<C>(kRows * kPanel);
  Best<C>* best = arena.take<Best<C>>(kRows);
  const RowView<T> a = metric_rows<T>(p, image, p.a_index, p.na, 0), b = metric_rows<T>(p, image, p.b_index, p.nb, 1);
  for (int64_t j = 0; j < p.nb; j += kPanel) {
    const int64_t n = p.nb - j < kPanel ? p.nb - j : kPanel;
    pack_units<T>(b, j, n, p.channels, units, staged);
    pack_columns<U>([&](int64_t i) { return staged + i * units; }, n, units, panels + j * units);
  }
  for (int64_t j = 0; j < padded; ++j) {
    const T* x = j < p.nb && j >= p.protect_b ? b(j) : nullptr;
    inverse[j] = x == nullptr ? C(__builtin_nan("")) : inverse_norm(x, p.channels);
  }
  C* scores = static_cast<C*>(p.score) + image * p.na;
  int32_t* nearest = p.nearest + image * p.na;
  for (int64_t s = first; s < last; ++s) {
    const int64_t begin = s * kRows, count = p.na - begin < kRows ? p.na - begin : kRows;
    pack_units<T>(a, begin, count, p.channels, units, rows);
    for (int64_t r = 0; r < count; ++r)
      best[r].score = splat<C>(kNegInf<C>), best[r].column = typename VecTypes<C>::integer{};
    for (int64_t j = 0; j < padded; j += kPanel) {
      const int64_t width = padded - j < kPanel ? padded - j : kPanel;
      Gemm<U>::panels(rows, units, panels + j * units, tile, kPanel, count, width, units);
      for (int64_t r = 0; r < count; ++r) update_best<C>(best[r], tile + r * kPanel, inverse, j, width);
    }
    for (int64_t r = 0; r < count; ++r) {
      const T* x = a(begin + r);
      const C top = reduce_max<C>(best[r].score);
      int64_t column = p.protect_b;  // where nothing may be chosen: the first token that may be merged into
      if (top > kNegInf<C>) {
        column = p.nb;
        for (int l = 0; l < kLanes<C>; ++l) {
          const bool better = best[r].score[l] == top && best[r].column[l] < column;
          column = better ? static_cast<int64_t>(best[r].column[l]) : column;
        }
      }
      const C score = x == nullptr || top == kNegInf<C> ? kNegInf<C> : top * inverse_norm(x, p.channels);
      const bool nan = score != score;
      scores[begin + r] = nan || begin + r < p.protect_a ? kNegInf<C> : score;
      nearest[begin + r] = static_cast<int32_t>(nan ? p.protect_b : column);
    }
  }
}

// ---- merging: one output row gathers its members in token order

template <typename T>
void merge_rows(const MergeParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int64_t kPart = 256;
  const int64_t n = p.channels;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t image = o / p.out_len, slot = o % p.out_len;
    const int32_t* offsets = p.offsets + image * (p.out_len + 1) + slot;
    const int32_t* members = p.members + image * p.tokens;
    const C* size = p.size == nullptr ? nullptr : static_cast<const C*>(p.size) + image * p.tokens;
    const int32_t first = offsets[0], last = offsets[1];
    C total = 0;
    for (int32_t i = first; i < last; ++i) total += size == nullptr ? C(1) : size[members[i]];
    static_cast<C*>(p.size_out)[o] = total;
    if (n == 0) continue;
    T* y = static_cast<T*>(p.y) + o * n;
    const T* x = static_cast<const T*>(p.x) + image * p.tokens * n;
    if (last == first) {
      __builtin_memset(y, 0, n * sizeof(T));
      continue;
    }
    // A lone token is its own mean; x * size / size would only round it twice.
    if (last == first + 1 && (p.mode != kMergeWeighted || total != 0)) {
      __builtin_memcpy(y, x + members[first] * n, n * sizeof(T));
      continue;
    }
    const C divisor = p.mode == kMergeMean ? C(last - first) : p.mode == kMergeWeighted ? total : C(1);
    const C factor = divisor == 0 ? C(0) : C(1) / divisor;
    for (int64_t c0 = 0; c0 < n; c0 += kPart) {
      const int64_t part = n - c0 < kPart ? n - c0 : kPart;
      C sum[kPart];
      for (int32_t i = first; i < last; ++i) {
        const T* row = x + members[i] * n + c0;
        const C weight = p.mode == kMergeWeighted ? size[members[i]] : C(1);
        if (i == first) {
          for (int64_t c = 0; c < part; ++c) sum[c] = weight * to_float(row[c]);
        } else if (p.mode == kMergeAmax) {
          for (int64_t c = 0; c < part; ++c) {
            const C v = to_float(row[c]);
            sum[c] = v > sum[c] || v != v ? v : sum[c];
          }
        } else {
          for (int64_t c = 0; c < part; ++c) sum[c] += weight * to_float(row[c]);
        }
      }
      narrow<T>(sum, y + c0, part, factor);
    }
  }
}

template <typename T>
void merge_rows_backward(const MergeParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t n = p.channels;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t image = o / p.out_len, slot = o % p.out_len;
    const int32_t* offsets = p.offsets + image * (p.out_len + 1) + slot;
    const int32_t* members = p.members + image * p.tokens;
    const C* size = p.size == nullptr ? nullptr : static_cast<const C*>(p.size) + image * p.tokens;
    const C total = static_cast<const C*>(p.size_out_in)[o];
    const C grad_total = p.grad_size_out == nullptr ? C(0) : static_cast<const C*>(p.grad_size_out)[o];
    const T* g = static_cast<const T*>(p.grad) + o * n;
    const T* y = static_cast<const T*>(p.y_in) + o * n;
    const int32_t first = offsets[0], last = offsets[1];
    for (int32_t i = first; i < last; ++i) {
      const int64_t token = image * p.tokens + members[i];
      const T* x = static_cast<const T*>(p.x) + token * n;
      T* to = static_cast<T*>(p.grad_x) + token * n;
      C grad_size = grad_total;
      if (p.mode == kMergeAmax) {
        for (int64_t c = 0; c < n; ++c) {
          C ties = 0;  // equal maxima share the gradient
          for (int32_t j = first; j < last; ++j) {
            ties += to_float((static_cast<const T*>(p.x) + (image * p.tokens + members[j]) * n)[c]) == to_float(y[c]);
          }
          to[c] = from_float<T, C>(to_float(x[c]) == to_float(y[c]) ? to_float(g[c]) / ties : C(0));
        }
      } else {
        const C weighted = total == 0 ? C(0) : C(1) / total;
        const C factor = p.mode == kMergeMean       ? C(1) / C(last - first)
                         : p.mode == kMergeWeighted ? size[members[i]] * weighted
                                                    : C(1);
        for (int64_t c = 0; c < n; ++c) to[c] = from_float<T, C>(to_float(g[c]) * factor);
        if (p.mode == kMergeWeighted) {
          C dot = 0;
          for (int64_t c = 0; c < n; ++c) dot += to_float(g[c]) * (to_float(x[c]) - to_float(y[c]));
          grad_size += dot * weighted;
        }
      }
      static_cast<C*>(p.grad_size)[token] = grad_size;
    }
  }
}

bool mean_heads(Dtype d, const HeadsParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { mean_rows<T>(p, begin, end); });
}
bool match(Dtype d, const MatchParams& p, int64_t item, int64_t chunks, char* scratch) {
  return visit(d, [&]<typename T>() { match_item<T>(p, item, chunks, scratch); });
}
bool merge(Dtype d, const MergeParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { merge_rows<T>(p, begin, end); });
}
bool merge_backward(Dtype d, const MergeParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { merge_rows_backward<T>(p, begin, end); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const MergeKernels TP_TABLE(merge_kernels) = {mean_heads, match_scratch, match, merge, merge_backward};

}  // namespace tokenprune
