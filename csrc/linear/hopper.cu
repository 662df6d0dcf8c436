// SPDX-License-Identifier: Apache-2.0
// The fused linear layer on kept tokens for sm_90a. A library fragment of its own: it exists only where it was built,
// and ops/linear.py calls it only when it is switched on.
#include "../common/hopper.h"
#include "checks.h"
#include "kernel_hopper.cuh"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

Tensor gather_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& index,
                     const Optional& features, const Optional& scatter, bool add, int64_t activation) {
  const char* op = "gather_linear";
  LinearCall call(op, x, weight, bias, index, features, scatter, add, activation);
  const Launcher launch(x);
  Tensor out = call.new_out();
  const LinearParams& p = call.p;
  TP_CHECK(linear::hopper_serves(p), op, "x must have tokens and columns, and fewer than 8 million tokens, got ",
           shape_text(x));
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const auto encode = [&](int box_columns, int box_rows) {
    return tensor_map(x.scalar_type(), p.weight, {p.width, 1, p.features}, {p.weight_stride * 2, p.weight_stride * 2},
                      box_columns, box_rows);
  };
  if (x.scalar_type() == ScalarType::Half) {
    linear::launch_hopper<__half>(launch, encode, p, processors);
  } else {
    linear::launch_hopper<__nv_bfloat16>(launch, encode, p, processors);
  }
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune_sm90a, m) {
  m.def(
      "gather_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? index, Tensor? features, Tensor? scatter, bool "
      "add, "
      "int activation) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(tokenprune_sm90a, CUDA, m) { m.impl("gather_linear", TORCH_BOX(&gather_linear)); }

}  // namespace
}  // namespace tokenprune
