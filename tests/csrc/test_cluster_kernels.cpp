// SPDX-License-Identifier: Apache-2.0
// The clustering and reconstruction kernels on the host model against scalar loops, which are written from the
// definitions and share no code with them.
#include <algorithm>
#include <type_traits>

#include "../../csrc/cluster/kernel.cuh"
#include "../../csrc/cluster/kernel_reconstruct.cuh"
#include "check.h"

namespace tokenprune {
namespace {

using test::Random;
const host_model::Launcher launch;

std::string label(const char* what, const char* type, std::initializer_list<double> numbers) {
  std::string text = std::string(what) + " " + type;
  char buffer[32];
  for (double n : numbers) std::snprintf(buffer, sizeof buffer, " %g", n), text += buffer;
  return text;
}

template <typename T>
double value(T v) {
  return static_cast<double>(to_acc(v));
}

// [rows, channels] with row stride channels + extra; `grid`: multiples of 1 / grid, so that distances are exact.
template <typename T>
struct Values {
  int64_t channels, stride;
  std::vector<T> data;

  Values(int64_t rows, int64_t channels_, int64_t extra, uint64_t seed, int64_t grid = 0)
      : channels(channels_), stride(channels_ + extra), data(rows * stride) {
    Random random(seed);
    for (T& v : data) {
      const double number = grid > 0 ? static_cast<double>(random.integer(-grid, grid)) / grid : random.uniform();
      v = from_acc<T>(static_cast<Acc<T>>(number));
    }
  }
  double at(int64_t row, int64_t c) const { return value(data[row * stride + c]); }
  T* row(int64_t i) { return data.data() + i * stride; }
};

template <typename U, typename V>
double squared_distance(const Values<U>& a, int64_t i, const Values<V>& b, int64_t j) {
  double sum = 0;
  for (int64_t c = 0; c < a.channels; ++c) sum += (a.at(i, c) - b.at(j, c)) * (a.at(i, c) - b.at(j, c));
  return sum;
}

// ---- clustering ----------------------------------------------------------------------------------------------------

struct ClusterCase {
  int64_t batch, height, width, rows, cols, channels, iters, window;
  double temperature = 0.5;
  int64_t extra = 0;
  bool direct = false;  // the general way, whatever the plan says
  bool halves = false;  // two kinds of tokens, left and right: centers between them lose their mass
};

int64_t home_of(int64_t token, int64_t size, int64_t cells) {
  const float scale = static_cast<float>(cells) / static_cast<float>(size);
  return std::min(static_cast<int64_t>(static_cast<float>(token) * scale), cells - 1);
}

struct ClusterOracle {
  const ClusterCase& k;
  int64_t tokens, clusters, reach_y, reach_x, slots;
  std::vector<double> x, centers, mass, affinity;  // affinity [batch, tokens, clusters]

