// SPDX-License-Identifier: Apache-2.0
// Forward of sparse_attention for sm_90a: rows without an index, 16-bit values, head widths 64, 80 and 128.
//
// A block owns 64 queries per consuming warpgroup of one sequence and one head. One warp of the first warpgroup feeds
// tiles of 128 keys and values through the tensor copy engine, two stages each; the others multiply with wgmma and keep
// scores, weights and sums in registers. The scores of the next tile are computed while the values of this one are
// summed; the softmax runs beside the sum.
#pragma once

#include "../common/hopper.cuh"
#include "kernel_stream.cuh"

namespace tokenprune::attention {

struct HopperMaps {  // boxes of 64 columns and of 16; the narrow ones are not used where the width is a multiple of 64
  hopper::TensorMap q, k, v, narrow_q, narrow_k, narrow_v;
};

constexpr int kHopperKeys = 128, kHopperStages = 2;

// Shared memory of a block, aligned to 1024 bytes.
template <int Dim, int Groups>
struct HopperShared {
  static constexpr int kRows = hopper::kGroupRows * Groups, kKeys = kHopperKeys, kStages = kHopperStages;
  using Own = hopper::Tile<kRows, Dim>;
  using Keys = hopper::Tile<kKeys, Dim>;
  static constexpr int kKeysAt = Own::kBytes, kValuesAt = kKeysAt + kStages * Keys::kBytes;
  static constexpr int kBiasAt = kValuesAt + kStages * Keys::kBytes, kBarriersAt = kBiasAt + kStages * kKeys * 4;
  static constexpr int kBytes = kBarriersAt + (2 + 4 * kStages) * 8 + 1024;
  static_assert(Own::kBytes % 1024 == 0 && Keys::kBytes % 1024 == 0 && kBytes <= 227 * 1024);

  unsigned char* memory;

  static __device__ __forceinline__ HopperShared aligned() {
    unsigned char* start = dynamic_shared<unsigned char>();
    return {start + ((1024 - shared_address(start) % 1024) % 1024)};
  }
  __device__ __forceinline__ unsigned char* keys(int stage) const { return memory + kKeysAt + stage * Keys::kBytes; }
  __device__ __forceinline__ unsigned char* values(int stage) const {
    return memory + kValuesAt + stage * Keys::kBytes;
  }
  __device__ __forceinline__ float* bias(int stage) const {  // base 2; -inf behind the last key
    return reinterpret_cast<float*>(memory + kBiasAt) + stage * kKeys;
  }
  __device__ __forceinline__ hopper::Barrier* barrier(int n) const {
    return reinterpret_cast<hopper::Barrier*>(memory + kBarriersAt) + n;
  }
  __device__ __forceinline__ hopper::Barrier* queries_full() const { return barrier(0); }
  __device__ __forceinline__ hopper::Barrier* landing() const { return barrier(1); }
  __device__ __forceinline__ hopper::Barrier* keys_full(int stage) const { return barrier(2 + stage); }
  __device__ __forceinline__ hopper::Barrier* keys_free(int stage) const { return barrier(2 + kStages + stage); }
  __device__ __forceinline__ hopper::Barrier* values_full(int stage) const { return barrier(2 + 2 * kStages + stage); }
  __device__ __forceinline__ hopper::Barrier* values_free(int stage) const { return barrier(2 + 3 * kStages + stage); }

  // By one thread. groups: warpgroups that have queries.
  __device__ __forceinline__ void init_barriers(int groups) const {
    hopper::barrier_init(queries_full(), 1);
    hopper::barrier_init(landing(), 1);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(keys_full(stage), 1);
      hopper::barrier_init(values_full(stage), 1);
      hopper::barrier_init(keys_free(stage), 4 * groups);  // a lane of every warp
      hopper::barrier_init(values_free(stage), 4 * groups);
    }
    hopper::barrier_init_fence();
  }
};

__device__ __forceinline__ int hopper_stage(int tile) { return tile % kHopperStages; }
// Parity of the phase in which `tile` fills its stage.
__device__ __forceinline__ int hopper_parity(int tile) { return tile / kHopperStages % 2; }

// ---- the feeding warp ----------------------------------------------------------------------------------------------

template <typename T, int Dim, int Groups>
struct HopperFeeder {
  using Shared = HopperShared<Dim, Groups>;
  using Keys = typename Shared::Keys;

  const Shared shared;
  const HopperMaps& maps;
  const int head;
  int landings = 0;

