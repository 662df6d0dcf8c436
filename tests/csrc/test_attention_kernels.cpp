// SPDX-License-Identifier: Apache-2.0
// The attention kernels on the host model against scalar loops in double.
#include "attention_problem.h"

namespace tokenprune::test {
namespace {

template <typename T>
void forward(const Case& c, int processors = 1000) {
  using S = Acc<T>;
  Problem<T> x(c);
  std::vector<T> out(x.oracle.out.size(), from_acc<T>(kPoison));
  std::vector<S> lse(x.oracle.lse.size(), kPoison), cls(x.oracle.cls.size(), kPoison);
  x.p.o = out.data(), x.p.lse = lse.data(), x.p.cls = cls.empty() ? nullptr : cls.data();
  launch_forward<T>(host_model::Launcher{}, x.p, processors);
  close(x.name("out"), out, x.oracle.out, tolerance<T>());
  close(x.name("lse"), lse, x.oracle.lse, sizeof(T) == 8 ? 1e-12 : 2e-5);
  close(x.name("cls"), cls, x.oracle.cls, sizeof(T) == 8 ? 1e-12 : 2e-5);
}

template <typename T>
void scores(const Case& c, int kind) {
  using S = Acc<T>;
  Problem<T> x(c);
  const std::vector<S> lse = rounded<S>(x.oracle.lse);
  std::vector<S> sums(x.oracle.cls.size(), kPoison), grad_lse(lse.size(), kPoison);
  x.oracle.column_scores(kind, std::vector<double>(x.grad_scores.begin(), x.grad_scores.end()));
  x.p.lse_in = lse.data(), x.p.scores_kind = kind;
  x.p.scores = sums.data();
  launch_scores<T>(host_model::Launcher{}, x.p);
  x.p.scores = nullptr, x.p.grad_scores = x.grad_scores.data(), x.p.grad_lse_out = grad_lse.data();
  launch_scores<T>(host_model::Launcher{}, x.p);
  const double limit = sizeof(T) == 8 ? 1e-12 : 2e-5;
  close(x.name(kind == 0 ? "cls scores" : "mean scores"), sums, x.oracle.scores, limit);
  close(x.name(kind == 0 ? "cls grad_lse" : "mean grad_lse"), grad_lse, x.oracle.scores_grad_lse, limit);
}

// terms: 1 grad_out, 2 grad_lse, 4 grad_scores
template <typename T>
void backward(const Case& c, int terms, int kind) {
  using S = Acc<T>;
  Problem<T> x(c);
  const std::vector<T> out = rounded<T>(x.oracle.out);
  const std::vector<S> lse = rounded<S>(x.oracle.lse);
  std::vector<double> out_used(out.size());
  for (size_t i = 0; i < out.size(); ++i) out_used[i] = to_acc(out[i]);
  std::vector<double> g(x.grad_out.size()), g_lse(x.grad_lse.begin(), x.grad_lse.end()),
      g_scores(x.grad_scores.begin(), x.grad_scores.end());
  for (size_t i = 0; i < g.size(); ++i) g[i] = to_acc(x.grad_out[i]);
  x.oracle.backward(terms & 1 ? g : std::vector<double>{}, out_used, terms & 2 ? g_lse : std::vector<double>{},
                    terms & 4 ? g_scores : std::vector<double>{}, kind);
  const T poison = from_acc<T>(kPoison);
  std::vector<T> grad_q(x.oracle.q.size(), poison), grad_k(x.oracle.k.size(), poison),
      grad_v(x.oracle.v.size(), poison);
  std::vector<S> grad_bias(x.oracle.cls.size(), kPoison), delta(lse.size(), kPoison);
  const int64_t stride = c.heads * c.dim;
  if (terms & 1) {
    x.p.grad_out = {x.grad_out.data(), x.p.total_q, stride, c.dim};
    x.p.out = {out.data(), x.p.total_q, stride, c.dim};
  }
  if (terms & 2) x.p.grad_lse = x.grad_lse.data();
  if (terms & 4) x.p.grad_scores = x.grad_scores.data();
  x.p.lse_in = lse.data(), x.p.scores_kind = kind;
  x.p.grad_q = grad_q.data(), x.p.grad_k = grad_k.data(), x.p.grad_v = grad_v.data(), x.p.grad_bias = grad_bias.data();
  launch_backward<T>(host_model::Launcher{}, x.p, delta.data());
  const double limit = sizeof(T) == 2 ? 2e-2 : 2 * tolerance<T>();
  close(x.name("grad_q"), grad_q, x.oracle.grad_q, limit);
  close(x.name("grad_k"), grad_k, x.oracle.grad_k, limit);
  close(x.name("grad_v"), grad_v, x.oracle.grad_v, limit);
  close(x.name("grad_bias"), grad_bias, x.oracle.grad_bias, limit);
}

// keep: the policy of every key, or negative for random ones. grad_scale: with one key seen and a small eps all
// gradients are multiples of eps; 1 / eps brings them to where the tolerance tells right from wrong.
template <typename T>
void policy(const std::string& name, int batch, int tokens, int heads, int dim, double eps, double keep_all = -1,
            double grad_scale = 1) {
  using S = Acc<T>;
  Random random(tokens * 17 + dim);
  const int64_t row = heads * dim, stats = int64_t{batch} * heads * tokens;
  const std::vector<T> qkv = random.values<T>(batch * tokens * 3 * row);
  std::vector<T> grad_out = random.values<T>(batch * tokens * row);
  for (T& x : grad_out) x = from_acc<T>(to_acc(x) * static_cast<S>(grad_scale));
  std::vector<S> keep(batch * tokens);
  for (S& x : keep) x = keep_all < 0 ? static_cast<S>(random.integer(0, 4)) / 4 : static_cast<S>(keep_all);
  PolicyParams p;
  p.q = {qkv.data(), tokens, 3 * row, dim}, p.k = {qkv.data() + row, tokens, 3 * row, dim};
  p.v = {qkv.data() + 2 * row, tokens, 3 * row, dim};
  p.q_batch = p.k_batch = p.v_batch = 3 * row * tokens;
  p.policy = keep.data(), p.batch = batch, p.tokens = tokens, p.heads = heads, p.dim = dim, p.eps = eps;
  p.scale = 2 / std::sqrt(static_cast<double>(dim));
  PolicyOracle oracle{batch, tokens, heads, dim, eps, p.scale};
  for (const T x : qkv) oracle.qkv.push_back(to_acc(x));
  for (const T x : grad_out) oracle.grad_out.push_back(to_acc(x));
  for (const S x : keep) oracle.policy.push_back(x);
  oracle.run();

  const T poison = from_acc<T>(kPoison);
  std::vector<T> out(batch * tokens * row, poison), grad_q(out), grad_k(out), grad_v(out);
  std::vector<S> row_max(stats, kPoison), row_sum(row_max), grad_policy(row_max), pivot(row_max), row_grad(row_max),
      top_grad(row_max), value_sum(batch * row, kPoison);
  std::vector<int32_t> top(stats, -7);
  p.o = out.data(), p.row_max = row_max.data(), p.row_sum = row_sum.data();
  const PolicyWorkspace w{eps != 0 ? value_sum.data() : nullptr, pivot.data(), row_grad.data(), top_grad.data(),
                          top.data()};
  launch_policy<T>(host_model::Launcher{}, p, w);
  const std::string full = name + " " + type_name<T>() + " policy ";
  const double limit = sizeof(T) == 2 ? 2e-2 : 3 * tolerance<T>(), exact = sizeof(T) == 8 ? 1e-12 : 3e-5;
  close(full + "out", out, oracle.out, limit);
  close(full + "row_max", row_max, oracle.row_max, exact);
  close(full + "row_sum", row_sum, oracle.row_sum, exact);

  p.out = {out.data(), tokens, row, dim}, p.grad_out = {grad_out.data(), tokens, row, dim};
  p.out_batch = p.grad_out_batch = tokens * row;
  p.grad_q = grad_q.data(), p.grad_k = grad_k.data(), p.grad_v = grad_v.data(), p.grad_policy = grad_policy.data();
  launch_policy_backward<T>(host_model::Launcher{}, p, w);
  close(full + "grad_q", grad_q, oracle.grad_q, limit);
  close(full + "grad_k", grad_k, oracle.grad_k, limit);
  close(full + "grad_v", grad_v, oracle.grad_v, limit);
  close(full + "grad_policy", grad_policy, oracle.grad_policy, limit);
}

template <typename T>
void tiny() {
  const Case c{"tiny", {20}, {130}, 1, 32, true, true};  // several tiles: their buffers are used again
  forward<T>(c), scores<T>(c, 1), backward<T>(c, 7, 1), policy<T>("tiny", 1, 5, 1, 32, 1e-2);
}

template <typename T>
void widths(std::initializer_list<int> dims) {
  for (const int dim : dims) {
    const Case c{"width " + std::to_string(dim), {9}, {70}, 1, dim};
    forward<T>(c), backward<T>(c, 1, 0);
  }
}

// Lengths that contradict each other, the buffers and the maxima: any result, but no access outside (AddressSanitizer).
template <typename T>
void wrong_contents() {
  using S = Acc<T>;
  Problem<T> x({"wrong", {5, 3}, {4, 9}, 1, 32});
  x.cu_q = {3, -2, 100}, x.cu_k = {0, 50, 7};
  std::vector<T> values(x.oracle.q.size() + x.oracle.k.size());
  std::vector<S> stats(x.oracle.lse.size() + x.oracle.cls.size()), delta(stats);
  x.p.o = x.p.grad_q = values.data(), x.p.grad_k = x.p.grad_v = values.data() + x.oracle.q.size();
  x.p.lse = stats.data(), x.p.cls = x.p.grad_bias = stats.data() + x.oracle.lse.size();
  launch_forward<T>(host_model::Launcher{}, x.p, 1);
  x.p.lse_in = stats.data();
  x.p.scores = x.p.cls, launch_scores<T>(host_model::Launcher{}, x.p);
  x.p.grad_out = x.p.out = x.p.q, launch_backward<T>(host_model::Launcher{}, x.p, delta.data());
  report(x.name("contents"), true, "");
}

template <typename T>
void tall() {  // two bands of rows per warp
  for (const int dim : {32, 64, 80}) {
    forward<T>({"tall " + std::to_string(dim), {130, 0, 70}, {70, 2, 129}, 1, dim, true, true, 2}, 0);
  }
}

template <typename T>
void everything() {
  const Case ragged{"ragged", {5, 0, 67, 1, 0}, {70, 3, 0, 1, 4}, 2, 32, false, true, 3};
  const Case indexed{"indexed", {66, 3}, {131, 2}, 1, 32, true, false, 2};
  const Case odd{"odd", {4, 3}, {6, 65}, 2, 27, true, true, 0, 1};
  const Case empty{"empty", {0, 0}, {0, 0}, 1, 32}, none{"none", {}, {}, 2, 32, false, false, 2};
  for (const Case& c : {ragged, indexed, odd, empty, none}) {
    forward<T>(c);
    for (const int kind : {0, 1}) scores<T>(c, kind);
    backward<T>(c, 7, &c == &indexed ? 0 : 1);
  }
  backward<T>(ragged, 4, 0), backward<T>(ragged, 2, 0), backward<T>(indexed, 5, 1);
  policy<T>("small", 2, 5, 2, 27, 1e-2), policy<T>("blocks", 1, 70, 1, 64, 1e-2), policy<T>("plain", 1, 33, 1, 16, 0);
  policy<T>("dropped", 2, 5, 2, 27, 1e-6, 0, 1e6), policy<T>("dropped blocks", 1, 70, 1, 64, 1e-6, 0, 1e6);
  wrong_contents<T>();
}

}  // namespace
}  // namespace tokenprune::test

int main() {
  using namespace tokenprune::test;
  if (kTiny) {
    tiny<__nv_bfloat16>(), tiny<float>();
    return finish();
  }
  everything<__nv_bfloat16>(), everything<float>(), tall<__half>();
  widths<__half>({16, 32, 48, 64, 80, 96, 128}), widths<float>({64, 80, 128}), widths<double>({32, 64, 96, 128});
  policy<__half>("wide", 1, 20, 1, 80, 1e-2), policy<double>("double", 1, 40, 1, 64, 1e-2);
  const Case odd{"odd", {4, 3}, {6, 65}, 2, 27, true, true, 0, 1};
  forward<double>(odd), backward<double>(odd, 7, 1), scores<double>(odd, 1), forward<__half>(odd);
  return finish();
}
