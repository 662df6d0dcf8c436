// SPDX-License-Identifier: Apache-2.0
// Rows taken through an index come too irregularly for hardware prefetchers, which start anew in every row.
#pragma once

#include <cstdint>

namespace tokenprune {

// Asks for the rows that come next of a matrix that is read (or, with `Write`, changed) row by row through an index.
template <bool Write = false>
struct RowsAhead {
  const void* base;
  const int32_t* indices;
  int64_t end, rows, stride, bytes;  // end of the indices; rows, their distance and size in bytes
  int64_t distance = rows * bytes <= kCached ? 0 : bytes < kInFlight ? kInFlight / bytes : 1;

  static constexpr int64_t kCached = 512 << 10;  // what the second-level cache may hold anyway
  static constexpr int64_t kInFlight = 8192;     // hides main memory without filling the buffers of a core

  // While row indices[i] is worked on. Always inlined: GCC drops calls of functions that do nothing but prefetch.
  __attribute__((always_inline)) void at(int64_t i) const {
    const int64_t next = i + distance;
    if (distance == 0 || next >= end || indices[next] < 0 || indices[next] >= rows) return;
    const char* row = static_cast<const char*>(base) + indices[next] * stride;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, Write ? 1 : 0, 3);
  }
};

}  // namespace tokenprune
