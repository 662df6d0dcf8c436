// SPDX-License-Identifier: Apache-2.0
// Attention of one row of tokens, cluster by cluster. Queries are the lanes of the vectors, so that the softmax over a
// cluster's keys needs no sums across lanes; results of all rounds and of all blocks of keys meet in one running
// softmax per query, and nothing of the size rounds * tokens is ever stored.
#pragma once

#include "../common/pack.h"
#include "params.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kKeyBlock = 128;                // most keys per step
constexpr int kKeyTile = kTileVecs == 4 ? 8 : 4;  // keys x 2 vectors of queries in registers
constexpr int kQueryTile = 4;                     // queries x kTileVecs vectors of channels in registers
constexpr int64_t kAhead = 8;                     // rows between asking for one and reading it
constexpr int64_t kMostQueries = 2 * kVecBytes / sizeof(float);

inline int64_t balanced_scratch_bytes(const BalancedParams& p) {
  const int64_t wide = 8, width = round_up(p.dim, 16) + 16;  // bytes of the widest compute type
  return wide * (p.q.tokens * (2 * width + 2) + 2 * (p.k.tokens + kKeyBlock + 1) * width + kMostQueries * width +
                 kKeyBlock * (width + 2 * kMostQueries)) +
         4096;
}

template <typename T>
__attribute__((always_inline)) inline void ask_for(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// f.template operator()<R>() for R = rows, at most Most.
template <int Most, typename F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (Most > 1) {
    if (rows < Most) return with_rows<Most - 1>(rows, f);
  }
  f.template operator()<Most>();
}

template <typename T>
struct BalancedRow {
  using U = typename Packed<T>::type;
  using C = Compute<T>;
  using Value = typename PackedValue<T>::type;  // of rows that are not paired yet
  static constexpr int w = kLanes<C>;
  static constexpr int64_t kPer = kUsesPairs<T> ? 2 : 1;  // values per unit

  const BalancedParams& p;
  const int64_t row, units, width;
  const C factor;
  C *sums, *tops, *totals;  // [Nq, width], [Nq] x 2: the running softmax of every query
  U *queries, *keys;        // the row's own [Nq, units], [Nk + kKeyBlock, units]; other rows' keys go behind
  Value* values;            // the same [Nk + kKeyBlock, width], and a row of zeros
  U *panel, *mixed;         // queries of a strip, transposed [units, V w]; pairs of values [keys / 2, width]
  C* scores;                // [keys, V w]
  U* weights;
  int32_t slots[kKeyBlock];  // the block's rows in keys and values
  C bias[kKeyBlock];
  int64_t count = 0;  // keys in the block

  BalancedRow(const BalancedParams& params, int64_t r, char* scratch)
      : p(params),
        row(r),
        units(ceil_div(params.dim, kPer)),
        width(round_up(params.dim, w)),
        factor(static_cast<C>(params.scale * kLog2E)) {
    Arena arena{scratch};
    sums = arena.take<C>(p.q.tokens * width);
    tops = arena.take<C>(p.q.tokens), totals = arena.take<C>(p.q.tokens);
    queries = arena.take<U>(p.q.tokens * units);
    keys = arena.take<U>((p.k.tokens + kKeyBlock) * units);
    values = arena.take<Value>((p.k.tokens + kKeyBlock + 1) * width);
    panel = arena.take<U>(2 * w * units);
    mixed = arena.take<U>(kUsesPairs<T> ? kKeyBlock / 2 * width : 0);
    scores = arena.take<C>(kKeyBlock * 2 * w);
    weights = kUsesPairs<T> ? arena.take<U>(kKeyBlock / 2 * 2 * w) : reinterpret_cast<U*>(scores);
    __builtin_memset(sums, 0, p.q.tokens * width * sizeof(C));
    for (int64_t i = 0; i < p.q.tokens; ++i) tops[i] = kNegInf<C>, totals[i] = 0;
    // Copied once: rows of a head lie a whole token apart, where they compete for the same cache sets.
    for (int64_t i = 0; i < p.q.tokens; ++i) {
      if (i + kAhead < p.q.tokens) ask_for(source(p.q_rows, row, i + kAhead), p.dim);
      to_units(source(p.q_rows, row, i), queries + i * units);
    }
    for (int64_t i = 0; i < p.k.tokens; ++i) {
      if (i + kAhead < p.k.tokens) {
        ask_for(source(p.k_rows, row, i + kAhead), p.dim);
        ask_for(source(p.v_rows, row, i + kAhead), p.dim);
      }
      copy_key(row, i, i);
    }
    for (int64_t d = 0; d < width; ++d) zeros()[d] = Value{};
  }

  // ---- rows of tokens

  static const T* source(const TokenRows& rows, int64_t r, int64_t token) {
    return static_cast<const T*>(rows.data) + r * rows.row_stride + token * rows.token_stride;
  }

  void to_units(const T* from, U* to) const {
    if constexpr (kUsesPairs<T>) {
      __builtin_memcpy(to, from, p.dim * sizeof(T));
      if (p.dim & 1) reinterpret_cast<T*>(to)[p.dim] = T{};
    } else {
      widen(from, to, p.dim);
    }
  }

