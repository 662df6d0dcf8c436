// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of this family, compiled once per instruction set.
#include "../common/norm.h"
#include "../common/pack.h"
#include "../common/prefetch.h"
#include "cpu_kernels.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {
namespace {

int64_t compact(const bool* mask, int64_t n, int64_t base, int32_t* out, int64_t room) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m512i lane = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                  _mm512_set1_epi32(static_cast<int>(base)));
  const __m512i step = _mm512_set1_epi32(16);
  for (; i + 64 <= n && count + 64 <= room; i += 64) {
    const __m512i flags = _mm512_loadu_si512(mask + i);
    const uint64_t keep = _mm512_test_epi8_mask(flags, flags);
    for (int part = 0; part < 4; ++part) {
      const __mmask16 bits = static_cast<__mmask16>(keep >> (16 * part));
      // Compress in registers and store whole: a masked compress-store is microcoded on some CPUs.
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(bits, lane));
      count += __builtin_popcount(bits);
      lane = _mm512_add_epi32(lane, step);
    }
  }
#endif
  const uint8_t* flags = reinterpret_cast<const uint8_t*>(mask);  // a byte of neither 0 nor 1 is true as well
  for (; i < n; ++i) {
    if (flags[i] == 0) continue;
    if (count < room) out[count] = static_cast<int32_t>(base + i);
    ++count;
  }
  return count;
}

template <typename T>
const T* row(const void* base, int64_t index, int64_t stride) {
  return static_cast<const T*>(base) + index * stride;
}

inline bool valid(const RowParams& p, int64_t i) { return p.indices[i] >= 0 && p.indices[i] < p.rows; }

void gather_rows(const RowParams& p, int64_t size, void* out, int64_t begin, int64_t end) {
  const int64_t bytes = p.channels * size, stride = p.map_stride * size;
  const char* from = static_cast<const char*>(p.map);
  const RowsAhead<> ahead{from, p.indices, end, p.rows, stride, bytes};
  for (int64_t i = begin; i < end; ++i) {
    char* to = static_cast<char*>(out) + i * bytes;
    if (valid(p, i)) {
      ahead.copy(i, to, from + p.indices[i] * stride);
    } else {
      __builtin_memset(to, 0, bytes);
    }
  }
}

template <typename T>
void norm_rows(const RowParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t n = p.channels;
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const int64_t size = sizeof(T);
  const RowsAhead<> ahead{p.map, p.indices, end, p.rows, p.map_stride * size, n * size};
  for (int64_t i = begin; i < end; ++i) {
    ahead.at(i);
    T* out = static_cast<T*>(p.tokens_out) + i * n;
    C* mean_out = static_cast<C*>(p.mean) + i;
    C* rstd_out = static_cast<C*>(p.rstd) + i;
    if (!valid(p, i)) {
      __builtin_memset(out, 0, n * sizeof(T));
      *mean_out = *rstd_out = 0;
      continue;
    }
    const NormedRow<T> norm(row<T>(p.map, p.indices[i], p.map_stride), n, weight, bias, p.eps);
    *mean_out = norm.mean;
    *rstd_out = norm.rstd;
    norm.write(out, n);
  }
}

// tokens = gradient of the output; tokens_out = gradient of the gathered row.
template <typename T>
void norm_rows_backward(const RowParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t n = p.channels;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t i = begin; i < end; ++i) {
    T* out = static_cast<T*>(p.tokens_out) + i * n;
    if (!valid(p, i)) {
      __builtin_memset(out, 0, n * sizeof(T));
      continue;
    }
    const T* x = row<T>(p.map, p.indices[i], p.map_stride);
    const T* g = row<T>(p.tokens, i, p.token_stride);
    const C mean = static_cast<const C*>(p.mean)[i], rstd = static_cast<const C*>(p.rstd)[i];
    C sum = 0, dot = 0;
    for (int64_t c = 0; c < n; ++c) {
      const C gw = to_float(g[c]) * (weight == nullptr ? C(1) : C(to_float(weight[c])));
      sum += gw;
      dot += gw * (to_float(x[c]) - mean) * rstd;
    }
    sum /= static_cast<C>(n);
    dot /= static_cast<C>(n);
    for (int64_t c = 0; c < n; ++c) {
      const C gw = to_float(g[c]) * (weight == nullptr ? C(1) : C(to_float(weight[c])));
      out[c] = from_float<T, C>(rstd * (gw - sum - (to_float(x[c]) - mean) * rstd * dot));
    }
  }
}

template <typename T>
void norm_parameters(const RowParams& p, void* grad_weight, void* grad_bias, int64_t begin, int64_t end) {
  using C = Compute<T>;
  C* gw = static_cast<C*>(grad_weight);
  C* gb = static_cast<C*>(grad_bias);
  for (int64_t c = begin; c < end; ++c) gw[c] = gb[c] = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    if (!valid(p, i)) continue;
    const T* x = row<T>(p.map, p.indices[i], p.map_stride);
    const T* g = row<T>(p.tokens, i, p.token_stride);
    const C mean = static_cast<const C*>(p.mean)[i], rstd = static_cast<const C*>(p.rstd)[i];
    for (int64_t c = begin; c < end; ++c) {
      gw[c] += to_float(g[c]) * (to_float(x[c]) - mean) * rstd;
      gb[c] += to_float(g[c]);
    }
  }
}

