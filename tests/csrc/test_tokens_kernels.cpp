// SPDX-License-Identifier: Apache-2.0
// The token kernels on the host model against scalar loops.
#include <algorithm>

#include "../../csrc/tokens/kernel.cuh"
#include "../../csrc/tokens/kernel_norm.cuh"
#include "check.h"

namespace tokenprune {
namespace {

using test::Random;
const host_model::Launcher launch;

std::string label(const char* what, const char* type, std::initializer_list<int64_t> numbers) {
  std::string text = std::string(what) + " " + type;
  for (int64_t n : numbers) text += " " + std::to_string(n);
  return text;
}

// ---- select
// ----------------------------------------------------------------------------------------------------------

template <int Block>
void test_select(int64_t batch, int64_t tokens, int64_t capacity, int keep_percent) {
  Random random(batch * 1000 + tokens);
  std::vector<uint8_t> mask(batch * tokens);
  for (uint8_t& m : mask) m = random.integer(0, 99) < keep_percent;
  std::vector<int32_t> want, want_cu(batch + 1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < tokens; ++i) {
      if (mask[b * tokens + i]) want.push_back(static_cast<int32_t>(b * tokens + i));
    }
    want_cu[b + 1] = static_cast<int32_t>(want.size());
  }
  const bool sized = capacity < 0;
  std::vector<int32_t> cu(batch + 1, -7);
  SelectParams p{
      reinterpret_cast<const bool*>(mask.data()), nullptr, cu.data(), batch, tokens, sized ? INT32_MAX : capacity};
  launch_select_counts<Block>(launch, p);
  if (sized) p.capacity = cu[batch];
  std::vector<int32_t> indices(p.capacity, -7);
  p.indices = indices.data();
  launch_select_write<Block>(launch, p);
  want.resize(p.capacity, -1);
  for (int32_t& c : want_cu) c = static_cast<int32_t>(std::min<int64_t>(c, p.capacity));
  const std::string name = label("select", "", {batch, tokens, capacity, keep_percent});
  test::equal(name + " cu_seqlens", cu, want_cu);
  test::equal(name + " indices", indices, want);
}

// ---- rows
// ------------------------------------------------------------------------------------------------------------

// Maps with a row stride and an offset, so that the packed and the scalar paths both run.
template <typename T>
struct Case {
  int64_t rows, count, channels, stride, offset;
  std::vector<T> map, tokens, weight, bias;
  std::vector<int32_t> indices;
  std::vector<Acc<T>> scale;
  RowParams p;

