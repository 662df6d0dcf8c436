// SPDX-License-Identifier: Apache-2.0
// Storage types of the CPU kernels for bfloat16 and float16: they hold bits, all arithmetic is float32.
// No torch header, no STL: this file is compiled into every instruction-set object.
#pragma once

#include <stdint.h>

namespace tokenprune {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// What a kernel table is asked for; one value per storage type.
enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace tokenprune
