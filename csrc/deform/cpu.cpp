// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, the order in which queries are visited, and the loops over items.
#include <algorithm>
#include <cmath>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const DeformKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? deform_kernels_generic : deform_kernels(); }

constexpr int64_t kChunk = 64;              // queries per item: neighbours whose surroundings the caches hold together
constexpr int64_t kMostBand = 8 << 20;      // bytes of one band's gradient
constexpr int64_t kMostStreams = 64 << 20;  // bytes of the streams of one group of images

// ---- the order of the queries: along a Morton curve through the image, found by counting sort

constexpr int64_t kCells = 64;  // per side

uint32_t spread_bits(uint32_t v) {  // 6 bits to the even places
  uint32_t r = 0;
  for (int i = 0; i < 6; ++i) r |= (v >> i & 1) << 2 * i;
  return r;
}

template <typename C>
void sort_queries(const C* first, int64_t stride, int64_t queries, int32_t* order) {
  static const std::vector<uint32_t> spread = [] {
    std::vector<uint32_t> table(kCells);
    for (int64_t i = 0; i < kCells; ++i) table[i] = spread_bits(static_cast<uint32_t>(i));
    return table;
  }();
  const auto cell = [](C v) {
    const C c = v * C(kCells);
    return c > 0 ? static_cast<int64_t>(std::min(c, C(kCells - 1))) : int64_t{0};  // NaN: 0
  };
  std::vector<uint16_t> code(queries);
  std::vector<int32_t> next(kCells * kCells + 1);
  for (int64_t q = 0; q < queries; ++q) {
    const C* xy = first + q * stride;
    code[q] = static_cast<uint16_t>(spread[cell(xy[0])] | spread[cell(xy[1])] << 1);
    ++next[code[q] + 1];
  }
  for (int64_t c = 0; c < kCells * kCells; ++c) next[c + 1] += next[c];
  for (int64_t q = 0; q < queries; ++q) order[next[code[q]]++] = static_cast<int32_t>(q);
}

// A row of positions per image, or one row for all of them.
struct Order {
  std::vector<int32_t> order;
  int64_t stride = 0;

  explicit Order(const DeformCall& call) {
    const DeformParams& p = call.p;
    const QueryRows& rows = p.fused ? p.reference : p.locations;
    const bool shared = rows.batch_stride == 0 || p.queries <= 2 * kChunk;
    const int64_t images = shared ? std::min<int64_t>(p.batch, 1) : p.batch;
    stride = shared ? 0 : p.queries;
    order.resize(images * p.queries);
    const bool sort = p.queries > 2 * kChunk && p.heads * p.levels * p.points > 0;
    parallel_items(images, p.queries * 16, [&](int64_t b) {
      int32_t* to = order.data() + b * p.queries;
      if (!sort) {
        for (int64_t q = 0; q < p.queries; ++q) to[q] = static_cast<int32_t>(q);
      } else if (call.stat == ScalarType::Double) {
        sort_queries(static_cast<const double*>(rows.data) + b * rows.batch_stride, rows.query_stride, p.queries, to);
      } else {
        sort_queries(static_cast<const float*>(rows.data) + b * rows.batch_stride, rows.query_stride, p.queries, to);
      }
    });
  }
  const int32_t* of(int64_t image) const { return order.data() + image * stride; }
};

// f(image, begin, count) for chunks of the queries of all images.
template <typename F>
void for_chunks(const DeformParams& p, int64_t first_image, int64_t images, int64_t work, const F& f) {
  const int64_t chunks = (p.queries + kChunk - 1) / kChunk;
  parallel_items(images * chunks, kChunk * work, [&](int64_t item) {
    const int64_t begin = item % chunks * kChunk;
    f(first_image + item / chunks, begin, std::min(kChunk, p.queries - begin));
  });
}

// ---- forward

Tensor forward(DeformCall& call) {
  DeformParams& p = call.p;
  Tensor out = call.new_out();
  const Dtype dtype = kernel_dtype(call.op, call.dtype);
  const Order order(call);
  const DeformKernels& table = kernels(dtype);
  const int64_t bytes = table.forward_scratch(p, kChunk);
  const int64_t work = p.heads * p.levels * p.points * (p.dim / 4 + 8);
  for_chunks(p, 0, p.batch, work, [&](int64_t image, int64_t begin, int64_t count) {
    table.forward(dtype, p, image, order.of(image) + begin, count, thread_scratch(bytes));
  });
  return out;
}

// ---- backward

// As few bands as give every thread work, and buffers that are not too large. The result does not depend on it.
int64_t count_bands(const DeformParams& p, int64_t images) {
  int64_t pixels = 1, rows = 1;
  for (int64_t l = 0; l < p.levels; ++l) {
    pixels = std::max(pixels, p.level[l].height * p.level[l].width);
    rows = std::max(rows, p.level[l].height);
  }
  const int64_t items = std::max<int64_t>(1, images * p.heads * p.levels);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t for_threads = items >= threads ? 1 : (threads + items - 1) / items;
  const int64_t for_memory = (pixels * (p.dim + 16) * 4 + kMostBand - 1) / kMostBand;
  return std::min(rows, std::max(for_threads, for_memory));
}

