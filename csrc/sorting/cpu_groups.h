// SPDX-License-Identifier: Apache-2.0
// Groups of tokens that hash alike (ACT): locality-sensitive codes of a row, sorted, equal ones numbered.
#pragma once

#include "cpu_argsort.h"
#include "params.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

constexpr int64_t kHashStrip = 48;  // tokens widened at a time

template <typename C>
struct GroupScratch {
  C *wide, *hashes;
  uint64_t* keys;
  int32_t *tokens, *order, *other;
  int64_t bytes;

  GroupScratch(const GroupParams& p, char* base) {
    Arena arena{base};
    wide = arena.take<C>(kHashStrip * p.dim), hashes = arena.take<C>(p.longest * p.hashes);
    keys = arena.take<uint64_t>(p.longest), tokens = arena.take<int32_t>(p.longest);
    order = arena.take<int32_t>(p.longest), other = arena.take<int32_t>(p.longest);
    bytes = arena.next - base;
  }
};

template <typename C>
inline Vec<C> floor_lanes(Vec<C> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return (Vec<C>)_mm512_floor_ps((__m512)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4) return (Vec<C>)_mm256_floor_ps((__m256)v);
#endif
  for (int l = 0; l < kLanes<C>; ++l) v[l] = static_cast<C>(__builtin_floor(static_cast<double>(v[l])));
  return v;
}

// h as an integer; what no 64 bits hold is the least one.
template <typename C>
inline uint64_t hash_bits(C h) {
  return static_cast<uint64_t>(h >= C(-0x1p63) && h < C(0x1p63) ? static_cast<int64_t>(h) : INT64_MIN);
}
template <typename C>
inline uint64_t hash_code(const C* h, int64_t hashes) {
  uint64_t code = 0;
  for (int64_t l = 0; l < hashes; ++l) code += hash_bits(h[l]) << 2 * l;
  return code;
}

// hashes[t] = floor((x[t] * scale . projection + offset) / width) of every token of a row.
template <typename T>
void hash_row(const GroupParams& p, const T* x, int64_t n, const GroupScratch<Compute<T>>& scratch) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const C scale = static_cast<C>(p.scale);
  for (int64_t t = 0; t < n; t += kHashStrip) {
    const int64_t strip = n - t < kHashStrip ? n - t : kHashStrip;
    for (int64_t i = 0; i < strip; ++i) {
      C* to = scratch.wide + i * p.dim;
      widen(x + (t + i) * p.token_stride, to, p.dim);
      for (int64_t d = 0; d < p.dim; ++d) to[d] *= scale;
    }
    Gemm<C>::rows(scratch.wide, p.dim, 1, static_cast<const C*>(p.projection), p.hashes, scratch.hashes + t * p.hashes,
                  p.hashes, strip, p.hashes, p.dim, false);
  }
  const C* offset = static_cast<const C*>(p.offset);
  const Vec<C> width = splat(static_cast<C>(p.width));
  for (int64_t l = 0; l < p.hashes; l += w) {
    const Vec<C> start = load(offset + l);
    for (C* h = scratch.hashes + l; h < scratch.hashes + n * p.hashes; h += p.hashes) {
      store(h, floor_lanes<C>((load(h) + start) / width));
    }
  }
}

// Code of the least hashes of the tokens listed, which shifts all codes; a hash without a finite least one shifts none.
template <typename C>
uint64_t least_code(const C* hashes, int64_t count, const int32_t* tokens, int64_t n) {
  using Int = typename VecTypes<C>::integer;
  constexpr int w = kLanes<C>;
  const Vec<C> infinity = splat<C>(__builtin_inf());
  C least[kMaxHashes];
  for (int64_t l = 0; l < count; l += w) {
    Vec<C> low = infinity;
    Int nan{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<C> h = load(hashes + tokens[i] * count + l);
      low = h < low ? h : low;
      nan |= h != h;
    }
    const Int finite = (low > -infinity) & (low < infinity) & ~nan;
    store(least + l, finite ? low : Vec<C>{});
  }
  return hash_code(least, count);
}

// Ids and counts of one row.
template <typename T>
void group_row(const GroupParams& p, int64_t row, char* memory) {
  const GroupScratch<Compute<T>> scratch(p, memory);
  int32_t *ids = p.ids + row * p.tokens, *counts = p.counts + row * p.tokens, found = 0;
  int64_t n = 0;
  for (int64_t t = 0; t < p.tokens; ++t) ids[t] = -1, counts[t] = 0;
  for (int64_t t = 0; t < p.length(row); ++t) {
    if (p.valid == nullptr || p.valid[row * p.tokens + t] != 0) scratch.tokens[n++] = static_cast<int32_t>(t);
  }
  if (n > 0) {
    hash_row(p, static_cast<const T*>(p.x) + p.first(row), p.length(row), scratch);
    const uint64_t shift = least_code(scratch.hashes, p.hashes, scratch.tokens, n);
    for (int64_t i = 0; i < n; ++i) {  // flipping the sign makes the order of integers that of their bits
      const uint64_t code = hash_code(scratch.hashes + scratch.tokens[i] * p.hashes, p.hashes);
      scratch.keys[i] = (code - shift) ^ uint64_t { 1 } << 63;
    }
    radix_sort(scratch.keys, n, scratch.other, scratch.order);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int32_t at = scratch.order[i];
    found += i == 0 || scratch.keys[at] != scratch.keys[scratch.order[i - 1]];
    ids[scratch.tokens[at]] = found - 1;
    ++counts[found - 1];
  }
  p.found[row] = found;
}

// Means of the groups of one row, [groups, dim].
template <typename T>
void group_means(const GroupParams& p, int64_t row, T* means, char* memory) {
  using C = Compute<T>;
  constexpr int w = kLanes<C>;
  const int64_t groups = p.found[row];
  const int32_t *ids = p.ids + row * p.tokens, *counts = p.counts + row * p.tokens;
  C* sums = reinterpret_cast<C*>(memory);
  for (int64_t i = 0; i < groups * p.dim; ++i) sums[i] = 0;
  const T* x = static_cast<const T*>(p.x) + p.first(row);
  for (int64_t t = 0; t < p.length(row); ++t, x += p.token_stride) {
    if (ids[t] < 0) continue;
    C* sum = sums + ids[t] * p.dim;
    int64_t d = 0;
    for (; d + w <= p.dim; d += w) store(sum + d, load(sum + d) + load_wide(x + d));
    for (; d < p.dim; ++d) sum[d] += to_float(x[d]);
  }
  for (int64_t g = 0; g < groups; ++g)
    narrow(sums + g * p.dim, means + g * p.dim, p.dim, C(1) / static_cast<C>(counts[g]));
}

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
