// SPDX-License-Identifier: Apache-2.0
// Check and fill: one class for all ops, used by the CPU and the CUDA side alike.
#pragma once

#include "../common/contents.h"
#include "params.h"

namespace tokenprune {

// spatial_shapes of either overload.
struct LevelShapes {
  const Tensor* tensor = nullptr;
  const std::vector<int64_t>* list = nullptr;
  LevelShapes(const Tensor& t) : tensor(&t) {}
  LevelShapes(const std::vector<int64_t>& l) : list(&l) {}
  int64_t levels() const { return tensor != nullptr ? tensor->size(0) : static_cast<int64_t>(list->size()) / 2; }
};

// The tensors that the parameters point into stay alive with it.
struct DeformCall {
  const char* op;
  std::vector<Tensor> held;
  std::vector<Level> level;
  Tensor like;
  ScalarType dtype, stat;
  DeformParams p;

  DeformCall(const char* name, const Tensor& value, const LevelShapes& shapes, const std::optional<Tensor>& starts)
      : op(name), like(value), dtype(value.scalar_type()), stat(stat_dtype(value.scalar_type())) {
    held.reserve(12);
    check_dim(op, "value", value, 4, "[B, S, M, D]");
    check_floating(op, "value", value);
    const Tensor& v = hold(inner_contiguous(value));
    p.value = v.const_data_ptr();
    p.batch = v.size(0), p.tokens = v.size(1), p.heads = v.size(2), p.dim = v.size(3);
    p.value_batch = v.stride(0), p.value_token = v.stride(1), p.value_head = v.stride(2);
    set_shapes(shapes, starts);
  }

  const Tensor& hold(const Tensor& t) { return held.emplace_back(t); }

  // ---- levels

  void set_shapes(const LevelShapes& shapes, const std::optional<Tensor>& starts) {
    if (shapes.tensor != nullptr) {
      check_dim(op, "spatial_shapes", *shapes.tensor, 2, "[L, 2]");
      check_size(op, "spatial_shapes", *shapes.tensor, 1, 2);
      check_dtype(op, "spatial_shapes", *shapes.tensor, ScalarType::Long);
      check_device(op, "spatial_shapes", *shapes.tensor, like);
    } else {
      TP_CHECK(shapes.list->size() % 2 == 0, op, "spatial_shapes must hold pairs (H, W), got ", shapes.list->size(),
               " numbers");
    }
    p.levels = shapes.levels();
    std::optional<Tensor> start;
    if (starts.has_value()) {
      check_dim(op, "level_start_index", *starts, 1, "[L]");
      check_size(op, "level_start_index", *starts, 0, p.levels);
      check_dtype(op, "level_start_index", *starts, ScalarType::Long);
      check_device(op, "level_start_index", *starts, like);
      start = hold(as_contiguous(*starts));
    }
    if (shapes.list != nullptr) {
      read_levels(shapes.list->data(), start);
      p.level = level.data();
      return;
    }
    const Tensor& pairs = hold(as_contiguous(*shapes.tensor));
    const std::optional<Tensor> host = readable(pairs);
    if (host.has_value()) read_levels(data<int64_t>(*host), start);
    if (pairs.is_cpu()) {
      p.level = level.data();
    } else {
      p.shapes = data<int64_t>(pairs), p.starts = data<int64_t>(*start);
    }
  }

  // Levels follow one another without a gap and add up to the tokens.
  void read_levels(const int64_t* shapes, const std::optional<Tensor>& starts) {
    const std::optional<Tensor> host = starts.has_value() ? readable(*starts) : std::nullopt;
    level.resize(p.levels);
    int64_t next = 0;
    for (int64_t l = 0; l < p.levels; ++l) {
      const int64_t height = shapes[2 * l], width = shapes[2 * l + 1];
      TP_CHECK(height >= 0 && width >= 0, op, "spatial_shapes must not be negative, got ", height, " x ", width,
               " in level ", l);
      TP_CHECK(width == 0 || height <= (p.tokens - next) / width, op, "spatial_shapes must add up to the ", p.tokens,
               " rows of value, got more with ", height, " x ", width, " in level ", l);
      if (host.has_value()) {
        const int64_t got = data<int64_t>(*host)[l];
        TP_CHECK(got == next, op, "level_start_index must be ", next, " for level ", l, ", got ", got);
      }
      level[l] = {height, width, next};
      next += height * width;
    }
    TP_CHECK(next == p.tokens, op, "spatial_shapes must add up to the ", p.tokens, " rows of value, got ", next);
  }

  // ---- queries

  // Rows [B, Q, inner...]; the inner dimensions are made contiguous where they are not.
  QueryRows rows_of(const char* name, const Tensor& t, ScalarType wanted) {
    check_dtype(op, name, t, wanted);
    check_device(op, name, t, like);
    int64_t step = 1;
    bool dense = true;
    for (int64_t d = t.dim() - 1; d >= 2; --d) {
      dense &= t.size(d) == 1 || t.stride(d) == step;
      step *= t.size(d);
    }
    const Tensor& kept = hold(dense ? t : torch::stable::contiguous(t));
    return {kept.const_data_ptr(), kept.stride(0), kept.stride(1)};
  }

