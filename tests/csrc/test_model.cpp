// SPDX-License-Identifier: Apache-2.0
// The host model and the wrappers of common/cuda.h themselves.
#include "../../csrc/common/cuda.h"
#include "check.h"

namespace tokenprune {
namespace {

// Block sum through shuffles, static and dynamic shared memory.
__global__ void block_sum(const float* x, float* sums, int n) {
  TP_SHARED(float, warp_sums, [8]);
  float* copy = dynamic_shared<float>();
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  copy[t] = i < n ? x[i] : 0.0f;
  __syncthreads();
  const float sum = warp_sum(copy[(t + 1) % blockDim.x]);
  if (t % 32 == 0) warp_sums[t / 32] = sum;
  __syncthreads();
  if (t == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += warp_sums[w];
    sums[blockIdx.x] = total;
  }
}

void test_block_sum() {
  const int n = test::kTiny ? 70 : 1000, block = 64, blocks = (n + block - 1) / block;
  std::vector<float> x(n), sums(blocks);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i % 7);
  TP_LAUNCH(block_sum, blocks, block, block * sizeof(float), x.data(), sums.data(), n);
  std::vector<double> want(blocks);
  for (int i = 0; i < n; ++i) want[i / block] += x[i];
  test::close("block sum", sums, want, 0);
}

// C = A B with cp.async, ldmatrix (plain for A, transposed for B stored [k][n]) and mma.
template <typename T>
__global__ void small_matmul(const T* a, const T* b, float* c) {
  TP_SHARED(T, a_tile, [16][24]);  // rows of 48 bytes
  TP_SHARED(T, b_tile, [16][8]);
  const int lane = threadIdx.x;
  copy_async<16>(&a_tile[lane / 2][lane % 2 * 8], a + lane * 8, true);
  copy_async_commit();
  if (lane < 16) copy_async<16>(&b_tile[lane][0], b + lane * 8, true);
  copy_async_commit();
  copy_async_wait<0>();
  warp_sync();
  uint32_t a_fragment[4], b_fragment[2];
  load_matrix_x4(a_fragment, &a_tile[lane % 16][lane / 16 * 8]);
  load_matrix_x2_trans(b_fragment, &b_tile[lane % 16][0]);
  float sum[4] = {1, 1, 1, 1};
  mma_16x8x16<T>(sum, a_fragment, b_fragment);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

template <typename T>
void test_small_matmul(const char* name) {
  test::Random random(3);
  const auto a = random.values<T>(256), b = random.values<T>(128);
  std::vector<float> c(128);
  TP_LAUNCH(small_matmul<T>, 1, 32, 0, a.data(), b.data(), c.data());
  std::vector<double> want(128, 1.0);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) want[i * 8 + j] += double(to_acc(a[i * 16 + k])) * to_acc(b[k * 8 + j]);
    }
  }
  test::close(name, c, want, 1e-5);
}

__global__ void votes(uint32_t* out) {
  const int lane = threadIdx.x % 32;
  const uint32_t bits = warp_ballot(lane % 3 == 0);
  const int up = warp_shuffle_up(lane, 1), first = warp_shuffle(lane + 5, 0);
  out[threadIdx.x] = bits + 1000u * up + first + (warp_any(lane == 31) ? 7 : 0) + warp_max(lane);
}

void test_votes() {
  std::vector<uint32_t> out(64), want(64);
  TP_LAUNCH(votes, 1, 64, 0, out.data());
  uint32_t bits = 0;
  for (int l = 0; l < 32; l += 3) bits |= 1u << l;
  for (int t = 0; t < 64; ++t) want[t] = bits + 1000u * (t % 32 ? t % 32 - 1 : 0) + 5 + 7 + 31;
  test::equal("ballot and shuffles", out, want);
}

void test_conversions() {
  bool good = true;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const __half h{static_cast<uint16_t>(bits)};
    const __nv_bfloat16 b{static_cast<uint16_t>(bits)};
    const float hf = __half2float(h), bf = __bfloat162float(b);
    good &= hf != hf || __float2half(hf).bits == bits;
    good &= bf != bf || __float2bfloat16(bf).bits == bits;
  }
  good &= __float2half(2049.0f).bits == __float2half(2048.0f).bits && __float2half(65519.0f).bits == 0x7bff;
  good &= __float2half(2051.0f).bits == __float2half(2052.0f).bits && __float2half(1e-8f).bits == 0;
  test::report("16-bit conversions", good, "");
}

}  // namespace
}  // namespace tokenprune

int main() {
  using namespace tokenprune;
  test_block_sum();
  test_small_matmul<__half>("cp.async, ldmatrix, mma half");
  test_small_matmul<__nv_bfloat16>("cp.async, ldmatrix, mma bfloat16");
  test_votes();
  test_conversions();
  return test::finish();
}
