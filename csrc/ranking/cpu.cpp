// SPDX-License-Identifier: Apache-2.0
// CPU registration: checks, ranking, and copies of the kept rows. One call each, because a small model at batch 1
// spends more time between ops than in them.
#include "../sorting/cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/contents.h"
#include "../common/dtype.h"
#include "../common/parallel.h"
#include "cpu_kernels.h"

namespace tokenprune {
namespace {

using Optional = std::optional<Tensor>;

template <typename Bits>
void negate_rows(const Tensor& from, int64_t first, const Tensor& to) {
  constexpr Bits sign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
  const int64_t rows = to.size(0), n = to.size(1);
  const Bits* x = static_cast<const Bits*>(from.const_data_ptr()) + first;
  Bits* y = static_cast<Bits*>(to.mutable_data_ptr());
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < n; ++i) y[b * n + i] = static_cast<Bits>(x[b * from.stride(0) + i] ^ sign);
  }
}

// Positions behind the prefix by descending score, counted from its end: int32 [B, N - num_prefix].
Tensor rank_patches(const char* op, const Tensor& score, int64_t num_prefix) {
  check_dim(op, "score", score, 2, "[B, N]");
  check_floating(op, "score", score);
  TP_CHECK(num_prefix >= 0 && num_prefix <= score.size(1), op, "num_prefix must be in [0, ", score.size(1), "], got ",
           num_prefix);
  TP_CHECK(score.size(0) < INT32_MAX && score.numel() < INT32_MAX, op,
           "score must have fewer than 2^31 rows and entries, got ", shape_text(score));
  const Tensor from = inner_contiguous(score);
  const Tensor negative = allocate(from, {from.size(0), from.size(1) - num_prefix});
  switch (from.element_size()) {
    case 2: negate_rows<uint16_t>(from, num_prefix, negative); break;
    case 4: negate_rows<uint32_t>(from, num_prefix, negative); break;
    default: negate_rows<uint64_t>(from, num_prefix, negative); break;
  }
  return argsort_rows(negative);
}

// The first `count` positions of an image by rank.
void fill_order(const int32_t* ranked, int64_t num_prefix, int64_t count, int64_t* order) {
  for (int64_t i = 0; i < count; ++i) order[i] = i < num_prefix ? i : num_prefix + ranked[i - num_prefix];
}

std::tuple<Tensor, Tensor, Tensor> rank_tokens(const Tensor& score, int64_t num_prefix, int64_t count) {
  const char* op = "rank_tokens";
  const Tensor ranked = rank_patches(op, score, num_prefix);
  const int64_t batch = score.size(0), tokens = score.size(1);
  TP_CHECK(count >= 0 && count <= tokens, op, "count must be in [0, ", tokens, "], got ", count);
  Tensor order = allocate(score, {batch, tokens}, ScalarType::Long),
         rows = allocate(score, {batch * count}, ScalarType::Int),
         cu_seqlens = allocate(score, {batch + 1}, ScalarType::Int);
  const int32_t* from = data<int32_t>(ranked);
  int64_t* to = mutable_data<int64_t>(order);
  int32_t *flat = mutable_data<int32_t>(rows), *starts = mutable_data<int32_t>(cu_seqlens);
  for (int64_t b = 0; b <= batch; ++b) starts[b] = static_cast<int32_t>(b * count);
  for (int64_t b = 0; b < batch; ++b) {
    fill_order(from + b * (tokens - num_prefix), num_prefix, tokens, to + b * tokens);
    for (int64_t i = 0; i < count; ++i) flat[b * count + i] = static_cast<int32_t>(b * tokens + to[b * tokens + i]);
  }
  return {order, rows, cu_seqlens};
}

