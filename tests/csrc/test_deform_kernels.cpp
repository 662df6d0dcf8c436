// SPDX-License-Identifier: Apache-2.0
// The deformable attention kernels on the host model against scalar loops.
#include <algorithm>
#include <numeric>

#include "../../csrc/deform/kernel.cuh"
#include "../../csrc/deform/kernel_lists.cuh"
#include "check.h"

namespace tokenprune {
namespace {

using test::Random;

// Never more than two rows of blocks, so that every kernel goes round its loop over (image, head).
struct NarrowLauncher {
  template <typename... Parameters, typename... Args>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) const {
    grid.y = std::min(grid.y, 2u);
    host_model::Launcher{}(kernel, grid, block, shared_bytes, args...);
  }
};
const NarrowLauncher launch;
constexpr int kScanBlock = 64;

struct Shape {
  const char* name;
  int64_t batch, heads, dim, queries, points;
  std::vector<Level> levels;  // starts are filled in, unless the contents are given by the device
  bool device = false, mask = false, crowded = false;
  int64_t extra = 0;                                                         // padding of every row
  int64_t reference_levels = 1, reference_columns = 2, reference_batch = 0;  // 0: one row for all images
  int64_t tokens = -1;                                                       // other than what the levels add up to
};

// One case: the arguments, the results and what they should be.
template <typename T, typename P>
struct Case {
  using A = Acc<T>;
  Shape k;
  bool fused;
  DeformParams p;
  Random random{1};
  std::vector<T> value, out, grad_out, grad_value;
  std::vector<P> locations, weights, grad_locations, grad_weights;
  std::vector<A> reference, grad_reference;
  std::vector<uint8_t> mask;
  std::vector<int64_t> shapes, starts, level_workspace;
  int64_t total;

  std::vector<double> want_out, want_value, want_locations, want_weights, want_reference;

  Case(const Shape& shape, bool is_fused) : k(shape), fused(is_fused) {
    int64_t tokens = std::max<int64_t>(k.tokens, 0);
    for (Level& l : k.levels) {
      if (!k.device) l.start = tokens;
      if (k.tokens < 0) tokens += l.height * l.width;
      shapes.insert(shapes.end(), {l.height, l.width}), starts.push_back(l.start);
    }
    p.batch = k.batch, p.heads = k.heads, p.dim = k.dim, p.queries = k.queries, p.points = k.points;
    p.tokens = tokens, p.levels = static_cast<int64_t>(k.levels.size()), p.fused = fused;
    p.offsets_are_values = fused && std::is_same_v<P, T>;
    total = p.levels * p.points;
    random = Random(tokens * 31 + k.queries * 7 + k.dim);
    if (k.device) {
      p.shapes = shapes.data(), p.starts = starts.data();
    } else {
      p.level = k.levels.data();
    }
    level_workspace.resize(3 * k.levels.size());
    fill_values();
    fill_points();
    p.out = (out = std::vector<T>(k.batch * k.queries * k.heads * k.dim)).data();
  }

  void fill_values() {
    p.value_head = k.dim, p.value_token = k.heads * k.dim + k.extra, p.value_batch = p.tokens * p.value_token;
    value = random.values<T>(k.batch * p.value_batch);
    p.value = value.data();
    p.grad_out = {nullptr, k.queries * (k.heads * k.dim + k.extra), k.heads * k.dim + k.extra};
    grad_out = random.values<T>(k.batch * p.grad_out.batch_stride);
    p.grad_out.data = grad_out.data();
    if (!k.mask) return;
    mask.resize(k.batch * p.tokens);
    for (int64_t i = 0; i < static_cast<int64_t>(mask.size()); ++i) {
      mask[i] = random.integer(0, 3) == 0;
      if (mask[i]) {  // what is masked may be anything
        T* row = value.data() + i * p.value_token;
        std::fill(row, row + k.heads * k.dim, from_acc<T>(A(NAN)));
      }
    }
    p.mask = reinterpret_cast<const bool*>(mask.data());
  }

