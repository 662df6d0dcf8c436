# SPDX-License-Identifier: Apache-2.0
"""The two halves of a pre-norm transformer block, each in one call, from packed weights: inference on the CPU.

The same kernels as :func:`packed_linear` and :func:`sparse_attention`, without the way back to Python in between, which
small models at batch 1 feel.
"""

import torch
from torch import Tensor

from . import attention, packed
from ._register import call, check, check_floating, check_index, default_scale, register, stat_dtype
from .tokens import TokenIndex, gather_tokens

__all__ = ["packed_attention", "packed_mlp"]


# ---------------------------------------------------------------- public functions


def packed_attention(
    x: Tensor,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    *,
    norm: tuple[Tensor | None, Tensor | None, float],
    num_heads: int,
    head_dim: int,
    layer_scale: Tensor | None = None,
    index: TokenIndex | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    want_cls: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x + layer_scale * proj(attention(qkv(LayerNorm(x))))``, inference only.

    Args:
        x: padded ``[B, N, C]`` (all rows are tokens), or ``[T, C]`` with ``cu_seqlens`` and ``max_seqlen``.
        qkv: weight ``[3 * H * D, C]`` of the dtype of x, from :func:`pack_linear`, and its bias or None; outputs ordered
            q, k, v, then by head.
        proj: weight ``[C, H * D]``, likewise.
        norm: ``(weight [C] or None, bias [C] or None, eps)``.
        num_heads, head_dim: H and D.
        layer_scale: ``[C]``.
        index: with ``cu_seqlens``: the tokens are these rows of ``x [R, C]``, int32/int64 ``[T]``, -1 for a zero row.
        cu_seqlens: int32 ``[B + 1]``, starts of the sequences of packed tokens; max_seqlen bounds their lengths.
        key_bias: ``[T]``, added to the logits of every query, float32 (float64 for float64 values).
        scale: factor of the logits, default ``D ** -0.5``.
        want_cls: also return the probabilities of each sequence's first query, averaged over heads.

    Returns:
        ``(y, qkv [..., 3 * H * D], lse [H, T], cls [T])``; ``cls`` is empty unless wanted.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: wrong contents of ``cu_seqlens``, or a weight that
            is not packed for these sizes. NotImplementedError: when differentiated.
    """
    op = "packed_attention"
    check_floating(op, x=x)
    packed.check_on_cpu(op, "x", x)
    if cu_seqlens is None:
        check(x.dim() == 3, op, "x", "have shape [B, N, C] without cu_seqlens", tuple(x.shape))
    else:
        check(x.dim() == 2, op, "x", "have shape [T, C] with cu_seqlens", tuple(x.shape))
        cu_seqlens = check_index(op, "cu_seqlens", cu_seqlens, x.device)
    if index is not None:
        check(cu_seqlens is not None, op, "cu_seqlens", "be given with an index", None)
        index = check_index(op, "index", index.indices if isinstance(index, TokenIndex) else index, x.device)
    if key_bias is not None:
        key_bias = key_bias.to(stat_dtype(x.dtype))
    scale = default_scale(head_dim) if scale is None else scale
    tail = num_heads, head_dim, index, cu_seqlens, max_seqlen, key_bias, scale, want_cls
    return call(op, x.device, x, *norm, *qkv, *proj, layer_scale, *tail)


def packed_mlp(
    x: Tensor,
    first: tuple[Tensor, Tensor | None],
    second: tuple[Tensor, Tensor | None],
    *,
    norm: tuple[Tensor | None, Tensor | None, float],
    hidden: int,
    act: str | None = "gelu",
    layer_scale: Tensor | None = None,
) -> Tensor:
    """``x + layer_scale * second(act(first(LayerNorm(x))))``, inference only.

    Args:
        x: ``[..., C]``.
        first: weight ``[hidden, C]`` of the dtype of x, from :func:`pack_linear`, and its bias or None.
        second: weight ``[C, hidden]``, likewise.
        norm: ``(weight [C] or None, bias [C] or None, eps)``.
        hidden: width between the two.
        act: as in :func:`packed_linear`.
        layer_scale: ``[C]``.

    Raises:
        As :func:`packed_linear`.
    """
    op = "packed_mlp"
    check_floating(op, x=x)
    packed.check_on_cpu(op, "x", x)
    packed.check_activation(op, act)
    return call(op, x.device, x, *norm, *first, hidden, packed.ACTIVATIONS.index(act), *second, layer_scale)


# ---------------------------------------------------------------- fake, flops, reference


def _fake_attention(
    x, norm_weight, norm_bias, eps, qkv, b, proj, d, layer_scale, heads, dim, index, cu, most, bias, scale, cls
):
    lead = x.shape[:-1] if index is None else index.shape
    rows = lead[0] * lead[1] if cu is None else lead[0]
    stats = {"dtype": stat_dtype(x.dtype)}
    return (
        x.new_empty(*lead, x.shape[-1]),
        x.new_empty(*lead, 3 * heads * dim),
        x.new_empty(heads, rows, **stats),
        x.new_empty(rows if cls else 0, **stats),
    )


def _fake_mlp(x, *args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flops_attention(
    x,
    norm_weight,
    norm_bias,
    eps,
    qkv,
    b,
    proj,
    d,
    layer_scale,
    heads,
    dim,
    index,
    cu,
    most,
    *args,
    out_val=None,
    **kwargs,
):
    padded = cu is None
    pairs = x.shape[0] * x.shape[1] ** 2 if padded else attention._pairs(x, x, cu, cu, most, index, index)
    return 8 * out_val[0].numel() * heads * dim + 4 * heads * dim * pairs


def _flops_mlp(x, norm_weight, norm_bias, eps, first, bias_1, hidden, *args, out_val=None, **kwargs):
    return 4 * x.numel() * hidden


def _reference_attention(
    x, norm_weight, norm_bias, eps, qkv, b, proj, d, layer_scale, heads, dim, index, cu, most, bias, scale, cls
):
    linear = packed._reference_linear
    if cu is None:
        most = x.shape[1]
        cu = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * most
    wide = linear(x, qkv, 3 * heads * dim, b, True, norm_weight, norm_bias, eps, 0, None, None, index)
    parts = wide.reshape(-1, 3, heads, dim).unbind(1)
    mixed, lse, row = attention._reference_attention(*parts, cu, cu, most, most, bias, None, None, scale, cls)
    mixed = mixed.reshape(*wide.shape[:-1], heads * dim)
    x = x if index is None else gather_tokens(x, index)
    y = linear(mixed, proj, x.shape[-1], d, False, None, None, 0.0, 0, layer_scale, x, None)
    return y, wide, lse, row.mean(0)


def _reference_mlp(x, norm_weight, norm_bias, eps, first, bias_1, hidden, act, second, bias_2, layer_scale):
    linear = packed._reference_linear
    h = linear(x, first, hidden, bias_1, True, norm_weight, norm_bias, eps, act, None, None, None)
    return linear(h, second, x.shape[-1], bias_2, False, None, None, 0.0, 0, layer_scale, x, None)


register("packed_attention", fake=_fake_attention, reference=_reference_attention, flops=_flops_attention)
register("packed_mlp", fake=_fake_mlp, reference=_reference_mlp, flops=_flops_mlp)
