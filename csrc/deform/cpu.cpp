// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation and the loops over ranges of queries and bands of values.
#include "../common/dtype.h"
#include "../common/pages.h"
#include "cpu_order.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const DeformKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? deform_kernels_generic : deform_kernels(); }

constexpr int64_t kShares = 16;             // of the ranges for each thread: they take different times
constexpr int64_t kMostBand = 8 << 20;      // bytes of one band's gradient
constexpr int64_t kMostStreams = 64 << 20;  // bytes of the streams of one group of images

int64_t bytes_of(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return t.numel() * (dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2);
}

// f(range) for all ranges of queries of `images` images. A thread takes several neighbours at a time: each finds values
// in the cache that the one before has read.
template <typename F>
void for_ranges(const DeformParams& p, const QueryOrder& order, int64_t first_image, int64_t images, const F& f) {
  const auto [first, last] = order.ranges_of(first_image, images);
  const int64_t work = p.heads * (p.levels * p.points + 1) * (p.dim / 4 + 8);
  const int64_t count = last - first, step = std::max<int64_t>(1, count / (kShares * torch::stable::get_num_threads()));
  parallel_items((count + step - 1) / step, step * std::min(kRange, p.queries) * work,
                 [&, first = first, last = last](int64_t item) {
                   const int64_t begin = first + item * step, end = std::min<int64_t>(last, begin + step);
                   for (int64_t i = begin; i < end; ++i) f(order.ranges()[i]);
                 });
}

Tensor forward(DeformCall& call) {
  const DeformParams& p = call.p;
  const Dtype dtype = kernel_dtype(call.op, call.dtype);
  Tensor out = call.new_out();
  prefer_huge_pages(p.out, bytes_of(out));
  const DeformKernels& table = kernels(dtype);
  const int64_t bytes = table.forward_scratch(p);
  const QueryOrder order(call);
  for_ranges(p, order, 0, p.batch, [&](QueryRange range) { table.forward(dtype, p, range, thread_scratch(bytes)); });
  return out;
}

// As few bands as give every thread work, and buffers that are not too large. The result does not depend on it.
int64_t count_bands(const DeformParams& p, int64_t images) {
  int64_t pixels = 1, rows = 1;
  for (int64_t l = 0; l < p.levels; ++l) {
    pixels = std::max(pixels, p.level[l].height * p.level[l].width);
    rows = std::max(rows, p.level[l].height);
  }
  const int64_t items = std::max<int64_t>(1, images * p.heads * p.levels);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t for_threads = items % threads == 0 ? 1 : (4 * threads + items - 1) / items;
  const int64_t for_memory = (pixels * (p.dim + 16) * 4 + kMostBand - 1) / kMostBand;
  return std::min(rows, std::max(for_threads, for_memory));
}

// grad_value is allocated by the caller, as the other results are.
void backward(DeformCall& call, const Tensor& grad_value) {
  const DeformParams& p = call.p;
  const Dtype dtype = kernel_dtype(call.op, call.dtype);
  const DeformKernels& table = kernels(dtype);
  prefer_huge_pages(p.grad_value, bytes_of(grad_value));
  const int64_t per_image = p.heads * p.levels * p.queries * p.points;
  const int64_t size = call.stat == ScalarType::Double ? 8 : 4;
  const int64_t fitting = kMostStreams / std::max<int64_t>(1, per_image * 3 * size);
  const int64_t group = std::max<int64_t>(1, std::min(p.batch, fitting));
  const int64_t bands = count_bands(p, group), part = group * per_image + 64;  // readable beyond the end
  const int64_t points_bytes = table.backward_points_scratch(p), values_bytes = table.backward_values_scratch(p, bands);
  Tensor memory = torch::stable::new_empty(call.like, {3, part}, call.stat);
  const QueryOrder order(call);
  PointStreams s;
  s.order_stride = order.stride();
  s.xy = memory.mutable_data_ptr(), s.weight = static_cast<char*>(s.xy) + 2 * part * size;
  for (int64_t first = 0; first < p.batch; first += group) {
    const int64_t images = std::min(group, p.batch - first);
    s.first_image = first, s.order = order.order(first);
    for_ranges(p, order, first, images,
               [&](QueryRange range) { table.backward_points(dtype, p, s, range, thread_scratch(points_bytes)); });
    parallel_items(
        images * p.heads * p.levels * bands, (p.queries * p.points + p.tokens) * (p.dim / 4 + 8),
        [&](int64_t item) { table.backward_values(dtype, p, s, item, bands, thread_scratch(values_bytes)); });
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
  backward(call, grad_value);
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
  backward(call, grad_value);
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