  template <typename T>
  ClusterOracle(const ClusterCase& c, const Values<T>& values)
      : k(c),
        tokens(c.height * c.width),
        clusters(c.rows * c.cols),
        reach_y(std::min(c.window / 2, c.rows - 1)),
        reach_x(std::min(c.window / 2, c.cols - 1)),
        slots((2 * reach_y + 1) * (2 * reach_x + 1)),
        centers(c.batch * clusters * c.channels),
        mass(c.batch * clusters),
        affinity(c.batch * tokens * clusters) {
    for (int64_t i = 0; i < c.batch * tokens; ++i) {
      for (int64_t j = 0; j < c.channels; ++j) x.push_back(values.at(i, j));
    }
    for (int64_t b = 0; b < c.batch; ++b) {
      mean(b, [&](int64_t t, int64_t m) { return pooled(t, m) ? 1.0 : 0.0; });
      for (int64_t i = 0; i < c.iters; ++i) {
        refresh(b);
        mean(b, [&](int64_t t, int64_t m) { return affinity[(b * tokens + t) * clusters + m]; });
      }
    }
  }
  static bool covers(int64_t cell, int64_t token, int64_t size, int64_t cells) {
    return token >= cell * size / cells && token < ((cell + 1) * size + cells - 1) / cells;
  }
  bool pooled(int64_t t, int64_t m) const {
    return covers(m / k.cols, t / k.width, k.height, k.rows) && covers(m % k.cols, t % k.width, k.width, k.cols);
  }
  int64_t slot(int64_t t, int64_t m) const {  // -1: not a candidate
    const int64_t i = m / k.cols - home_of(t / k.width, k.height, k.rows) + reach_y;
    const int64_t j = m % k.cols - home_of(t % k.width, k.width, k.cols) + reach_x;
    return i < 0 || i > 2 * reach_y || j < 0 || j > 2 * reach_x ? -1 : i * (2 * reach_x + 1) + j;
  }
  template <typename Weight>
  void mean(int64_t b, Weight weight) {
    for (int64_t m = 0; m < clusters; ++m) {
      double total = 0;
      for (int64_t t = 0; t < tokens; ++t) total += weight(t, m);
      mass[b * clusters + m] = total;
      for (int64_t c = 0; c < k.channels; ++c) {
        double sum = 0;
        for (int64_t t = 0; t < tokens; ++t) sum += weight(t, m) * x[(b * tokens + t) * k.channels + c];
        centers[(b * clusters + m) * k.channels + c] = sum / std::max(total, 1e-16);
      }
    }
  }
  void refresh(int64_t b) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> d(clusters, INFINITY);
      double nearest = INFINITY, sum = 0;
      for (int64_t m = 0; m < clusters; ++m) {
        if (slot(t, m) < 0) continue;
        d[m] = 0;
        for (int64_t c = 0; c < k.channels; ++c) {
          const double e = x[(b * tokens + t) * k.channels + c] - centers[(b * clusters + m) * k.channels + c];
          d[m] += e * e;
        }
        nearest = std::min(nearest, d[m]);
      }
      for (double v : d) sum += std::exp(-k.temperature * (v - nearest));
      for (int64_t m = 0; m < clusters; ++m) {
        affinity[(b * tokens + t) * clusters + m] = std::exp(-k.temperature * (d[m] - nearest)) / sum;
      }
    }
  }
  std::vector<double> slotted() const {
    std::vector<double> result(k.batch * tokens * slots);
    for (int64_t i = 0; i < k.batch * tokens; ++i) {
      for (int64_t m = 0; m < clusters; ++m) {
        const int64_t s = slot(i % tokens, m);
        if (s >= 0) result[i * slots + s] = affinity[i * clusters + m];
      }
    }
    return result;
  }
  double weight(int64_t b, int64_t t, int64_t m) const {  // of a token in a center
    if (k.iters == 0) return pooled(t, m) ? 1 / mass[b * clusters + m] : 0;
    return affinity[(b * tokens + t) * clusters + m] / std::max(mass[b * clusters + m], 1e-16);
  }
};

ClusterAxis axis_of(int64_t size, int64_t cells, int64_t window) {
  ClusterAxis a;
  a.size = size, a.cells = cells, a.reach = std::min(window / 2, cells - 1);
  a.scale = size > 0 ? static_cast<float>(cells) / static_cast<float>(size) : 0.f;
  return a;
}

