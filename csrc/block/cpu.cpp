// SPDX-License-Identifier: Apache-2.0
// CPU registration: layers and attention called one after another. A small model at batch 1 spends a tenth of its time
// on the way from one op to the next, because the weights push the interpreter's code and data out of the cache.
#include "../attention/cpu.h"

#include <algorithm>

#include "../common/check.h"
#include "../packed/cpu.h"
#include "../tokens/cpu.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kMost = 1 << 20;  // heads, and their width: products of both must not overflow

Tensor view(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
            torch::headeronly::IntHeaderOnlyArrayRef strides, int64_t offset) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                               sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// Starts of sequences of equal length.
Tensor equal_starts(const Tensor& like, int64_t batch, int64_t tokens) {
  const Tensor starts = allocate(like, {batch + 1}, ScalarType::Int);
  for (int64_t b = 0; b <= batch; ++b) mutable_data<int32_t>(starts)[b] = static_cast<int32_t>(b * tokens);
  return starts;
}

template <typename C>
void fill_mean(const Tensor& x, C* mean) {
  const C* from = data<C>(x);
  const int64_t heads = x.size(0), n = x.size(1);
  std::fill(mean, mean + n, C(0));
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < n; ++i) mean[i] += from[h * n + i];
  }
  for (int64_t i = 0; i < n; ++i) mean[i] /= static_cast<C>(heads);
}

Tensor mean_over_heads(const Tensor& x) {  // [H, T] -> [T]
  Tensor mean = allocate(x, {x.size(1)});
  x.scalar_type() == ScalarType::Double ? fill_mean(x, mutable_data<double>(mean))
                                        : fill_mean(x, mutable_data<float>(mean));
  return mean;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_attention(
    const Tensor& x, const Optional& norm_weight, const Optional& norm_bias, double norm_eps, const Tensor& packed_qkv,
    const Optional& bias_qkv, const Tensor& packed_proj, const Optional& bias_proj, const Optional& layer_scale,
    int64_t heads, int64_t dim, const Optional& indices, const Optional& cu_seqlens, int64_t max_seqlen,
    const Optional& key_bias, double scale, bool want_cls) {
  const char* op = "packed_attention";
  const bool padded = !cu_seqlens.has_value();
  TP_CHECK(!padded || !indices.has_value(), op, "cu_seqlens must be given with indices, got none");
  check_dim(op, "x", x, padded ? 3 : 2, padded ? "[B, N, C] without cu_seqlens" : "[T, C] with cu_seqlens");
  TP_CHECK(heads >= 0 && heads <= kMost, op, "num_heads must be in 0..", kMost, ", got ", heads);
  TP_CHECK(dim >= 0 && dim <= kMost, op, "head_dim must be in 0..", kMost, ", got ", dim);
  const int64_t batch = padded ? x.size(0) : 0, tokens = padded ? x.size(1) : max_seqlen;
  const int64_t rows = padded ? batch * tokens : indices.has_value() ? indices->numel() : x.size(0);
  const int64_t width = heads * dim, channels = x.size(x.dim() - 1);
  TP_CHECK(!padded || rows <= INT32_MAX, op, "x must have fewer than 2^31 tokens, got ", shape_text(x));
  const Tensor qkv =
      packed_linear(x, packed_qkv, 3 * width, bias_qkv, true, norm_weight, norm_bias, norm_eps, 0, {}, {}, indices);
  const auto part = [&](int64_t place) { return view(qkv, {rows, heads, dim}, {3 * width, dim, 1}, place * width); };
  const Tensor starts = padded ? equal_starts(x, batch, tokens) : *cu_seqlens;
  auto [mixed, lse, cls] =
      sparse_attention(part(0), part(1), part(2), starts, starts, tokens, tokens, key_bias, {}, {}, scale, want_cls);
  const Tensor inner = padded ? view(mixed, {batch, tokens, width}, {tokens * width, width, 1}, 0)
                              : view(mixed, {rows, width}, {width, 1}, 0);
  const Tensor residual = indices.has_value() ? gather_tokens(x, *indices) : x;
  Tensor y = packed_linear(inner, packed_proj, channels, bias_proj, false, {}, {}, 0, 0, layer_scale, residual, {});
  return {y, qkv, lse, mean_over_heads(cls)};
}

Tensor packed_mlp(const Tensor& x, const Optional& norm_weight, const Optional& norm_bias, double norm_eps,
                  const Tensor& packed_1, const Optional& bias_1, int64_t hidden, int64_t act, const Tensor& packed_2,
                  const Optional& bias_2, const Optional& layer_scale) {
  TP_CHECK(x.dim() >= 1, "packed_mlp", "x must have shape [..., C], got ", shape_text(x));
  const Tensor inner =
      packed_linear(x, packed_1, hidden, bias_1, true, norm_weight, norm_bias, norm_eps, act, {}, {}, {});
  return packed_linear(inner, packed_2, x.size(x.dim() - 1), bias_2, false, {}, {}, 0, 0, layer_scale, x, {});
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_mlp", TORCH_BOX(&packed_mlp));
}

}  // namespace
}  // namespace tokenprune
