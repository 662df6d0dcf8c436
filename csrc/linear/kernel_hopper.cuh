// SPDX-License-Identifier: Apache-2.0
// Linear layer on gathered rows for sm_90a: out[scatter[t]] = act(x[index[t]] . weight^T + bias) (+ add[scatter[t]]),
// 16-bit values, float32 sums.
//
// A block computes 128 tokens x Features. One warpgroup feeds stages of 64 summed columns: rows of x through their
// index with 16-byte cp.async, which it swizzles as the tensor copy engine would, and the weights through that engine.
// Two warpgroups of 64 tokens each multiply with wgmma.
#pragma once

#include "../common/hopper.cuh"
#include "params.h"

namespace tokenprune::linear {

constexpr int kTokens = 128, kDepth = 64, kStages = 4;
constexpr int kLag = 2;  // stages whose copies are in flight while the next ones are issued
static_assert(kLag < kStages);

// Shared memory of a block, aligned to 1024 bytes. The result is staged where the operands were.
template <int Features>
struct Shared {
  using Rows = hopper::Tile<kTokens, kDepth>;
  using Weights = hopper::Tile<Features, kDepth>;
  using Out = hopper::Tile<kTokens, Features>;
  static constexpr int kStageBytes = Rows::kBytes + Weights::kBytes, kBarriersAt = kStages * kStageBytes;
  static constexpr int kBytes = kBarriersAt + 2 * kStages * 8 + 1024;
  static_assert(Out::kBytes <= kBarriersAt && kBytes <= 227 * 1024);

  unsigned char* memory;

  static __device__ __forceinline__ Shared aligned() {
    unsigned char* start = dynamic_shared<unsigned char>();
    return {start + ((1024 - shared_address(start) % 1024) % 1024)};
  }
  __device__ __forceinline__ unsigned char* rows(int stage) const { return memory + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* weights(int stage) const { return rows(stage) + Rows::kBytes; }
  __device__ __forceinline__ hopper::Barrier* full(int stage) const {
    return reinterpret_cast<hopper::Barrier*>(memory + kBarriersAt) + stage;
  }
  __device__ __forceinline__ hopper::Barrier* free(int stage) const { return full(kStages + stage); }
};

__device__ __forceinline__ int stage_of(int step) { return step % kStages; }
__device__ __forceinline__ int parity_of(int step) { return step / kStages % 2; }

// ---- the feeding warpgroup -----------------------------------------------------------------------------------------

// A thread copies the same unit of every 16th row.
template <typename T, int Features>
struct Feeder {
  static constexpr int kUnits = kDepth / 8, kRowStep = hopper::kGroupThreads / kUnits, kCopies = kTokens / kRowStep;

  const Shared<Features> shared;
  const hopper::TensorMap* weights;
  const int thread, unit, first_feature;
  const T* row[kCopies];  // null: a row of zeros

  __device__ __forceinline__ Feeder(const Shared<Features>& shared_, const hopper::TensorMap* weights_,
                                    const LinearParams& p, int64_t first_token, int first_feature_)
      : shared(shared_),
        weights(weights_),
        thread(static_cast<int>(threadIdx.x)),
        unit(thread % kUnits),
        first_feature(first_feature_) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t token = first_token + thread / kUnits + i * kRowStep;
      int64_t from = token < p.count ? token : -1;
      if (from >= 0 && p.index != nullptr) from = p.index[token];
      row[i] = from >= 0 && from < p.rows ? static_cast<const T*>(p.x) + from * p.x_stride : nullptr;
    }
  }

  __device__ __forceinline__ void issue(const LinearParams& p, int step) {
    const int stage = stage_of(step), column = step * kDepth + unit * 8;
    hopper::barrier_wait(shared.free(stage), parity_of(step) ^ 1);
    if (thread == 0) {
      hopper::barrier_expect(shared.full(stage), Shared<Features>::Weights::kBytes);
      hopper::copy_tile(weights, shared.full(stage), shared.weights(stage), step * kDepth, 0, first_feature);
    }
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool there = row[i] != nullptr && column < p.width;
      hopper::copy_unit(shared.rows(stage) + Shared<Features>::Rows::offset(thread / kUnits + i * kRowStep, unit * 8),
                        there ? row[i] + column : static_cast<const T*>(p.x), there);
    }
    copy_async_commit();
  }
  // This thread's copies of that step have landed; wgmma reads them by another way than they were written.
  __device__ __forceinline__ void publish(int step) {
    hopper::fence_async_shared();
    hopper::barrier_arrive(shared.full(stage_of(step)));
  }
  __device__ __forceinline__ void run(const LinearParams& p, int steps) {
    for (int step = 0; step < steps; ++step) {
      issue(p, step);
      if (step >= kLag) {
        copy_async_wait<kLag>();
        publish(step - kLag);
      }
    }
    copy_async_wait<0>();
    for (int step = steps < kLag ? 0 : steps - kLag; step < steps; ++step) publish(step);
  }
};

// ---- a consuming warpgroup -----------------------------------------------------------------------------------------

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678118654752f)); }

template <typename T, int Features>
struct Consumer {
  using S = Shared<Features>;

  const S shared;
  const int index;  // of the warpgroup among the consumers
  float sums[Features / 2];