  void copy_key(int64_t r, int64_t token, int64_t slot) {
    to_units(source(p.k_rows, r, token), keys + slot * units);
    Value* to = values + slot * width;
    const T* from = source(p.v_rows, r, token);
    if constexpr (kUsesPairs<T>) {
      __builtin_memcpy(to, from, p.dim * sizeof(T));
    } else {
      widen(from, to, p.dim);
    }
    for (int64_t d = p.dim; d < width; ++d) to[d] = Value{};
  }

  Value* zeros() { return values + (p.k.tokens + kKeyBlock) * width; }

  // Tokens `places` of row r, behind the keys that are in the block.
  void add_keys(int64_t r, const int32_t* places, int64_t n) {
    const C* key_bias = p.key_bias == nullptr ? nullptr : static_cast<const C*>(p.key_bias) + r * p.k.tokens;
    for (int64_t i = 0; i < n; ++i, ++count) {
      slots[count] = r == row ? places[i] : static_cast<int32_t>(p.k.tokens + count);
      if (r != row) copy_key(r, places[i], slots[count]);
      bias[count] = key_bias == nullptr ? C(0) : key_bias[places[i]] * C(kLog2E);
    }
  }

  const U* value_units(int64_t j) const {
    if constexpr (kUsesPairs<T>) {
      return mixed + j * width;
    } else {
      return values + slots[j] * width;
    }
  }

  void pair_values() {
    if constexpr (kUsesPairs<T>) {
      for (int64_t j = 0; j < count; j += 2) {
        const Value *x = values + slots[j] * width, *y = j + 1 < count ? values + slots[j + 1] * width : zeros();
        U* to = mixed + j / 2 * width;
        for (int64_t d = 0; d < width; ++d) to[d] = x[d].bits | static_cast<U>(y[d].bits) << 16;
      }
    }
  }

  // ---- a strip of queries against the block

  template <int R, int V>
  __attribute__((noinline)) void logits(int64_t j, Vec<C>* top) {
    Vec<C> acc[R][V], best[V];
    const U* key[R];
    TP_UNROLL for (int r = 0; r < R; ++r) {
      key[r] = keys + slots[j + r] * units;
      TP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Vec<C>{};
    }
    for (int64_t i = 0; i < units; ++i) {
      Vec<U> q[V];
      TP_UNROLL for (int v = 0; v < V; ++v) q[v] = load(panel + (i * V + v) * w);
      TP_UNROLL for (int r = 0; r < R; ++r) {
        const U x = key[r][i];
        TP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Dot<U>::step(acc[r][v], x, q[v]);
      }
    }
    TP_UNROLL for (int v = 0; v < V; ++v) best[v] = top[v];
    TP_UNROLL for (int r = 0; r < R; ++r) {
      TP_UNROLL for (int v = 0; v < V; ++v) {
        const Vec<C> s = acc[r][v] * factor + bias[j + r];
        best[v] = vmax<C>(best[v], s);
        store(scores + ((j + r) * V + v) * w, s);
      }
    }
    TP_UNROLL for (int v = 0; v < V; ++v) top[v] = best[v];
  }

