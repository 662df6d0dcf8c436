// SPDX-License-Identifier: Apache-2.0
// Reconstruction of one image: strips of 66 tokens against all centers, packed once as transposed panels. The strip of
// distances stays in the second-level cache; the k nearest of every row are found by bisection on the bits of the
// distances, and only their values are summed.
#pragma once

#include "cpu_kernels.h"
#include "cpu_vectors.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kStripTokens = 66;
constexpr int64_t kDotUnits = 128;  // summed in one go: long sums lose digits, and this much of a panel stays in L1

template <typename T>
struct ReconstructSpace {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  static constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;
  static constexpr int64_t kPanel = kTileVecs * kLanes<U>;

  int64_t units, padded, width, entries;
  bool dense;  // nearly all centers are kept: a matrix product beats sums of single rows
  // of the image
  U* panels;  // [clusters, channels] transposed
  C *mean, *norms, *values;
  int32_t *counts, *kept, *offsets, *where;  // backward: the kept centers of each token, the entries of each center
  C *weight, *grad_distance;
  // of the thread
  U* rows;
  C *distances, *squares, *u, *out;
  int32_t* index;
  typename VecTypes<C>::integer* keys;
  int64_t shared_bytes, scratch_bytes;

  ReconstructSpace(const ReconstructParams& p, char* shared, char* scratch) {
    units = ceil_div(p.channels, kPer), padded = round_up(p.clusters, kLanes<U>);
    width = round_up(p.width, kLanes<C>);
    dense = p.out != nullptr && 4 * p.k >= p.clusters;
    entries = !p.backward ? 0 : p.tokens * p.clusters;
    Arena a{shared};
    panels = a.take<U>(padded * units);
    mean = a.take<C>(p.channels + kLanes<C>);
    norms = a.take<C>(padded);
    values = a.take<C>(dense ? p.clusters * width : 0);
    counts = a.take<int32_t>(!p.backward ? 0 : p.tokens);
    offsets = a.take<int32_t>(!p.backward ? 0 : p.clusters + 1);
    kept = a.take<int32_t>(entries), where = a.take<int32_t>(entries);
    weight = a.take<C>(entries), grad_distance = a.take<C>(entries);
    shared_bytes = a.next - shared;
    Arena b{scratch};
    rows = b.take<U>((kPanel > kStripTokens ? kPanel : kStripTokens) * units);
    distances = b.take<C>(kStripTokens * stride());
    squares = b.take<C>(kStripTokens);
    u = b.take<C>(padded + kLanes<C>);
    out = b.take<C>(dense ? kStripTokens * width : 0);
    index = b.take<int32_t>(padded + 16);
    keys = b.take<typename VecTypes<C>::integer>(padded / kLanes<C>);
    scratch_bytes = b.next - scratch;
  }
  int64_t stride() const { return padded + kLanes<C>; }  // no power of two
};

template <typename T>
RowView<T> image_rows(const void* data, int64_t image, int64_t batch_stride, int64_t row_stride, int64_t rows) {
  return {static_cast<const T*>(data) + image * batch_stride, row_stride, 0, rows, nullptr};
}
template <typename T>
RowView<T> feature_rows(const ReconstructParams& p, int64_t image) {
  return image_rows<T>(p.features, image, p.features_batch, p.features_row, p.tokens);
}
template <typename T>
RowView<T> center_rows(const ReconstructParams& p, int64_t image) {
  return image_rows<T>(p.centers, image, p.centers_batch, p.centers_row, p.clusters);
}
template <typename T>
RowView<T> value_rows(const ReconstructParams& p, int64_t image) {
  return image_rows<T>(p.values, image, p.values_batch, p.values_row, p.clusters);
}

// Rows as units and their squared norms: minus the mean, or (pairs) as they are.
template <typename T>
void pack_centred(const RowView<T>& from, int64_t begin, int64_t n, int64_t channels, const ReconstructSpace<T>& space,
                  Compute<T>* norms) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  if constexpr (kUsesPairs<T>) pack_units<T>(from, begin, n, channels, space.units, space.rows);
  for (int64_t i = 0; i < n; ++i) {
    const T* row = from(begin + i);
    Vec<C> norm{};
    for (int64_t c = 0; c < channels; c += w) {
      Vec<C> v = load_upto(row, c, channels);
      if constexpr (!kUsesPairs<T>) {
        v -= load(space.mean + c);  // zeros behind the channels
        store_upto<C>(space.rows + i * space.units, c, channels, v);
      }
      norm += v * v;
    }
    norms[i] = reduce_add<C>(norm);
  }
}