template <typename T>
void test_cluster(const ClusterCase& k) {
  using A = Acc<T>;
  const int64_t tokens = k.height * k.width, clusters = k.rows * k.cols;
  Values<T> x(k.batch * tokens, k.channels, k.extra, tokens * 31 + k.channels);
  for (int64_t i = 0; k.halves && i < k.batch * tokens; ++i) {
    for (int64_t c = 0; c < k.channels; ++c) {
      const double side = i % k.width < k.width / 2 ? 1 : -1;
      x.row(i)[c] = from_acc<T>(static_cast<A>(side + x.at(i, c) / 64));
    }
  }
  const ClusterOracle oracle(k, x);
  ClusterParams p;
  p.x = x.data.data(), p.batch = k.batch, p.tokens = tokens, p.channels = k.channels;
  p.batch_stride = tokens * x.stride, p.token_stride = x.stride;
  p.y_axis = axis_of(k.height, k.rows, k.window), p.x_axis = axis_of(k.width, k.cols, k.window);
  p.clusters = clusters, p.slots = oracle.slots, p.iters = k.iters, p.temperature = k.temperature;
  cluster::ClusterPlan plan = cluster::plan_of(p);
  if (k.direct) plan.banded = false, plan.centers = k.batch * clusters * k.channels, plan.pairs = 0;

  const A unset = A(NAN);
  std::vector<T> centers(k.batch * clusters * k.channels, from_acc<T>(unset));
  std::vector<A> mass(k.batch * clusters, unset), affinity(k.iters > 0 ? k.batch * tokens * oracle.slots : 0, unset);
  std::vector<A> distances(plan.banded ? plan.distances : 0, unset), pairs(plan.pairs, unset),
      refined(plan.centers, unset);
  p.centers = centers.data(), p.mass = mass.data(), p.affinity = affinity.data();
  cluster::ClusterSpace<A> space;
  space.affinity = affinity.data(), space.distances = distances.data();
  space.pairs = pairs.data(), space.centers = refined.data();
  cluster::launch_cluster<T>(launch, p, plan, space);

  const std::string name =
      label(plan.banded ? "cluster banded" : "cluster", test::type_name<T>(),
            {double(k.batch), double(k.height), double(k.width), double(k.rows), double(k.cols), double(k.channels),
             double(k.iters), double(k.window), k.temperature, double(k.extra)});
  const double sharp = 1 + k.temperature, fine = (sizeof(A) == 8 ? 1e-11 : 3e-5) * sharp;
  test::close(name + " centers", centers, oracle.centers, std::max(fine, test::tolerance<T>()));
  test::close(name + " mass", mass, oracle.mass, fine);
  if (k.iters > 0) test::close(name + " affinity", affinity, oracle.slotted(), fine);

  // The gradient, from the affinities and masses just made.
  Values<T> grad(k.batch * clusters, k.channels, 0, 77);
  std::vector<T> grad_x(k.batch * tokens * k.channels, from_acc<T>(unset));
  ClusterBackwardParams q;
  q.grad = grad.data.data(), q.mass = mass.data(), q.affinity = k.iters > 0 ? affinity.data() : nullptr;
  q.batch = k.batch, q.tokens = tokens, q.channels = k.channels, q.clusters = clusters, q.slots = oracle.slots;
  q.iters = k.iters, q.y_axis = p.y_axis, q.x_axis = p.x_axis, q.grad_x = grad_x.data();
  cluster::launch_cluster_backward<T>(launch, q);
  std::vector<double> want(grad_x.size());
  double largest = 1;
  for (int64_t i = 0; i < k.batch * tokens; ++i) {
    const int64_t b = i / tokens;
    for (int64_t m = 0; m < clusters; ++m) {
      const double w = oracle.weight(b, i % tokens, m);
      for (int64_t c = 0; c < k.channels; ++c) want[i * k.channels + c] += w * grad.at(b * clusters + m, c);
      largest = std::max(largest, w);
    }
  }
  test::close(name + " grad", grad_x, want, std::max(fine * largest, test::tolerance<T>()));
}

