// SPDX-License-Identifier: Apache-2.0
// The matching and merge kernels on the host model against scalar loops.
#include <algorithm>
#include <numeric>

#include "../../csrc/merge/kernel.cuh"
#include "../../csrc/merge/kernel_match.cuh"
#include "../../csrc/merge/kernel_select.cuh"
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

// ---- matching
// --------------------------------------------------------------------------------------------------------

struct MatchCase {
  int64_t batch, tokens, channels, extra = 0, protect_a = 0, protect_b = 0;
  bool indexed = false;
};

// Values on a coarse grid: equal rows and ties are frequent, and sums are exact in every type.
template <typename T>
std::vector<T> metric_values(const MatchCase& k, int64_t stride) {
  Random random(k.tokens * 17 + k.channels);
  std::vector<T> metric(k.batch * k.tokens * stride);
  for (T& v : metric) v = from_acc<T>(static_cast<Acc<T>>(random.integer(-4, 4)) / 4);
  for (int64_t b = 0; b < k.batch; ++b) {
    for (int64_t t = 0; t < k.tokens; ++t) {
      T* row = metric.data() + (b * k.tokens + t) * stride;
      if (t % 13 == 4) std::fill(row, row + k.channels, T{});  // no direction
      if (t % 17 == 9 && k.channels > 0) row[k.channels / 2] = from_acc<T>(Acc<T>(NAN));
      if (t >= 6 && t % 5 == 1) std::copy(row - 4 * stride, row - 4 * stride + k.channels, row);  // a tie
    }
  }
  return metric;
}

template <typename T>
void test_match(const MatchCase& k) {
  using A = Acc<T>;
  const int64_t stride = k.channels + k.extra;
  const std::vector<T> metric = metric_values<T>(k, stride);
  MatchParams p;
  p.metric = metric.data();
  p.batch = k.batch, p.tokens = k.tokens, p.channels = k.channels;
  p.batch_stride = k.tokens * stride, p.token_stride = stride;
  p.na = (k.tokens + 1) / 2, p.nb = k.tokens / 2, p.protect_a = k.protect_a, p.protect_b = k.protect_b;
  std::vector<int32_t> a_index, b_index;
  if (k.indexed) {
    Random random(5);
    p.na = k.tokens / 3, p.nb = k.tokens - p.na;
    for (int64_t i = 0; i < k.batch * p.na; ++i) a_index.push_back(static_cast<int32_t>(random.integer(-2, k.tokens)));
    for (int64_t i = 0; i < k.batch * p.nb; ++i) b_index.push_back(static_cast<int32_t>(random.integer(-2, k.tokens)));
    p.a_index = a_index.data(), p.b_index = b_index.data();
  }
  std::vector<A> score(k.batch * p.na), inverse(k.batch * k.tokens);
  std::vector<int32_t> nearest(k.batch * p.na);
  p.score = score.data(), p.nearest = nearest.data();
  std::vector<A> part_score(8 * score.size());
  std::vector<int32_t> part_nearest(8 * score.size());
  MatchParts<A> parts;
  parts.score = part_score.data(), parts.nearest = part_nearest.data();
  launch_match<T>(launch, p, parts, inverse.data());

  // The score must be the maximum, and the chosen token the first one that reaches it (up to rounding).
  std::vector<double> want(score.size());
  bool first = true;
  const double slack = sizeof(T) == 8 ? 1e-12 : 1e-5;
  for (int64_t b = 0; b < k.batch; ++b) {
    const auto row = [&](int64_t token) { return metric.data() + (b * k.tokens + token) * stride; };
    for (int64_t i = 0; i < p.na; ++i) {
      const int64_t a = k.indexed ? a_index[b * p.na + i] : 2 * i;
      std::vector<double> scores(p.nb, NAN);
      for (int64_t j = k.protect_b; j < p.nb; ++j) {
        const int64_t o = k.indexed ? b_index[b * p.nb + j] : 2 * j + 1;
        if (i < k.protect_a || !in_range(a, k.tokens) || !in_range(o, k.tokens)) continue;
        double dot = 0, aa = 0, oo = 0;
        for (int64_t c = 0; c < k.channels; ++c) {
          const double x = to_acc(row(a)[c]), y = to_acc(row(o)[c]);
          dot += x * y, aa += x * x, oo += y * y;
        }
        scores[j] = dot / (std::sqrt(aa) * std::sqrt(oo));
      }
      double best = -INFINITY;
      for (double s : scores) best = s > best ? s : best;
      want[b * p.na + i] = best;
      int64_t choice = k.protect_b < p.nb ? k.protect_b : 0;
      if (best > -INFINITY) {
        const auto close = [&](double s) { return s >= best - slack; };
        choice = std::find_if(scores.begin(), scores.end(), close) - scores.begin();
        const int32_t got = nearest[b * p.na + i];  // a near tie of different rows may fall either way
        if (got != choice && in_range(got, p.nb) && close(scores[got]) && scores[got] != scores[choice]) choice = got;
      }
      first &= nearest[b * p.na + i] == choice;
    }
  }
  const std::string name = label("match", test::type_name<T>(),
                                 {k.batch, k.tokens, k.channels, k.extra, k.protect_a, k.protect_b, k.indexed});
  test::close(name + " score", score, want, slack);
  test::report(name + " nearest", first, "");
}