  template <typename Tile>
  __device__ __forceinline__ void copy(const hopper::TensorMap& wide, const hopper::TensorMap& narrow,
                                       hopper::Barrier* barrier, unsigned char* to, int row) const {
    hopper::barrier_expect(barrier, Tile::kBytes);
#pragma unroll
    for (int block = 0; block < Tile::kWide; ++block) {
      hopper::copy_tile(&wide, barrier, to + block * Tile::kWideBytes, block * 64, head, row);
    }
    if constexpr (Tile::kNarrow == 1) {
      hopper::copy_tile(&narrow, barrier, to + Tile::kNarrowAt, Tile::kWide * 64, head, row);
    }
  }

  // A tile with `valid` rows of this sequence. The rows behind belong to the next one: they are cleared, because what a
  // weight of 0 multiplies must not be infinite or NaN.
  __device__ __forceinline__ void load(const hopper::TensorMap& wide, const hopper::TensorMap& narrow,
                                       hopper::Barrier* full, unsigned char* to, int row, int valid) {
    const bool whole = valid >= Shared::kKeys;
    if (hopper::lane() == 0) copy<Keys>(wide, narrow, whole ? full : shared.landing(), to, row);
    if (whole) return;
    hopper::barrier_wait(shared.landing(), landings++ % 2);
    for (int unit = hopper::lane(); unit < (Shared::kKeys - valid) * Keys::kUnits; unit += 32) {
      const int r = valid + unit / Keys::kUnits, c = unit % Keys::kUnits * 8;
      hopper::store_unit(to + Keys::offset(r, c), uint4{0, 0, 0, 0});
    }
    hopper::fence_async_shared();
    warp_sync();
    if (hopper::lane() == 0) hopper::barrier_arrive(full);
  }

  __device__ __forceinline__ void load_keys(const AttentionParams& p, const Range& keys, int tile) {
    const int stage = hopper_stage(tile), start = tile * Shared::kKeys;
    hopper::barrier_wait(shared.keys_free(stage), hopper_parity(tile) ^ 1);
    for (int i = hopper::lane(); i < Shared::kKeys; i += 32) {
      const int position = start + i;
      float bias = position < keys.count ? 0 : -kInfinity<float>;
      if (p.key_bias != nullptr && position < keys.count) {
        bias = at<float>(p.key_bias, keys.begin + position) * static_cast<float>(kLog2e);
      }
      shared.bias(stage)[i] = bias;
    }
    warp_sync();
    load(maps.k, maps.narrow_k, shared.keys_full(stage), shared.keys(stage), keys.begin + start, keys.count - start);
  }
  __device__ __forceinline__ void load_values(const Range& keys, int tile) {
    const int stage = hopper_stage(tile), start = tile * Shared::kKeys;
    hopper::barrier_wait(shared.values_free(stage), hopper_parity(tile) ^ 1);
    load(maps.v, maps.narrow_v, shared.values_full(stage), shared.values(stage), keys.begin + start,
         keys.count - start);
  }

  // In the order in which the consumers need them.
  __device__ __forceinline__ void run(const AttentionParams& p, int first_query, const Range& keys) {
    const int tiles = (keys.count + Shared::kKeys - 1) / Shared::kKeys;
    if (tiles == 0) return;
    if (hopper::lane() == 0) {
      copy<typename Shared::Own>(maps.q, maps.narrow_q, shared.queries_full(), shared.memory, first_query);
    }
    for (int tile = 0; tile < tiles; ++tile) {
      load_keys(p, keys, tile);
      if (tile > 0) load_values(keys, tile - 1);
    }
    load_values(keys, tiles - 1);
  }
};

// ---- a consuming warpgroup -----------------------------------------------------------------------------------------

template <typename T, int Dim, int Groups>
struct HopperConsumer {
  using Shared = HopperShared<Dim, Groups>;
  using Own = typename Shared::Own;
  using Keys = typename Shared::Keys;
  static constexpr int kWideDim = Own::kWide * 64, kNarrowDim = Own::kNarrow * 16, kKeySteps = Shared::kKeys / 16;

  const Shared shared;
  const int index;  // of the warpgroup among the consumers
  float scores[Shared::kKeys / 2], wide[kWideDim / 2], narrow[kNarrowDim == 0 ? 1 : kNarrowDim / 2];
  uint32_t weights[kKeySteps][4];  // the scores as 16-bit operand
  float best[2], sum[2];           // maximum (base 2), and sum per thread, of rows row_of(0) and row_of(1)

  __device__ __forceinline__ HopperConsumer(const Shared& shared_, int index_) : shared(shared_), index(index_) {
    best[0] = best[1] = -kInfinity<float>;
    sum[0] = sum[1] = 0;
#pragma unroll
    for (float& x : wide) x = 0;
#pragma unroll
    for (float& x : narrow) x = 0;
  }

