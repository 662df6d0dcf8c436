// SPDX-License-Identifier: Apache-2.0
// Which tokens and which centers see each other; the same functions on the host and on the device. No torch header.
//
// Along each axis the tokens 0..size-1 are spread over `cells` cells. Both axes are independent, so everything is
// described by intervals per axis.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(TOKENPRUNE_HOST_MODEL)
#define TP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TP_HOST_DEVICE inline
#endif

namespace tokenprune {
#ifdef TOKENPRUNE_ISA
inline namespace TOKENPRUNE_ISA {
#endif

// One axis of the map. scale is float32(cells) / float32(size), rounded once: home cells follow the float32
// nearest-neighbour rule, which differs from exact integer division for a few sizes (44 -> 26, 46 -> 28).
struct ClusterAxis {
  int64_t size = 0, cells = 0;
  int64_t reach = 0;  // half the window, at most cells - 1
  float scale = 0;
};

// Both monotone in their argument.
TP_HOST_DEVICE int64_t home_cell(const ClusterAxis& a, int64_t token) {
  const int64_t cell = static_cast<int64_t>(static_cast<float>(token) * a.scale);
  return cell < a.cells - 1 ? cell : a.cells - 1;
}
// The first token whose home is `cell` or a later one; `size` when there is none. Any cell, also outside of the map.
TP_HOST_DEVICE int64_t first_token(const ClusterAxis& a, int64_t cell) {
  if (cell <= 0) return 0;
  if (cell >= a.cells) return a.size;
  int64_t token = cell * a.size / a.cells;  // at most one rounding away
  while (token < a.size && home_cell(a, token) < cell) ++token;
  while (token > 0 && home_cell(a, token - 1) >= cell) --token;
  return token;
}

// Tokens [first, last) that have center `cell` among their candidates.
TP_HOST_DEVICE int64_t tokens_begin(const ClusterAxis& a, int64_t cell) { return first_token(a, cell - a.reach); }
TP_HOST_DEVICE int64_t tokens_end(const ClusterAxis& a, int64_t cell) { return first_token(a, cell + a.reach + 1); }

// Adaptive average pooling: cell i covers tokens [begin, end), and token y lies in cells [first, last]; cells overlap
// where they do not divide the tokens.
TP_HOST_DEVICE int64_t pool_begin(const ClusterAxis& a, int64_t cell) { return cell * a.size / a.cells; }
TP_HOST_DEVICE int64_t pool_end(const ClusterAxis& a, int64_t cell) {
  return ((cell + 1) * a.size + a.cells - 1) / a.cells;
}
TP_HOST_DEVICE int64_t pool_first(const ClusterAxis& a, int64_t token) { return token * a.cells / a.size; }
TP_HOST_DEVICE int64_t pool_last(const ClusterAxis& a, int64_t token) {
  return ((token + 1) * a.cells + a.size - 1) / a.size - 1;
}

// Width of the window of candidates along one axis, clipped or not.
TP_HOST_DEVICE int64_t window_width(const ClusterAxis& a) { return 2 * a.reach + 1; }

#ifdef TOKENPRUNE_ISA
}  // namespace TOKENPRUNE_ISA
#endif
}  // namespace tokenprune
