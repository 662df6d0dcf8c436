// SPDX-License-Identifier: Apache-2.0
// CUDA side of deformable attention, forward.
#include "cuda_common.h"
#include "kernel.cuh"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;
using List = std::vector<int64_t>;

Tensor forward(DeformCall& call) {
  const Launcher launch(call.like);
  const Tensor levels = new_level_workspace(call);
  Tensor out = call.new_out();
  visit_floating_cuda(call.op, call.dtype, [&]<typename T>() {
    check_deform_sizes<T>(call);
    launch_deform<T>(launch, call.p, mutable_data<int64_t>(levels));
  });
  return out;
}

// Shapes is Tensor or the list of sizes.
template <typename Shapes, typename Starts>
Tensor ms_deform_attn(const Tensor& value, const Shapes& shapes, const Starts& starts, const Tensor& locations,
                      const Tensor& weights, int64_t) {
  DeformCall call("ms_deform_attn", narrow_rows(value), shapes, starts);
  call.set_classic(locations, weights);
  return forward(call);
}

template <typename Shapes, typename Starts>
Tensor ms_deform_attn_fused(const Tensor& value, const Shapes& shapes, const Starts& starts, const Tensor& reference,
                            const Tensor& offsets, const Tensor& logits, const Optional& mask) {
  DeformCall call("ms_deform_attn_fused", narrow_rows(value), shapes, starts);
  call.set_fused(reference, offsets, logits, mask);
  return forward(call);
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX((&ms_deform_attn<Tensor, Tensor>)));
  m.impl("ms_deform_attn.list", TORCH_BOX((&ms_deform_attn<List, Optional>)));
  m.impl("ms_deform_attn_fused", TORCH_BOX((&ms_deform_attn_fused<Tensor, Tensor>)));
  m.impl("ms_deform_attn_fused.list", TORCH_BOX((&ms_deform_attn_fused<List, Optional>)));
}

}  // namespace
}  // namespace tokenprune
