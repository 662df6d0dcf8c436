// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, allocation, and the loops over strips of rows.
#include "cpu.h"

#include <algorithm>

#include "../common/dtype.h"
#include "../common/parallel.h"
#include "checks.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

const PackedKernels& kernels(Dtype dtype) { return dtype == kFloat64 ? packed_kernels_generic : packed_kernels(); }

Tensor pack_linear(const Tensor& weight_) {
  const char* op = "pack_linear";
  check_dim(op, "weight", weight_, 2, "[N, K]");
  check_floating(op, "weight", weight_);
  const Tensor weight = as_contiguous(weight_);
  const Dtype dtype = kernel_dtype(op, weight.scalar_type());
  const PackedKernels& table = kernels(dtype);
  const int64_t n = weight.size(0), k = weight.size(1), width = table.panel_width(dtype);
  Tensor packed = allocate(weight, {table.packed_bytes(dtype, n, k)}, ScalarType::Byte);
  const void* from = weight.const_data_ptr();
  void* to = packed.mutable_data_ptr();
  parallel_ranges((n + width - 1) / width, width * k, [&](int64_t begin, int64_t end) {
    table.pack(dtype, from, n, k, begin * width, std::min(end * width, n), to, thread_scratch(table.pack_scratch(k)));
  });
  return packed;
}

}  // namespace

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t out_features, const Optional& bias, bool norm,
                     const Optional& norm_weight, const Optional& norm_bias, double norm_eps, int64_t act,
                     const Optional& scale, const Optional& residual, const Optional& indices) {
  const char* op = "packed_linear";
  PackedLinearCall call(op, x, packed, out_features, bias, norm, norm_weight, norm_bias, norm_eps, act, scale, residual,
                        indices);
  PackedLinearParams& p = call.p;
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  const PackedKernels& table = kernels(dtype);
  const int64_t expected = table.packed_bytes(dtype, out_features, p.in_features);
  TP_CHECK(packed.numel() == expected, op, "packed must hold a ", dtype_name(x.scalar_type()), " weight [",
           out_features, ", ", p.in_features, "] (", expected, " bytes), got ", packed.numel(), " bytes");
  Tensor y = allocate(call.x, call.shape);
  p.y = y.mutable_data_ptr();
  if (p.rows == 0 || out_features == 0) return y;
  // Every strip reads the whole weight once: as few as fit the second-level cache, equally long, of whole tiles of 6.
  constexpr int64_t kStripBytes = 576 << 10;
  const int64_t fitting = kStripBytes / (p.in_features * call.x.element_size() + 1);
  const int64_t most = std::clamp<int64_t>(fitting / 6 * 6, 12, 60), wanted = (p.rows + most - 1) / most;
  const int64_t threads = torch::stable::get_num_threads();
  p.strip = ((p.rows + wanted - 1) / wanted + 5) / 6 * 6;
  const int64_t strips = (p.rows + p.strip - 1) / p.strip;
  // Few strips: threads share their columns. A value never depends on how the work was cut.
  const int64_t panels = (out_features + table.panel_width(dtype) - 1) / table.panel_width(dtype);
  const int64_t chunks = strips >= 4 * threads || threads == 1 ? 1 : std::min(threads, panels);
  const int64_t bytes = table.linear_scratch(p);
  parallel_items(strips * chunks, p.strip * p.in_features * out_features / 8 / chunks,
                 [&](int64_t item) { table.linear(dtype, p, item, chunks, thread_scratch(bytes)); });
  return y;
}

namespace {

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
}

}  // namespace
}  // namespace tokenprune