std::tuple<Tensor, Tensor> keep_top_tokens(const Tensor& x_, const Tensor& score_, int64_t num_prefix, int64_t keep,
                                           bool fuse, bool by_rank) {
  const char* op = "keep_top_tokens";
  check_dim(op, "x", x_, 3, "[B, N, C]");
  check_floating(op, "x", x_);
  check_dim(op, "score", score_, 2, "[B, N]");
  check_dtype(op, "score", score_, stat_dtype(x_.scalar_type()));
  check_device(op, "score", score_, x_);
  check_size(op, "score", score_, 0, x_.size(0));
  check_size(op, "score", score_, 1, x_.size(1));
  const Tensor x = as_contiguous(x_), score = as_contiguous(score_), ranked = rank_patches(op, score, num_prefix);
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), patches = tokens - num_prefix;
  TP_CHECK(keep >= 0 && keep <= patches, op, "keep must be in [0, ", patches, "], got ", keep);
  const int64_t count = num_prefix + keep, rows = count + fuse, dropped = patches - keep;
  Tensor y = allocate(x, {batch, rows, channels}), order = allocate(x, {batch, count}, ScalarType::Long);
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  const RankingKernels& table = dtype == kFloat64 ? ranking_kernels_generic : ranking_kernels();
  const int64_t row_bytes = channels * x.element_size();
  const char *from = static_cast<const char*>(x.const_data_ptr()),
             *weights = static_cast<const char*>(score.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  parallel_items(batch, tokens * channels / 8, [&](int64_t b) {
    const int32_t* places = data<int32_t>(ranked) + b * patches;
    int64_t* chosen = mutable_data<int64_t>(order) + b * count;
    fill_order(places, num_prefix, count, chosen);
    if (!by_rank) std::sort(chosen, chosen + count);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + (b * rows + i) * row_bytes, from + (b * tokens + chosen[i]) * row_bytes, row_bytes);
    }
    if (!fuse) return;
    const int64_t first = b * tokens + num_prefix;  // ranks count from there
    FuseParams p;
    p.x = from + first * row_bytes, p.weights = weights + first * score.element_size();
    p.dropped = places + keep, p.count = dropped, p.channels = channels;
    p.out = to + (b * rows + count) * row_bytes;
    table.fuse(dtype, p);
  });
  return {y, order};
}

std::tuple<Tensor, Tensor, Tensor> keep_marked_tokens(const Tensor& x_, const Tensor& keep_, const Tensor& cu_seqlens,
                                                      const Optional& weights_) {
  const char* op = "keep_marked_tokens";
  check_dim(op, "x", x_, 2, "[T, C]");
  check_floating(op, "x", x_);
  check_dim(op, "keep", keep_, 1, "[T]");
  check_dtype(op, "keep", keep_, ScalarType::Bool);
  check_device(op, "keep", keep_, x_);
  check_size(op, "keep", keep_, 0, x_.size(0));
  check_dim(op, "cu_seqlens", cu_seqlens, 1, "[B + 1]");
  check_dtype(op, "cu_seqlens", cu_seqlens, ScalarType::Int);
  check_device(op, "cu_seqlens", cu_seqlens, x_);
  TP_CHECK(cu_seqlens.numel() >= 1, op, "cu_seqlens must have at least one entry, got ", shape_text(cu_seqlens));
  const Tensor x = as_contiguous(x_), keep = as_contiguous(keep_), starts = as_contiguous(cu_seqlens);
  const int64_t tokens = x.size(0), channels = x.size(1), batch = starts.numel() - 1;
  check_cu_seqlens(op, "cu_seqlens", starts, tokens, INT32_MAX, "cu_seqlens");
  Optional weights;
  if (weights_.has_value()) {
    check_dim(op, "weights", *weights_, 1, "[T]");
    check_size(op, "weights", *weights_, 0, tokens);
    check_dtype(op, "weights", *weights_, stat_dtype(x.scalar_type()));
    check_device(op, "weights", *weights_, x);
    weights = as_contiguous(*weights_);
  }
  const bool fuse = weights.has_value();
  const uint8_t* marked = static_cast<const uint8_t*>(keep.const_data_ptr());  // any byte but 0 is true
  const int32_t* from = data<int32_t>(starts);
  TP_CHECK(tokens + batch <= INT32_MAX, op, "x must have fewer than 2^31 rows, got ", shape_text(x));
  Tensor cu_out = allocate(x, {batch + 1}, ScalarType::Int);
  int32_t* to = mutable_data<int32_t>(cu_out);
  to[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const auto dropped = std::count(marked + from[b], marked + from[b + 1], 0);
    to[b + 1] = to[b] + fuse + from[b + 1] - from[b] - static_cast<int32_t>(dropped);
  }
  Tensor y = allocate(x, {to[batch], channels}), source = allocate(x, {to[batch]}, ScalarType::Int);
  const Dtype dtype = kernel_dtype(op, x.scalar_type());
  const RankingKernels& table = dtype == kFloat64 ? ranking_kernels_generic : ranking_kernels();
  const int64_t row_bytes = channels * x.element_size();
  const char* rows = static_cast<const char*>(x.const_data_ptr());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  std::vector<int32_t> others(fuse ? tokens : 0);  // dropped tokens, in the places of their sequences
  parallel_items(batch, tokens * channels / 8 / (batch > 0 ? batch : 1), [&](int64_t b) {
    int32_t *place = mutable_data<int32_t>(source) + to[b], *rest = others.data() + from[b], dropped = 0;
    for (int32_t t = from[b]; t < from[b + 1]; ++t) {
      if (marked[t] != 0) {
        std::memcpy(out + (place - data<int32_t>(source)) * row_bytes, rows + t * row_bytes, row_bytes);
        *place++ = t;
      } else if (fuse) {
        rest[dropped++] = t;
      }
    }
    if (!fuse) return;
    *place = -1;
    FuseParams p;
    p.x = rows, p.weights = weights->const_data_ptr(), p.dropped = rest;
    p.count = dropped, p.channels = channels;
    p.out = out + (place - data<int32_t>(source)) * row_bytes;
    table.fuse(dtype, p);
  });
  return {y, source, cu_out};
}