// Item -1: the mean; item j: panel j of the centers.
template <typename T>
void reconstruct_pack_item(const ReconstructParams& p, const ReconstructStep& s) {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  const ReconstructSpace<T> space(p, s.shared, s.scratch);
  const RowView<T> centers = center_rows<T>(p, s.image);
  if (s.item < 0) {
    return coarse_mean<T>(centers, p.clusters, p.channels, p.channels + kLanes<C>, space.mean);
  }
  const int64_t begin = s.item * space.kPanel;
  const int64_t n = p.clusters - begin < space.kPanel ? p.clusters - begin : space.kPanel;
  pack_centred<T>(centers, begin, n, p.channels, space, space.norms + begin);
  for (int64_t i = n; i < round_up(n, kLanes<U>); ++i) space.norms[begin + i] = -kNegInf<C>;  // never near
  pack_columns<U>([&](int64_t i) { return space.rows + i * space.units; }, n, space.units,
                  space.panels + begin * space.units);
  if (space.dense) {
    pack_rows(value_rows<T>(p, s.image), begin, n, p.width, space.width, space.values + begin * space.width);
  }
}

// Dot products of the strip's tokens with all centers; returns their number.
template <typename T>
int64_t strip_dots(const ReconstructParams& p, const ReconstructStep& s, const ReconstructSpace<T>& space) {
  using U = typename Packed<T>::type;
  const int64_t begin = s.item * kStripTokens;
  const int64_t n = p.tokens - begin < kStripTokens ? p.tokens - begin : kStripTokens;
  pack_centred<T>(feature_rows<T>(p, s.image), begin, n, p.channels, space, space.squares);
  for (int64_t j = 0; j < space.padded; j += space.kPanel) {
    const int64_t width = space.padded - j < space.kPanel ? space.padded - j : space.kPanel;
    for (int64_t u = 0; u < space.units || u == 0; u += kDotUnits) {
      const int64_t part = space.units - u < kDotUnits ? space.units - u : kDotUnits;
      Gemm<U>::rows(space.rows + u, space.units, 1, space.panels + j * space.units + u * width, width,
                    space.distances + j, space.stride(), n, width, part, u > 0);
    }
  }
  return n;
}

template <typename T>
void nearest_strip_item(const ReconstructParams& p, const ReconstructStep& s) {
  using C = Compute<T>;
  using Int = typename VecTypes<C>::integer;
  constexpr int w = kLanes<C>;
  const ReconstructSpace<T> space(p, s.shared, s.scratch);
  const int64_t rows = strip_dots<T>(p, s, space);
  for (int64_t r = 0; r < rows; ++r) {
    const C* dots = space.distances + r * space.stride();
    Vec<C> best = splat<C>(-kNegInf<C>);
    Int column{}, here;
    for (int l = 0; l < w; ++l) here[l] = l;
    for (int64_t j = 0; j < p.clusters; j += w, here += w) {
      const Vec<C> d = load(space.norms + j) - C(2) * load(dots + j);
      const auto better = d < best;
      best = better ? d : best;
      column = better ? here : column;
    }
    C least = -kNegInf<C>;
    int64_t nearest = 0;
    for (int l = 0; l < w; ++l) {
      if (best[l] < least || (best[l] == least && column[l] < nearest)) least = best[l], nearest = column[l];
    }
    p.nearest[s.image * p.tokens + s.item * kStripTokens + r] = nearest;
  }
}

// ---- the k nearest of one row

// Integers in the order of the floating values; NaN is at one of the ends.
template <typename C>
inline typename VecTypes<C>::integer order_key(Vec<C> v) {
  using Int = typename VecTypes<C>::integer;
  constexpr int kSignBit = sizeof(C) * 8 - 1;
  const Int bits = (Int)v, negative = bits >> kSignBit;
  return bits ^ (negative & (Int{} + static_cast<decltype(bits[0] + 0)>(~uint64_t{0} >> (64 - kSignBit))));
}

// How many of the keys are at most `most`.
template <typename Int, typename Key>
inline int64_t count_upto(const Int* keys, int64_t vecs, Key most) {
  int64_t count = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Key) == 4) {
    const __m512i limit = _mm512_set1_epi32(most);
    for (int64_t j = 0; j < vecs; ++j) {
      count += __builtin_popcount(_mm512_cmple_epi32_mask((__m512i)keys[j], limit));
    }
    return count;
  }
#endif
  Int below{};
  for (int64_t j = 0; j < vecs; ++j) below -= keys[j] <= most;
  for (int64_t l = 0; l < static_cast<int64_t>(sizeof(Int) / sizeof(Key)); ++l) count += below[l];
  return count;
}

// Their positions, ascending, below n; `index` has room for a whole vector behind the last one.
template <typename Int, typename Key>
inline int64_t list_upto(const Int* keys, int64_t n, Key most, int32_t* index) {
  int64_t count = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(Key) == 4) {
    __m512i here = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t j = 0; j < n; j += 16) {
      const __mmask16 inside = n - j < 16 ? (1u << (n - j)) - 1 : 0xffff;
      const __mmask16 near = _mm512_mask_cmple_epi32_mask(inside, (__m512i)keys[j / 16], _mm512_set1_epi32(most));
      _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(near, here));
      count += __builtin_popcount(near);
      here = _mm512_add_epi32(here, _mm512_set1_epi32(16));
    }
    return count;
  }
#endif
  const Key* all = reinterpret_cast<const Key*>(keys);
  for (int64_t j = 0; j < n; ++j) {
    index[count] = static_cast<int32_t>(j);
    count += all[j] <= most;
  }
  return count;
}

