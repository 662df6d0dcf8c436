// SPDX-License-Identifier: Apache-2.0
// As racy.cpp, for what sm_90a kernels can get wrong: copies, barriers and wgmma of host_hopper.h.
#include <cstring>

#include "../../csrc/common/hopper.cuh"

namespace tokenprune {
namespace {

enum Mistake { kNone, kNoFence, kNoProductWait, kEarlyOverwrite, kNoCopyWait, kLostArrival, kTooManyBytes };

using Rows = hopper::Tile<64, 64>;
using Columns = hopper::Tile<16, 64>;

// y[r, c] = sum over 64 columns of a row of ones and a copied row: 64 times x[c].
__global__ void multiply(hopper::TensorMap map, float* y, int mistake) {
  unsigned char *rows = dynamic_shared<unsigned char>(), *columns = rows + Rows::kBytes;
  auto* landed = reinterpret_cast<hopper::Barrier*>(columns + Columns::kBytes);
  const int t = threadIdx.x;
  if (t == 0) hopper::barrier_init(landed, mistake == kLostArrival ? 2 : 1);
  for (int unit = t; unit < 64 * 8; unit += 128) {
    hopper::store_unit(rows + Rows::offset(unit / 8, unit % 8 * 8), {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00});
  }
  if (mistake != kNoFence) hopper::fence_async_shared();
  __syncthreads();
  if (t == 0) {
    hopper::barrier_expect(landed, mistake == kTooManyBytes ? Columns::kBytes / 2 : Columns::kBytes);
    hopper::copy_tile(&map, landed, columns, 0, 0, 0);
  }
  if (mistake != kNoCopyWait) hopper::barrier_wait(landed, 0);
  float d[8] = {};
  for (int k = 0; k < 4; ++k) {
    hopper::wgmma_shared<__half, 16, hopper::Order::kRows>(d, Rows::rows_wide(shared_address(rows), 0, 0, k),
                                                           Columns::rows_wide(shared_address(columns), 0, 0, k), k > 0);
  }
  hopper::wgmma_commit();
  if (mistake == kEarlyOverwrite) std::memset(columns + t * 16, 0, 16);
  if (mistake != kNoProductWait) hopper::wgmma_wait<0>();
  for (int n = 0; n < 8; ++n) y[hopper::row_of(n / 2 % 2) * 16 + hopper::column_of(n / 4, n % 2)] = d[n];
}

int run(int mistake) {
  std::vector<__half> x(16 * 64);
  std::vector<float> y(64 * 16, -1.0f);
  for (int i = 0; i < 16 * 64; ++i) x[i] = __float2half(static_cast<float>(i / 64));
  const hopper::TensorMap map{x.data(), {64, 1, 16}, {2, 128, 128}, 64, 16, hopper::Swizzle::k128};
  TP_LAUNCH(multiply, 1, 128, Rows::kBytes + Columns::kBytes + 8, map, y.data(), mistake);
  for (int i = 0; i < 64 * 16; ++i) {
    if (y[i] != 64.0f * static_cast<float>(i % 16)) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace tokenprune

int main(int argc, char** argv) {
  const char* names[] = {"none", "fence", "product", "early", "copy", "arrival", "bytes"};
  for (int i = 0; i < 7; ++i) {
    if (argc == 2 && std::strcmp(argv[1], names[i]) == 0) return tokenprune::run(i);
  }
  return 2;
}
