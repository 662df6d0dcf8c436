// SPDX-License-Identifier: Apache-2.0
// The ops from C++: an op of your own that keeps the tokens above a threshold, attends among them and writes the result
// back into the feature map. It uses torch's stable ABI, so one binary serves every torch >= 2.11.
//
//   g++ -std=c++20 -shared -fPIC -DTORCH_TARGET_VERSION=0x020b000000000000ULL \
//       -I$TORCH/include sparse_block.cpp -o sparse_block.so $TORCH/lib/libtorch_cpu.so
//
// In Python: `import tokenprune_ext`, `torch.ops.load_library("sparse_block.so")`,
// `torch.ops.example.sparse_block(features, scores > 0.5, heads)`.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>

namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls tokenprune::<name>; the stack holds the arguments on entry and the results on return.
template <size_t N>
void call(const char* name, std::array<StableIValue, N>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

// features [B, N, C], mask bool [B, N] -> features with self-attention applied among the kept tokens of each image.
Tensor sparse_block(const Tensor& features, const Tensor& mask, int64_t heads) {
  const int64_t batch = features.size(0), tokens = features.size(1), channels = features.size(2);
  const int64_t width = channels / heads;
  const Tensor rows = torch::stable::reshape(features, {batch * tokens, channels});

  std::array<StableIValue, 2> selected{from(mask)};
  call("tokenprune::select_tokens", selected);
  const auto indices = to<Tensor>(selected[0]), cu_seqlens = to<Tensor>(selected[1]);

  // Rows are addressed through the index: no gather copy.
  const Tensor qkv = torch::stable::reshape(rows, {batch * tokens, heads, width});
  const std::optional<Tensor> index = indices, none;
  std::array<StableIValue, 12> attended{from(qkv),   from(qkv),   from(qkv),  from(cu_seqlens),
                                        from(cu_seqlens), from(tokens), from(tokens), from(none),
                                        from(index), from(index), from(1.0 / std::sqrt(static_cast<double>(width))),
                                        from(false)};
  call("tokenprune::sparse_attention", attended);
  const Tensor out = torch::stable::reshape(to<Tensor>(attended[0]), {indices.size(0), channels});
  to<Tensor>(attended[1]);  // lse and cls are owned by the caller too
  to<Tensor>(attended[2]);

  std::array<StableIValue, 5> scattered{from(rows), from(out), from(indices), from(none), from(true)};
  call("tokenprune::scatter_tokens", scattered);
  return torch::stable::reshape(to<Tensor>(scattered[0]), {batch, tokens, channels});
}

}  // namespace

STABLE_TORCH_LIBRARY(example, m) { m.def("sparse_block(Tensor features, Tensor mask, int heads) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(example, CPU, m) { m.impl("sparse_block", TORCH_BOX(&sparse_block)); }