  __device__ __forceinline__ void pin() {
    hopper::pin(scores);
    hopper::pin(wide);
    if constexpr (kNarrowDim > 0) hopper::pin(narrow);
  }

  // scores = queries . keys^T
  __device__ __forceinline__ void issue_scores(int stage) {
    const uint32_t own = shared_address(shared.memory), keys = shared_address(shared.keys(stage));
    const int row = index * hopper::kGroupRows;
#pragma unroll
    for (int step = 0; step < 4 * Own::kWide; ++step) {
      hopper::wgmma_shared<T, Shared::kKeys, hopper::Order::kRows>(
          scores, Own::rows_wide(own, step / 4, row, step % 4), Keys::rows_wide(keys, step / 4, 0, step % 4), step > 0);
    }
    if constexpr (kNarrowDim > 0) {
      hopper::wgmma_shared<T, Shared::kKeys, hopper::Order::kRows>(scores, Own::rows_narrow(own, row),
                                                                   Keys::rows_narrow(keys, 0), true);
    }
    hopper::wgmma_commit();
  }

  // sums += weights x values
  __device__ __forceinline__ void issue_sums(int stage) {
    const uint32_t values = shared_address(shared.values(stage));
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
      hopper::wgmma_registers<T, kWideDim, hopper::Order::kColumns>(wide, weights[step],
                                                                    Keys::columns_wide(values, step), true);
      if constexpr (kNarrowDim > 0) {
        hopper::wgmma_registers<T, kNarrowDim, hopper::Order::kColumns>(narrow, weights[step],
                                                                        Keys::columns_narrow(values, step), true);
      }
    }
    hopper::wgmma_commit();
  }

  // Scores -> unnormalised weights; gives the factor for what was summed before.
  __device__ __forceinline__ void weigh(const float* bias, float scale, float* factor) {
    float top[2] = {best[0], best[1]};
#pragma unroll
    for (int j = 0; j < Shared::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float b = bias[hopper::column_of(j, e)];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = scores[4 * j + 2 * i + e];
          s = s * scale + b;
          top[i] = fmaxf(top[i], s);
        }
      }
    }
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = fmaxf(top[i], warp_shuffle_xor(top[i], 1));
      top[i] = fmaxf(top[i], warp_shuffle_xor(top[i], 2));
      base[i] = top[i] == -kInfinity<float> ? 0.0f : top[i];  // only hidden keys so far
      factor[i] = exp2_fast(best[i] - base[i]);
      best[i] = top[i];
      sum[i] *= factor[i];
    }
#pragma unroll
    for (int n = 0; n < Shared::kKeys / 2; ++n) {
      scores[n] = exp2_fast(scores[n] - base[n / 2 % 2]);
      sum[n / 2 % 2] += scores[n];
    }
  }

  __device__ __forceinline__ void rescale(const float* factor) {
#pragma unroll
    for (int n = 0; n < kWideDim / 2; ++n) wide[n] *= factor[n / 2 % 2];
#pragma unroll
    for (int n = 0; n < kNarrowDim / 2; ++n) narrow[n] *= factor[n / 2 % 2];
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int step = 0; step < kKeySteps; ++step) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        weights[step][r] = pack_pair<T>(scores[8 * step + 2 * r], scores[8 * step + 2 * r + 1]);
      }
    }
  }

  __device__ __forceinline__ void release(hopper::Barrier* barrier) const {
    warp_sync();
    if (hopper::lane() == 0) hopper::barrier_arrive(barrier);
  }

  __device__ __forceinline__ void run(int tiles, float scale) {
    float factor[2];
    hopper::barrier_wait(shared.queries_full(), 0);
    hopper::barrier_wait(shared.keys_full(0), 0);
    pin();
    hopper::wgmma_fence();
    issue_scores(0);
    hopper::wgmma_wait<0>();
    pin();
    weigh(shared.bias(0), scale, factor);
    release(shared.keys_free(0));
    pack();
    for (int tile = 1; tile < tiles; ++tile) {
      const int stage = hopper_stage(tile), before = hopper_stage(tile - 1);
      hopper::barrier_wait(shared.keys_full(stage), hopper_parity(tile));
      pin();
      hopper::wgmma_fence();
      issue_scores(stage);
      hopper::barrier_wait(shared.values_full(before), hopper_parity(tile - 1));
      hopper::wgmma_fence();
      issue_sums(before);
      hopper::wgmma_wait<1>();
      hopper::pin(scores);
      weigh(shared.bias(stage), scale, factor);
      release(shared.keys_free(stage));
      hopper::wgmma_wait<0>();
      pin();
      release(shared.values_free(before));
      rescale(factor);
      pack();
    }
    hopper::barrier_wait(shared.values_full(hopper_stage(tiles - 1)), hopper_parity(tiles - 1));
    pin();
    hopper::wgmma_fence();
    issue_sums(hopper_stage(tiles - 1));
    hopper::wgmma_wait<0>();
    pin();
  }

  // The warpgroup's rows of the query tile serve as staging; a warp writes and reads only its own 16 rows there.
  __device__ __forceinline__ void store(T* to, int64_t stride, int rows, const float* factor) {
    hopper::group_sync(1 + index, hopper::kGroupThreads);  // every warp is through with the queries
    const int own = index * hopper::kGroupRows;
    const auto put = [&](int i, int column, float low, float high) {
      *reinterpret_cast<uint32_t*>(shared.memory + Own::offset(own + hopper::row_of(i), column)) =
          pack_pair<T>(low * factor[i], high * factor[i]);
    };
#pragma unroll
    for (int j = 0; j < kWideDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) put(i, hopper::column_of(j, 0), wide[4 * j + 2 * i], wide[4 * j + 2 * i + 1]);
    }