// ---- selection
// -------------------------------------------------------------------------------------------------------

template <typename A, int Block>
void test_select(int64_t batch, int64_t tokens, int64_t r, int64_t protect_a, int64_t interleave, bool sorted,
                 int64_t shared_limit = 227 * 1024) {
  SelectMergeParams p;
  p.batch = batch, p.tokens = tokens, p.na = (tokens + 1) / 2, p.nb = tokens / 2, p.r = r;
  p.protect_a = protect_a, p.interleave = interleave, p.sort_unmerged = sorted;
  const int64_t kept = p.na - r;
  Random random(tokens + r);
  std::vector<A> score(batch * p.na);
  std::vector<int32_t> nearest(score.size());
  for (size_t i = 0; i < score.size(); ++i) {
    score[i] = static_cast<A>(random.integer(-6, 6)) / 6;
    if (i % 9 == 3) score[i] = -A(INFINITY);
    if (i % 10 == 7) score[i] = A(NAN);
    if (i % 8 == 2) score[i] = -A(0);
    if (static_cast<int64_t>(i) % p.na < protect_a) score[i] = 1;
    nearest[i] = static_cast<int32_t>(random.integer(0, std::max<int64_t>(p.nb - 1, 0)));
  }
  std::vector<int32_t> unm(batch * kept, -7), src(batch * r, -7), dst(batch * r, -7), parent(batch * tokens, -7);
  std::vector<int32_t> want_unm, want_src, want_dst, want_parent(parent.size()), rank(score.size());
  p.score = score.data(), p.nearest = nearest.data();
  p.unm = unm.data(), p.src = src.data(), p.dst = dst.data(), p.parent = parent.data();
  host_model::Launcher limited;
  limited.shared_limit = shared_limit;
  launch_select_merge<A, Block>(limited, p, rank.data());

  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int32_t> order(p.na);
    std::iota(order.begin(), order.end(), 0);
    const auto value = [&](int32_t i) {
      const A s = score[b * p.na + i];
      return i < protect_a ? -2e9 : s == s && s > -1e9 ? static_cast<double>(s) : -1e9;
    };
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) { return value(x) > value(y); });
    std::vector<int32_t> rest(order.begin() + r, order.end());
    if (sorted) std::sort(rest.begin(), rest.end());
    // The output sequence as a list of tokens, laid out as the contract says.
    std::vector<int32_t> sequence;
    int64_t u = 0, o = 0;
    for (int64_t t = 0; t < interleave; ++t) sequence.push_back(t % 2 == 0 ? 2 * rest[u++] : 2 * o++ + 1);
    while (u < kept) sequence.push_back(2 * rest[u++]);
    while (o < p.nb) sequence.push_back(static_cast<int32_t>(2 * o++ + 1));
    for (size_t i = 0; i < sequence.size(); ++i) want_parent[b * tokens + sequence[i]] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < r; ++i) {
      const int32_t to = nearest[b * p.na + order[i]];
      want_src.push_back(order[i]), want_dst.push_back(to);
      want_parent[b * tokens + 2 * order[i]] = want_parent[b * tokens + 2 * to + 1];
    }
    want_unm.insert(want_unm.end(), rest.begin(), rest.end());
  }
  const std::string name =
      label("select merge", test::type_name<A>(), {batch, tokens, r, protect_a, interleave, sorted, shared_limit});
  test::equal(name + " unm", unm, want_unm);
  test::equal(name + " src", src, want_src);
  test::equal(name + " dst", dst, want_dst);
  test::equal(name + " parent", parent, want_parent);
}