  void fill_points() {
    const int64_t inner = k.heads * total, count = k.batch * k.queries;
    p.locations = {nullptr, k.queries * (2 * inner + k.extra), 2 * inner + k.extra};
    p.weights = {nullptr, k.queries * (inner + k.extra), inner + k.extra};
    locations.resize(count * p.locations.query_stride), weights.resize(count * p.weights.query_stride);
    for (P& v : weights) v = from_acc<P>(static_cast<Acc<P>>(2 * random.uniform()));
    const double scale = fused ? 3.0 : 0.8, centre = fused ? 0.0 : 0.5;
    for (size_t i = 0; i < locations.size(); ++i) {
      double v = centre + scale * random.uniform();
      if (k.crowded) v = fused ? 0.25 : 0.37;
      if (!k.crowded && i % 37 == 5) v = NAN;
      if (!k.crowded && i % 41 == 7) v = i % 2 ? INFINITY : -1e30;
      locations[i] = from_acc<P>(static_cast<Acc<P>>(v));
    }
    p.locations.data = locations.data(), p.weights.data = weights.data();
    if (!fused) return;
    p.reference_levels = k.reference_levels, p.reference_columns = k.reference_columns;
    const int64_t row = k.reference_levels * k.reference_columns;
    reference.resize((k.reference_batch ? k.batch : 1) * k.queries * row);
    for (A& v : reference) v = static_cast<A>(k.crowded ? 0.5 : 0.5 + 0.5 * random.uniform());
    p.reference = {reference.data(), k.reference_batch ? k.queries * row : 0, row};
  }

  std::string name(const char* what) const {
    return std::string(k.name) + " " + (fused ? "fused " : "classic ") + test::type_name<T>() +
           (std::is_same_v<P, T> ? " " : " wide ") + what;
  }

  // ---- scalar loops

  bool readable(int64_t b, const Level& l, int64_t y, int64_t x) const {
    if (!in_range(y, l.height) || !in_range(x, l.width)) return false;
    return mask.empty() || !mask[b * p.tokens + l.start + y * l.width + x];
  }

  // f(point number in the pair, its level, attention weight, x, y) for all points of a pair; coordinates are rounded
  // as the kernel does.
  template <typename F>
  void each_point(int64_t b, int64_t q, int64_t m, F&& f) const {
    const P* location = locations.data() + b * p.locations.batch_stride + q * p.locations.query_stride + m * total * 2;
    const P* weight = weights.data() + b * p.weights.batch_stride + q * p.weights.query_stride + m * total;
    double largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < total; ++i) largest = std::max<double>(largest, to_acc(weight[i]));
    for (int64_t i = 0; i < total; ++i) sum += std::exp(to_acc(weight[i]) - largest);
    for (int64_t i = 0; i < total; ++i) {
      const int64_t l = i / k.points;
      Level level = k.levels[l];
      if (!level_fits(level.height, level.width, level.start, p.tokens)) level = {};
      const auto pixel = [&](int axis, int64_t size) -> A {
        const A given = to_acc(location[2 * i + axis]), extent = static_cast<A>(size);
        if (!fused) return pixel_of_location(given, extent);
        const A* r = reference_row(b, q, l);
        if (k.reference_columns == 2) return pixel_of_offset(r[axis], given, extent);
        return pixel_of_box_offset(r[axis], r[2 + axis], given, A(1) / static_cast<A>(k.points), extent);
      };
      const double a = fused ? std::exp(to_acc(weight[i]) - largest) / sum : static_cast<double>(to_acc(weight[i]));
      f(i, level, a, pixel(0, level.width), pixel(1, level.height));
    }
  }
  int64_t reference_offset(int64_t b, int64_t q, int64_t l) const {
    return ((b * k.queries + q) * k.reference_levels + (k.reference_levels == 1 ? 0 : l)) * k.reference_columns;
  }
  const A* reference_row(int64_t b, int64_t q, int64_t l) const {
    return reference.data() + reference_offset(k.reference_batch ? b : 0, q, l);
  }

  // Adds factor * (bilinear weight of the corner, its derivatives) through f(row, weight, by x, by y).
  template <typename F>
  void each_corner(int64_t b, const Level& l, A x, A y, F&& f) const {
    if (!(x > A(-1) && y > A(-1) && x < static_cast<A>(l.width) && y < static_cast<A>(l.height))) return;
    const double left = std::floor(x), top = std::floor(y), fx = x - left, fy = y - top;
    for (int64_t dy = 0; dy < 2; ++dy) {
      for (int64_t dx = 0; dx < 2; ++dx) {
        const int64_t cx = static_cast<int64_t>(left) + dx, cy = static_cast<int64_t>(top) + dy;
        if (!readable(b, l, cy, cx)) continue;
        const double wx = dx ? fx : 1 - fx, wy = dy ? fy : 1 - fy;
        f(l.start + cy * l.width + cx, wx * wy, (dx ? 1 : -1) * wy, (dy ? 1 : -1) * wx);
      }
    }
  }

