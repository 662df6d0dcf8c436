# SPDX-License-Identifier: Apache-2.0
"""Select tokens, gather them (optionally through LayerNorm) and scatter results back into a preserved feature map.

The mechanism of dynamic token pruning with preserved features: SViT (arXiv 2306.07050), DToP (arXiv 2308.01045),
DynamicViT (arXiv 2106.02034).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._register import batched, call, check, check_floating, check_index, register, stat_dtype

__all__ = [
    "TokenIndex",
    "gather_layer_norm",
    "gather_tokens",
    "scatter_tokens",
    "scatter_tokens_",
    "select_tokens",
]


@dataclass(frozen=True)
class TokenIndex:
    """Which tokens of a ``[B, N]`` batch are kept.

    Attributes:
        indices: int32 ``[T]``, flat ``b * N + i``, ascending; -1 means "no token".
        cu_seqlens: int32 ``[B + 1]``, where each image's kept tokens start.
        max_seqlen: upper bound of the tokens kept per image.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


torch.export.register_dataclass(TokenIndex)


# ---------------------------------------------------------------- public functions


def select_tokens(mask: Tensor, *, capacity: int | None = None) -> TokenIndex:
    """Indices of the true entries of a mask, in order.

    Args:
        mask: bool ``[B, N]``, true = keep.
        capacity: fixed number of index slots. Nothing is then read back to the host; unused slots hold -1. On CUDA,
            tokens beyond the capacity are dropped; on the CPU they are an error.

    Returns:
        TokenIndex with ``[T]`` (or ``[capacity]``) indices.

    Raises:
        TypeError: mask is not bool.
        ValueError: mask is not 2-D, or capacity is negative.

    Example:
        >>> select_tokens(torch.tensor([[True, False, True]])).indices
        tensor([0, 2], dtype=torch.int32)
    """
    op = "select_tokens"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        check(False, op, "mask", "be a bool tensor", getattr(mask, "dtype", type(mask)), error=TypeError)
    shape = mask.shape
    if len(shape) != 2:
        check(False, op, "mask", "have shape [B, N]", tuple(shape))
    if capacity is None:
        indices, cu_seqlens = call("select_tokens", mask.device, mask)
    else:
        check(capacity >= 0, op, "capacity", "be >= 0", capacity)
        indices, cu_seqlens = call("select_tokens_capacity", mask.device, mask, capacity)
    return TokenIndex(indices, cu_seqlens, shape[1])


def gather_tokens(x: Tensor, index: TokenIndex | Tensor) -> Tensor:
    """Rows of ``x`` in the order of the index.

    Args:
        x: ``[B, N, C]`` or ``[R, C]``.
        index: TokenIndex, or flat int32/int64 row numbers ``[T]``; -1 gives a zero row.

    Returns:
        ``[T, C]``; differentiable in ``x`` (rows taken several times sum their gradients in a fixed order).

    Raises:
        ValueError, TypeError: wrong rank, dtype or device. RuntimeError: index out of range (on the CPU; on CUDA under
            TOKENPRUNE_VALIDATE=1, otherwise such rows are zero).
    """
    op = "gather_tokens"
    rows = _rows(op, "x", x)
    return call(op, x.device, rows, _indices(op, index, x))


