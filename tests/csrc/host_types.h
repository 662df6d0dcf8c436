// SPDX-License-Identifier: Apache-2.0
// The CUDA names that a kernel.cuh uses, for a host compiler: function attributes, index variables, 16-bit floats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(int64_t a = 1, int64_t b = 1, int64_t c = 1)
      : x(static_cast<unsigned>(a)), y(static_cast<unsigned>(b)), z(static_cast<unsigned>(c)) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

#ifdef TOKENPRUNE_HOST_THREADS
inline thread_local Uint3 threadIdx, blockIdx;
#else
inline Uint3 threadIdx, blockIdx;  // the running fiber's
#endif
inline dim3 blockDim, gridDim;

// Same names, layout and rounding (to nearest even) as cuda_fp16.h and cuda_bf16.h.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float f;
  if (exponent == 31) {
    f = mantissa ? NAN : INFINITY;
  } else {
    f = exponent ? std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25)
                 : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return v.bits & 0x8000 ? -f : f;
}
inline __half __float2half(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float a = std::fabs(f);
  if (f != f) return {0x7fff};
  if (a >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = -100;                                                             // zero counts as subnormal
  if (a > 0) std::frexp(a, &exponent);                                             // a = m * 2^exponent, m in [0.5, 1)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;                      // weight of the last mantissa bit
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(a, -unit)));  // 11 bits; carries work out
  const uint32_t base = unit == -24 ? 0 : static_cast<uint32_t>(unit + 24) << 10;
  return {static_cast<uint16_t>(sign | (base + steps))};
}