template <typename T>
void test_clusters() {
  constexpr int64_t kC = 2 * kPack<T>;  // rows of whole packs
  if (test::kTiny) {
    test_cluster<T>({1, 4, 3, 2, 2, kC, 2, 3});
    test_cluster<T>({1, 4, 3, 2, 2, 3, 0, 3});
    return test_cluster<T>({1, 4, 3, 2, 2, 3, 2, 3, 0.5, 0, true});
  }
  for (const bool direct : {false, true}) {
    test_cluster<T>({2, 6, 6, 3, 3, kC, 3, 3, 0.5, 0, direct});
    test_cluster<T>({2, 7, 5, 3, 4, 7, 4, 5, 0.5, 3, direct});
    test_cluster<T>({1, 7, 5, 3, 4, 5 * kC, 1, 3, 2, kPack<T>, direct});
    test_cluster<T>({1, 5, 4, 5, 4, 3, 2, 3, 1, 0, direct});     // a cell per token
    test_cluster<T>({1, 46, 1, 28, 1, 2, 2, 3, 1, 0, direct});   // homes by the float32 rule
    test_cluster<T>({1, 17, 11, 8, 5, kC, 2, 3, 1, 0, direct});  // several patches
    test_cluster<T>({1, 6, 5, 2, 3, kC, 3, 3, 150, 0, direct});
    test_cluster<T>({1, 1, 12, 1, 3, 8, 3, 3, 20, 0, direct, true});
    test_cluster<T>({2, 2, 12, 1, 3, 8, 2, 5, 5.1, 0, direct, true});
    test_cluster<T>({1, 4, 4, 2, 2, kC, 2, 99, 0.5, 0, direct});  // every center is a candidate
    test_cluster<T>({1, 5, 7, 1, 1, kC, 2, 5, 0.5, 0, direct});
    test_cluster<T>({2, 3, 4, 2, 2, 0, 2, 3, 0.5, 0, direct});
    test_cluster<T>({0, 3, 4, 2, 2, 4, 2, 3, 0.5, 0, direct});
  }
  test_cluster<T>({1, 8, 6, 4, 3, kC, 3, 1});   // each token has its own cell only
  test_cluster<T>({2, 2, 3, 5, 7, kC, 2, 3});   // more cells than tokens: some have none
  test_cluster<T>({1, 2, 3, 6, 2, 5, 2, 1});    // pooling reaches outside of the window
  test_cluster<T>({1, 26, 30, 2, 2, 3, 2, 5});  // too many tokens per cell for the band
  test_cluster<T>({2, 0, 4, 2, 3, 4, 2, 3});    // no tokens
  for (const int64_t channels : {kC, int64_t{5}, int64_t{0}}) {
    test_cluster<T>({2, 7, 5, 3, 4, channels, 0, 3});
    test_cluster<T>({1, 2, 3, 5, 7, channels, 0, 3});
    test_cluster<T>({2, 4, 0, 2, 3, channels, 0, 3});
  }
}

// ---- nearest centers -----------------------------------------------------------------------------------------------

template <typename T>
void test_nearest(int64_t batch, int64_t tokens, int64_t clusters, int64_t channels, int64_t extra = 0) {
  Values<T> features(batch * tokens, channels, extra, 3, 2), centers(batch * clusters, channels, 0, 4, 2);
  const T nan = from_acc<T>(Acc<T>(NAN));
  for (int64_t m = 0; m < batch * clusters; ++m) {
    if (m % 5 == 3) std::copy_n(centers.row(m - 2), channels, centers.row(m));  // ties
    if (m % 7 == 2 && channels > 0) centers.row(m)[channels - 1] = nan;
  }
  if (tokens > 4 && channels > 0) features.row(4)[0] = nan;
  std::vector<int64_t> nearest(batch * tokens, -7), want(nearest.size());
  ReconstructParams p;
  p.features = features.data.data(), p.centers = centers.data.data();
  p.features_batch = tokens * features.stride, p.features_row = features.stride;
  p.centers_batch = clusters * centers.stride, p.centers_row = centers.stride;
  p.batch = batch, p.tokens = tokens, p.clusters = clusters, p.channels = channels, p.nearest = nearest.data();
  cluster::launch_nearest<T>(launch, p);
  for (int64_t i = 0; i < batch * tokens; ++i) {
    double best = INFINITY;
    for (int64_t m = 0; m < clusters; ++m) {
      const double d = squared_distance(features, i, centers, i / tokens * clusters + m);
      if (d < best) best = d, want[i] = m;
    }
  }
  test::equal(label("nearest", test::type_name<T>(),
                    {double(batch), double(tokens), double(clusters), double(channels), double(extra)}),
              nearest, want);
}

// ---- reconstruction ------------------------------------------------------------------------------------------------

struct ReconstructCase {
  int64_t batch, tokens, clusters, channels, width, k;
  double temperature = 0.5;
  bool l1 = false;
  int64_t extra = 0;
};

// Weights and their gradients, row by row; u is rounded as a kernel of this type must round it where it matters.
template <typename A>
struct WeightRow {
  std::vector<double> u, v;
  bool at_floor = false;