template <typename T>
void scatter_rows(const RowParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t n = p.channels;
  const C* scale = static_cast<const C*>(p.scale);
  const int64_t size = sizeof(T);
  const RowsAhead<true> ahead{p.map_out, p.indices, end, p.rows, n * size, n * size};
  for (int64_t i = begin; i < end; ++i) {
    if (!valid(p, i)) continue;
    T* out = static_cast<T*>(p.map_out) + static_cast<int64_t>(p.indices[i]) * n;
    const T* x = row<T>(p.tokens, i, p.token_stride);
    if (scale == nullptr && !p.add) {
      ahead.copy(i, out, x);
      continue;
    }
    ahead.at(i);
    const C s = scale == nullptr ? C(1) : scale[i];
    constexpr int w = kLanes<C>;
    int64_t c = 0;
    if (p.add) {
      for (; c + w <= n; c += w) store_narrow<T>(out + c, load_wide(out + c) + s * load_wide(x + c));
      for (; c < n; ++c) out[c] = from_float<T, C>(to_float(out[c]) + s * to_float(x[c]));
    } else {
      for (; c + w <= n; c += w) store_narrow<T>(out + c, s * load_wide(x + c));
      for (; c < n; ++c) out[c] = from_float<T, C>(s * to_float(x[c]));
    }
  }
}

// map = gradient of the result; tokens (optional) = the scattered tokens.
template <typename T>
void scatter_rows_backward(const RowParams& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t n = p.channels;
  const C* scale = static_cast<const C*>(p.scale);
  for (int64_t i = begin; i < end; ++i) {
    T* out = static_cast<T*>(p.tokens_out) + i * n;
    C* scale_grad = scale == nullptr ? nullptr : static_cast<C*>(p.scale_grad) + i;
    if (!valid(p, i)) {
      __builtin_memset(out, 0, n * sizeof(T));
      if (scale_grad != nullptr) *scale_grad = 0;
      continue;
    }
    const T* g = row<T>(p.map, p.indices[i], p.map_stride);
    if (scale == nullptr) {
      __builtin_memcpy(out, g, n * sizeof(T));
      continue;
    }
    const T* x = row<T>(p.tokens, i, p.token_stride);
    C dot = 0;
    for (int64_t c = 0; c < n; ++c) {
      dot += to_float(g[c]) * to_float(x[c]);
      out[c] = from_float<T, C>(scale[i] * to_float(g[c]));
    }
    *scale_grad = dot;
  }
}

template <typename T>
void sum_map_rows(const RowParams& p, const int32_t* offsets, const int32_t* positions, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int64_t kPart = 256;
  const int64_t n = p.channels;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(p.map_out) + r * n;
    const int32_t first = offsets[r], last = offsets[r + 1];
    if (last == first) {
      __builtin_memset(out, 0, n * sizeof(T));
    } else if (last == first + 1) {
      __builtin_memcpy(out, row<T>(p.tokens, positions[first], p.token_stride), n * sizeof(T));
    } else {
      for (int64_t c0 = 0; c0 < n; c0 += kPart) {
        const int64_t part = n - c0 < kPart ? n - c0 : kPart;
        C sum[kPart] = {};
        for (int32_t i = first; i < last; ++i) {
          const T* g = row<T>(p.tokens, positions[i], p.token_stride) + c0;
          for (int64_t c = 0; c < part; ++c) sum[c] += to_float(g[c]);
        }
        narrow<T>(sum, out + c0, part);
      }
    }
  }
}

bool gather_layer_norm(Dtype d, const RowParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { norm_rows<T>(p, begin, end); });
}
bool gather_layer_norm_backward(Dtype d, const RowParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { norm_rows_backward<T>(p, begin, end); });
}
bool layer_norm_parameters(Dtype d, const RowParams& p, void* gw, void* gb, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { norm_parameters<T>(p, gw, gb, begin, end); });
}
bool scatter(Dtype d, const RowParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { scatter_rows<T>(p, begin, end); });
}
bool scatter_backward(Dtype d, const RowParams& p, int64_t begin, int64_t end) {
  return visit(d, [&]<typename T>() { scatter_rows_backward<T>(p, begin, end); });
}
bool sum_rows(Dtype d, const RowParams& p, const int32_t* offsets, const int32_t* positions, int64_t begin,
              int64_t end) {
  return visit(d, [&]<typename T>() { sum_map_rows<T>(p, offsets, positions, begin, end); });
}

}  // namespace
}  // namespace TOKENPRUNE_ISA

extern const TokenKernels TP_TABLE(token_kernels) = {
    compact, gather_rows,      gather_layer_norm, gather_layer_norm_backward, layer_norm_parameters,
    scatter, scatter_backward, sum_rows,
};

}  // namespace tokenprune
