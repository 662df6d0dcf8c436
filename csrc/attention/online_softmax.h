// SPDX-License-Identifier: Apache-2.0
// Softmax over key panels as they come out of the first product.
#pragma once

#include "strips.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// Turns the tiles of a strip's product with one key block into weights, exp2(logit - shift). A finished tile only
// leaves its logits here: their exponentials are computed between the products of the next tile, in units that would
// idle.
//
// The shift of a row is the maximum of its first panel. It is raised, by an integer, only when a logit exceeds it by
// more than kSlack: what was computed is then scaled by a power of two, which costs no accuracy.
template <typename T>
struct OnlineSoftmax : StoreOnly {
  using C = Compute<T>;
  using U = typename Packed<T>::type;
  using Weight = typename PackedValue<T>::type;
  static constexpr bool kStore = false;
  static constexpr C kSlack = 16;
  static constexpr int kW = kLanes<C>;

  C factor;                    // from products to the log2 domain
  int64_t stride, width;       // of weights and out
  Weight* weights;             // [strip rows, stride] of this block
  C* out;                      // [strip rows, width] of the blocks before
  C *shift, *limit;            // per row; the limit is -inf until a finite logit came
  Vec<C>*sums, *rounded_sums;  // per row, lane by lane; with pairs also of the weights as they are multiplied
  C* queue;                    // logits of the last tile
  const C* bias = nullptr;     // of the block's keys, in the log2 domain; -inf in the columns behind them
  C* cls = nullptr;            // takes the logits of row 0, or null
  bool first = true;           // the first block
  mutable int64_t queued = 0;  // rows of the last tile
  mutable int64_t row0 = 0, column0 = 0;  // its place

  void start(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      shift[r] = 0, limit[r] = kNegInf<C>;
      sums[r] = rounded_sums[r] = Vec<C>{};
    }
  }

  // Inlined by force, as `work`: the accumulators of the tile must stay in registers.
  template <int V, typename Acc>
  __attribute__((always_inline)) void row(int64_t r, int64_t in_tile, int64_t column, Vec<Acc>* s) const {
    TP_UNROLL for (int v = 0; v < V; ++v) s[v] = s[v] * factor + load(bias + column + v * kW);
    Vec<C> top = s[0];
    TP_UNROLL for (int v = 1; v < V; ++v) top = vmax<C>(top, s[v]);
    if (any_above<C>(top, limit[r])) {
      if (limit[r] == kNegInf<C>) {
        shift[r] = reduce_max<C>(top);
      } else {
        raise(r, column, reduce_max<C>(top));
      }
      limit[r] = shift[r] + kSlack;
    }
    TP_UNROLL for (int v = 0; v < V; ++v) store(queue + (in_tile * kTileVecs + v) * kW, s[v]);
    if (r == 0 && cls != nullptr) {
      TP_UNROLL for (int v = 0; v < V; ++v) store(cls + column + v * kW, s[v]);
    }
  }
  template <int R, int V>
  void end(int64_t row, int64_t column) const {
    row0 = row, column0 = column, queued = R;
    if (V < kTileVecs) flush<V>();
  }
  template <int V = kTileVecs>
  void flush() const {
    for (int64_t r = 0; r < queued; ++r) work<V>(r);
    queued = 0;
  }

  // Weights of one row of the queued tile.
  template <int V = kTileVecs>
  __attribute__((always_inline)) void work(int64_t in_tile) const {
    const int64_t r = row0 + in_tile;
    Weight* to = weights + r * stride + column0;
    Vec<C> weight[V], sum{};
    TP_UNROLL for (int v = 0; v < V; ++v) {
      weight[v] = exp2v(load(queue + (in_tile * kTileVecs + v) * kW) - shift[r]);
      sum += weight[v];
    }
    sums[r] += sum;
    if constexpr (kUsesPairs<T>) {
      const U ones = 0x3f803f80;
      Vec<C> rounded_sum = rounded_sums[r];
      TP_UNROLL for (int v = 0; v < V; v += 2) {
        const Vec<U> pairs = Dot<U>::round(weight[v], v + 1 < V ? weight[v + 1] : Vec<C>{});
        store(reinterpret_cast<U*>(to + v * kW), pairs);
        rounded_sum = Dot<U>::step(rounded_sum, ones, pairs);
      }
      rounded_sums[r] = rounded_sum;
    } else {
      TP_UNROLL for (int v = 0; v < V; ++v) store(to + v * kW, weight[v]);
    }
  }

  __attribute__((noinline, cold)) void raise(int64_t r, int64_t column, C top) const {
    const C by = ceils(top - shift[r]), keep = exp2s(-by);
    Weight* w = weights + r * stride;
    for (int64_t j = 0; j < column; j += kW) store_narrow<Weight>(w + j, load_wide(w + j) * keep);
    for (int64_t d = 0; d < width && !first; ++d) out[r * width + d] *= keep;
    sums[r] *= keep;
    if constexpr (kUsesPairs<T>) rounded_sums[r] *= keep;
    shift[r] = keep > 0 ? shift[r] + by : top;  // the sum may fall far short of the top
  }

  // Sums of a finished row: of the exact weights, and of those that the output was made with. Dividing by the latter
  // lets their rounding cancel where one key has nearly all the weight.
  C sum(int64_t r) const { return reduce_add<C>(sums[r]); }
  C rounded_sum(int64_t r) const { return reduce_add<C>(rounded_sums[r]); }
};

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