  WeightRow(const std::vector<double>& distance, int64_t k, double temperature, bool l1) {
    for (double d : distance) {
      const double e = std::exp(-temperature * d);
      u.push_back(sizeof(A) == 4 && e < 1.2e-38 ? 0 : e);
    }
    std::vector<double> order = distance;
    std::sort(order.begin(), order.end());
    double sum = 0;
    for (size_t i = 0; i < u.size(); ++i) {
      if (distance[i] > order[k - 1]) u[i] = 0;
      sum += l1 ? u[i] : u[i] * u[i];
    }
    const double norm = l1 ? sum : std::sqrt(sum);
    at_floor = norm < 1e-12;
    for (double e : u) v.push_back(e / (at_floor ? 1e-12 : norm));
  }
};

template <typename T>
void test_reconstruct(const ReconstructCase& k) {
  using A = Acc<T>;
  const int64_t n = k.batch * k.tokens, m = k.batch * k.clusters;
  Values<T> features(n, k.channels, k.extra, 5, 2), centers(m, k.channels, k.extra, 6, 2),
      values(m, k.width, k.extra, 7);
  Values<T> grad(n, k.width, 0, 8);
  for (int64_t i = 3; i < m; i += 4) std::copy_n(centers.row(i - 1), k.channels, centers.row(i));  // ties
  ReconstructParams p;
  p.features = features.data.data(), p.centers = centers.data.data(), p.values = values.data.data();
  p.features_batch = k.tokens * features.stride, p.features_row = features.stride;
  p.centers_batch = k.clusters * centers.stride, p.centers_row = centers.stride;
  p.values_batch = k.clusters * values.stride, p.values_row = values.stride;
  p.batch = k.batch, p.tokens = k.tokens, p.clusters = k.clusters, p.channels = k.channels, p.width = k.width;
  p.k = std::min(k.k, k.clusters), p.temperature = k.temperature, p.l1 = k.l1;
  const T unset = from_acc<T>(A(NAN));
  std::vector<T> out(n * k.width, unset), grad_features(n * k.channels, unset), grad_centers(m * k.channels, unset),
      grad_values(m * k.width, unset);
  p.out = out.data(), p.grad = grad.data.data(), p.grad_features = grad_features.data();
  p.grad_centers = grad_centers.data(), p.grad_values = grad_values.data();
  const int64_t elements = cluster::images_at_once(p) * k.tokens * k.clusters;
  std::vector<A> weights(elements, A(NAN)), slopes(elements, A(NAN));
  cluster::launch_reconstruct<T>(launch, p, weights.data());
  std::fill(weights.begin(), weights.end(), A(NAN));
  cluster::launch_reconstruct_backward<T>(launch, p, weights.data(), slopes.data());

  std::vector<double> want(out.size()), want_f(grad_features.size()), want_c(grad_centers.size()),
      want_v(grad_values.size());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = i / k.tokens * k.clusters;
    std::vector<double> distance(k.clusters), slope(k.clusters);
    for (int64_t j = 0; j < k.clusters; ++j) distance[j] = squared_distance(features, i, centers, first + j);
    const WeightRow<A> row(distance, p.k, k.temperature, k.l1);
    double mean = 0;
    for (int64_t j = 0; j < k.clusters; ++j) {
      for (int64_t c = 0; c < k.width; ++c) {
        want[i * k.width + c] += row.v[j] * values.at(first + j, c);
        want_v[(first + j) * k.width + c] += row.v[j] * grad.at(i, c);
        slope[j] += grad.at(i, c) * values.at(first + j, c);
      }
      mean += row.v[j] * slope[j];
    }
    if (row.at_floor) mean = 0;
    for (int64_t j = 0; j < k.clusters; ++j) {
      const double s = -2 * k.temperature * row.v[j] * (slope[j] - (k.l1 ? mean : row.v[j] * mean));
      for (int64_t c = 0; c < k.channels; ++c) {
        const double e = s * (features.at(i, c) - centers.at(first + j, c));
        want_f[i * k.channels + c] += e, want_c[(first + j) * k.channels + c] -= e;
      }
    }
  }
  const std::string name = label(k.l1 ? "reconstruct l1" : "reconstruct", test::type_name<T>(),
                                 {double(k.batch), double(k.tokens), double(k.clusters), double(k.channels),
                                  double(k.width), double(k.k), k.temperature, double(k.extra)});
  const double tolerance = std::max((sizeof(A) == 8 ? 1e-11 : 2e-5) * (1 + k.temperature), test::tolerance<T>());
  test::close(name, out, want, tolerance);
  test::close(name + " grad features", grad_features, want_f, tolerance);
  test::close(name + " grad centers", grad_centers, want_c, tolerance);
  test::close(name + " grad values", grad_values, want_v, tolerance);
}