def gather_layer_norm(
    x: Tensor, index: TokenIndex | Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm of the gathered rows, in one pass over the memory.

    Args:
        x: ``[B, N, C]`` or ``[R, C]``.
        index: as in :func:`gather_tokens`; -1 gives a zero row.
        weight, bias: ``[C]`` or None.
        eps: added to the variance.

    Returns:
        ``[T, C]``; differentiable in ``x``, ``weight`` and ``bias``.
    """
    op = "gather_layer_norm"
    rows = _rows(op, "x", x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check(
                tuple(parameter.shape) == (x.shape[-1],),
                op,
                name,
                "have shape [{}]",
                tuple(parameter.shape),
                x.shape[-1],
            )
            check(parameter.device == x.device, op, name, "be on {}", parameter.device, x.device)
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return call(op, x.device, rows, _indices(op, index, x), weight, bias, eps)[0]


def scatter_tokens(
    features: Tensor, tokens: Tensor, index: TokenIndex | Tensor, *, add: bool = False, scale: Tensor | None = None
) -> Tensor:
    """Write tokens back into a copy of the feature map.

    Args:
        features: ``[B, N, C]`` or ``[R, C]``.
        tokens: ``[T, C]``.
        index: as in :func:`gather_tokens`, without duplicates; -1 is skipped.
        add: add to the row that is there (a residual connection) instead of replacing it.
        scale: per-token factor ``[T]`` applied to ``tokens``.

    Returns:
        A new tensor shaped like ``features``; differentiable in ``features``, ``tokens`` and ``scale``.
    """
    rows, tokens, indices, scale = _scatter_arguments("scatter_tokens", features, tokens, index, scale)
    return call("scatter_tokens", features.device, rows, tokens, indices, scale, add).view(features.shape)


def scatter_tokens_(
    features: Tensor, tokens: Tensor, index: TokenIndex | Tensor, *, add: bool = False, scale: Tensor | None = None
) -> Tensor:
    """In-place :func:`scatter_tokens` for inference; returns ``features``.

    Raises:
        RuntimeError: a gradient would be lost. ValueError: features is not contiguous.
    """
    op = "scatter_tokens_"
    if torch.is_grad_enabled() and (features.requires_grad or tokens.requires_grad):
        raise RuntimeError(
            f"tokenprune::{op}: features and tokens must not require grad (use scatter_tokens), got requires_grad=True"
        )
    if not features.is_contiguous():
        check(False, op, "features", "be contiguous", features.stride())
    rows, tokens, indices, scale = _scatter_arguments(op, features, tokens, index, scale)
    call(op, features.device, rows, tokens, indices, scale, add)
    return features


# ---------------------------------------------------------------- checks


def _rows(op, name, x):
    check_floating(op, **{name: x})
    shape = x.shape
    if len(shape) == 2:
        return x
    if len(shape) != 3:
        check(False, op, name, "have shape [B, N, C] or [R, C]", tuple(shape))
    return x.reshape(shape[0] * shape[1], shape[2])


def _indices(op, index, like):
    indices = index.indices if isinstance(index, TokenIndex) else index
    return check_index(op, "index", indices, like.device)


def _scatter_arguments(op, features, tokens, index, scale):
    rows = _rows(op, "features", features)
    indices = _indices(op, index, features)
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        check(False, op, "tokens", "be a floating tensor", getattr(tokens, "dtype", type(tokens)), error=TypeError)
    tokens = tokens.to(features.dtype)  # autocast leaves half-precision branches beside a float32 residual stream
    check_floating(op, features=features, tokens=tokens)
    shape, count = tokens.shape, indices.shape[0]
    if len(shape) != 2 or shape[1] != rows.shape[1]:
        check(False, op, "tokens", "have shape [T, {}]", tuple(shape), rows.shape[1])
    if shape[0] != count:
        check(False, op, "tokens", "have one row per index ({})", tuple(shape), count)
    if scale is not None:
        if tuple(scale.shape) != (count,):
            check(False, op, "scale", "have shape [{}]", tuple(scale.shape), count)
        check(scale.device == features.device, op, "scale", "be on {}", scale.device, features.device)
        scale = scale.to(stat_dtype(features.dtype))
    return rows, tokens, indices, scale


# ---------------------------------------------------------------- fake


def _fake_select(mask):
    count = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty(count, dtype=torch.int32), mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


def _fake_select_capacity(mask, capacity):
    return mask.new_empty(capacity, dtype=torch.int32), mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


def _fake_gather(x, indices):
    return x.new_empty(indices.shape[0], x.shape[1])


def _fake_gather_layer_norm(x, indices, weight, bias, eps):
    stat = x.new_empty(indices.shape[0], dtype=stat_dtype(x.dtype))
    return x.new_empty(indices.shape[0], x.shape[1]), stat, torch.empty_like(stat)


def _fake_gather_layer_norm_backward(grad, x, indices, weight, mean, rstd):
    per_channel = x.new_empty(x.shape[1], dtype=stat_dtype(x.dtype))
    return x.new_empty(indices.shape[0], x.shape[1]), per_channel, torch.empty_like(per_channel)


def _fake_scatter_backward(grad, tokens, indices, scale, add):
    count = indices.shape[0]
    return (
        grad.new_empty(grad.shape),
        grad.new_empty(count, grad.shape[1]),
        grad.new_empty(0 if scale is None else count, dtype=stat_dtype(grad.dtype)),
    )


# ---------------------------------------------------------------- autograd


def _setup_gather(ctx, inputs, output):
    x, indices = inputs
    ctx.save_for_backward(indices)
    ctx.rows = x.shape[0]


def _backward_gather(ctx, grad):
    (indices,) = ctx.saved_tensors
    return torch.ops.tokenprune.gather_tokens_backward(grad, indices, ctx.rows), None


def _setup_gather_layer_norm(ctx, inputs, output):
    x, indices, weight, bias, _ = inputs
    ctx.save_for_backward(x, indices, weight, output[1], output[2])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward_gather_layer_norm(ctx, grad, grad_mean, grad_rstd):
    x, indices, weight, mean, rstd = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None
    rows, grad_weight, grad_bias = torch.ops.tokenprune.gather_layer_norm_backward(grad, x, indices, weight, mean, rstd)
    grad_x = torch.ops.tokenprune.gather_tokens_backward(rows, indices, x.shape[0]) if ctx.needs_input_grad[0] else None
    grad_weight = None if weight is None else grad_weight.to(weight.dtype)
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, None, grad_weight, grad_bias, None


def _setup_scatter(ctx, inputs, output):
    _, tokens, indices, scale, add = inputs
    ctx.save_for_backward(tokens if scale is not None else None, indices, scale)
    ctx.add = add


def _backward_scatter(ctx, grad):
    tokens, indices, scale = ctx.saved_tensors
    grads = torch.ops.tokenprune.scatter_tokens_backward(grad, tokens, indices, scale, ctx.add)
    return grads[0], grads[1], None, None if scale is None else grads[2], None


# ---------------------------------------------------------------- vmap: one call over all rows of the batch


def _flat_indices(indices, rows):
    start = torch.arange(indices.shape[0], device=indices.device, dtype=torch.int32)[:, None] * rows
    return torch.where(indices < 0, indices, indices + start).flatten()


def _vmap_gather(info, dims, x, indices):
    x, indices = (batched(t, d, info.batch_size) for t, d in zip((x, indices), dims))
    rows = torch.ops.tokenprune.gather_tokens(x.flatten(0, 1), _flat_indices(indices, x.shape[1]))
    return rows.unflatten(0, indices.shape), 0


def _vmap_scatter(info, dims, features, tokens, indices, scale, add):
    features, tokens, indices, scale = (
        batched(t, d, info.batch_size) for t, d in zip((features, tokens, indices, scale), dims)
    )
    out = torch.ops.tokenprune.scatter_tokens(
        features.flatten(0, 1),
        tokens.flatten(0, 1),
        _flat_indices(indices, features.shape[1]),
        None if scale is None else scale.flatten(),
        add,
    )
    return out.view(features.shape), 0


# ---------------------------------------------------------------- reference


def _reference_select(mask):
    batch = mask.shape[0]
    indices = mask.reshape(-1).nonzero().squeeze(1).to(torch.int32)
    cu_seqlens = mask.new_zeros(batch + 1, dtype=torch.int32)
    cu_seqlens[1:] = mask.sum(1).cumsum(0)
    return indices, cu_seqlens


def _reference_select_capacity(mask, capacity):
    indices, cu_seqlens = _reference_select(mask)
    slots = mask.new_full((capacity,), -1, dtype=torch.int32)
    slots[: indices.shape[0]] = indices[:capacity]
    return slots, cu_seqlens.clamp(max=capacity)


def _valid(indices, rows):
    valid = (indices >= 0) & (indices < rows)
    return valid, indices.clamp(0, max(rows - 1, 0)).long()


def _reference_gather(x, indices):
    if x.shape[0] == 0:
        return x.new_zeros(indices.shape[0], x.shape[1])
    valid, safe = _valid(indices, x.shape[0])
    return torch.where(valid[:, None], x[safe], 0)


def _reference_gather_layer_norm(x, indices, weight, bias, eps):
    stat = stat_dtype(x.dtype)
    rows = _reference_gather(x, indices).to(stat)
    valid = _valid(indices, x.shape[0])[0]
    mean = rows.mean(1)
    rstd = (rows.var(1, unbiased=False) + eps).rsqrt()
    out = (rows - mean[:, None]) * rstd[:, None]
    out = out if weight is None else out * weight.to(stat)
    out = out if bias is None else out + bias.to(stat)
    return torch.where(valid[:, None], out, 0).to(x.dtype), mean * valid, rstd * valid


def _reference_scatter(features, tokens, indices, scale, add):
    valid = _valid(indices, features.shape[0])[0]
    rows = indices[valid].long()
    updates = tokens[valid].to(stat_dtype(tokens.dtype))
    updates = updates if scale is None else updates * scale[valid][:, None]
    updates = updates + features[rows].to(updates.dtype) if add else updates
    return features.index_copy(0, rows, updates.to(features.dtype))


def _reference_scatter_(features, tokens, indices, scale, add):
    features.copy_(_reference_scatter(features, tokens, indices, scale, add))


register("select_tokens", fake=_fake_select, reference=_reference_select)
register("select_tokens_capacity", fake=_fake_select_capacity, reference=_reference_select_capacity)
register(
    "gather_tokens",
    fake=_fake_gather,
    reference=_reference_gather,
    setup_context=_setup_gather,
    backward=_backward_gather,
    vmap=_vmap_gather,
)
register("gather_tokens_backward", fake=lambda grad, indices, rows: grad.new_empty(rows, grad.shape[1]))
register(
    "gather_layer_norm",
    fake=_fake_gather_layer_norm,
    reference=_reference_gather_layer_norm,
    setup_context=_setup_gather_layer_norm,
    backward=_backward_gather_layer_norm,
)
register("gather_layer_norm_backward", fake=_fake_gather_layer_norm_backward)
register(
    "scatter_tokens",
    fake=lambda features, tokens, indices, scale, add: features.new_empty(features.shape),
    reference=_reference_scatter,
    setup_context=_setup_scatter,
    backward=_backward_scatter,
    vmap=_vmap_scatter,
)
register("scatter_tokens_", fake=lambda features, tokens, indices, scale, add: None, reference=_reference_scatter_)
register("scatter_tokens_backward", fake=_fake_scatter_backward)