// Distances from dot products, in place; then the indices of the k nearest centers (all of them at a tie) in order.
// Returns how many.
template <typename T>
int64_t select_nearest(const ReconstructParams& p, const ReconstructSpace<T>& space, int64_t row) {
  using C = Compute<T>;
  using Int = typename VecTypes<C>::integer;
  using Key = decltype(Int{}[0] + 0);
  constexpr int w = kLanes<C>;
  C* d = space.distances + row * space.stride();
  const C square = space.squares[row];
  const int64_t vecs = ceil_div(p.clusters, w);
  Int low, high;
  for (int64_t j = 0; j < vecs; ++j) {
    const Vec<C> distance = (load(space.norms + j * w) + square) - C(2) * load(d + j * w);
    store(d + j * w, distance);
    const Int key = order_key<C>(distance);
    space.keys[j] = key;
    low = j == 0 || key < low ? key : low;
    high = j == 0 || key > high ? key : high;
  }
  Key first = low[0], last = high[0];
  for (int l = 1; l < w; ++l) first = low[l] < first ? low[l] : first, last = high[l] > last ? high[l] : last;
  if (p.k < p.clusters) {
    while (first < last) {
      const Key middle = first + static_cast<Key>((static_cast<uint64_t>(last) - static_cast<uint64_t>(first)) / 2);
      const int64_t count = count_upto(space.keys, vecs, middle);
      if (count < p.k) {
        first = middle + 1;
      } else {
        last = middle;
        if (count == p.k) break;
      }
    }
  }
  return list_upto(space.keys, p.clusters, last, space.index);
}

// u = exp(-t d) of the kept centers; returns their norm.
template <typename T>
Compute<T> weights_of(const ReconstructParams& p, const ReconstructSpace<T>& space, int64_t row, int64_t kept) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const C* d = space.distances + row * space.stride();
  for (int64_t i = 0; i < kept; ++i) space.u[i] = d[space.index[i]];
  for (int64_t i = kept; i < round_up(kept, w); ++i) space.u[i] = -kNegInf<C>;
  const C factor = static_cast<C>(-p.temperature * kLog2E);
  Vec<C> sum{};
  for (int64_t i = 0; i < kept; i += w) {
    const Vec<C> u = exp2v(load(space.u + i) * factor);
    store(space.u + i, u);
    sum += p.l1 ? u : u * u;
  }
  const C total = reduce_add<C>(sum);
  return p.l1 ? total : static_cast<C>(__builtin_sqrt(static_cast<double>(total)));
}

template <typename C>
C inverse_of_norm(C norm) {
  const C floor = static_cast<C>(kNormFloor);
  return C(1) / (norm > floor || norm != norm ? norm : floor);
}

// ---- forward

// to[c..] = sum_i weight[i] * row_of(i)[c..], V vectors at a time.
template <typename T, typename Term>
void sum_rows(int64_t width, T* to, Compute<T> factor, Term&& term) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>;
  constexpr int V = 8;
  int64_t c = 0;
  for (; c + V * w <= width; c += V * w) {
    Vec<C> acc[V];
    TP_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec<C>{};
    term([&](C weight, const T* row) {
      TP_UNROLL for (int v = 0; v < V; ++v) acc[v] += weight * load_wide(row + c + v * w);
    });
    TP_UNROLL for (int v = 0; v < V; ++v) store_narrow<T>(to + c + v * w, acc[v] * factor);
  }
  for (; c < width; c += w) {
    Vec<C> acc{};
    term([&](C weight, const T* row) { acc += weight * load_upto(row, c, width); });
    store_upto<T>(to, c, width, acc * factor);
  }
}

template <typename T>
void reconstruct_strip_item(const ReconstructParams& p, const ReconstructStep& s) {
  using C = Compute<T>;
  const ReconstructSpace<T> space(p, s.shared, s.scratch);
  const int64_t rows = strip_dots<T>(p, s, space);
  const RowView<T> values = value_rows<T>(p, s.image);
  T* out = static_cast<T*>(p.out) + (s.image * p.tokens + s.item * kStripTokens) * p.width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t kept = select_nearest<T>(p, space, r);
    const C inverse = inverse_of_norm<C>(weights_of<T>(p, space, r, kept));
    if (space.dense) {
      C* weights = space.distances + r * space.stride();
      for (int64_t j = 0; j < space.padded; ++j) weights[j] = 0;
      for (int64_t i = 0; i < kept; ++i) weights[space.index[i]] = space.u[i] * inverse;
      continue;
    }
    sum_rows<T>(p.width, out + r * p.width, inverse, [&](auto&& add) {
      for (int64_t i = 0; i < kept; ++i) add(space.u[i], values(space.index[i]));
    });
  }
  if (!space.dense) return;
  Gemm<C>::rows(space.distances, space.stride(), 1, space.values, space.width, space.out, space.width, rows,
                space.width, p.clusters, false);
  for (int64_t r = 0; r < rows; ++r) narrow<T>(space.out + r * space.width, out + r * p.width, p.width);
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