  __device__ __forceinline__ void release(int step) const {
    warp_sync();
    if (hopper::lane() == 0) hopper::barrier_arrive(shared.free(stage_of(step)));
  }
  __device__ __forceinline__ void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      const int stage = stage_of(step);
      const uint32_t rows = shared_address(shared.rows(stage)), weights = shared_address(shared.weights(stage));
      hopper::barrier_wait(shared.full(stage), parity_of(step));
      hopper::pin(sums);
      hopper::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        hopper::wgmma_shared<T, Features, hopper::Order::kRows>(
            sums, S::Rows::rows_wide(rows, 0, index * hopper::kGroupRows, k), S::Weights::rows_wide(weights, 0, 0, k),
            step > 0 || k > 0);
      }
      hopper::wgmma_commit();
      hopper::wgmma_wait<1>();  // the step before is done
      if (step > 0) release(step - 1);
    }
    hopper::wgmma_wait<0>();
    hopper::pin(sums);
  }

  // Bias and activation; the result, rounded, to the staging tile.
  __device__ __forceinline__ void finish(const LinearParams& p, int first_feature) {
    const T* bias = static_cast<const T*>(p.bias);
#pragma unroll
    for (int j = 0; j < Features / 8; ++j) {
      const int column = hopper::column_of(j, 0), feature = first_feature + column;
      float b[2] = {};
      if (bias != nullptr && feature < p.features) b[0] = to_acc(bias[feature]), b[1] = to_acc(bias[feature + 1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low = sums[4 * j + 2 * i] + b[0], high = sums[4 * j + 2 * i + 1] + b[1];
        if (p.activation == kGelu) low = gelu(low), high = gelu(high);
        *reinterpret_cast<uint32_t*>(shared.memory + S::Out::offset(index * hopper::kGroupRows + hopper::row_of(i),
                                                                    column)) = pack_pair<T>(low, high);
      }
    }
  }

  // A warp stores the 16 rows that it staged, 16 bytes at a time.
  __device__ __forceinline__ void store(const LinearParams& p, int64_t first_token, int first_feature) const {
    const int first_row = index * hopper::kGroupRows + hopper::warp_row();
    const int64_t left = p.features - first_feature;
    const int units = static_cast<int>(left < Features ? left : Features) / 8;
    for (int n = hopper::lane(); n < 16 * units; n += 32) {
      const int row = first_row + n / units, column = n % units * 8;
      const int64_t token = first_token + row;
      if (token >= p.count) continue;
      const int64_t to = p.scatter != nullptr ? p.scatter[token] : token;
      if (to < 0 || to >= p.out_rows) continue;
      const int64_t at = to * p.features + first_feature + column;
      Pack<T, 8> value = load_pack<8>(reinterpret_cast<const T*>(shared.memory + S::Out::offset(row, column)));
      if (p.add != nullptr) {
        const Pack<T, 8> before = load_pack<8>(static_cast<const T*>(p.add) + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) value.v[i] = from_acc<T>(to_acc(before.v[i]) + to_acc(value.v[i]));
      }
      store_pack(static_cast<T*>(p.out) + at, value);
    }
  }
};

// ---- the kernel ----------------------------------------------------------------------------------------------------

// blockIdx.x counts the feature tiles, so that blocks which share rows of x run side by side; blockIdx.y the token
// tiles.
template <typename T, int Features>
__global__ void __launch_bounds__(3 * hopper::kGroupThreads, 1)
    gather_linear_hopper(LinearParams p, const __grid_constant__ hopper::TensorMap weights) {
  const Shared<Features> shared = Shared<Features>::aligned();
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int first_feature = static_cast<int>(blockIdx.x) * Features;
  const int steps = static_cast<int>((p.width + kDepth - 1) / kDepth);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::barrier_init(shared.full(stage), hopper::kGroupThreads + 1);  // every feeding thread, and the weights
      hopper::barrier_init(shared.free(stage), 8);                          // a lane of every consuming warp
    }
    hopper::barrier_init_fence();
  }
  __syncthreads();
  if (hopper::group() == 0) {
    hopper::registers_down<40>();
    Feeder<T, Features> feeder(shared, &weights, p, first_token, first_feature);
    feeder.run(p, steps);
  } else {
    hopper::registers_up<232>();
    Consumer<T, Features> consumer{shared, hopper::group() - 1, {}};
    consumer.run(steps);
    hopper::group_sync(1, 2 * hopper::kGroupThreads);  // both are through with the operands: their place is free
    consumer.finish(p, first_feature);
    warp_sync();
    consumer.store(p, first_token, first_feature);
  }
}

// What the kernel takes; 16-bit values is the caller's condition.
inline bool hopper_serves(const LinearParams& p) {
  const auto fits = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  };
  return p.count > 0 && p.width > 0 && p.features > 0 && p.rows > 0 && p.width % 8 == 0 && p.features % 8 == 0 &&
         p.features < (int64_t{1} << 31) && p.count <= int64_t{65535} * kTokens && fits(p.x, p.x_stride) &&
         fits(p.weight, p.weight_stride) && p.weight_stride > 0 && fits(p.out, 0) && fits(p.add, 0);
}

// encode(box_columns, box_rows): the tensor map of the weights. Tiles of 256 features read the rows of x less often; as
// long as they do not fill the card, smaller ones finish sooner.
template <typename T, typename Launch, typename Encode>
void launch_hopper(const Launch& launch, const Encode& encode, const LinearParams& p, int processors) {
  const int64_t tiles = (p.count + kTokens - 1) / kTokens;
  const auto with = [&]<int Features>() {
    launch(&gather_linear_hopper<T, Features>,
           dim3(static_cast<unsigned>((p.features + Features - 1) / Features), static_cast<unsigned>(tiles)),
           dim3(3 * hopper::kGroupThreads), Shared<Features>::kBytes, p, encode(64, Features));
  };
  if (tiles * ((p.features + 255) / 256) >= processors) return with.template operator()<256>();
  with.template operator()<128>();
}

}  // namespace tokenprune::linear