  void loops() {
    const int64_t channels = k.heads * k.dim;
    want_out.assign(out.size(), 0), want_value.assign(k.batch * p.tokens * channels, 0);
    want_locations.assign(k.batch * k.queries * k.heads * total * 2, 0);
    want_weights.assign(k.batch * k.queries * k.heads * total, 0);
    want_reference.assign(fused ? k.batch * k.queries * k.reference_levels * k.reference_columns : 0, 0);
    for (int64_t b = 0; b < k.batch; ++b) {
      for (int64_t q = 0; q < k.queries; ++q) {
        for (int64_t m = 0; m < k.heads; ++m) pair(b, q, m);
      }
    }
  }

  void pair(int64_t b, int64_t q, int64_t m) {
    const int64_t channels = k.heads * k.dim, number = (b * k.queries + q) * k.heads + m;
    const T* g = grad_out.data() + b * p.grad_out.batch_stride + q * p.grad_out.query_stride + m * k.dim;
    double* weight_grads = want_weights.data() + number * total;
    std::vector<double> attention(total);
    each_point(b, q, m, [&](int64_t i, const Level& l, double a, A x, A y) {
      double by_x = 0, by_y = 0;
      attention[i] = a;
      each_corner(b, l, x, y, [&](int64_t row, double w, double dx, double dy) {
        const T* v = value.data() + b * p.value_batch + row * p.value_token + m * k.dim;
        for (int64_t d = 0; d < k.dim; ++d) {
          const double read = to_acc(v[d]), grad = to_acc(g[d]);
          want_out[number * k.dim + d] += a * w * read;
          want_value[(b * p.tokens + row) * channels + m * k.dim + d] += a * w * grad;
          weight_grads[i] += w * read * grad;
          by_x += a * dx * read * grad, by_y += a * dy * read * grad;
        }
      });
      point_grads(b, q, m, i, l, by_x, by_y);
    });
    double delta = 0;
    for (int64_t i = 0; i < total; ++i) delta += attention[i] * weight_grads[i];
    for (int64_t i = 0; fused && i < total; ++i) weight_grads[i] = attention[i] * (weight_grads[i] - delta);
  }

  void point_grads(int64_t b, int64_t q, int64_t m, int64_t i, const Level& l, double by_x, double by_y) {
    double* grads = want_locations.data() + (((b * k.queries + q) * k.heads + m) * total + i) * 2;
    const double size[2] = {static_cast<double>(l.width), static_cast<double>(l.height)}, by[2] = {by_x, by_y};
    for (int axis = 0; axis < 2; ++axis) {
      if (by[axis] == 0) continue;  // a point that reads nothing, with any offset
      if (!fused) {
        grads[axis] = by[axis] * size[axis];
        continue;
      }
      const int64_t level = i / k.points, at_row = reference_offset(b, q, level);
      const double offset =
          to_acc(locations[b * p.locations.batch_stride + q * p.locations.query_stride + (m * total + i) * 2 + axis]);
      want_reference[at_row + axis] += by[axis] * size[axis];
      grads[axis] = by[axis];
      if (k.reference_columns == 4) {
        const double half = 0.5 / static_cast<double>(k.points);
        grads[axis] = by[axis] * size[axis] * half * static_cast<double>(reference_row(b, q, level)[2 + axis]);
        want_reference[at_row + 2 + axis] += by[axis] * size[axis] * half * offset;
      }
    }
  }

  // ---- kernels

  void forward() { launch_deform<T>(launch, p, level_workspace.data()); }

  void backward() {
    const int64_t count = k.batch * k.heads * k.queries * total;
    grad_value.assign(k.batch * p.tokens * k.heads * k.dim, from_acc<T>(A(7)));
    grad_locations.assign(2 * count, from_acc<P>(Acc<P>(7))), grad_weights.assign(count, from_acc<P>(Acc<P>(7)));
    grad_reference.assign(want_reference.size(), A(7));
    p.grad_value = grad_value.data(), p.grad_locations = grad_locations.data(), p.grad_weights = grad_weights.data();
    p.grad_reference = fused ? grad_reference.data() : nullptr;
    std::vector<int32_t> start(k.batch * k.heads * (p.tokens + 1), -5), cell(count), slot(count), member(count);
    std::vector<Pack<A, 4>> corners(count);
    std::vector<Pack<A, 2>> pixel_grads(count);
    DeformLists<A> lists;
    lists.start = start.data(), lists.cell = cell.data(), lists.slot = slot.data(), lists.member = member.data();
    lists.weights = corners.data(), lists.pixel_grads = fused ? pixel_grads.data() : nullptr;
    launch_deform_backward<T, kScanBlock>(launch, p, lists, level_workspace.data());
    bool ascending = true;  // in order, so that the sums do not depend on who came first
    for (size_t i = 0; i + 1 < start.size() && p.dim > 0; ++i) {
      const int64_t segment = static_cast<int64_t>(i) / (p.tokens + 1);
      if (static_cast<int64_t>(i + 1) % (p.tokens + 1) == 0) continue;
      const int32_t* list = member.data() + segment * k.queries * total;
      ascending &= std::is_sorted(list + start[i], list + start[i + 1]);
    }
    test::report(name("lists"), ascending, "");
  }

