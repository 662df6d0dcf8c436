// SPDX-License-Identifier: Apache-2.0
// Attention and its gradients as scalar loops in double, in the layout of the ops.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

namespace tokenprune::test {

struct Oracle {
  int heads, dim, total_q, total_k;
  double scale;
  std::vector<int> cu_q{}, cu_k{};
  std::vector<double> q{}, k{}, v{}, bias{};  // packed [total, heads, dim]; bias [total_k] or empty
  std::vector<double> out{}, lse{}, cls{};    // results of forward()
  std::vector<double> scores{}, scores_grad_lse{};
  std::vector<double> grad_q{}, grad_k{}, grad_v{}, grad_bias{};

  int64_t value_at(int64_t row, int head) const { return (row * heads + head) * dim; }
  double dot(const std::vector<double>& a, int64_t i, const std::vector<double>& b, int64_t j, int head) const {
    double sum = 0;
    for (int d = 0; d < dim; ++d) sum += a[value_at(i, head) + d] * b[value_at(j, head) + d];
    return sum;
  }
  double logit(int64_t i, int64_t j, int head) const {
    return scale * dot(q, i, k, j, head) + (bias.empty() ? 0 : bias[j]);
  }
  double probability(int64_t i, int64_t j, int head) const {
    const double l = lse[head * total_q + i];
    return std::isinf(l) ? 0 : std::exp(logit(i, j, head) - l);
  }
  // f(sequence, head, query row)
  template <typename F>
  void each_query(F&& f) const {
    for (size_t s = 0; s + 1 < cu_q.size(); ++s) {
      for (int h = 0; h < heads; ++h) {
        for (int i = cu_q[s]; i < cu_q[s + 1]; ++i) f(static_cast<int>(s), h, i);
      }
    }
  }
  double weight(int kind, int s, int i) const {
    return kind == 0 ? (i == cu_q[s] ? 1.0 : 0.0) : 1.0 / (cu_q[s + 1] - cu_q[s]);
  }

  void forward() {
    const double none = -std::numeric_limits<double>::infinity();
    out.assign(int64_t{total_q} * heads * dim, 0.0);
    lse.assign(int64_t{total_q} * heads, none);
    cls.assign(int64_t{total_k} * heads, 0.0);
    each_query([&](int s, int h, int i) {
      double top = none, sum = 0;
      for (int j = cu_k[s]; j < cu_k[s + 1]; ++j) top = std::max(top, logit(i, j, h));
      if (std::isinf(top)) return;
      for (int j = cu_k[s]; j < cu_k[s + 1]; ++j) sum += std::exp(logit(i, j, h) - top);
      lse[h * total_q + i] = top + std::log(sum);
      for (int j = cu_k[s]; j < cu_k[s + 1]; ++j) {
        const double p = probability(i, j, h);
        for (int d = 0; d < dim; ++d) out[value_at(i, h) + d] += p * v[value_at(j, h) + d];
        if (i == cu_q[s]) cls[h * total_k + j] = p;
      }
    });
  }

  void column_scores(int kind, const std::vector<double>& grad) {
    scores.assign(cls.size(), 0.0);
    scores_grad_lse.assign(lse.size(), 0.0);
    each_query([&](int s, int h, int i) {
      for (int j = cu_k[s]; j < cu_k[s + 1]; ++j) {
        const double p = probability(i, j, h) * weight(kind, s, i);
        scores[h * total_k + j] += p;
        scores_grad_lse[h * total_q + i] -= p * grad[h * total_k + j];
      }
    });
  }

