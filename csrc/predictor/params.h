// SPDX-License-Identifier: Apache-2.0
// Arguments of what lies between a predictor's layers.
#pragma once

#include <cstdint>

namespace tokenprune {

struct PredictorParams {
  int64_t heads = 1, width = 0;               // of tokens x [T, heads * width]
  const bool* counted = nullptr;              // [T] or null
  const void* x = nullptr;                    // [T, heads, width]
  void* features = nullptr;                   // [T, heads, width]
  void* means = nullptr;                      // [T, heads]: of the channels of x
  const void* logits = nullptr;               // [T, heads, 2]
  const void* importance = nullptr;           // [T, heads] or null: all alike
  void *scores = nullptr, *chance = nullptr;  // [T, 2] stat dtype
};

}  // namespace tokenprune