  Case(int64_t r, int64_t n, int64_t c, int64_t extra, int64_t shift, int duplicates)
      : rows(r), count(n), channels(c), stride(c + extra), offset(shift) {
    Random random(r * 31 + n * 7 + c);
    map = random.values<T>(shift + r * stride);
    tokens = random.values<T>(shift + n * stride);
    weight = random.values<T>(c), bias = random.values<T>(c);
    scale = random.values<Acc<T>>(n);
    std::vector<int32_t> order(r);
    for (int64_t i = 0; i < r; ++i) order[i] = static_cast<int32_t>(i);
    for (int64_t i = r - 1; i > 0; --i) std::swap(order[i], order[random.integer(0, i)]);
    for (int64_t t = 0; t < n; ++t) {
      indices.push_back(t < r ? order[t] : -1);
      if (duplicates == 1 && r > 0) indices.back() = static_cast<int32_t>(random.integer(0, r - 1));
      if (duplicates == 2 && r > 0) indices.back() = static_cast<int32_t>(t % 3 ? r / 2 : r / 3);  // long lists
      if (t % 11 == 5) indices.back() = -1;
      if (t % 11 == 7) indices.back() = static_cast<int32_t>(t % 2 ? r + 3 : INT32_MIN);  // nonsense is skipped
    }
    p.map = map.data() + shift, p.map_stride = stride;
    p.tokens = tokens.data() + shift, p.token_stride = stride;
    p.indices = indices.data();
    p.rows = r, p.count = n, p.channels = c;
  }
  bool valid(int64_t t) const { return indices[t] >= 0 && indices[t] < rows; }
  double map_at(int64_t row, int64_t c) const { return to_acc(map[offset + row * stride + c]); }
  double token_at(int64_t t, int64_t c) const { return to_acc(tokens[offset + t * stride + c]); }
  std::vector<int64_t> winners() const {
    std::vector<int64_t> w(rows, -1);
    for (int64_t t = 0; t < count; ++t) {
      if (valid(t)) w[indices[t]] = t;
    }
    return w;
  }
  std::string name(const char* what) const {
    return label(what, test::type_name<T>(), {rows, count, channels, stride - channels, offset});
  }
};

template <typename T>
void test_gather(Case<T>& k) {
  std::vector<T> out(k.count * k.channels);
  std::vector<double> want(out.size());
  for (int64_t t = 0; t < k.count; ++t) {
    for (int64_t c = 0; k.valid(t) && c < k.channels; ++c) want[t * k.channels + c] = k.map_at(k.indices[t], c);
  }
  k.p.tokens_out = out.data();
  launch_gather(launch, k.p, sizeof(T));
  test::close(k.name("gather"), out, want, 0);
}

template <typename T>
void test_gather_backward(Case<T>& k) {
  std::vector<T> out(k.rows * k.channels);
  std::vector<Acc<T>> sums(out.size());
  for (int64_t t = 0; t < k.count; ++t) {  // in the order of the indices and the accumulation type: exactly equal
    for (int64_t c = 0; k.valid(t) && c < k.channels; ++c) {
      sums[k.indices[t] * k.channels + c] += static_cast<Acc<T>>(k.token_at(t, c));
    }
  }
  std::vector<T> want;
  for (Acc<T> s : sums) want.push_back(from_acc<T>(s));
  std::vector<int32_t> head(k.rows), next(k.count);
  k.p.map_out = out.data();
  launch_gather_backward<T>(launch, k.p, head.data(), next.data());
  test::close(k.name("gather backward"), out, want, 0);
}

template <typename T>
void test_norm(Case<T>& k, bool affine) {
  const int64_t n = k.count, c = k.channels;
  std::vector<T> out(n * c), grad_rows(n * c);
  std::vector<Acc<T>> mean(n), rstd(n), partial(norm_slices(n) * 2 * c), grad_weight(c), grad_bias(c);
  k.p.tokens_out = out.data(), k.p.mean = mean.data(), k.p.rstd = rstd.data(), k.p.eps = 1e-5;
  k.p.weight = affine ? k.weight.data() : nullptr, k.p.bias = affine ? k.bias.data() : nullptr;
  launch_gather_norm<T>(launch, k.p);
  k.p.tokens_out = grad_rows.data();
  launch_gather_norm_backward<T>(launch, k.p, partial.data(), grad_weight.data(), grad_bias.data());
  std::vector<double> want(n * c), want_mean(n), want_rstd(n), want_rows(n * c), want_weight(c), want_bias(c);
  for (int64_t t = 0; t < n; ++t) {
    if (!k.valid(t)) continue;
    double m = 0, v = 0, sum = 0, product = 0;
    for (int64_t i = 0; i < c; ++i) m += k.map_at(k.indices[t], i) / c;
    for (int64_t i = 0; i < c; ++i) v += std::pow(k.map_at(k.indices[t], i) - m, 2) / c;
    const double r = 1 / std::sqrt(v + 1e-5);
    want_mean[t] = m, want_rstd[t] = r;
    const auto w = [&](int64_t i) { return affine ? static_cast<double>(to_acc(k.weight[i])) : 1.0; };
    const auto xhat = [&](int64_t i) { return (k.map_at(k.indices[t], i) - m) * r; };
    for (int64_t i = 0; i < c; ++i) {
      want[t * c + i] = xhat(i) * w(i) + (affine ? static_cast<double>(to_acc(k.bias[i])) : 0.0);
      sum += k.token_at(t, i) * w(i) / c;
      product += k.token_at(t, i) * w(i) * xhat(i) / c;
      want_weight[i] += k.token_at(t, i) * xhat(i);
      want_bias[i] += k.token_at(t, i);
    }
    for (int64_t i = 0; i < c; ++i) want_rows[t * c + i] = r * (k.token_at(t, i) * w(i) - sum - xhat(i) * product);
  }
  const double tolerance = test::tolerance<T>(), fine = sizeof(T) == 8 ? 1e-11 : 1e-4;
  const std::string name = k.name(affine ? "gather norm affine" : "gather norm");
  test::close(name, out, want, tolerance);
  test::close(name + " mean", mean, want_mean, fine);
  test::close(name + " rstd", rstd, want_rstd, fine);
  test::close(name + " grad rows", grad_rows, want_rows, 20 * tolerance);  // rstd may be large in narrow rows
  test::close(name + " grad weight", grad_weight, want_weight, fine);
  test::close(name + " grad bias", grad_bias, want_bias, fine);
}

template <typename T>
void test_scatter(Case<T>& k, bool add, bool scaled) {
  const std::vector<int64_t> winner = k.winners();
  std::vector<double> want(k.rows * k.channels);
  for (int64_t r = 0; r < k.rows; ++r) {
    for (int64_t c = 0; c < k.channels; ++c) {
      double v = winner[r] < 0 || add ? k.map_at(r, c) : 0;
      if (winner[r] >= 0) v += (scaled ? static_cast<double>(k.scale[winner[r]]) : 1.0) * k.token_at(winner[r], c);
      want[r * k.channels + c] = v;
    }
  }
  std::vector<int32_t> workspace(k.rows);
  std::vector<T> out(k.rows * k.channels);
  k.p.add = add, k.p.scale = scaled ? k.scale.data() : nullptr;
  k.p.map_out = out.data();
  launch_scatter<T>(launch, k.p, workspace.data());
  const std::string name = k.name(add ? "scatter add" : "scatter");
  test::close(name, out, want, test::tolerance<T>());

  std::vector<T> map = k.map, dense;
  RowParams p = k.p;
  p.map_out = map.data() + k.offset, p.map = p.map_out;
  launch_scatter_in_place<T>(launch, p, workspace.data());
  for (int64_t r = 0; r < k.rows; ++r) {
    const T* row = map.data() + k.offset + r * k.stride;
    dense.insert(dense.end(), row, row + k.channels);
  }
  test::close(name + " in place", dense, want, test::tolerance<T>());
}

template <typename T>
void test_scatter_backward(Case<T>& k, bool add, bool scaled) {
  const std::vector<int64_t> winner = k.winners();
  const int64_t n = k.channels;
  std::vector<T> grad_map(k.rows * n), grad_tokens(k.count * n);
  std::vector<Acc<T>> grad_scale(scaled ? k.count : 0);
  std::vector<double> want_map(k.rows * n), want_tokens(k.count * n), want_scale(grad_scale.size());
  for (int64_t r = 0; r < k.rows; ++r) {
    for (int64_t c = 0; c < n; ++c) want_map[r * n + c] = add || winner[r] < 0 ? k.map_at(r, c) : 0;
  }
  for (int64_t t = 0; t < k.count; ++t) {
    if (!k.valid(t) || winner[k.indices[t]] != t) continue;
    for (int64_t c = 0; c < n; ++c) {
      const double g = k.map_at(k.indices[t], c);
      want_tokens[t * n + c] = (scaled ? static_cast<double>(k.scale[t]) : 1.0) * g;
      if (scaled) want_scale[t] += g * k.token_at(t, c);
    }
  }
  std::vector<int32_t> workspace(k.rows);
  k.p.add = add, k.p.scale = scaled ? k.scale.data() : nullptr;
  k.p.scale_grad = scaled ? grad_scale.data() : nullptr;
  k.p.map_out = grad_map.data(), k.p.tokens_out = grad_tokens.data();
  RowParams p = k.p;
  if (!scaled) p.tokens = nullptr, p.token_stride = 0;
  launch_scatter_backward<T>(launch, p, workspace.data());
  const std::string name = k.name(add ? "scatter add backward" : "scatter backward");
  test::close(name + " features", grad_map, want_map, test::tolerance<T>());
  test::close(name + " tokens", grad_tokens, want_tokens, test::tolerance<T>());
  test::close(name + " scale", grad_scale, want_scale, sizeof(T) == 8 ? 1e-12 : 1e-4);
}

template <typename T>
void test_all(int64_t rows, int64_t count, int64_t channels, int64_t extra, int64_t shift, int duplicates) {
  Case<T> k(rows, count, channels, extra, shift, duplicates);
  test_gather(k);
  test_gather_backward(k);
  test_norm(k, true);
  if (!test::kTiny) test_norm(k, false);
  test_scatter(k, true, true);
  if (!test::kTiny) test_scatter(k, false, false);
  test_scatter_backward(k, true, true);
  if (!test::kTiny) test_scatter_backward(k, false, false);
}

template <typename T>
void test_dtype() {
  test_all<T>(20, 13, 64, 0, 0, 0);
  if (test::kTiny) return;
  test_all<T>(20, 13, 7, 0, 0, 0);    // odd width
  test_all<T>(20, 13, 16, 5, 0, 0);   // odd stride
  test_all<T>(20, 13, 24, 0, 1, 0);   // shifted by one element
  test_all<T>(17, 50, 40, 8, 8, 1);   // duplicates
  test_all<T>(17, 150, 33, 0, 0, 2);  // more than 32 tokens on one row
  test_all<T>(9, 70, 600, 0, 0, 1);   // more than two packs per lane
  test_all<T>(3, 4, 1104, 8, 0, 1);   // the row does not fit the registers
  test_all<T>(0, 5, 8, 0, 0, 0);      // empty map
  test_all<T>(5, 0, 8, 0, 0, 0);      // no tokens
  test_all<T>(5, 4, 0, 0, 0, 0);      // no channels
  test_all<T>(5, 4, 1, 0, 0, 1);
  test_all<T>(4200, 300, 2, 0, 0, 1);  // too large for one block
}

}  // namespace
}  // namespace tokenprune

int main() {
  using namespace tokenprune;
  if (test::kTiny) {
    test_select<64>(2, 600, 64, 50);
  } else {
    for (int64_t tokens : {0, 1, 7, 8, 64, 197, 1100}) {
      for (int64_t batch : {0, 1, 5}) {
        test_select<64>(batch, tokens, -1, 60);
        test_select<64>(batch, tokens, 100, 30);
        test_select<64>(batch, tokens, 0, 100);
      }
    }
    test_select<64>(150, 9, -1, 50);  // several passes of the prefix sum
    test_select<kSelectBlock>(2, 4500, -1, 50);
  }
  test_dtype<float>();
  test_dtype<__nv_bfloat16>();
  if (!test::kTiny) test_dtype<__half>(), test_dtype<double>();
  return test::finish();
}
