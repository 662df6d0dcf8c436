// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, the layers, and what lies between them.
#include "../packed/cpu.h"

#include "../common/contents.h"
#include "../common/dtype.h"
#include "../common/parallel.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kGelu = 1;  // of packed_linear

struct Layer {
  const Tensor& packed;
  const Optional& bias;

  Tensor operator()(const Tensor& x, int64_t out, int64_t act) const {
    return packed_linear(x, packed, out, bias, false, {}, {}, 0, act, {}, {}, {});
  }
};

// Where each image starts; the last one ends with the tokens.
std::vector<int64_t> image_starts(const char* op, const Tensor& x, const Optional& cu_seqlens, int64_t tokens) {
  std::vector<int64_t> starts;
  TP_CHECK(x.size(0) < INT32_MAX, op, "x must have fewer than 2^31 rows, got ", shape_text(x));
  if (!cu_seqlens.has_value()) {
    for (int64_t b = 0; b <= x.size(0); ++b) starts.push_back(b * x.size(1));
    return starts;
  }
  check_dim(op, "cu_seqlens", *cu_seqlens, 1, "[B + 1]");
  check_dtype(op, "cu_seqlens", *cu_seqlens, ScalarType::Int);
  check_device(op, "cu_seqlens", *cu_seqlens, x);
  TP_CHECK(cu_seqlens->numel() >= 1, op, "cu_seqlens must have at least one entry, got ", shape_text(*cu_seqlens));
  const Tensor cu = as_contiguous(*cu_seqlens);
  check_cu_seqlens(op, "cu_seqlens", cu, tokens, INT32_MAX, "cu_seqlens");
  starts.assign(data<int32_t>(cu), data<int32_t>(cu) + cu.numel());
  if (starts.size() > 1) starts.back() = tokens;
  return starts;
}

// The importance of every head of every token [T, H].
Tensor weigh_heads(const PredictorKernels& table, Dtype dtype, PredictorParams& p, const Tensor& x, int64_t tokens,
                   const Layer& squeeze, const Layer& excite) {
  Tensor means = allocate(x, {tokens, p.heads});
  p.means = means.mutable_data_ptr();
  parallel_ranges(tokens, p.heads * p.width / 4,
                  [&](int64_t begin, int64_t end) { table.head_means(dtype, p, begin, end); });
  return excite(squeeze(means, p.heads / 2, kGelu), p.heads, 0);
}

std::tuple<Tensor, Tensor> packed_predictor(const Tensor& input, const Optional& counted, const Optional& cu_seqlens,
                                            int64_t heads, const Optional& norm_weight, const Optional& norm_bias,
                                            double norm_eps, const Tensor& packed_0, const Optional& bias_0,
                                            const Tensor& packed_1, const Optional& bias_1, const Tensor& packed_2,
                                            const Optional& bias_2, const Tensor& packed_3, const Optional& bias_3,
                                            const Optional& packed_s0, const Optional& bias_s0,
                                            const Optional& packed_s1, const Optional& bias_s1) {
  const char* op = "packed_predictor";
  const bool padded = !cu_seqlens.has_value();
  check_dim(op, "x", input, padded ? 3 : 2, padded ? "[B, N, C] without cu_seqlens" : "[T, C] with cu_seqlens");
  check_floating(op, "x", input);
  const Tensor x = as_contiguous(input);
  const int64_t channels = x.size(x.dim() - 1), tokens = padded ? x.size(0) * x.size(1) : x.size(0);
  TP_CHECK(channels > 0 && heads >= 1 && channels % heads == 0, op, "num_heads must divide the channels (", channels,
           "), got ", heads);
  TP_CHECK(packed_s0.has_value() == packed_s1.has_value(), op,
           "packed_s1 must be given with packed_s0, got one of them");
  const std::vector<int64_t> starts = image_starts(op, x, cu_seqlens, tokens);
  PredictorParams p;
  p.heads = heads, p.width = channels / heads, p.x = x.const_data_ptr();
  Optional held;
  if (counted.has_value()) {
    check_dtype(op, "counted", *counted, ScalarType::Bool);
    check_device(op, "counted", *counted, x);
    TP_CHECK(counted->numel() == tokens, op, "counted must have one entry per token (", tokens, "), got ",
             shape_text(*counted));
    held = as_contiguous(*counted);
    p.counted = data<bool>(*held);
  }
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  const PredictorKernels& table = dtype == kFloat64 ? predictor_kernels_generic : predictor_kernels();
  const Tensor rows = view(x, {tokens * heads, p.width}, {p.width, 1}, 0);
  Tensor features =
      packed_linear(rows, packed_0, p.width, bias_0, true, norm_weight, norm_bias, norm_eps, kGelu, {}, {}, {});
  p.features = features.mutable_data_ptr();
  const int64_t images = static_cast<int64_t>(starts.size()) - 1, bytes = channels * 8;
  parallel_items(images, images > 0 ? tokens * channels / 4 / images : 0,
                 [&](int64_t b) { table.pool(dtype, p, starts[b], starts[b + 1], thread_scratch(bytes)); });
  const Tensor half = Layer{packed_1, bias_1}(features, p.width / 2, kGelu),
               quarter = Layer{packed_2, bias_2}(half, p.width / 4, kGelu),
               logits = Layer{packed_3, bias_3}(quarter, 2, 0);
  p.logits = logits.const_data_ptr();
  Optional importance;
  if (packed_s0.has_value()) {
    importance = weigh_heads(table, dtype, p, x, tokens, {*packed_s0, bias_s0}, {*packed_s1, bias_s1});
    p.importance = importance->const_data_ptr();
  }
  const ScalarType stat = stat_dtype(x.scalar_type());
  const auto results = [&] {
    return padded ? allocate(x, {x.size(0), x.size(1), 2}, stat) : allocate(x, {tokens, 2}, stat);
  };
  Tensor scores = results(), chance = results();
  p.scores = scores.mutable_data_ptr(), p.chance = chance.mutable_data_ptr();
  parallel_ranges(tokens, heads * 40, [&](int64_t begin, int64_t end) { table.finish(dtype, p, begin, end); });
  return {scores, chance};
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("packed_predictor", TORCH_BOX(&packed_predictor)); }

}  // namespace
}  // namespace tokenprune