// ---- merge
// -----------------------------------------------------------------------------------------------------------

template <typename T>
void test_merge(int64_t batch, int64_t tokens, int64_t out_len, int64_t channels, int64_t mode, bool sized,
                bool crowded = false) {
  using A = Acc<T>;
  Random random(tokens * 3 + out_len + mode);
  std::vector<T> x = random.values<T>(batch * tokens * channels), grad = random.values<T>(batch * out_len * channels);
  for (T& v : x) v = from_acc<T>(static_cast<A>(std::round(4 * static_cast<double>(to_acc(v)))) / 4);  // ties for amax
  std::vector<A> size(batch * tokens), grad_size_out = random.values<A>(batch * out_len);
  for (A& s : size) s = static_cast<A>(random.integer(0, 3));
  std::vector<int32_t> parent(batch * tokens);
  for (int32_t& q : parent) q = static_cast<int32_t>(random.integer(-2, out_len));  // out of range: dropped
  if (crowded) std::fill(parent.begin(), parent.end(), static_cast<int32_t>(out_len - 1));
  std::vector<int32_t> heads(batch * out_len), members(batch * tokens);

  std::vector<T> y(grad.size()), grad_x(x.size());
  std::vector<A> size_out(batch * out_len), grad_size(batch * tokens);
  MergeParams p;
  p.x = x.data(), p.grad = grad.data(), p.parent = parent.data();
  p.batch = batch, p.tokens = tokens, p.channels = channels, p.out_len = out_len, p.mode = mode;
  p.size = sized ? size.data() : nullptr, p.grad_size_out = sized ? grad_size_out.data() : nullptr;
  p.y = y.data(), p.size_out = size_out.data(), p.grad_x = grad_x.data(), p.grad_size = grad_size.data();
  p.y_in = y.data(), p.size_out_in = size_out.data();
  p.offsets = heads.data(), p.members = members.data();
  launch_merge<T>(launch, p);
  const std::vector<T> y_seen = y;
  launch_merge_backward<T>(launch, p);

  std::vector<double> want(y.size()), want_size(size_out.size()), want_x(x.size()), want_grad_size(size.size());
  std::vector<std::vector<int64_t>> groups(batch * out_len);
  for (int64_t t = 0; t < batch * tokens; ++t) {
    if (in_range(parent[t], out_len)) groups[t / tokens * out_len + parent[t]].push_back(t);
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t o = 0; o < out_len; ++o) {
      const std::vector<int64_t>& group = groups[b * out_len + o];
      double total = 0;
      for (int64_t t : group) total += sized ? static_cast<double>(size[t]) : 1.0;
      const int64_t row = b * out_len + o;
      want_size[row] = total;
      const double divisor = mode == kMergeWeighted ? total : mode == kMergeMean ? group.size() : 1.0;
      for (int64_t t : group) want_grad_size[t] += sized ? static_cast<double>(grad_size_out[row]) : 0.0;
      for (int64_t c = 0; c < channels && !group.empty(); ++c) {
        const auto at_x = [&](int64_t t) { return static_cast<double>(to_acc(x[t * channels + c])); };
        const double g = to_acc(grad[row * channels + c]);
        double sum = 0, largest = -INFINITY, ties = 0;
        for (int64_t t : group) {
          sum += at_x(t) * (mode == kMergeWeighted ? static_cast<double>(size[t]) : 1.0);
          largest = std::max(largest, at_x(t));
        }
        for (int64_t t : group) ties += at_x(t) == largest;
        double& value = want[row * channels + c];
        value = mode == kMergeAmax ? largest : divisor == 0 ? 0 : sum / divisor;
        for (int64_t t : group) {
          double& gx = want_x[t * channels + c];
          if (mode == kMergeAmax) {
            gx = at_x(t) == largest ? g / ties : 0;
          } else if (mode == kMergeWeighted) {
            gx = divisor == 0 ? 0 : g * static_cast<double>(size[t]) / divisor;
            const double y_value = to_acc(y_seen[row * channels + c]);
            want_grad_size[t] += divisor == 0 ? 0 : g * (at_x(t) - y_value) / divisor;
          } else {
            gx = g / divisor;
          }
        }
      }
    }
  }
  const double tolerance = test::tolerance<T>(), fine = sizeof(T) == 8 ? 1e-12 : 1e-4;
  const std::string name =
      label("merge", test::type_name<T>(), {batch, tokens, out_len, channels, mode, sized, crowded});
  test::close(name, y, want, tolerance);
  test::close(name + " size", size_out, want_size, 1e-6);
  test::close(name + " grad x", grad_x, want_x, tolerance);
  test::close(name + " grad size", grad_size, want_grad_size, fine);
}

