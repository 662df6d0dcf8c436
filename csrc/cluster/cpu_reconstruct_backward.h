// SPDX-License-Identifier: Apache-2.0
// Gradients of reconstruction: the distances and the kept centers again, then gathers. Tokens own the gradients of the
// features; lists of entries per center, tokens ascending, those of the centers and values: fixed order of every sum.
#pragma once

#include "cpu_reconstruct.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// Gradient of the squared distances to the kept centers of one token, and the weights of its output.
template <typename T>
void distance_gradients(const ReconstructParams& p, const ReconstructSpace<T>& space, const RowView<T>& values,
                        int64_t r, int64_t token, int64_t kept, Compute<T> norm, const T* grad) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>;
  const int32_t* index = space.index_of(r);
  const C* u = space.u_of(r);
  const C inverse = inverse_of_norm<C>(norm), temperature = static_cast<C>(p.temperature);
  C *weight = space.weight + token * p.clusters, *to = space.grad_distance + token * p.clusters;
  for (int64_t i = 0; i < kept; i += w) {  // dL/dW = grad . values, w centers at a time
    Vec<C> sums[w];
    for (int64_t l = 0; l < w; ++l) {
      sums[l] = Vec<C>{};
      if (i + l >= kept) continue;
      const T* row = values(index[i + l]);
      Vec<C> a{}, b{};
      int64_t c = 0;
      for (; c + 2 * w <= p.width; c += 2 * w) {
        a += load_wide(grad + c) * load_wide(row + c);
        b += load_wide(grad + c + w) * load_wide(row + c + w);
      }
      for (; c < p.width; c += w) a += load_upto(grad, c, p.width) * load_upto(row, c, p.width);
      sums[l] = a + b;
    }
    const Vec<C> dots = reduce_square<C>(sums);
    for (int64_t l = 0; l < w && i + l < kept; ++l) to[i + l] = dots[l];
  }
  C projection = 0;
  for (int64_t i = 0; i < kept; ++i) {
    weight[i] = u[i] * inverse;
    projection += weight[i] * to[i];
  }
  if (!(norm > static_cast<C>(kNormFloor))) projection = 0;  // the clamped norm is a constant
  for (int64_t i = 0; i < kept; ++i) {
    to[i] = -temperature * u[i] * inverse * (to[i] - (p.l1 ? projection : weight[i] * projection));
  }
}

// factor * sum_i weight_i (a - row_i), V vectors at a time: differences first, which loses no digits.
template <typename T, typename Term>
void sum_differences(int64_t channels, const T* a, T* to, Compute<T> factor, Term&& term) {
  using C = Compute<T>;
  constexpr int64_t w = kLanes<C>;
  constexpr int V = 4;
  int64_t c = 0;
  for (; c + V * w <= channels; c += V * w) {
    Vec<C> acc[V], own[V];
    TP_UNROLL for (int v = 0; v < V; ++v) acc[v] = Vec<C>{}, own[v] = load_wide(a + c + v * w);
    term([&](C weight, const T* row) {
      TP_UNROLL for (int v = 0; v < V; ++v) acc[v] += weight * (own[v] - load_wide(row + c + v * w));
    });
    TP_UNROLL for (int v = 0; v < V; ++v) store_narrow<T>(to + c + v * w, acc[v] * factor);
  }
  for (; c < channels; c += w) {
    Vec<C> acc{};
    const Vec<C> own = load_upto(a, c, channels);
    term([&](C weight, const T* row) { acc += weight * (own - load_upto(row, c, channels)); });
    store_upto<T>(to, c, channels, acc * factor);
  }
}

template <typename T>
void reconstruct_backward_strip_item(const ReconstructParams& p, const ReconstructStep& s) {
  using C = Compute<T>;
  const ReconstructSpace<T> space(p, s.shared, s.scratch);
  const int64_t rows = strip_dots<T>(p, s, space);
  const RowView<T> features = feature_rows<T>(p, s.image), centers = center_rows<T>(p, s.image);
  const RowView<T> values = value_rows<T>(p, s.image);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t token = s.item * kStripTokens + r, row = s.image * p.tokens + token;
    const int64_t kept = select_nearest<T>(p, space, r);
    const C norm = weights_of<T>(p, space, r, kept);
    const T* grad = static_cast<const T*>(p.grad) + row * p.width;
    distance_gradients<T>(p, space, values, r, token, kept, norm, grad);
    space.counts[token] = static_cast<int32_t>(kept);
    __builtin_memcpy(space.kept + token * p.clusters, space.index_of(r), kept * sizeof(int32_t));
    const C* weight = space.grad_distance + token * p.clusters;
    sum_differences<T>(p.channels, features(token), static_cast<T*>(p.grad_features) + row * p.channels, C(2),
                       [&](auto&& add) {
                         for (int64_t i = 0; i < kept; ++i) add(weight[i], centers(space.index_of(r)[i]));
                       });
  }
}

// Which entries belong to each center, tokens ascending.
template <typename T>
void reconstruct_lists_item(const ReconstructParams& p, const ReconstructStep& s) {
  const ReconstructSpace<T> space(p, s.shared, s.scratch);
  int32_t* offsets = space.offsets;
  __builtin_memset(offsets, 0, (p.clusters + 1) * sizeof(int32_t));
  for (int64_t n = 0; n < p.tokens; ++n) {
    for (int32_t i = 0; i < space.counts[n]; ++i) ++offsets[space.kept[n * p.clusters + i] + 1];
  }
  for (int64_t k = 0; k < p.clusters; ++k) offsets[k + 1] += offsets[k];
  for (int64_t n = 0; n < p.tokens; ++n) {
    for (int32_t i = 0; i < space.counts[n]; ++i) {
      const int64_t entry = n * p.clusters + i;
      space.where[offsets[space.kept[entry]]++] = static_cast<int32_t>(entry);
    }
  }
  for (int64_t k = p.clusters; k > 0; --k) offsets[k] = offsets[k - 1];  // undo the advance
  offsets[0] = 0;
}

template <typename T>
void reconstruct_backward_center_item(const ReconstructParams& p, const ReconstructStep& s) {
  using C = Compute<T>;
  const ReconstructSpace<T> space(p, s.shared, s.scratch);
  const RowView<T> features = feature_rows<T>(p, s.image);
  const T* grad = static_cast<const T*>(p.grad) + s.image * p.tokens * p.width;
  const int64_t row = s.image * p.clusters + s.item;
  const int32_t first = space.offsets[s.item], last = space.offsets[s.item + 1];
  sum_rows<T>(p.width, static_cast<T*>(p.grad_values) + row * p.width, C(1), [&](auto&& add) {
    for (int32_t i = first; i < last; ++i) {
      const int32_t entry = space.where[i];
      add(space.weight[entry], grad + entry / p.clusters * p.width);
    }
  });
  sum_differences<T>(p.channels, center_rows<T>(p, s.image)(s.item), static_cast<T*>(p.grad_centers) + row * p.channels,
                     C(2), [&](auto&& add) {
                       for (int32_t i = first; i < last; ++i) {
                         const int32_t entry = space.where[i];
                         add(space.grad_distance[entry], features(entry / p.clusters));
                       }
                     });
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
