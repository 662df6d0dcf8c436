// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention. value [B, S, M, D]: the L levels of a pyramid one after another, level l being H_l
// x W_l pixels from row level_start_index[l]; a point (x, y) with 0..1 spanning its level reads bilinearly, zero
// outside. Each op has two overloads: spatial_shapes as an int64 tensor [L, 2] with level_start_index int64 [L], never
// read on the host when they are on the GPU; or as the flat list H_0, W_0, H_1, W_1, ... (level_start_index, if given,
// is only checked). Coordinates are float32, or float64 beside float64 values.
#include "../common/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tokenprune, m) {
  // sampling_locations [B, Q, M, L, P, 2] and attention_weights [B, Q, M, L, P], both float32 (float64); out
  // [B, Q, M * D]. The weights are used as given. im2col_step has no effect.
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights, SymInt im2col_step=64) -> Tensor");
  m.def(
      "ms_deform_attn.list(Tensor value, SymInt[] spatial_shapes, Tensor? level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, SymInt im2col_step=64) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> "
      "(Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  m.def(
      "ms_deform_attn_backward.list(Tensor grad, Tensor value, SymInt[] spatial_shapes, Tensor? level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights) -> "
      "(Tensor grad_value, Tensor grad_locations, Tensor grad_weights)");
  // Softmax of logits [B, Q, M, L * P] and the locations inside. reference_points [B or 1, Q, L or 1, 2 or 4] float32
  // (float64); offsets [B, Q, M, L, P, 2] and logits in the dtype of the values or float32 (float64), both the same.
  // Two columns: location = reference + offset / (W_l, H_l); four (cx, cy, w, h): centre + offset / P * (w, h) / 2.
  // padding_mask [B, S] bool: true reads as 0.
  m.def(
      "ms_deform_attn_fused(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor reference_points, "
      "Tensor offsets, Tensor logits, Tensor? padding_mask=None) -> Tensor");
  m.def(
      "ms_deform_attn_fused.list(Tensor value, SymInt[] spatial_shapes, Tensor? level_start_index, "
      "Tensor reference_points, Tensor offsets, Tensor logits, Tensor? padding_mask=None) -> Tensor");
  // grad_reference [B, Q, L or 1, 2 or 4] float32 (float64), not summed over the images that share one row of
  // reference_points; [0, Q, L or 1, 2 or 4] when not wanted.
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor reference_points, Tensor offsets, Tensor logits, Tensor? padding_mask, bool want_reference) -> "
      "(Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, Tensor grad_logits)");
  m.def(
      "ms_deform_attn_fused_backward.list(Tensor grad, Tensor value, SymInt[] spatial_shapes, "
      "Tensor? level_start_index, Tensor reference_points, Tensor offsets, Tensor logits, Tensor? padding_mask, "
      "bool want_reference) -> "
      "(Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, Tensor grad_logits)");
}
