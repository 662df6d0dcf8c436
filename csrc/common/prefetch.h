// SPDX-License-Identifier: Apache-2.0
// Rows taken through an index come too irregularly for hardware prefetchers, which start anew in every row.
#pragma once

#include "vec.h"

namespace tokenprune {
inline namespace TOKENPRUNE_ISA {

// Asks for the rows that come next of a matrix that is read (or, with `Write`, changed) row by row through an index.
template <bool Write = false>
struct RowsAhead {
  const void* base;
  const int32_t* indices;
  int64_t end, rows, stride, bytes;  // end of the indices; rows, their distance and size in bytes
  int64_t distance = rows * bytes <= kCached ? 0 : bytes < kInFlight ? kInFlight / bytes : 1;

  static constexpr int64_t kCached = 512 << 10;  // what the second-level cache may hold anyway
  static constexpr int64_t kInFlight = 8192;     // hides main memory without filling the buffers of a core

  static constexpr int64_t kLine = 64;

  // The row to ask for while row indices[i] is worked on; null when there is none.
  const char* next(int64_t i) const {
    const int64_t n = i + distance;
    if (distance == 0 || n >= end || indices[n] < 0 || indices[n] >= rows) return nullptr;
    return static_cast<const char*>(base) + indices[n] * stride;
  }

  // Always inlined, as below: GCC drops calls of functions that do nothing but prefetch.
  __attribute__((always_inline)) void at(int64_t i) const {
    const char* row = next(i);
    for (int64_t b = 0; row != nullptr && b < bytes; b += kLine) ask(row + b);
  }

  // Copies a row meanwhile. Line by line: a burst of requests fills the buffers, and the copy waits behind it.
  __attribute__((always_inline)) void copy(int64_t i, void* to_, const void* from_) const {
    char* to = static_cast<char*>(to_);
    const char *from = static_cast<const char*>(from_), *row = next(i);
    int64_t b = 0;
    for (; row != nullptr && b + kLine <= bytes; b += kLine) {
      ask(row + b);
      TP_UNROLL for (int64_t v = 0; v < kLine; v += kVecBytes) {
        Vec<uint32_t> words;  // copied as bytes: rows of 16-bit values may lie at odd multiples of two
        __builtin_memcpy(&words, from + b + v, kVecBytes);
        __builtin_memcpy(to + b + v, &words, kVecBytes);
      }
    }
    __builtin_memcpy(to + b, from + b, bytes - b);
  }

  __attribute__((always_inline)) static void ask(const char* line) { __builtin_prefetch(line, Write ? 1 : 0, 3); }
};

}  // namespace TOKENPRUNE_ISA
}  // namespace tokenprune