  void run() {
    loops();
    forward();
    test::close(name("out"), out, want_out, test::tolerance<T>());
    backward();
    // One rounding of a sum that may be large.
    const double fine = sizeof(T) == 8 ? 1e-11 : 1e-4;
    test::close(name("grad value"), grad_value, want_value, test::tolerance<T>());
    test::close(name("grad locations"), grad_locations, want_locations, sizeof(P) == 2 ? 1e-2 : fine);
    test::close(name("grad weights"), grad_weights, want_weights, sizeof(P) == 2 ? 1e-2 : fine);
    test::close(name("grad reference"), grad_reference, want_reference, fine);
  }
};

template <typename T>
void test_shape(const Shape& k) {
  using A = Acc<T>;
  if (!k.mask) Case<T, A>(k, false).run();
  Case<T, A>(k, true).run();
  if (sizeof(T) == 2) Case<T, T>(k, true).run();
}

template <typename T>
void test_shapes() {
  if (test::kTiny) {
    test_shape<T>({"tiny", 1, 2, 16, 5, 9, {{3, 4}, {2, 1}}, false, true});  // 18 points: two chunks
    return;
  }
  test_shape<T>({"injector", 2, 3, 32, 24, 4, {{8, 12}, {4, 6}, {2, 3}}});
  test_shape<T>({"extractor", 1, 2, 16, 126, 4, {{4, 6}}, true, true});
  test_shape<T>({"encoder", 2, 2, 24, 77, 3, {{7, 9}, {3, 4}, {1, 2}}, true, false, false, 8, 3, 4, 1});
  test_shape<T>({"odd width", 1, 3, 7, 11, 3, {{5, 3}, {2, 2}}, false, true, false, 3, 2, 2});
  test_shape<T>({"odd rows", 2, 1, 16, 9, 2, {{5, 5}}, false, false, false, 1, 1, 4, 1});
  test_shape<T>({"many points", 1, 2, 8, 6, 7, {{4, 4}, {3, 3}, {2, 2}, {1, 1}, {1, 5}}, true, false, false, 0, 5, 4});
  test_shape<T>({"wide", 1, 1, 600, 3, 2, {{3, 3}}});
  test_shape<T>({"wide, many points", 1, 1, 290, 2, 20, {{3, 3}}});
  test_shape<T>({"one channel", 2, 2, 1, 5, 1, {{1, 1}, {1, 7}}});
  test_shape<T>({"crowded", 1, 1, 8, 60, 8, {{4, 5}}, false, false, true});
  test_shape<T>({"ten levels", 1, 1, 8, 4, 1, std::vector<Level>(10, Level{1, 2, 0})});
  test_shape<T>({"hole", 1, 1, 8, 9, 2, {{0, 4}, {3, 3}, {2, 0}}});
  // Contents that contradict each other: negative, too large, overlapping, beyond the end.
  test_shape<T>({"wrong levels",
                 2,
                 2,
                 8,
                 13,
                 2,
                 {{-3, 4, 0},
                  {int64_t{1} << 40, int64_t{1} << 40, 0},
                  {3, 4, 2},
                  {4, 3, 1},
                  {5, 5, 0},
                  {2, 2, -1},
                  {1, 1, INT64_MAX},
                  {3, 3, 12}},
                 true,
                 false,
                 false,
                 0,
                 8,
                 2,
                 0,
                 20});
  test_shape<T>({"no queries", 2, 2, 8, 0, 2, {{3, 4}}});
  test_shape<T>({"no points", 2, 2, 8, 3, 0, {{3, 4}}});
  test_shape<T>({"no levels", 2, 2, 8, 3, 2, {}, true});
  test_shape<T>({"no tokens", 1, 2, 8, 3, 2, {{0, 0}}});
  test_shape<T>({"no batch", 0, 2, 8, 3, 2, {{3, 4}}});
  test_shape<T>({"no heads", 2, 0, 8, 3, 2, std::vector<Level>(10, Level{1, 2, 0})});
  test_shape<T>({"no channels", 2, 2, 0, 3, 2, {{3, 4}}});
}

