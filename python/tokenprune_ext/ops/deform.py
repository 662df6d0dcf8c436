# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention, from Deformable DETR (arXiv 2010.04159, eq. 3 and appendix A.2).

Every query reads ``P`` points on each of ``L`` levels of a feature pyramid, bilinearly and with zeros outside, and sums
them with its attention weights. Both call forms are there: the locations and weights themselves, in the argument order
of Deformable-DETR and mmcv, or reference points, offsets and logits as the linear layers give them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import batched, call, check, check_floating, register, stat_dtype

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]

Shapes = Tensor | Sequence[tuple[int, int]]


# ---------------------------------------------------------------- public functions


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """Weighted sum of bilinear samples of a feature pyramid.

    Location ``(x, y)`` reads level ``l`` at pixel ``(x * W_l - 0.5, y * H_l - 0.5)``: 0..1 spans the level, pixels
    outside are zero. A point that touches no pixel, or is NaN or infinite, contributes nothing and has no gradient.

    Args:
        value: ``[B, S, M, D]``, the levels one after another; strides of the first three dimensions are free.
        spatial_shapes: ``(H, W)`` of every level, with ``S = sum(H * W)``: an int64 tensor ``[L, 2]`` on the device of
            value (on a GPU it is never read on the host), or a list of pairs.
        level_start_index: int64 ``[L]``, first row of every level; None is enough beside a list.
        sampling_locations: ``[B, Q, M, L, P, 2]``, used in float32 (float64 beside float64 values).
        attention_weights: ``[B, Q, M, L, P]``, used as given, in the dtype of the locations.
        im2col_step: accepted for compatibility, without effect.

    Returns:
        ``[B, Q, M * D]``, channel ``m * D + d``, in the dtype of value. Differentiable (once) in value, locations and
        weights; deterministic.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; a list of shapes that does not add up to ``S``.
        RuntimeError: contents of a shapes or starts tensor wrong (CPU; on CUDA under TOKENPRUNE_VALIDATE=1, otherwise
            a level that is not within value reads as zeros).
    """
    op = "ms_deform_attn"
    value = _checked_value(op, value)
    stat = stat_dtype(value.dtype)
    name, shapes, starts, levels = _levels(op, value, spatial_shapes, level_start_index)
    _check_points(op, "sampling_locations", value, sampling_locations, levels)
    check(
        attention_weights.shape == sampling_locations.shape[:-1],
        op,
        "attention_weights",
        "have shape {}",
        tuple(attention_weights.shape),
        tuple(sampling_locations.shape[:-1]),
    )
    _check_companion(op, "attention_weights", attention_weights, value)
    return call(
        name,
        value.device,
        value,
        shapes,
        starts,
        sampling_locations.to(stat),
        attention_weights.to(stat),
        im2col_step,
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Shapes,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    *,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """:func:`ms_deform_attn` with the softmax and the arithmetic of the locations inside.

    The weights are the softmax of the logits over levels and points together. With 2 columns a location is
    ``reference + offset / (W_l, H_l)``; with 4 (``cx, cy, w, h``) it is ``centre + offset / P * (w, h) / 2``.

    Args:
        value, spatial_shapes, level_start_index: as in :func:`ms_deform_attn`.
        reference_points: ``[B or 1, Q, L or 1, 2 or 4]``, used in float32 (float64 beside float64 values).
        offsets: ``[B, Q, M, L, P, 2]`` and logits ``[B, Q, M, L * P]``: in the dtype of value or float32; rows of one
            wider projection are not copied.
        padding_mask: bool ``[B, S]``, true where value counts as zero.

    Returns:
        ``[B, Q, M * D]``; differentiable (once) in value, reference_points, offsets and logits; deterministic.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`ms_deform_attn`.
    """
    op = "ms_deform_attn_fused"
    value = _checked_value(op, value)
    stat = stat_dtype(value.dtype)
    name, shapes, starts, levels = _levels(op, value, spatial_shapes, level_start_index)
    _check_points(op, "offsets", value, offsets, levels)
    batch, queries, heads, _, points, _ = offsets.shape
    check(
        tuple(logits.shape) == (batch, queries, heads, levels * points),
        op,
        "logits",
        "have shape [{}, {}, {}, {}]",
        tuple(logits.shape),
        batch,
        queries,
        heads,
        levels * points,
    )
    _check_companion(op, "logits", logits, value)
    _check_reference(op, reference_points, value, queries, levels)
    if offsets.dtype != logits.dtype or offsets.dtype not in (value.dtype, stat):
        offsets, logits = offsets.to(stat), logits.to(stat)
    if padding_mask is not None:
        check(
            tuple(padding_mask.shape) == tuple(value.shape[:2]),
            op,
            "padding_mask",
            "have shape {}",
            tuple(padding_mask.shape),
            list(value.shape[:2]),
        )
        check(padding_mask.dtype == torch.bool, op, "padding_mask", "be bool", padding_mask.dtype, error=TypeError)
        check(padding_mask.device == value.device, op, "padding_mask", "be on {}", padding_mask.device, value.device)
    return call(name, value.device, value, shapes, starts, reference_points.to(stat), offsets, logits, padding_mask)


# ---------------------------------------------------------------- checks


def _checked_value(op, value):
    """The values, in the autocast dtype where autocast is on."""
    check_floating(op, value=value)
    check(value.dim() == 4, op, "value", "have shape [B, S, M, D]", tuple(value.shape))
    device = value.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        return value.to(torch.get_autocast_dtype(device))
    return value


def _levels(op, value, shapes, starts):
    """``(op with its overload, shapes, starts, number of levels)``."""
    if isinstance(shapes, Tensor):
        check(starts is not None, op, "level_start_index", "be given beside a tensor of shapes", None)
        _check_integers(op, "spatial_shapes", shapes, value)
        check(shapes.dim() == 2 and shapes.shape[1] == 2, op, "spatial_shapes", "be [L, 2]", tuple(shapes.shape))
        name, levels, shapes = op, shapes.shape[0], shapes.to(torch.int64)
    else:
        pairs = [tuple(pair) for pair in shapes]
        check(all(len(pair) == 2 for pair in pairs), op, "spatial_shapes", "hold pairs (H, W)", pairs)
        shapes = [size for pair in pairs for size in pair]
        if not torch.compiler.is_compiling():  # the kernel checks it anyway; here it would specialise on the sizes
            check(all(size >= 0 for size in shapes), op, "spatial_shapes", "not be negative", pairs)
            total = sum(h * w for h, w in pairs)
            check(total == value.shape[1], op, "spatial_shapes", "add up to {} rows", total, value.shape[1])
        name, levels = f"{op}.list", len(pairs)
    if starts is not None:
        if not isinstance(starts, Tensor):
            starts = torch.tensor(starts, dtype=torch.int64, device=value.device)
        _check_integers(op, "level_start_index", starts, value)
        check(tuple(starts.shape) == (levels,), op, "level_start_index", "be [{}]", tuple(starts.shape), levels)
        starts = starts.to(torch.int64)
    return name, shapes, starts, levels


def _check_integers(op, argument, tensor, value):
    integers = (torch.int64, torch.int32)
    check(tensor.dtype in integers, op, argument, "be int64 or int32", tensor.dtype, error=TypeError)
    check(tensor.device == value.device, op, argument, "be on {}", tensor.device, value.device)


def _check_companion(op, argument, tensor, value):
    check(tensor.is_floating_point(), op, argument, "be floating", tensor.dtype, error=TypeError)
    check(tensor.device == value.device, op, argument, "be on {}", tensor.device, value.device)


def _check_points(op, argument, value, points, levels):
    batch, _, heads, _ = value.shape
    check(
        points.dim() == 6
        and points.shape[0] == batch
        and points.shape[2] == heads
        and points.shape[3] == levels
        and points.shape[5] == 2,
        op,
        argument,
        "have shape [{}, Q, {}, {}, P, 2]",
        tuple(points.shape),
        batch,
        heads,
        levels,
    )
    _check_companion(op, argument, points, value)


def _check_reference(op, reference, value, queries, levels):
    check(
        reference.dim() == 4
        and reference.shape[0] in (value.shape[0], 1)
        and reference.shape[1] == queries
        and reference.shape[2] in (levels, 1)
        and reference.shape[3] in (2, 4),
        op,
        "reference_points",
        "have shape [{} or 1, {}, {} or 1, 2 or 4]",
        tuple(reference.shape),
        value.shape[0],
        queries,
        levels,
    )
    _check_companion(op, "reference_points", reference, value)


# ---------------------------------------------------------------- fake


def _fake(value, shapes, starts, locations, weights, im2col_step=64):
    batch, _, heads, dim = value.shape
    return value.new_empty(batch, locations.shape[1], heads * dim)


def _fake_backward(grad, value, shapes, starts, locations, weights):
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _fake_fused(value, shapes, starts, reference, offsets, logits, mask=None):
    return _fake(value, shapes, starts, offsets, logits)


def _fake_fused_backward(grad, value, shapes, starts, reference, offsets, logits, mask, want_reference):
    images = value.shape[0] if want_reference else 0
    return (
        value.new_empty(value.shape),
        reference.new_empty(images, *reference.shape[1:]),
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
    )


# ---------------------------------------------------------------- autograd


def _save(ctx, shapes, starts, *tensors):
    """Shapes are a tensor in one overload and a list in the other."""
    ctx.sizes = None if isinstance(shapes, Tensor) else shapes
    ctx.save_for_backward(shapes if ctx.sizes is None else None, starts, *tensors)


def _saved(ctx):
    shapes, starts, *tensors = ctx.saved_tensors
    return (shapes if ctx.sizes is None else ctx.sizes), starts, tensors


def _setup(ctx, inputs, output):
    value, shapes, starts, locations, weights = inputs[:5]
    _save(ctx, shapes, starts, value, locations, weights)


def _backward(ctx, grad):
    shapes, starts, (value, locations, weights) = _saved(ctx)
    grads = torch.ops.tokenprune.ms_deform_attn_backward(grad, value, shapes, starts, locations, weights)
    return grads[0], None, None, grads[1], grads[2], None


def _setup_fused(ctx, inputs, output):
    value, shapes, starts, reference, offsets, logits, mask = inputs
    _save(ctx, shapes, starts, value, reference, offsets, logits, mask)


def _backward_fused(ctx, grad):
    shapes, starts, (value, reference, offsets, logits, mask) = _saved(ctx)
    want_reference = ctx.needs_input_grad[3]
    grad_value, grad_reference, grad_offsets, grad_logits = torch.ops.tokenprune.ms_deform_attn_fused_backward(
        grad, value, shapes, starts, reference, offsets, logits, mask, want_reference
    )
    if not want_reference:
        grad_reference = None
    elif reference.shape[0] != value.shape[0]:  # one row of points for all images
        grad_reference = grad_reference.sum(0, keepdim=True)
    return grad_value, None, None, grad_reference, grad_offsets, grad_logits, None


# ---------------------------------------------------------------- vmap and flop formulas


def _vmap(info, dims, value, shapes, starts, locations, weights, im2col_step=64):
    _refuse_batched_levels("ms_deform_attn", dims)
    value, locations, weights = (
        batched(t, d, info.batch_size) for t, d in zip((value, locations, weights), (dims[0], *dims[3:5]), strict=True)
    )
    out = torch.ops.tokenprune.ms_deform_attn(
        value.flatten(0, 1), shapes, starts, locations.flatten(0, 1), weights.flatten(0, 1), im2col_step
    )
    return out.unflatten(0, value.shape[:2]), 0


def _vmap_fused(info, dims, value, shapes, starts, reference, offsets, logits, mask=None):
    _refuse_batched_levels("ms_deform_attn_fused", dims)
    tensors = (value, reference, offsets, logits, mask)
    value, reference, offsets, logits, mask = (
        batched(t, d, info.batch_size)
        for t, d in zip(tensors, (dims[0], *dims[3:6], dims[6] if len(dims) > 6 else None), strict=True)
    )
    reference = reference.expand(-1, value.shape[1], -1, -1, -1)
    mask = None if mask is None else mask.flatten(0, 1)
    out = torch.ops.tokenprune.ms_deform_attn_fused(
        value.flatten(0, 1),
        shapes,
        starts,
        reference.flatten(0, 1),
        offsets.flatten(0, 1),
        logits.flatten(0, 1),
        mask,
    )
    return out.unflatten(0, value.shape[:2]), 0


def _refuse_batched_levels(op, dims):
    shapes = [d for d in torch.utils._pytree.tree_leaves(dims[1:3]) if d is not None]
    check(not shapes, op, "spatial_shapes", "be the same for all of a vmapped batch", "batched ones")


def _flops(value, locations, per_channel):
    batch, _, heads, dim = value.shape
    return per_channel * batch * heads * dim * locations.shape[1] * locations.shape[3] * locations.shape[4]


def _flops_forward(value, shapes, starts, *points, out_val=None, **kwargs):
    return _flops(value, next(t for t in points if t.dim() == 6), 8)  # four corners, a multiply-add each


def _flops_backward(grad, value, shapes, starts, *points, out_val=None, **kwargs):
    return _flops(value, next(t for t in points if isinstance(t, Tensor) and t.dim() == 6), 16)


# ---------------------------------------------------------------- reference


def _sizes(shapes):
    flat = shapes.flatten().tolist() if isinstance(shapes, Tensor) else shapes
    return list(zip(flat[::2], flat[1::2], strict=True))


def _reference(value, shapes, starts, locations, weights, im2col_step=64):
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    stat = stat_dtype(value.dtype)
    sizes = _sizes(shapes)
    out = value.new_zeros(batch * heads, dim, queries, dtype=stat)
    rows = value.to(stat).split([h * w for h, w in sizes], 1)
    for level, (height, width) in enumerate(sizes):
        if 0 in (batch, heads, dim, queries, points, height, width):
            continue
        at = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B * M, Q, P, 2]
        pixel = at * at.new_tensor([width, height]) - 0.5
        reads = ((pixel > -1) & (pixel < at.new_tensor([width, height]))).all(-1)
        at = torch.where(reads[..., None], at, -1)  # wholly outside
        image = rows[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        sampled = F.grid_sample(image, 2 * at - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = torch.where(reads, weights[:, :, :, level].transpose(1, 2).flatten(0, 1), 0)
        out = out + (sampled * weight[:, None]).sum(-1)
    return out.view(batch, heads * dim, queries).transpose(1, 2).to(value.dtype)


def _locations_and_weights(shapes, reference, offsets, logits, stat):
    batch, queries, heads, levels, points, _ = offsets.shape
    offsets, reference = offsets.to(stat), reference[:, :, None, :, None]
    # What is not finite reads nothing. Its gradient would be 0 * infinity: keep it out of the arithmetic.
    known = reference.isfinite().all(-1, keepdim=True) & offsets.isfinite().all(-1, keepdim=True)
    offsets, reference = torch.where(known, offsets, 0), torch.where(known, reference, 0)
    if reference.shape[-1] == 2:
        size = offsets.new_tensor(_sizes(shapes)).view(levels, 1, 2).flip(-1)
        locations = reference + offsets / size.clamp(min=1)
    else:
        locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    locations = torch.where(known, locations, float("nan"))
    weights = logits.to(stat).softmax(-1) if logits.shape[-1] else logits.to(stat)
    return locations, weights.view(batch, queries, heads, levels, points)


def _reference_fused(value, shapes, starts, reference, offsets, logits, mask=None):
    locations, weights = _locations_and_weights(shapes, reference, offsets, logits, stat_dtype(value.dtype))
    value = value if mask is None else value.masked_fill(mask[..., None, None], 0)
    return _reference(value, shapes, starts, locations, weights)


for _overload in ("", ".list"):
    _first = _overload == ""  # a flop formula belongs to both overloads of an op
    register(
        "ms_deform_attn" + _overload,
        fake=_fake,
        reference=_reference,
        setup_context=_setup,
        backward=_backward,
        vmap=_vmap,
        flops=_flops_forward if _first else None,
    )
    register("ms_deform_attn_backward" + _overload, fake=_fake_backward, flops=_flops_backward if _first else None)
    register(
        "ms_deform_attn_fused" + _overload,
        fake=_fake_fused,
        reference=_reference_fused,
        setup_context=_setup_fused,
        backward=_backward_fused,
        vmap=_vmap_fused,
        flops=_flops_forward if _first else None,
    )
    register(
        "ms_deform_attn_fused_backward" + _overload,
        fake=_fake_fused_backward,
        flops=_flops_backward if _first else None,
    )
