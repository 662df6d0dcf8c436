// SPDX-License-Identifier: Apache-2.0
// Arguments of the ops on sorted rows, filled and checked once (checks.h). Strides count elements.
#pragma once

#include <cstdint>

namespace tokenprune {

struct TokenRows {  // [rows, tokens, dim], unit inner stride
  const void* data = nullptr;
  int64_t row_stride = 0, token_stride = 0;
};

struct BalancedSide {
  const int32_t* order = nullptr;    // [rounds, rows, tokens]
  const int32_t* lengths = nullptr;  // [rows] or null: all tokens
  int64_t tokens = 0, size = 0;

  int64_t length(int64_t row) const {
    if (lengths == nullptr) return tokens;
    return lengths[row] < 0 ? 0 : lengths[row] < tokens ? lengths[row] : tokens;
  }
};

struct BalancedParams {
  TokenRows q_rows, k_rows, v_rows;
  BalancedSide q, k;
  const void* key_bias = nullptr;  // [rows, k.tokens] stat dtype or null
  int64_t rounds = 0, rows = 0, dim = 0;
  bool per_row = true;
  double scale = 0;
  void *out = nullptr, *lse = nullptr;  // [rows, q.tokens, dim], [rows, q.tokens]
};

struct SampleParams {
  const void* scores = nullptr;     // [batch, n] stat dtype, 0 where not valid
  const int64_t* order = nullptr;   // [batch, n]
  const bool* valid = nullptr;      // [batch, n] or null
  const int32_t* counts = nullptr;  // [batch] or null
  int64_t batch = 0, n = 0, points = 0;
  bool published = false;
  void *cdf = nullptr, *grid = nullptr;  // results: [batch, n], [batch, points]
  int64_t* pick = nullptr;               // [batch, points]
  bool* kept = nullptr;                  // [batch, n]
  int32_t* rows = nullptr;               // [batch, n]
};

struct SequenceParams {             // sequences of tokens that are sampled; [T] rows of values in all
  const void* attention = nullptr;  // [heads, total] stat dtype
  const void* values = nullptr;     // [total, heads, dim], unit inner stride
  int64_t row_stride = 0, head_stride = 0, heads = 0, dim = 0, total = 0;
  const void* key_bias = nullptr;       // [total] stat dtype or null
  const bool* initial = nullptr;        // [batch, points + prefix]
  const int32_t* cu_seqlens = nullptr;  // [batch + 1]
  int64_t batch = 0, points = 0, prefix = 0, max_seqlen = 0;
};

constexpr int64_t kMaxHashes = 32;  // two bits of a code for each of them

struct GroupParams {        // rows of tokens that hash alike; row r is head r % heads of sequence r / heads
  const void* x = nullptr;  // unit inner stride
  int64_t sequence_stride = 0, head_stride = 0, token_stride = 0, heads = 1, dim = 0;
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1] or null: all sequences have `tokens`, a stride apart
  int64_t rows = 0, tokens = 0, hashes = 0, longest = 0;  // no row is longer than the last, whatever `tokens` allows
  const void *projection = nullptr, *offset = nullptr;    // [dim, hashes], [hashes] stat dtype; whole vectors
  double width = 1, scale = 1;
  const uint8_t* valid = nullptr;                               // [rows, tokens], 0 hides, or null
  int32_t *ids = nullptr, *counts = nullptr, *found = nullptr;  // results: [rows, tokens] twice, groups [rows]

  int64_t length(int64_t row) const {
    return cu_seqlens == nullptr ? tokens : cu_seqlens[row / heads + 1] - cu_seqlens[row / heads];
  }
  int64_t first(int64_t row) const {  // element of x
    const int64_t b = row / heads;
    return (cu_seqlens == nullptr ? b * sequence_stride : cu_seqlens[b] * token_stride) + row % heads * head_stride;
  }
};

}  // namespace tokenprune