#pragma unroll
    for (int j = 0; j < kNarrowDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        put(i, kWideDim + hopper::column_of(j, 0), narrow[4 * j + 2 * i], narrow[4 * j + 2 * i + 1]);
      }
    }
    warp_sync();
    const int first = hopper::warp_row(), count = rows - first < 16 ? rows - first : 16;
    for (int unit = hopper::lane(); unit < count * Own::kUnits; unit += 32) {
      const int r = first + unit / Own::kUnits, c = unit % Own::kUnits * 8;
      *reinterpret_cast<uint4*>(to + r * stride + c) =
          *reinterpret_cast<const uint4*>(shared.memory + Own::offset(own + r, c));
    }
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------------------

template <typename T, int Dim, int Groups>
__global__ void __launch_bounds__(hopper::kGroupThreads*(Groups + 1), Groups == 1 ? 2 : 1)
    sparse_attention_hopper(AttentionParams p, int blocks, const __grid_constant__ HopperMaps maps) {
  using Shared = HopperShared<Dim, Groups>;
  const Place place = place_of(blocks);
  const int64_t out_stride = p.heads * Dim;
  const auto out_at = [&](int64_t row) { return static_cast<T*>(p.o) + row * out_stride + place.head * Dim; };
  const auto lse_at = [&](int64_t row) { return static_cast<float*>(p.lse) + place.head * p.total_q + row; };
  if (place.sequence == p.batch) {
    if (threadIdx.x >= kThreads) return;
    const int end = clamp_to(p.cu_q[p.batch], 0, p.total_q);
    clear_rows(out_at(0), out_stride, Dim, end, p.total_q, place);
    fill_stats(lse_at(0), -kInfinity<float>, end, p.total_q, place);
    return;
  }
  const Range queries = range_of(p.cu_q, place.sequence, p.total_q);
  const Range keys = range_of(p.cu_k, place.sequence, p.total_k);
  const int first = place.block * Shared::kRows;
  if (first >= queries.count) return;

  const Shared shared = Shared::aligned();
  const int tiles = (keys.count + Shared::kKeys - 1) / Shared::kKeys, rows = queries.count - first;
  if (threadIdx.x == 0) {
    const int groups = (rows + hopper::kGroupRows - 1) / hopper::kGroupRows;
    shared.init_barriers(groups < Groups ? groups : Groups);
  }
  __syncthreads();
  if (hopper::group() == 0) {
    hopper::registers_down<40>();
    if (threadIdx.x < 32) {
      HopperFeeder<T, Dim, Groups> feeder{shared, maps, place.head};
      feeder.run(p, queries.begin + first, keys);
    }
  } else {
    hopper::registers_up<Groups == 1 ? 216 : 232>();
    const int index = hopper::group() - 1, own = rows - index * hopper::kGroupRows;
    if (own <= 0) return;
    HopperConsumer<T, Dim, Groups> consumer(shared, index);
    if (tiles > 0) consumer.run(tiles, static_cast<float>(p.scale * kLog2e));
    const int64_t begin = queries.begin + first + index * hopper::kGroupRows;
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = consumer.sum[i];
      total += warp_shuffle_xor(total, 1);
      total += warp_shuffle_xor(total, 2);
      factor[i] = total == 0 ? 0.0f : 1.0f / total;
      if (hopper::row_of(i) < own && hopper::lane() % 4 == 0) {  // no visible key: -inf
        *lse_at(begin + hopper::row_of(i)) = (consumer.best[i] + log2_of(total)) * static_cast<float>(kLn2);
      }
    }
    consumer.store(out_at(begin), out_stride, own, factor);
  }
}

}  // namespace tokenprune::attention