// NaN is a matter of one token or one center, and a center that cannot be ranked comes last.
template <typename T>
void test_reconstruct_nan() {
  using A = Acc<T>;
  const int64_t tokens = 6, clusters = 5, channels = 8, width = 3;
  Values<T> features(tokens, channels, 0, 9, 2), centers(clusters, channels, 0, 10, 2), values(clusters, width, 0, 11);
  features.row(2)[1] = from_acc<T>(A(NAN)), centers.row(3)[4] = from_acc<T>(A(NAN));
  for (const int64_t k : {int64_t{2}, clusters}) {
    ReconstructParams p;
    p.features = features.data.data(), p.centers = centers.data.data(), p.values = values.data.data();
    p.features_row = p.centers_row = channels, p.values_row = width;
    p.batch = 1, p.tokens = tokens, p.clusters = clusters, p.channels = channels, p.width = width, p.k = k;
    std::vector<T> out(tokens * width);
    std::vector<A> weights(tokens * clusters);
    p.out = out.data();
    cluster::launch_reconstruct<T>(launch, p, weights.data());
    bool good = true;
    for (int64_t i = 0; i < tokens * width; ++i) good &= (out[i] != out[i]) == (i / width == 2 || k == clusters);
    test::report(label("reconstruct nan", test::type_name<T>(), {double(k)}), good, "");
  }
}

template <typename T>
void test_reconstructs() {
  constexpr int64_t kC = 2 * kPack<T>;
  if (test::kTiny) {
    test_nearest<T>(1, 5, 6, kC);
    return test_reconstruct<T>({1, 5, 6, kC, kC, 2});
  }
  test_nearest<T>(2, 70, 67, kC);
  test_nearest<T>(1, 9, 130, 3, 2);
  test_nearest<T>(1, 3, 4, 5 * kC, kPack<T>);
  test_nearest<T>(2, 3, 4, 0);
  test_nearest<T>(0, 3, 4, 2);
  test_nearest<T>(2, 0, 4, 2);
  for (const bool l1 : {false, true}) {
    test_reconstruct<T>({2, 9, 12, kC, kC, 3, 0.5, l1});
    test_reconstruct<T>({1, 70, 66, 5, 7, 20, 0.2, l1, 1});
    test_reconstruct<T>({1, 6, 50, kC, 150, 50, 0.05, l1});            // all kept; several chunks of values
    test_reconstruct<T>({1, 12, 7, kC, 4, 2, 9, l1});                  // norms at their floor
    test_reconstruct<T>({1, 12, 7, kC, 4, 7, 400, l1, kPack<T>});      // most weights underflow
    test_reconstruct<T>({2, 7, 9, 10 * kC, 33 * kPack<T>, 1, 1, l1});  // deep rows, two steps of packed values
  }
  test_reconstruct<T>({1, 3, 1030, 4, 2, 20});  // ranks are not kept in registers
  test_reconstruct<T>({1, 4, 5, 0, 3, 2});
  test_reconstruct<T>({1, 4, 5, 3, 0, 2});
  test_reconstruct<T>({0, 4, 5, 3, 3, 2});
  test_reconstruct<T>({2, 0, 5, 3, 3, 2});
}

}  // namespace
}  // namespace tokenprune

int main() {
  using namespace tokenprune;
  test_clusters<float>();
  test_clusters<__nv_bfloat16>();
  test_reconstructs<float>();
  test_reconstructs<__nv_bfloat16>();
  if (test::kTiny) return test::finish();
  test_clusters<double>();
  test_clusters<__half>();
  test_reconstructs<double>();
  test_reconstructs<__half>();
  test_reconstruct_nan<float>();
  test_reconstruct_nan<double>();
  return test::finish();
}