  // weights = exp2(scores - shift), in pairs of keys where products come in pairs; returns their sum.
  Vec<C> exponentials(Vec<C> shift, int64_t v, int64_t stride) {
    Vec<C> sum{};
    if constexpr (kUsesPairs<T>) {
#if defined(__AVX512BF16__)
      __m512i interleave;
      for (int l = 0; l < w; ++l) reinterpret_cast<uint32_t*>(&interleave)[l] = l | (l + w) << 16;
      for (int64_t j = 0; j < count; j += 2) {
        const Vec<C> a = exp2v(load(scores + j * stride + v * w) - shift);
        const Vec<C> b = j + 1 < count ? exp2v(load(scores + (j + 1) * stride + v * w) - shift) : Vec<C>{};
        sum += a + b;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
        store(weights + j / 2 * stride + v * w, (Vec<uint32_t>)_mm512_permutexvar_epi16(interleave, both));
      }
#endif
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const Vec<C> a = exp2v(load(scores + j * stride + v * w) - shift);
        sum += a;
        store(weights + j * stride + v * w, a);
      }
    }
    return sum;
  }

  // sums[place] = sums[place] * keep + weights . values, for R queries and V vectors of channels from d.
  template <int R, int V>
  __attribute__((noinline)) void mix(const int32_t* places, const C* keep, const U* a, int64_t stride, int64_t d) {
    Vec<C> acc[R][V];
    TP_UNROLL for (int r = 0; r < R; ++r) { TP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Vec<C>{}; }
    TP_UNROLL for (int r = 0; r < R; ++r) ask_for(sums + places[r] * width + d, V * w);
    const int64_t steps = ceil_div(count, kPer);
    for (int64_t j = 0; j < steps; ++j) {
      const U* from = value_units(j) + d;
      Vec<U> b[V];
      TP_UNROLL for (int v = 0; v < V; ++v) b[v] = load(from + v * w);
      TP_UNROLL for (int r = 0; r < R; ++r) {
        const U x = a[j * stride + r];
        TP_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = Dot<U>::step(acc[r][v], x, b[v]);
      }
    }
    TP_UNROLL for (int r = 0; r < R; ++r) {
      C* to = sums + places[r] * width + d;
      TP_UNROLL for (int v = 0; v < V; ++v) store(to + v * w, load(to + v * w) * keep[r] + acc[r][v]);
    }
  }

  template <int V>
  void strip(const int32_t* places, int64_t n) {
    pack_columns<U>([&](int64_t i) { return queries + places[i] * units; }, n, units, panel);
    Vec<C> top[V];
    TP_UNROLL for (int v = 0; v < V; ++v) top[v] = splat<C>(kNegInf<C>);
    for (int64_t j = 0; j < count; j += kKeyTile) {
      with_rows<kKeyTile>(count - j, [&]<int R>() { logits<R, V>(j, top); });
    }
    C old_top[2 * w], old_total[2 * w], keep[2 * w], new_top[2 * w], new_total[2 * w];
    for (int64_t i = 0; i < V * w; ++i) {
      old_top[i] = i < n ? tops[places[i]] : kNegInf<C>;
      old_total[i] = i < n ? totals[places[i]] : C(0);
    }
    for (int v = 0; v < V; ++v) {
      const Vec<C> before = load(old_top + v * w), best = vmax<C>(before, top[v]);
      const Vec<C> shift = best == splat<C>(kNegInf<C>) ? Vec<C>{} : best;
      const Vec<C> kept = exp2v(before - shift);
      store(keep + v * w, kept);
      store(new_top + v * w, best);
      store(new_total + v * w, load(old_total + v * w) * kept + exponentials(shift, v, V * w));
    }
    for (int64_t i = 0; i < n; ++i) tops[places[i]] = new_top[i], totals[places[i]] = new_total[i];
    for (int64_t i = 0; i < n; i += kQueryTile) {
      for (int64_t d = 0; d < width; d += kTileVecs * w) {
        with_rows<kQueryTile>(n - i, [&]<int R>() {
          with_rows<kTileVecs>((width - d) / w,
                               [&]<int D>() { mix<R, D>(places + i, keep + i, weights + i, V * w, d); });
        });
      }
    }
  }

  void run(const int32_t* places, int64_t n) {
    pair_values();
    for (int64_t i = 0; i < n; i += 2 * w) {
      n - i > w ? strip<2>(places + i, n - i < 2 * w ? n - i : 2 * w) : strip<1>(places + i, n - i);
    }
    count = 0;
  }

  // Queries `places` of this row against the keys [begin, end) of the flat list of all orders.
  void cluster(const int32_t* places, int64_t n, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t in_row = p.k.tokens - begin % p.k.tokens, room = kKeyBlock - count;
      int64_t part = end - begin < in_row ? end - begin : in_row;
      if (part > room) part = room;
      add_keys(begin / p.k.tokens % p.rows, p.k.order + begin, part);
      begin += part;
      if (count == kKeyBlock || begin == end) run(places, n);
    }
  }

  // ---- all clusters of the row

  void run_round(int64_t round) {
    const int64_t q_begin = (round * p.rows + row) * p.q.tokens, k_begin = (round * p.rows + row) * p.k.tokens;
    if (p.per_row) {
      const int64_t nq = p.q.length(row), nk = p.k.length(row);
      const int64_t needed = ceil_div(nq, p.q.size), wanted = ceil_div(nk, p.k.size);
      const int64_t clusters = needed > wanted ? needed : wanted;
      for (int64_t c = 0; c < clusters; ++c) {
        const int64_t first = nq * c / clusters, last = nq * (c + 1) / clusters;
        if (first == last) continue;
        cluster(p.q.order + q_begin + first, last - first, k_begin + nk * c / clusters,
                k_begin + nk * (c + 1) / clusters);
      }
      return;
    }
    // One list: a cluster that reaches into other rows is met once by each of them, with their queries only.
    for (int64_t first = q_begin, end = q_begin + p.q.tokens; first < end;) {
      const int64_t c = first / p.q.size, last = (c + 1) * p.q.size < end ? (c + 1) * p.q.size : end;
      cluster(p.q.order + first, last - first, c * p.k.size, (c + 1) * p.k.size);
      first = last;
    }
  }

  void finish() {
    T* out = static_cast<T*>(p.out) + row * p.q.tokens * p.dim;
    C* lse = static_cast<C*>(p.lse) + row * p.q.tokens;
    for (int64_t i = 0; i < p.q.tokens; ++i) {
      const C sum = totals[i];
      narrow<T>(sums + i * width, out + i * p.dim, p.dim, sum == 0 ? C(0) : C(1) / sum);
      lse[i] = sum == 0 ? kNegInf<C> : (tops[i] + log2s(sum)) * C(kLn2);
    }
  }
};

template <typename T>
void balanced_row(const BalancedParams& p, int64_t row, char* scratch) {
  BalancedRow<T> work(p, row, scratch);
  for (int64_t round = 0; round < p.rounds; ++round) work.run_round(round);
  work.finish();
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
