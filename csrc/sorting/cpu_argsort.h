// SPDX-License-Identifier: Apache-2.0
// Stable argsort of a row of floats by counting: two passes over 16 bits of where a value lies between the row's least
// and largest, and an insertion sort of what they left undecided, which for hashes is next to nothing. Rows of other
// shapes (a few values far away from all others) take one pass per byte of the value.
#pragma once

#include "../common/pack.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// How a storage type sorts: its bits, and the bits of infinity.
template <typename T>
struct SortTraits;
template <>
struct SortTraits<float> {
  using Key = uint32_t;
  static constexpr Key infinity = 0x7f800000;
};
template <>
struct SortTraits<double> {
  using Key = uint64_t;
  static constexpr Key infinity = 0x7ff0000000000000;
};
template <>
struct SortTraits<Half> {
  using Key = uint16_t;
  static constexpr Key infinity = 0x7c00;
};
template <>
struct SortTraits<BFloat16> {
  using Key = uint16_t;
  static constexpr Key infinity = 0x7f80;
};

// An integer that orders as the float does: -0 equals 0, and every NaN is last and equal to the others.
template <typename T>
typename SortTraits<T>::Key sort_key(T x) {
  using Key = typename SortTraits<T>::Key;
  constexpr Key sign = static_cast<Key>(Key{1} << (8 * sizeof(Key) - 1));
  const Key bits = __builtin_bit_cast(Key, x), magnitude = static_cast<Key>(bits & ~sign);
  const Key ordered = static_cast<Key>(bits & sign ? ~bits : bits | sign);
  return magnitude > SortTraits<T>::infinity ? static_cast<Key>(~Key{0}) : magnitude == 0 ? sign : ordered;
}

// One stable pass of positions, in the order of `from` (null: ascending), by a digit of 8 bits; `start` holds the
// digits' counts and loses them.
template <typename Digit>
void counting_pass(const int32_t* from, int32_t* to, int64_t n, int32_t* start, Digit digit) {
  int32_t before = 0;
  for (int v = 0; v < 256; ++v) {
    const int32_t count = start[v];
    start[v] = before;
    before += count;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t at = from == nullptr ? static_cast<int32_t>(i) : from[i];
    to[start[digit(at)]++] = at;
  }
}

// Exact, whatever the values: one pass per byte of the keys.
template <typename Key>
void radix_sort(const Key* keys, int64_t n, int32_t* other, int32_t* order) {
  static_assert(sizeof(Key) % 2 == 0);  // the last pass ends in `order`
  for (int byte = 0; byte < static_cast<int>(sizeof(Key)); ++byte) {
    const auto digit = [&](int32_t at) { return keys[at] >> (8 * byte) & 255; };
    int32_t start[256] = {};
    for (int64_t i = 0; i < n; ++i) ++start[digit(static_cast<int32_t>(i))];
    counting_pass(byte == 0 ? nullptr : byte % 2 ? other : order, byte % 2 ? order : other, n, start, digit);
  }
}

// Puts right what is nearly in order; gives up (false) when positions have far to go. Stable.
template <typename Key>
bool insertion_sort(const Key* keys, int64_t n, int32_t* order) {
  int64_t budget = 4 * n;
  Key before = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t at = order[i];
    const Key key = keys[at];
    if (before <= key) {
      before = key;
      continue;
    }
    int64_t j = i;
    for (; j > 0 && keys[order[j - 1]] > key; --j) order[j] = order[j - 1];
    order[j] = at;
    if ((budget -= i - j) < 0) return false;
  }
  return true;
}

// Places of the values on an even grid of 2^16 between the least and the largest, which keep their order.
template <typename T>
bool even_grid(const T* x, int64_t n, T& least, T& factor) {
  constexpr int w = kLanes<T>;
  constexpr T infinity = __builtin_inf();
  Vec<T> low = splat<T>(infinity), high = -low;
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const Vec<T> v = load(x + i);
    low = v < low ? v : low;
    high = v < splat<T>(infinity) ? vmax<T>(v, high) : high;
  }
  T top = reduce_max<T>(high);
  least = -reduce_max<T>(-low);
  for (; i < n; ++i) {
    least = x[i] < least ? x[i] : least;
    top = x[i] > top && x[i] < infinity ? x[i] : top;
  }
  factor = T(65535) / (top - least);
  return factor > 0 && factor < infinity;  // neither one value, nor too far apart, nor -inf
}

inline int64_t argsort_scratch_bytes(int64_t n) { return n * (8 + 4 + 4) + 3 * 64; }

// order[i] = position of the i-th smallest of x[0, n).
template <typename T>
void argsort_row(const T* x, int64_t n, char* scratch, int32_t* order) {
  using Key = typename SortTraits<T>::Key;
  Arena arena{scratch};
  Key* keys = arena.take<Key>(n);
  int32_t *other = arena.take<int32_t>(n), *places = arena.take<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = sort_key(x[i]);
  if constexpr (sizeof(T) > 2) {
    T least, factor;
    if (even_grid(x, n, least, factor)) {
      int32_t low[256] = {}, high[256] = {};
      for (int64_t i = 0; i < n; ++i) {
        const T place = (x[i] - least) * factor;
        places[i] = static_cast<int32_t>(place < T(65535) ? place : T(65535));  // inf and NaN, too
      }
      for (int64_t i = 0; i < n; ++i) ++low[places[i] & 255], ++high[places[i] >> 8];
      counting_pass(nullptr, other, n, low, [&](int32_t at) { return places[at] & 255; });
      counting_pass(other, order, n, high, [&](int32_t at) { return places[at] >> 8; });
      if (insertion_sort(keys, n, order)) return;
    }
  }
  radix_sort(keys, n, other, order);
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
