// SPDX-License-Identifier: Apache-2.0
// Register-tiled products of small panels: C[m, n] (+)= A[m, k] B[k, n], the micro-kernel of attention and matching.
//
// A is read by broadcast with any strides; rows of B and C are whole vectors (padded by the caller). Every loop that
// touches the accumulators is unrolled: otherwise GCC keeps them on the stack (87 instead of 260 GFLOP/s on Zen 5).
#pragma once

#include "vec.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// One step along k. float, double: a fused multiply-add. uint32_t: two bfloat16 products at once, summed in float32.
template <typename Unit>
struct Dot {
  using Acc = Unit;
  static inline Vec<Unit> step(Vec<Unit> acc, Unit a, Vec<Unit> b) { return acc + a * b; }
};
#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16Dot = true;
template <>
struct Dot<uint32_t> {
  using Acc = float;
  static inline Vec<float> step(Vec<float> acc, uint32_t a, Vec<uint32_t> b) {
    const __m512i pair = _mm512_set1_epi32(static_cast<int>(a));
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pair, (__m512bh)b);
  }
};
#else
constexpr bool kHasBFloat16Dot = false;
#endif

// What happens to a row of finished accumulators before it is stored: nothing.
struct StoreOnly {
  template <int V, typename Acc>
  void row(int64_t, int64_t, Vec<Acc>*) const {}
};

template <typename Unit>
struct Gemm {
  using Acc = typename Dot<Unit>::Acc;
  static constexpr int kW = kLanes<Unit>;

  // `last` sees every row while it is in registers: last.row<V>(row of the tile's first + r, column, accumulators).
  template <int R, int V, typename Last = StoreOnly>
  static void tile(const Unit* a, int64_t a_row, int64_t a_k, const Unit* b, int64_t ldb, Acc* c, int64_t ldc,
                   int64_t k, bool accumulate, const Last& last, int64_t row, int64_t column) {
    Vec<Acc> acc[R][V];
    TP_UNROLL for (int r = 0; r < R; ++r) { TP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Vec<Acc>{}; }
    for (int64_t i = 0; i < k; ++i) {
      Vec<Unit> row[V];
      TP_UNROLL for (int v = 0; v < V; ++v) row[v] = load(b + i * ldb + v * kW);
      TP_UNROLL for (int r = 0; r < R; ++r) {
        const Unit x = a[r * a_row + i * a_k];
        TP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Dot<Unit>::step(acc[r][v], x, row[v]);
      }
    }
    TP_UNROLL for (int r = 0; r < R; ++r) {
      // Added at the end: a sum of partial sums loses fewer digits than one long sum.
      TP_UNROLL for (int v = 0; v < V; ++v) {
        if (accumulate) acc[r][v] += load(c + r * ldc + v * kW);
      }
      last.template row<V, Acc>(row + r, column, acc[r]);
      TP_UNROLL for (int v = 0; v < V; ++v) store(c + r * ldc + v * kW, acc[r][v]);
    }
  }

  template <typename Last>
  using Tile = void (*)(const Unit*, int64_t, int64_t, const Unit*, int64_t, Acc*, int64_t, int64_t, bool, const Last&,
                        int64_t, int64_t);

  template <int V, typename Last>
  static Tile<Last> pick_rows(int64_t rows) {
    static constexpr Tile<Last> tiles[] = {tile<1, V, Last>, tile<2, V, Last>, tile<3, V, Last>,
                                           tile<4, V, Last>, tile<5, V, Last>, tile<6, V, Last>};
    return tiles[rows - 1];
  }
  template <typename Last = StoreOnly>
  static Tile<Last> pick(int64_t rows, int64_t vecs) {
    if constexpr (kTileVecs == 4) {
      if (vecs == 4) return pick_rows<4, Last>(rows);
      if (vecs == 3) return pick_rows<3, Last>(rows);
    }
    return vecs == 2 ? pick_rows<2, Last>(rows) : pick_rows<1, Last>(rows);
  }

  // B row-major with row stride ldb; n a multiple of the vector width.
  static void rows(const Unit* a, int64_t a_row, int64_t a_k, const Unit* b, int64_t ldb, Acc* c, int64_t ldc,
                   int64_t m, int64_t n, int64_t k, bool accumulate) {
    for (int64_t j = 0; j < n; j += kTileVecs * kW) {
      const int64_t vecs = (n - j < kTileVecs * kW ? n - j : kTileVecs * kW) / kW;
      for (int64_t i = 0; i < m; i += kTileRows) {
        const int64_t r = m - i < kTileRows ? m - i : kTileRows;
        pick(r, vecs)(a + i * a_row, a_row, a_k, b + j, ldb, c + i * ldc + j, ldc, k, accumulate, {}, i, j);
      }
    }
  }

  // B in column panels of kTileVecs vectors (the last one narrower), each contiguous [k, width]; see pack_columns.
  template <typename Last = StoreOnly>
  static void panels(const Unit* a, int64_t a_row, const Unit* b, Acc* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
                     const Last& last = {}) {
    for (int64_t j = 0; j < n; j += kTileVecs * kW) {
      const int64_t width = n - j < kTileVecs * kW ? n - j : kTileVecs * kW;
      for (int64_t i = 0; i < m; i += kTileRows) {
        const int64_t r = m - i < kTileRows ? m - i : kTileRows;
        pick<Last>(r, width / kW)(a + i * a_row, a_row, 1, b + j * k, width, c + i * ldc + j, ldc, k, false, last, i,
                                  j);
      }
    }
  }
};

// Transpose a square of kLanes x kLanes in registers: log2 steps of two-source permutes.
template <typename T, int Step = 1>
inline void transpose_square(Vec<T>* rows) {
  constexpr int n = kLanes<T>;
  if constexpr (Step < n) {
    const auto low = load_mask<T>(kLaneMasks<T, Step>.low), high = load_mask<T>(kLaneMasks<T, Step>.high);
    TP_UNROLL for (int i = 0; i < n; ++i) {
      if (i & Step) continue;
      const Vec<T> a = rows[i], b = rows[i + Step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + Step] = __builtin_shuffle(a, b, high);
    }
    transpose_square<T, 2 * Step>(rows);
  }
}

// Pack `n` rows of `k` units (row i given by `row_of(i)`, null = zeros) into transposed column panels for Gemm::panels.
template <typename Unit, typename RowOf>
inline void pack_columns(RowOf&& row_of, int64_t n, int64_t k, Unit* out) {
  constexpr int w = kLanes<Unit>;
  const int64_t padded = round_up(n, w);
  for (int64_t j = 0; j < padded; j += kTileVecs * w) {
    const int64_t width = padded - j < kTileVecs * w ? padded - j : kTileVecs * w;
    Unit* panel = out + j * k;
    for (int64_t jj = 0; jj < width; jj += w) {
      const Unit* rows[w];
      for (int l = 0; l < w; ++l) rows[l] = j + jj + l < n ? row_of(j + jj + l) : nullptr;
      int64_t d = 0;
      for (; d + w <= k; d += w) {
        Vec<Unit> square[w];
        TP_UNROLL for (int l = 0; l < w; ++l) square[l] = rows[l] ? load(rows[l] + d) : Vec<Unit>{};
        transpose_square<Unit>(square);
        TP_UNROLL for (int l = 0; l < w; ++l) store(panel + (d + l) * width + jj, square[l]);
      }
      for (; d < k; ++d) {
        for (int l = 0; l < w; ++l) panel[d * width + jj + l] = rows[l] ? rows[l][d] : Unit(0);
      }
    }
  }
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
