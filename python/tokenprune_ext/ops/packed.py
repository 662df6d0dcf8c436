# SPDX-License-Identifier: Apache-2.0
"""Linear layers for inference on the CPU: weights packed once, norm, activation and residual in the same pass.

A plain linear layer rearranges its weight at every call, or reads it in an order that caches dislike; with few tokens that
costs as much as the multiplications. Packed weights are read as they stream past.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import call, check, check_floating, check_index, register, stat_dtype
from .tokens import TokenIndex

__all__ = ["pack_linear", "packed_linear"]

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu")


# ---------------------------------------------------------------- public functions


def pack_linear(weight: Tensor) -> Tensor:
    """The weight ``[N, K]`` of a linear layer in the layout that :func:`packed_linear` reads.

    Returns:
        uint8 ``[bytes]``, opaque: made for the instruction set of this process, not for storage.

    Raises:
        ValueError, TypeError: not a floating matrix on the CPU.
    """
    op = "pack_linear"
    check_floating(op, weight=weight)
    check(weight.dim() == 2, op, "weight", "have shape [N, K]", tuple(weight.shape))
    check_on_cpu(op, "weight", weight)
    return call(op, weight.device, weight.detach())


def packed_linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    act: str | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    index: TokenIndex | Tensor | None = None,
) -> Tensor:
    """``residual + scale * act(LayerNorm(x[index]) @ weight.T + bias)`` in one pass, inference only.

    Sums and the activation are computed in float32 (float64 for float64 values), rounded once.

    Args:
        x: ``[..., K]``; with ``index``, ``[R, K]``.
        packed: weight ``[N, K]`` of the dtype of x, from :func:`pack_linear`.
        out_features: N.
        bias: ``[N]``.
        norm: ``(weight [K] or None, bias [K] or None, eps)`` of a LayerNorm over the last dimension.
        act: None, ``"gelu"``, ``"gelu_tanh"`` or ``"quick_gelu"`` (``x * sigmoid(1.702 x)``).
        scale: ``[N]`` (LayerScale).
        residual: like the result.
        index: rows of x to take, -1 for a zero row: int32/int64 ``[M]``.

    Returns:
        ``[..., N]`` (``[M, N]`` with ``index``).

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: an index out of range, or ``packed`` does not
            hold an ``[N, K]`` weight of this dtype. NotImplementedError: when differentiated.
    """
    op = "packed_linear"
    check_floating(op, x=x)
    check_on_cpu(op, "x", x)
    check_activation(op, act)
    if index is not None:
        check(x.dim() == 2, op, "x", "have shape [R, K] with an index", tuple(x.shape))
        index = check_index(op, "index", index.indices if isinstance(index, TokenIndex) else index, x.device)
    if residual is not None:
        shape = (*(x.shape[:-1] if index is None else index.shape), out_features)
        if residual.shape != shape:
            check(False, op, "residual", "have shape {}", tuple(residual.shape), shape)
    return run_packed(x, packed, out_features, bias, norm, act, scale, residual, index)


# ---------------------------------------------------------------- checks


def run_packed(x, packed, out_features, bias, norm=None, act=None, scale=None, residual=None, index=None):
    """:func:`packed_linear` of arguments that are known to be right: a layer calls it several times per block."""
    norm = (False, None, None, 0.0) if norm is None else (True, *norm)
    rest = ACTIVATIONS.index(act), scale, residual, index
    return call("packed_linear", x.device, x, packed, out_features, bias, *norm, *rest)


def check_on_cpu(op, name, tensor):
    """Nothing else runs from packed weights."""
    if tensor.device.type not in ("cpu", "meta"):
        check(False, op, name, "be on the CPU (other devices need no packing)", tensor.device)


def check_activation(op, act):
    """One of ``ACTIVATIONS``."""
    if act not in ACTIVATIONS:
        check(False, op, "act", "be one of {}", repr(act), ACTIVATIONS)


# ---------------------------------------------------------------- fake, flops, reference


def _fake_pack(weight):
    # The true size depends on the instruction set; nothing but packed_linear may look at it.
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def _fake_linear(x, packed, out_features, bias, norm, norm_weight, norm_bias, eps, act, scale, residual, indices):
    return x.new_empty(*(x.shape[:-1] if indices is None else indices.shape), out_features)


def _flops_linear(x, packed, out_features, *args, out_val=None, **kwargs):
    return 2 * out_val.numel() * x.shape[-1]


def _reference_pack(weight):
    return weight.contiguous().flatten().view(torch.uint8).clone()


def _reference_linear(x, packed, out_features, bias, norm, norm_weight, norm_bias, eps, act, scale, residual, indices):
    weight = packed.view(x.dtype).view(out_features, x.shape[-1])
    stat = stat_dtype(x.dtype)

    def wide(t):
        return None if t is None else t.to(stat)

    z = wide(x)
    if norm:
        z = F.layer_norm(z, z.shape[-1:], wide(norm_weight), wide(norm_bias), eps)
    if indices is not None:
        z = (
            torch.where(indices[:, None] >= 0, z[indices.clamp(min=0).long()], 0)
            if x.shape[0]
            else z.new_zeros(indices.shape[0], x.shape[1])
        )
    y = F.linear(z, wide(weight), wide(bias))
    if act == 3:
        y = y * torch.sigmoid(1.702 * y)
    elif act:
        y = F.gelu(y, approximate="tanh" if act == 2 else "none")
    y = y if scale is None else y * wide(scale)
    y = y if residual is None else y + wide(residual)
    return y.to(x.dtype)


register("pack_linear", fake=_fake_pack, reference=_reference_pack)
register("packed_linear", fake=_fake_linear, reference=_reference_linear, flops=_flops_linear)
