// SPDX-License-Identifier: Apache-2.0
// Which calls the sm_90a kernel takes, its tensor maps and its launch. `encode(rows, dim, box_columns, box_rows)` makes
// a tensor map: the driver's, or the host model's.
#pragma once

#include "kernel_hopper.cuh"

namespace tokenprune::attention {

// Rows that the copy engine can address: 16-byte base and strides, each a multiple of the one before.
inline bool hopper_rows(const Rows& r, int64_t heads) {
  return r.rows > 0 && reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.row_stride % 8 == 0 && r.row_stride > 0 &&
         (heads == 1 || (r.head_stride % 8 == 0 && r.head_stride > 0 && r.row_stride % r.head_stride == 0));
}
// 16-bit values is the caller's condition.
inline bool hopper_serves(const AttentionParams& p) {
  return (p.dim == 64 || p.dim == 80 || p.dim == 128) && p.q_index == nullptr && p.k_index == nullptr &&
         p.cls == nullptr && p.heads > 0 && hopper_rows(p.q, p.heads) && hopper_rows(p.k, p.heads) &&
         hopper_rows(p.v, p.heads);
}

template <typename T, int Dim, int Groups, typename Launch, typename Encode>
void launch_hopper_tile(const Launch& launch, const Encode& encode, const AttentionParams& p) {
  using Shared = HopperShared<Dim, Groups>;
  const auto map = [&](const Rows& rows, int box_rows, bool narrow) {
    return encode(rows, p.heads, Dim, narrow ? 16 : 64, box_rows);
  };
  HopperMaps maps{
      map(p.q, Shared::kRows, false), map(p.k, Shared::kKeys, false), map(p.v, Shared::kKeys, false), {}, {}, {}};
  if constexpr (Dim % 64 != 0) {
    maps.narrow_q = map(p.q, Shared::kRows, true), maps.narrow_k = map(p.k, Shared::kKeys, true),
    maps.narrow_v = map(p.v, Shared::kKeys, true);
  }
  const int64_t blocks = p.max_q < 1 ? 1 : (p.max_q + Shared::kRows - 1) / Shared::kRows;
  launch(&sparse_attention_hopper<T, Dim, Groups>,
         dim3(static_cast<unsigned>(blocks * (p.batch + 1)), static_cast<unsigned>(p.heads)),
         dim3(hopper::kGroupThreads * (Groups + 1)), Shared::kBytes, p, static_cast<int>(blocks), maps);
}

// Two warpgroups per block read shared memory half as often; as long as such blocks do not fill the card, smaller ones
// finish sooner.
template <typename T, typename Launch, typename Encode>
void launch_hopper(const Launch& launch, const Encode& encode, const AttentionParams& p, int processors) {
  if (p.total_q == 0) return;
  const bool fills = p.max_q > 64 && p.total_q / 128 * p.heads >= processors;
  const auto with = [&]<int Dim>() {
    if (fills) return launch_hopper_tile<T, Dim, 2>(launch, encode, p);
    launch_hopper_tile<T, Dim, 1>(launch, encode, p);
  };
  if (p.dim == 64) return with.template operator()<64>();
  if (p.dim == 80) return with.template operator()<80>();
  with.template operator()<128>();
}

}  // namespace tokenprune::attention
