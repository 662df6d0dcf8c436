// SPDX-License-Identifier: Apache-2.0
// Kernels with one deliberate mistake each: the host model and the sanitizers must report them (tools/sanitize.sh
// expects a failing exit status for every name, and success for "none").
#include <cstring>

#include "../../csrc/common/cuda.h"

namespace tokenprune {
namespace {

enum Mistake { kNone, kNoBarrier, kShuffleAsBarrier, kHalfBarrier, kNoWait, kOverrun, kUninitialised, kDivergent };

__global__ void reverse(const float* x, float* y, int mistake) {
  TP_SHARED(float, tile, [64]);
  float* extra = dynamic_shared<float>();
  const int t = threadIdx.x;
  float own = 0;
  if (mistake == kNoWait) {
    copy_async<4>(&tile[t], x + t, true);
    copy_async_commit();
  } else if (mistake != kUninitialised) {
    tile[t] = x[t];
  }
  if (mistake == kHalfBarrier && t >= 32) return;
  if (mistake == kShuffleAsBarrier) own = warp_shuffle_xor(own, 1);
  if (mistake == kDivergent && t % 32 < 16) own = warp_sum(own);
  if (mistake != kNoBarrier && mistake != kShuffleAsBarrier) __syncthreads();
  if (mistake == kOverrun) extra[t + 1] = own;
  y[t] = tile[mistake == kShuffleAsBarrier ? t ^ 1 : 63 - t] + own;
}

int run(int mistake) {
  std::vector<float> x(64), y(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<float>(i);
  TP_LAUNCH(reverse, 1, 64, 64 * sizeof(float), x.data(), y.data(), mistake);
  for (int i = 0; i < 64; ++i) {
    if (y[i] != x[mistake == kShuffleAsBarrier ? i ^ 1 : 63 - i]) return 1;
  }
  return 0;
}

}  // namespace
}  // namespace tokenprune

int main(int argc, char** argv) {
  const char* names[] = {"none", "barrier", "shuffle", "half", "wait", "overrun", "uninitialised", "divergent"};
  for (int i = 0; i < 8; ++i) {
    if (argc == 2 && std::strcmp(argv[1], names[i]) == 0) return tokenprune::run(i);
  }
  return 2;
}