void test_orders(int64_t queries, const std::vector<Level>& levels) {
  std::vector<LevelBox> boxes;
  for (const Level& l : levels) {
    boxes.push_back({static_cast<int32_t>(l.height), static_cast<int32_t>(l.width), 0, 0});
  }
  std::vector<int64_t> seen(queries), all(queries);
  for (int64_t i = 0; i < queries; ++i) {
    seen[i] = query_at(boxes.data(), static_cast<int64_t>(boxes.size()), queries, i);
  }
  std::sort(seen.begin(), seen.end());
  std::iota(all.begin(), all.end(), 0);
  test::equal("order of " + std::to_string(queries) + " queries", seen, all);
}

// Lists of given lengths, each a segment of its own pixels, in disorder.
void test_sorting(const std::vector<int64_t>& lengths, int64_t segments) {
  const int64_t tokens = static_cast<int64_t>(lengths.size());
  const int64_t per_segment = std::accumulate(lengths.begin(), lengths.end(), int64_t{3});
  std::vector<int32_t> start, member(segments * per_segment), want;
  Random random(9);
  for (int64_t s = 0; s < segments; ++s) {
    start.push_back(0);
    int32_t* list = member.data() + s * per_segment;
    std::iota(list, list + per_segment, 0);
    for (int64_t i = per_segment - 1; i > 0; --i) std::swap(list[i], list[random.integer(0, i)]);
    for (int64_t n : lengths) start.push_back(start.back() + static_cast<int32_t>(n));
  }
  want = member;
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t i = 0; i < tokens; ++i) {
      int32_t* list = want.data() + s * per_segment;
      std::sort(list + start[s * (tokens + 1) + i], list + start[s * (tokens + 1) + i + 1]);
    }
  }
  launch(&sort_short_lists<64>, dim3(2, 2), 64, 0, member.data(), start.data(), segments, tokens, per_segment);
  launch(&sort_long_lists<64>, dim3(3, 2), 64, 0, member.data(), start.data(), segments, tokens, per_segment);
  test::equal("sorting " + std::to_string(tokens) + " lists", member, want);
}

void test_division() {
  bool good = true;
  for (int64_t d : {1u, 2u, 3u, 7u, 12u, 16u, 48u, 1000u, 65537u, (1u << 30) + 1, (1u << 31) - 1}) {
    const Divider divide(d);
    for (uint32_t q : {0u, 1u, 5u, ((1u << 31) - 1) / static_cast<uint32_t>(d)}) {
      for (int64_t n : {q * d, q * d + d - 1, q * d - 1, (int64_t{1} << 31) - 1}) {
        if (in_range(n, int64_t{1} << 31)) good &= divide(static_cast<uint32_t>(n)) == n / d;
      }
    }
  }
  test::report("division by multiplication", good, "");
}

void test_scan(int64_t segments, int64_t tokens) {
  Random random(3);
  std::vector<int32_t> start(segments * (tokens + 1)), want(start.size());
  for (int64_t i = 0; i < static_cast<int64_t>(start.size()); ++i) {
    const int64_t in_segment = i % (tokens + 1);
    start[i] = in_segment == 0 ? 0 : static_cast<int32_t>(random.integer(0, 5));
    want[i] = in_segment == 0 ? 0 : want[i - 1] + start[i];
  }
  launch(&scan_lists<kScanBlock>, 2, kScanBlock, 0, start.data(), segments, tokens);
  test::equal("scan " + std::to_string(tokens), start, want);
}

}  // namespace
}  // namespace tokenprune

int main() {
  using namespace tokenprune;
  test_shapes<float>();
  test_shapes<__nv_bfloat16>();
  test_sorting({3, 40, 9, 0, 2}, 1);
  test_scan(2, 70);
  if (test::kTiny) return test::finish();
  test_shapes<double>();
  test_shapes<__half>();
  test_division();
  test_orders(35, {{5, 7}});
  test_orders(20 * 13 + 10 * 6 + 5 * 3, {{20, 13}, {10, 6}, {5, 3}});
  test_orders(5 * 12 * 10 + 6 * 5, {{12, 10}});
  test_orders(33, {{4, 4}, {2, 2}});
  std::vector<int64_t> lengths(70);
  std::iota(lengths.begin(), lengths.end(), 0);
  test_sorting(lengths, 3);
  test_sorting({1, 129, 0, 4096, 2, 4097, 7, 5000, 33}, 2);
  for (int64_t tokens : {1, 511, 512, 513, 1500}) test_scan(3, tokens);
  return test::finish();
}
