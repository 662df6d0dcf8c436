// SPDX-License-Identifier: Apache-2.0
// CUDA side of deformable attention, backward.
#include "cuda_common.h"
#include "kernel_lists.cuh"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;
using List = std::vector<int64_t>;

// Workspace of the backward: see DeformLists.
struct ListTensors {
  Tensor start, cell, slot, member, weights, pixel_grads;

  explicit ListTensors(const DeformCall& call)
      : start(ints(call, segments(call) * (call.p.tokens + 1))),
        cell(ints(call, points(call))),
        slot(ints(call, points(call))),
        member(ints(call, points(call))),
        weights(stats(call, 4 * points(call))),
        pixel_grads(stats(call, call.p.grad_reference != nullptr ? 2 * points(call) : 0)) {}

  static int64_t segments(const DeformCall& call) { return call.p.batch * call.p.heads; }
  static int64_t points(const DeformCall& call) {
    return segments(call) * call.p.queries * call.p.levels * call.p.points;
  }
  static Tensor ints(const DeformCall& call, int64_t count) {
    return torch::stable::new_empty(call.like, {count}, ScalarType::Int);
  }
  static Tensor stats(const DeformCall& call, int64_t count) {
    return torch::stable::new_empty(call.like, {count}, call.stat);
  }

  template <typename A>
  DeformLists<A> pointers(bool want_reference) const {
    DeformLists<A> lists;
    lists.start = mutable_data<int32_t>(start), lists.cell = mutable_data<int32_t>(cell);
    lists.slot = mutable_data<int32_t>(slot), lists.member = mutable_data<int32_t>(member);
    lists.weights = mutable_data<Pack<A, 4>>(weights);
    if (want_reference) lists.pixel_grads = mutable_data<Pack<A, 2>>(pixel_grads);
    return lists;
  }
};

void backward(DeformCall& call) {
  const DeformParams& p = call.p;
  TP_CHECK(p.levels * p.points == 0 || p.queries <= INT32_MAX / (p.levels * p.points), call.op,
           "queries * levels * points must be below 2^31 on CUDA, got ", p.queries, " * ", p.levels, " * ", p.points);
  const Launcher launch(call.like);
  const Tensor levels = new_level_workspace(call);
  const ListTensors tensors(call);
  visit_floating_cuda(call.op, call.dtype, [&]<typename T>() {
    check_deform_sizes<T>(call);
    launch_deform_backward<T>(launch, p, tensors.pointers<Acc<T>>(p.grad_reference != nullptr),
                              mutable_data<int64_t>(levels));
  });
}

// Shapes is Tensor or the list of sizes.
template <typename Shapes, typename Starts>
std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value,
                                                           const Shapes& shapes, const Starts& starts,
                                                           const Tensor& locations, const Tensor& weights) {
  DeformCall call("ms_deform_attn_backward", narrow_rows(value), shapes, starts);
  call.set_classic(locations, weights);
  call.set_grad(grad);
  Tensor grad_value = call.new_grad_value(), grad_locations = call.new_grad_locations(),
         grad_weights = call.new_grad_weights();
  backward(call);
  return {grad_value, grad_locations, grad_weights};
}

template <typename Shapes, typename Starts>
std::tuple<Tensor, Tensor, Tensor, Tensor> ms_deform_attn_fused_backward(const Tensor& grad, const Tensor& value,
                                                                         const Shapes& shapes, const Starts& starts,
                                                                         const Tensor& reference, const Tensor& offsets,
                                                                         const Tensor& logits, const Optional& mask,
                                                                         bool want_reference) {
  DeformCall call("ms_deform_attn_fused_backward", narrow_rows(value), shapes, starts);
  call.set_fused(reference, offsets, logits, mask);
  call.set_grad(grad);
  Tensor grad_value = call.new_grad_value(), grad_reference = call.new_grad_reference(want_reference),
         grad_offsets = call.new_grad_locations(), grad_logits = call.new_grad_weights();
  backward(call);
  return {grad_value, grad_reference, grad_offsets, grad_logits};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("ms_deform_attn_backward", TORCH_BOX((&ms_deform_attn_backward<Tensor, Tensor>)));
  m.impl("ms_deform_attn_backward.list", TORCH_BOX((&ms_deform_attn_backward<List, Optional>)));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX((&ms_deform_attn_fused_backward<Tensor, Tensor>)));
  m.impl("ms_deform_attn_fused_backward.list", TORCH_BOX((&ms_deform_attn_fused_backward<List, Optional>)));
}

}  // namespace
}  // namespace tokenprune
