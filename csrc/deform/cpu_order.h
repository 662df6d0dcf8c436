// SPDX-License-Identifier: Apache-2.0
// The order in which queries are visited: by tiles of the image, so that the queries of one range read about the same
// values. Queries may come as grids of several sizes, or in no order at all; where they look is taken from their
// reference points or locations. Results do not depend on it. Not for cpu_isa.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {

constexpr int64_t kRange = 128;  // queries per range

class QueryOrder {
 public:
  explicit QueryOrder(const DeformCall& call) : p_(call.p) {
    const QueryRows& rows = p_.fused ? p_.reference : p_.locations;
    const bool sort = p_.queries > 2 * kRange && p_.heads * p_.levels * p_.points > 0;
    shared_ = !sort || rows.batch_stride == 0;
    const int64_t images = shared_ ? std::min<int64_t>(p_.batch, 1) : p_.batch;
    if (sort) choose_tiles();
    order_.resize(images * p_.queries);
    first_.resize(images);
    parallel_items(images, p_.queries * 16, [&](int64_t b) {
      if (call.stat == ScalarType::Double) {
        sort_image(b, static_cast<const double*>(rows.data) + b * rows.batch_stride, rows.query_stride);
      } else {
        sort_image(b, static_cast<const float*>(rows.data) + b * rows.batch_stride, rows.query_stride);
      }
    });
    for (int64_t b = 0; b < p_.batch; ++b) add_ranges(b);
  }

  const std::vector<QueryRange>& ranges() const { return ranges_; }
  // Ranges of the images [first, first + images).
  std::pair<int64_t, int64_t> ranges_of(int64_t first, int64_t images) const {
    const auto before = [](const QueryRange& r, int64_t image) { return r.image < image; };
    const auto at = [&](int64_t image) {
      return std::lower_bound(ranges_.begin(), ranges_.end(), image, before) - ranges_.begin();
    };
    return {at(first), at(first + images)};
  }
  const int32_t* order(int64_t image) const { return order_.data() + (shared_ ? 0 : image * p_.queries); }
  int64_t stride() const { return shared_ ? 0 : p_.queries; }

 private:
  // About kRange queries per tile, square on the level with the most pixels.
  void choose_tiles() {
    const Level* largest = p_.level;
    for (int64_t l = 1; l < p_.levels; ++l) {
      if (p_.level[l].height * p_.level[l].width > largest->height * largest->width) largest = p_.level + l;
    }
    const double tiles = static_cast<double>(p_.queries) / kRange;
    const double shape = std::max<double>(largest->height, 1) / std::max<double>(largest->width, 1);
    const auto between = [](double v) { return static_cast<int64_t>(std::min(std::max(v, 1.0), 256.0)); };
    down_ = between(std::sqrt(tiles * shape) + 0.5);
    across_ = between(tiles / static_cast<double>(down_) + 0.5);
  }

  template <typename C>
  void sort_image(int64_t b, const C* xy, int64_t stride) {
    int32_t* order = order_.data() + b * p_.queries;
    std::vector<int32_t>& next = first_[b];
    next.assign(down_ * across_ + 1, 0);
    const auto cell = [](C v, int64_t cells) {  // NaN: 0
      const C c = v * static_cast<C>(cells);
      return c > 0 ? static_cast<int64_t>(std::min(c, static_cast<C>(cells - 1))) : int64_t{0};
    };
    std::vector<uint16_t> tile(p_.queries, 0);
    for (int64_t q = 0; q < p_.queries; ++q) {
      if (down_ * across_ > 1) {
        tile[q] = static_cast<uint16_t>(cell(xy[q * stride + 1], down_) * across_ + cell(xy[q * stride], across_));
      }
      ++next[tile[q] + 1];
    }
    for (int64_t t = 0; t < down_ * across_; ++t) next[t + 1] += next[t];
    for (int64_t q = 0; q < p_.queries; ++q) order[next[tile[q]]++] = static_cast<int32_t>(q);
  }

  void add_ranges(int64_t image) {
    const std::vector<int32_t>& end = first_[shared_ ? 0 : image];  // after the sort, where each tile ends
    int64_t begin = 0;
    for (int64_t t = 0; t < down_ * across_; ++t) {
      bool first = true;
      for (; begin < end[t]; begin += kRange, first = false) {
        QueryRange r{image, begin, std::min<int64_t>(kRange, end[t] - begin), order(image)};
        if (first && down_ * across_ > 1) {  // the first range of a tile fetches for all of them
          const int64_t y = t / across_, x = t % across_;
          r.left = static_cast<float>(x) / static_cast<float>(across_);
          r.right = static_cast<float>(x + 1) / static_cast<float>(across_);
          r.top = static_cast<float>(y) / static_cast<float>(down_);
          r.bottom = static_cast<float>(y + 1) / static_cast<float>(down_);
        }
        ranges_.push_back(r);
      }
      begin = end[t];
    }
  }

  const DeformParams& p_;
  bool shared_ = true;  // one order for all images
  int64_t down_ = 1, across_ = 1;
  std::vector<int32_t> order_;
  std::vector<std::vector<int32_t>> first_;
  std::vector<QueryRange> ranges_;
};

}  // namespace tokenprune