// As torch.lerp: exact at both ends.
template <typename C>
C mixed(C from, C to, C weight) {
  return weight < C(0.5) ? from + weight * (to - from) : to - (to - from) * (C(1) - weight);
}

template <typename C>
void update_scores(const C* latest, const int32_t* rows, int64_t count, C weight, C* out) {
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = rows == nullptr ? t : rows[t];
    if (i >= 0) out[i] = mixed(out[i], latest[t], weight);
  }
}

Tensor running_scores(const Tensor& score_, const Tensor& latest_, const Optional& rows_, double weight) {
  const char* op = "running_scores";
  check_dim(op, "score", score_, 1, "[R]");
  check_dim(op, "latest", latest_, 1, "[T]");
  const ScalarType dtype = score_.scalar_type();
  TP_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, "score must be float32 or float64, got ",
           dtype_name(dtype));
  check_dtype(op, "latest", latest_, dtype);
  check_device(op, "latest", latest_, score_);
  const Tensor score = as_contiguous(score_), latest = as_contiguous(latest_);
  Optional rows;
  if (rows_.has_value()) {
    check_dim(op, "rows", *rows_, 1, "[T]");
    check_dtype(op, "rows", *rows_, ScalarType::Int);
    check_device(op, "rows", *rows_, score_);
    check_size(op, "rows", *rows_, 0, latest.size(0));
    rows = as_contiguous(*rows_);
    check_indices(op, "rows", *rows, score.size(0));
    check_unique(op, "rows", *rows, score.size(0));
  } else {
    check_size(op, "latest", latest, 0, score.size(0));
  }
  Tensor out = allocate(score, {score.size(0)});
  const int32_t* places = data_or_null<int32_t>(rows);
  std::memcpy(out.mutable_data_ptr(), score.const_data_ptr(), score.numel() * score.element_size());
  if (dtype == ScalarType::Double) {
    update_scores(data<double>(latest), places, latest.size(0), weight, mutable_data<double>(out));
  } else {
    update_scores(data<float>(latest), places, latest.size(0), static_cast<float>(weight), mutable_data<float>(out));
  }
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  m.impl("rank_tokens", TORCH_BOX(&rank_tokens));
  m.impl("keep_top_tokens", TORCH_BOX(&keep_top_tokens));
  m.impl("keep_marked_tokens", TORCH_BOX(&keep_marked_tokens));
  m.impl("running_scores", TORCH_BOX(&running_scores));
}

}  // namespace
}  // namespace tokenprune
