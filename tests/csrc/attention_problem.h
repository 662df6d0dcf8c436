// SPDX-License-Identifier: Apache-2.0
// Inputs of the attention kernels for the tests: ragged, indexed, with bias; the same values in double for the oracle.
#pragma once

#include "../../csrc/attention/kernel_launch.cuh"
#include "attention_oracle.h"
#include "check.h"

namespace tokenprune::test {

using namespace attention;

struct Case {
  std::string name;
  std::vector<int> queries, keys;  // lengths
  int heads = 1, dim = 32;
  bool index = false, bias = false;
  int slots = 0;  // behind the last sequence, on both sides
  int skew = 0;   // added to the row stride: 1 makes every row misaligned
};

// Inputs of one case: buffers of T, the same values in double for the oracle, and the parameters.
template <typename T>
struct Problem {
  using S = Acc<T>;
  Case c;
  Random random;
  std::vector<int32_t> cu_q{0}, cu_k{0}, index_q, index_k;
  std::vector<T> q, k, v, grad_out, out_t;
  std::vector<S> bias, lse_t, grad_lse, grad_scores;
  AttentionParams p;
  Oracle oracle;

  explicit Problem(const Case& c_) : c(c_), random(c_.dim * 131 + c_.queries.size() * 7 + c_.heads) {
    for (const int n : c.queries) cu_q.push_back(cu_q.back() + n);
    for (const int n : c.keys) cu_k.push_back(cu_k.back() + n);
    const int total_q = cu_q.back() + c.slots, total_k = cu_k.back() + c.slots;
    const int rows_q = c.index ? total_q + 5 : total_q, rows_k = c.index ? total_k + 3 : total_k;
    const int stride = c.heads * c.dim + c.skew;
    q = random.template values<T>(int64_t{rows_q} * stride);
    k = random.template values<T>(int64_t{rows_k} * stride);
    v = random.template values<T>(int64_t{rows_k} * stride);
    grad_out = random.template values<T>(int64_t{total_q} * c.heads * c.dim);
    grad_lse = random.template values<S>(int64_t{total_q} * c.heads);
    grad_scores = random.template values<S>(int64_t{total_k} * c.heads);
    if (c.index) {
      index_q = indices(total_q, rows_q);
      index_k = indices(total_k, rows_k);
    }
    if (c.bias) {
      bias = random.template values<S>(total_k);
      for (size_t i = 0; i < bias.size(); i += 5) bias[i] = -kInfinity<S>;
      // one sequence whose keys are all hidden
      if (c.keys.size() > 1) {
        for (int i = cu_k[1]; i < cu_k[2]; ++i) bias[i] = -kInfinity<S>;
      }
    }
    p.q = {q.data(), rows_q, stride, c.dim}, p.k = {k.data(), rows_k, stride, c.dim};
    p.v = {v.data(), rows_k, stride, c.dim};
    p.cu_q = cu_q.data(), p.cu_k = cu_k.data();
    p.q_index = c.index ? index_q.data() : nullptr, p.k_index = c.index ? index_k.data() : nullptr;
    p.key_bias = c.bias ? bias.data() : nullptr;
    p.batch = static_cast<int64_t>(c.queries.size()), p.heads = c.heads, p.dim = c.dim;
    p.total_q = total_q, p.total_k = total_k;
    for (const int n : c.queries) p.max_q = std::max<int64_t>(p.max_q, n);
    for (const int n : c.keys) p.max_k = std::max<int64_t>(p.max_k, n);
    p.scale = 1 / std::sqrt(static_cast<double>(c.dim));
    oracle = {c.heads, c.dim, total_q, total_k, p.scale, cu_q, cu_k};
    oracle.q = packed(q, p.q, p.q_index, total_q);
    oracle.k = packed(k, p.k, p.k_index, total_k);
    oracle.v = packed(v, p.v, p.k_index, total_k);
    for (const S b : bias) oracle.bias.push_back(b);
    oracle.forward();
  }

  std::vector<int32_t> indices(int n, int rows) {
    std::vector<int32_t> index(n);
    for (int32_t& i : index) i = static_cast<int32_t>(random.integer(0, rows - 1));
    if (n > 1) index[1] = -1;
    if (n > 3) index[3] = rows;  // wrong contents read as zeros
    return index;
  }
  std::vector<double> packed(const std::vector<T>& from, const Rows& rows, const int32_t* index, int total) const {
    std::vector<double> to(int64_t{total} * c.heads * c.dim, 0.0);
    for (int i = 0; i < total; ++i) {
      const int64_t row = index != nullptr ? index[i] : i;
      if (row < 0 || row >= rows.rows) continue;
      for (int h = 0; h < c.heads; ++h) {
        for (int d = 0; d < c.dim; ++d) {
          to[(int64_t{i} * c.heads + h) * c.dim + d] = to_acc(from[row * rows.row_stride + h * rows.head_stride + d]);
        }
      }
    }
    return to;
  }
  std::string name(const char* what) const { return c.name + " " + type_name<T>() + " " + what; }
};

constexpr double kPoison = 777;

}  // namespace tokenprune::test