void backward(DeformCall& call) {
  DeformParams& p = call.p;
  const Dtype dtype = kernel_dtype(call.op, call.dtype);
  const DeformKernels& table = kernels(dtype);
  const Order order(call);
  const int64_t size = call.stat == ScalarType::Double ? 8 : 4;
  const int64_t per_image = p.heads * p.levels * p.queries * p.points;
  const int64_t fitting = kMostStreams / std::max<int64_t>(1, per_image * 6 * size);
  const int64_t group = std::max<int64_t>(1, std::min(p.batch, fitting));
  const int64_t bands = count_bands(p, group);
  const int64_t bytes = table.forward_scratch(p, kChunk) + 32 * (p.heads + 1) * (p.levels * p.points + 16);
  const int64_t band_bytes = table.backward_scratch(p, bands);
  Tensor streams = torch::stable::new_empty(call.like, {6, group * per_image + 64}, call.stat);
  char* memory = static_cast<char*>(streams.mutable_data_ptr());
  const int64_t part = (group * per_image + 64) * size;
  for (int64_t first = 0; first < p.batch; first += group) {
    const int64_t images = std::min(group, p.batch - first), points = p.heads * p.levels * p.points;
    DeformStreams s;
    s.pixels = memory, s.grad_pixels = memory + 2 * part;
    s.weights = memory + 4 * part, s.grad_weights = memory + 5 * part;
    s.first_image = first, s.order = order.of(first), s.order_stride = order.stride;
    if (per_image > 0) {
      for_chunks(p, first, images, points * 4, [&](int64_t image, int64_t begin, int64_t count) {
        table.stream_points(dtype, p, s, image, begin, count, thread_scratch(bytes));
      });
    }
    parallel_items(images * p.heads * p.levels * bands, p.queries * p.points * (p.dim / 4 + 8),
                   [&](int64_t item) { table.backward(dtype, p, s, item, bands, thread_scratch(band_bytes)); });
    if (per_image > 0 || p.grad_reference != nullptr) {
      for_chunks(p, first, images, points * 4, [&](int64_t image, int64_t begin, int64_t count) {
        table.point_gradients(dtype, p, s, image, begin, count, thread_scratch(bytes));
      });
    }
  }
}

// ---- ops; Shapes is Tensor or the list of sizes

template <typename Shapes, typename Starts>
Tensor ms_deform_attn(const Tensor& value, const Shapes& shapes, const Starts& starts, const Tensor& locations,
                      const Tensor& weights, int64_t) {
  DeformCall call("ms_deform_attn", value, shapes, starts);
  call.set_classic(locations, weights);
  return forward(call);
}

template <typename Shapes, typename Starts>
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value,
                                                           const Shapes& shapes, const Starts& starts,
                                                           const Tensor& locations, const Tensor& weights) {
  DeformCall call("ms_deform_attn_backward", value, shapes, starts);
  call.set_classic(locations, weights);
  call.set_grad(grad);
  Tensor grad_value = call.new_grad_value(), grad_locations = call.new_grad_locations(),
         grad_weights = call.new_grad_weights();
  backward(call);
  return {grad_value, grad_locations, grad_weights};
}

template <typename Shapes, typename Starts>
Tensor ms_deform_attn_fused(const Tensor& value, const Shapes& shapes, const Starts& starts, const Tensor& reference,
                            const Tensor& offsets, const Tensor& logits, const Optional& mask) {
  DeformCall call("ms_deform_attn_fused", value, shapes, starts);
  call.set_fused(reference, offsets, logits, mask);
  return forward(call);
}

template <typename Shapes, typename Starts>
std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(const Tensor& grad, const Tensor& value,
                                                                         const Shapes& shapes, const Starts& starts,
                                                                         const Tensor& reference, const Tensor& offsets,
                                                                         const Tensor& logits, const Optional& mask,
                                                                         bool want_reference) {
  DeformCall call("ms_deform_attn_fused_backward", value, shapes, starts);
  call.set_fused(reference, offsets, logits, mask);
  call.set_grad(grad);
  Tensor grad_value = call.new_grad_value(), grad_reference = call.new_grad_reference(want_reference),
         grad_offsets = call.new_grad_locations(), grad_logits = call.new_grad_weights();
  backward(call);
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

using List = std::vector<int64_t>;

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX((&ms_deform_attn<Tensor, Tensor>)));
  m.impl("ms_deform_attn.list", TORCH_BOX((&ms_deform_attn<List, Optional>)));
  m.impl("ms_deform_attn_backward", TORCH_BOX((&ms_deform_attn_backward<Tensor, Tensor>)));
  m.impl("ms_deform_attn_backward.list", TORCH_BOX((&ms_deform_attn_backward<List, Optional>)));
  m.impl("ms_deform_attn_fused", TORCH_BOX((&ms_deform_attn_fused<Tensor, Tensor>)));
  m.impl("ms_deform_attn_fused.list", TORCH_BOX((&ms_deform_attn_fused<List, Optional>)));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX((&ms_deform_attn_fused_backward<Tensor, Tensor>)));
  m.impl("ms_deform_attn_fused_backward.list", TORCH_BOX((&ms_deform_attn_fused_backward<List, Optional>)));
}

}  // namespace
}  // namespace tokenprune