  // [B, Q, M, L, P, 2]: the shape that tells queries and points.
  void set_points(const char* name, const Tensor& t) {
    check_dim(op, name, t, 6, "[B, Q, M, L, P, 2]");
    check_size(op, name, t, 0, p.batch);
    check_size(op, name, t, 2, p.heads);
    check_size(op, name, t, 3, p.levels);
    check_size(op, name, t, 5, 2);
    p.queries = t.size(1), p.points = t.size(4);
  }

  void set_classic(const Tensor& locations, const Tensor& weights) {
    set_points("sampling_locations", locations);
    check_dim(op, "attention_weights", weights, 5, "[B, Q, M, L, P]");
    for (int64_t d = 0; d < 5; ++d) check_size(op, "attention_weights", weights, d, locations.size(d));
    p.locations = rows_of("sampling_locations", locations, stat);
    p.weights = rows_of("attention_weights", weights, stat);
  }

  void set_fused(const Tensor& reference, const Tensor& offsets, const Tensor& logits,
                 const std::optional<Tensor>& mask) {
    p.fused = true;
    set_points("offsets", offsets);
    check_dim(op, "logits", logits, 4, "[B, Q, M, L * P]");
    check_size(op, "logits", logits, 0, p.batch);
    check_size(op, "logits", logits, 1, p.queries);
    check_size(op, "logits", logits, 2, p.heads);
    check_size(op, "logits", logits, 3, p.levels * p.points);
    p.offsets_are_values = offsets.scalar_type() == dtype;
    const ScalarType points = p.offsets_are_values ? dtype : stat;
    p.locations = rows_of("offsets", offsets, points);
    p.weights = rows_of("logits", logits, points);

    check_dim(op, "reference_points", reference, 4, "[B or 1, Q, L or 1, 2 or 4]");
    TP_CHECK(reference.size(0) == p.batch || reference.size(0) == 1, op, "reference_points must have size ", p.batch,
             " or 1 in dimension 0, got ", shape_text(reference));
    check_size(op, "reference_points", reference, 1, p.queries);
    p.reference_levels = reference.size(2), p.reference_columns = reference.size(3);
    TP_CHECK(p.reference_levels == p.levels || p.reference_levels == 1, op, "reference_points must have size ",
             p.levels, " or 1 in dimension 2, got ", shape_text(reference));
    TP_CHECK(p.reference_columns == 2 || p.reference_columns == 4, op,
             "reference_points must have 2 or 4 columns, got ", shape_text(reference));
    p.reference = rows_of("reference_points", reference, stat);
    if (reference.size(0) == 1) p.reference.batch_stride = 0;

    if (mask.has_value()) {
      check_dim(op, "padding_mask", *mask, 2, "[B, S]");
      check_size(op, "padding_mask", *mask, 0, p.batch);
      check_size(op, "padding_mask", *mask, 1, p.tokens);
      check_dtype(op, "padding_mask", *mask, ScalarType::Bool);
      check_device(op, "padding_mask", *mask, like);
      p.mask = data<bool>(hold(as_contiguous(*mask)));
    }
  }

  void set_grad(const Tensor& grad) {
    check_dim(op, "grad", grad, 3, "[B, Q, M * D]");
    check_size(op, "grad", grad, 0, p.batch);
    check_size(op, "grad", grad, 1, p.queries);
    check_size(op, "grad", grad, 2, p.heads * p.dim);
    p.grad_out = rows_of("grad", grad, dtype);
  }

  // ---- results

  Tensor new_out() {
    Tensor out = torch::stable::new_empty(like, {p.batch, p.queries, p.heads * p.dim});
    p.out = out.mutable_data_ptr();
    return out;
  }
  Tensor new_grad_value() {
    Tensor grad = torch::stable::new_empty(like, {p.batch, p.tokens, p.heads, p.dim});
    p.grad_value = grad.mutable_data_ptr();
    return grad;
  }
  Tensor new_grad_locations() {
    Tensor grad = torch::stable::new_empty(like, {p.batch, p.queries, p.heads, p.levels, p.points, 2}, points_dtype());
    p.grad_locations = grad.mutable_data_ptr();
    return grad;
  }
  Tensor new_grad_weights() {
    Tensor grad =
        p.fused ? torch::stable::new_empty(like, {p.batch, p.queries, p.heads, p.levels * p.points}, points_dtype())
                : torch::stable::new_empty(like, {p.batch, p.queries, p.heads, p.levels, p.points}, stat);
    p.grad_weights = grad.mutable_data_ptr();
    return grad;
  }
  Tensor new_grad_reference(bool wanted) {
    Tensor grad = torch::stable::new_empty(
        like, {wanted ? p.batch : 0, p.queries, p.reference_levels, p.reference_columns}, stat);
    if (wanted) p.grad_reference = grad.mutable_data_ptr();
    return grad;
  }
  ScalarType points_dtype() const { return p.fused && p.offsets_are_values ? dtype : stat; }
};

}  // namespace tokenprune