  // Empty vectors: no such gradient.
  void backward(const std::vector<double>& grad_out, const std::vector<double>& out_used,
                const std::vector<double>& grad_lse, const std::vector<double>& grad_scores, int kind) {
    grad_q.assign(q.size(), 0.0), grad_k.assign(k.size(), 0.0), grad_v.assign(v.size(), 0.0);
    grad_bias.assign(cls.size(), 0.0);
    each_query([&](int s, int h, int i) {
      const double delta = grad_out.empty() ? 0 : dot(grad_out, i, out_used, i, h);
      for (int j = cu_k[s]; j < cu_k[s + 1]; ++j) {
        const double p = probability(i, j, h);
        double ds = -delta;
        if (!grad_out.empty()) ds += dot(grad_out, i, v, j, h);
        if (!grad_lse.empty()) ds += grad_lse[h * total_q + i];
        if (!grad_scores.empty()) ds += weight(kind, s, i) * grad_scores[h * total_k + j];
        ds *= p;
        grad_bias[h * total_k + j] += ds;
        for (int d = 0; d < dim; ++d) {
          grad_q[value_at(i, h) + d] += scale * ds * k[value_at(j, h) + d];
          grad_k[value_at(j, h) + d] += scale * ds * q[value_at(i, h) + d];
          if (!grad_out.empty()) grad_v[value_at(j, h) + d] += p * grad_out[value_at(i, h) + d];
        }
      }
    });
  }
};

// Literal: A from the definition, gradients from dA through the normalisation, the policy and the maximum.
struct PolicyOracle {
  int batch, tokens, heads, dim;
  double eps, scale;
  std::vector<double> qkv{}, grad_out{}, policy{};  // qkv [batch, tokens, 3, heads, dim]
  std::vector<double> out{}, row_max{}, row_sum{}, grad_q{}, grad_k{}, grad_v{}, grad_policy{};

  const double* row(int which, int b, int i, int h) const {
    return &qkv[(((int64_t{b} * tokens + i) * 3 + which) * heads + h) * dim];
  }
  int64_t value_at(int b, int i, int h) const { return ((int64_t{b} * tokens + i) * heads + h) * dim; }

  void run() {
    out.assign(grad_out.size(), 0.0);
    grad_q = grad_k = grad_v = out;
    row_max.assign(int64_t{batch} * heads * tokens, 0.0);
    row_sum = grad_policy = row_max;
    for (int b = 0; b < batch; ++b) {
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < tokens; ++i) run_row(b, h, i);
      }
    }
  }

  void run_row(int b, int h, int i) {
    const int64_t stats = (int64_t{b} * heads + h) * tokens, at = value_at(b, i, h);
    std::vector<double> a(tokens, 0.0), e(tokens), u(tokens), weights(tokens), du(tokens), da(tokens);
    int top = 0;
    for (int j = 0; j < tokens; ++j) {
      for (int d = 0; d < dim; ++d) a[j] += scale * row(0, b, i, h)[d] * row(1, b, j, h)[d];
      if (a[j] > a[top]) top = j;
    }
    double sum = 0;
    for (int j = 0; j < tokens; ++j) {
      e[j] = std::exp(a[j] - a[top]);
      u[j] = e[j] * (i == j ? 1 : policy[int64_t{b} * tokens + j]);
      sum += u[j];
    }
    row_max[stats + i] = a[top], row_sum[stats + i] = sum;
    double t = 0, through_max = 0;
    std::vector<double> g(tokens, 0.0);
    for (int j = 0; j < tokens; ++j) {
      weights[j] = (u[j] + eps / tokens) / (sum + eps);
      for (int d = 0; d < dim; ++d) {
        out[at + d] += weights[j] * row(2, b, j, h)[d];
        g[j] += grad_out[at + d] * row(2, b, j, h)[d];
        grad_v[value_at(b, j, h) + d] += weights[j] * grad_out[at + d];
      }
      t += g[j] * weights[j];
    }
    for (int j = 0; j < tokens; ++j) {
      du[j] = (g[j] - t) / (sum + eps);
      da[j] = du[j] * u[j];
      through_max += da[j];
      if (i != j) grad_policy[stats + j] += du[j] * e[j];
    }
    da[top] -= through_max;
    for (int j = 0; j < tokens; ++j) {
      for (int d = 0; d < dim; ++d) {
        grad_q[at + d] += scale * da[j] * row(1, b, j, h)[d];
        grad_k[value_at(b, j, h) + d] += scale * da[j] * row(0, b, i, h)[d];
      }
    }
  }
};

}  // namespace tokenprune::test