template <typename T>
void test_merge_modes() {
  for (int64_t mode = kMergeSum; mode <= kMergeWeighted; ++mode) {
    test_merge<T>(2, 20, 12, 24, mode, true);
    if (test::kTiny) continue;
    test_merge<T>(3, 21, 5, 7, mode, true);
    if (mode != kMergeWeighted) test_merge<T>(3, 50, 25, 40, mode, false);
    test_merge<T>(2, 40, 3, 1104, mode, true, true);  // more than 32 tokens in a row
    test_merge<T>(2, 8, 0, 8, mode, true);
    test_merge<T>(2, 0, 4, 8, mode, true);
    test_merge<T>(0, 8, 4, 8, mode, true);
    test_merge<T>(2, 8, 4, 0, mode, true);
    test_merge<T>(2, 9, 9, 1, mode, true);
    if (sizeof(T) == 4)
      test_merge<T>(1, 4200, 2100, 1, mode, mode == kMergeWeighted);  // too large for one block per image
  }
}

template <typename T>
void test_match_shapes() {
  test_match<T>({1, 20, 72});
  if (test::kTiny) return;
  test_match<T>({2, 197, 64, 0, 1, 1});  // several tiles and parts
  test_match<T>({1, 300, 72, 8, 2, 1});  // two depths of the matrix path
  test_match<T>({2, 131, 33, 0, 0, 0});
  test_match<T>({2, 90, 16, 3, 0, 0, true});
  test_match<T>({3, 40, 8});  // one tile, one part
  test_match<T>({2, 1, 8});
  test_match<T>({2, 2, 8});
  test_match<T>({2, 3, 8, 0, 1, 1});  // nothing may be chosen
  test_match<T>({2, 6, 0});
  test_match<T>({0, 6, 8});
  test_match<T>({2, 0, 8});
  test_match<T>({1, 2, 8, 0, 0, 0, true});  // no a-tokens
}

template <typename A>
void test_selections() {
  if (test::kTiny) return test_select<A, 64>(2, 300, 30, 1, 2, true);
  for (int64_t tokens : {1, 2, 3, 9, 64, 197, 700}) {
    const int64_t most = (tokens - 1) / 2;
    for (int64_t r : {int64_t{0}, most / 3, most}) {
      test_select<A, 64>(2, tokens, r, 0, 0, false);
      test_select<A, 64>(2, tokens, r, 1, 0, true);
      if (tokens > 3) test_select<A, 64>(3, tokens, std::min(r, most - 1), 1, 2, true);
      if (tokens > 3) test_select<A, 64>(3, tokens, std::min(r, most - 1), 0, 2, false);  // distillation token alone
      if (tokens > 8) test_select<A, 64>(1, tokens, std::min(r, most - 3), 3, 5, true);
      test_select<A, 64>(2, tokens, r, 1, 0, true, 0);  // ranks by counting
    }
  }
  test_select<A, kSortBlock>(1, 5000, 1000, 1, 1, true);
}

}  // namespace
}  // namespace tokenprune

int main() {
  using namespace tokenprune;
  test_match_shapes<float>();
  test_match_shapes<__nv_bfloat16>();
  test_selections<float>();
  test_merge_modes<float>();
  if (test::kTiny) {
    test_select<float, 64>(1, 520, 5, 0, 0, false, 0);
    return test::finish();
  }
  test_match_shapes<double>();
  test_match_shapes<__half>();
  test_selections<double>();
  test_merge_modes<double>();
  test_merge_modes<__half>();
  test_merge_modes<__nv_bfloat16>();
  return test::finish();
}
