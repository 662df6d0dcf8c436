// SPDX-License-Identifier: Apache-2.0
// The sm_90a gather/scatter linear kernel on the host model (host_hopper.h) against scalar loops in double.
#include <cmath>
#include <limits>

#include "../../csrc/linear/kernel_hopper.cuh"
#include "check.h"

namespace tokenprune::test {
namespace {

struct Case {
  std::string name;
  int rows, count, width, features;
  bool index = true, bias = true, scatter = false, add = false, gelu = false;
  int out_rows = 0;  // with scatter
};

template <typename T>
void run(const Case& c, int processors) {
  Random random(c.count * 131 + c.width * 7 + c.features);
  const int stride = c.width + 8, out_rows = c.scatter ? c.out_rows : c.count;
  std::vector<T> x = random.values<T>(int64_t{c.rows} * stride),
                 weight = random.values<T>(int64_t{c.features} * c.width), bias = random.values<T>(c.features),
                 before = random.values<T>(int64_t{out_rows} * c.features);
  for (T& w : weight) w = from_acc<T>(to_acc(w) / std::sqrt(static_cast<float>(c.width)));
  std::vector<int32_t> index(c.count), scatter(c.count);
  for (int t = 0; t < c.count; ++t) {
    index[t] = static_cast<int32_t>(random.integer(-1, c.rows));  // -1 and rows: a row of zeros
    scatter[t] = t * 7 % (out_rows + 3) - 1;                      // distinct for the sizes below; some outside: dropped
  }
  // Values behind the summed columns of a row must not be read as part of it.
  for (int r = 0; r < c.rows; ++r) {
    for (int d = c.width; d < stride; ++d) x[int64_t{r} * stride + d] = from_acc<T>(NAN);
  }
  std::vector<T> out = c.scatter ? before : std::vector<T>(before.size(), from_acc<T>(777.0f));
  std::vector<double> want(out.size());
  for (size_t i = 0; i < out.size(); ++i) want[i] = to_acc(out[i]);
  for (int t = 0; t < c.count; ++t) {
    const int from = c.index ? index[t] : t, to = c.scatter ? scatter[t] : t;
    if (to < 0 || to >= out_rows) continue;
    for (int f = 0; f < c.features; ++f) {
      double sum = c.bias ? to_acc(bias[f]) : 0;
      for (int d = 0; d < c.width && from >= 0 && from < c.rows; ++d) {
        sum += static_cast<double>(to_acc(x[int64_t{from} * stride + d])) * to_acc(weight[int64_t{f} * c.width + d]);
      }
      if (c.gelu) sum = sum / 2 * (1 + std::erf(sum / std::sqrt(2.0)));
      want[int64_t{to} * c.features + f] = sum + (c.add ? to_acc(before[int64_t{to} * c.features + f]) : 0);
    }
  }

  LinearParams p;
  p.x = x.data(), p.rows = c.rows, p.x_stride = stride, p.weight = weight.data(), p.weight_stride = c.width;
  p.bias = c.bias ? bias.data() : nullptr, p.count = c.count, p.width = c.width, p.features = c.features;
  p.index = c.index ? index.data() : nullptr, p.scatter = c.scatter ? scatter.data() : nullptr;
  p.add = c.add ? before.data() : nullptr, p.out = out.data(), p.out_rows = out_rows;
  p.activation = c.gelu ? kGelu : kNoActivation;
  const auto encode = [&](int columns, int box_rows) {
    return hopper::TensorMap{p.weight, {c.width, 1, c.features}, {2, c.width * 2, c.width * 2}, columns,
                             box_rows, hopper::Swizzle::k128};
  };
  const std::string name = c.name + " " + type_name<T>() + (processors == 0 ? " 256" : " 128");
  if (!linear::hopper_serves(p)) return report(name + " is served", false, "");
  linear::launch_hopper<T>(host_model::Launcher{}, encode, p, processors);
  close(name, out, want, 2e-2);
}

}  // namespace
}  // namespace tokenprune::test

int main() {
  using namespace tokenprune::test;
  if (kTiny) {  // every stage is used again
    run<__nv_bfloat16>({"tiny", 40, 70, 328, 8}, 1000);
    return finish();
  }
  for (const int processors : {0, 1000}) {
    run<__nv_bfloat16>({"gather", 50, 130, 72, 40}, processors);
    run<__half>({"deep", 300, 20, 520, 264, true, true, false, false, true}, processors);
    run<__nv_bfloat16>({"scatter", 9, 60, 64, 24, true, false, true, true, false, 100}, processors);
    run<__half>({"replace", 60, 60, 8, 136, false, true, true, false, false, 101}, processors);
    run<__nv_bfloat16>({"one", 1, 1, 16, 8, false, false}, processors);
  }
  return finish();
}
