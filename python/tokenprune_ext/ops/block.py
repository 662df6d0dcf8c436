# SPDX-License-Identifier: Apache-2.0
"""The two halves of a pre-norm transformer block, each in one call, from packed weights: inference on the CPU.
The attention half also with what ToMe, ATS and ACT do in it.

The same kernels as :func:`packed_linear` and :func:`sparse_attention`, without the way back to Python in between, which
small models at batch 1 feel.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import attention, merge, packed, sorting
from ._register import call, check, check_floating, check_index, default_scale, register, stat_dtype
from .tokens import TokenIndex, gather_tokens

__all__ = [
    "packed_attention",
    "packed_attention_grouped",
    "packed_attention_merged",
    "packed_attention_sampled",
    "packed_mlp",
]


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
    cu_seqlens = _check_tokens(op, x, cu_seqlens)
    if index is not None:
        check(cu_seqlens is not None, op, "cu_seqlens", "be given with an index", None)
        index = check_index(op, "index", index.indices if isinstance(index, TokenIndex) else index, x.device)
    if key_bias is not None:
        key_bias = key_bias.to(stat_dtype(x.dtype))
    scale = default_scale(head_dim) if scale is None else scale
    tail = num_heads, head_dim, index, cu_seqlens, max_seqlen, key_bias, scale, want_cls
    return call(op, x.device, x, *norm, *qkv, *proj, layer_scale, *tail)


def packed_attention_merged(
    x: Tensor,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    r: int,
    *,
    norm: tuple[Tensor | None, Tensor | None, float],
    num_heads: int,
    head_dim: int,
    layer_scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    size: Tensor | None = None,
    class_token: bool = False,
    distill_token: bool = False,
    num_prefix: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`packed_attention`, then :func:`match_and_merge` by its keys.

    Args:
        x: ``[B, N, C]``.
        qkv, proj, norm, num_heads, head_dim, layer_scale, key_bias, scale: as in :func:`packed_attention`.
        r, size, class_token, distill_token, num_prefix: as in :func:`match_and_merge`.

    Returns:
        ``(y [B, N', C], size' [B, N'], log(size') [B, N'], parent int32 [B, N])``.

    Raises:
        As :func:`packed_attention` and :func:`match_and_merge`.
    """
    op = "packed_attention_merged"
    check_floating(op, x=x)
    packed.check_on_cpu(op, "x", x)
    check(x.dim() == 3, op, "x", "have shape [B, N, C]", tuple(x.shape))
    r = merge.count_merges(op, x.shape[1], r, class_token, distill_token, num_prefix)
    stat = stat_dtype(x.dtype)
    key_bias, size = (None if t is None else t.to(stat) for t in (key_bias, size))
    scale = default_scale(head_dim) if scale is None else scale
    tail = num_heads, head_dim, key_bias, scale, r, size, class_token, distill_token, num_prefix or 0
    return call(op, x.device, x, *norm, *qkv, *proj, layer_scale, *tail)


def packed_attention_sampled(
    x: Tensor,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    initial: Tensor,
    *,
    norm: tuple[Tensor | None, Tensor | None, float],
    num_heads: int,
    head_dim: int,
    layer_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    num_prefix: int = 1,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    drop: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`packed_attention` of the tokens that :func:`sample_tokens` keeps: they are the queries, all are keys.

    The attention of each sequence's first token scores the others.

    Args:
        x, qkv, proj, norm, num_heads, head_dim, layer_scale, cu_seqlens, max_seqlen, key_bias, scale: as in
            :func:`packed_attention`.
        initial, num_prefix, drop: as in :func:`sample_tokens`.

    Returns:
        ``(y, rows, source, cu_seqlens)``: tokens padded as x is, ``[B, M, C]`` with zeros behind the kept ones, or packed
        ``[S, C]``, and what :func:`sample_tokens` returns.

    Raises:
        As :func:`packed_attention` and :func:`sample_tokens`.
    """
    op = "packed_attention_sampled"
    check_floating(op, x=x)
    packed.check_on_cpu(op, "x", x)
    cu_seqlens = _check_tokens(op, x, cu_seqlens)
    check(num_prefix >= 1, op, "num_prefix", "be >= 1 (the class token)", num_prefix)
    if key_bias is not None:
        key_bias = key_bias.to(stat_dtype(x.dtype))
    scale = default_scale(head_dim) if scale is None else scale
    tail = num_heads, head_dim, cu_seqlens, max_seqlen, key_bias, scale, initial, num_prefix, drop
    return call(op, x.device, x, *norm, *qkv, *proj, layer_scale, *tail)


def packed_attention_grouped(
    x: Tensor,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    projection: Tensor,
    offset: Tensor,
    *,
    norm: tuple[Tensor | None, Tensor | None, float],
    num_heads: int,
    head_dim: int,
    layer_scale: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    width: float = 8.0,
) -> tuple[Tensor, Tensor]:
    """:func:`packed_attention` in which the queries of a head that hash alike act as their mean.

    Args:
        x, qkv, proj, norm, num_heads, head_dim, layer_scale, cu_seqlens, max_seqlen, key_bias, scale: as in
            :func:`packed_attention`.
        projection, offset, width: as in :func:`hash_groups`, of the queries times ``scale``.

    Returns:
        ``(y, ids)``: tokens shaped as x, and the groups int32 ``[B, H, N]`` (``[B, H, max_seqlen]`` when packed).

    Raises:
        As :func:`packed_attention` and :func:`hash_groups`.
    """
    op = "packed_attention_grouped"
    check_floating(op, x=x)
    packed.check_on_cpu(op, "x", x)
    cu_seqlens = _check_tokens(op, x, cu_seqlens)
    sorting.check_draws(op, projection, offset, x, head_dim, width)
    if key_bias is not None:
        key_bias = key_bias.to(stat_dtype(x.dtype))
    scale = default_scale(head_dim) if scale is None else scale
    draws = projection.detach(), offset.detach()  # groups are constants
    tail = num_heads, head_dim, cu_seqlens, max_seqlen, key_bias, scale, *draws, float(width)
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


def _check_tokens(op, x, cu_seqlens):
    """Padded or packed tokens; the starts as int32."""
    if cu_seqlens is None:
        check(x.dim() == 3, op, "x", "have shape [B, N, C] without cu_seqlens", tuple(x.shape))
        return None
    check(x.dim() == 2, op, "x", "have shape [T, C] with cu_seqlens", tuple(x.shape))
    return check_index(op, "cu_seqlens", cu_seqlens, x.device)


# ---------------------------------------------------------------- fake, flops, reference


class _Half(NamedTuple):
    """Arguments that all halves with attention take behind the tokens."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    qkv: Tensor
    b: Tensor | None
    proj: Tensor
    d: Tensor | None
    layer_scale: Tensor | None
    heads: int
    dim: int

    def project(self, x, index=None):
        """Queries, keys and values of the reference, ``[..., 3 * H * D]``."""
        norm, width = (True, self.norm_weight, self.norm_bias, self.eps), 3 * self.heads * self.dim
        return packed._reference_linear(x, self.qkv, width, self.b, *norm, 0, None, None, index)

    def finish(self, mixed, residual):
        """``residual`` plus the projected values of the reference."""
        norm, channels = (False, None, None, 0.0), residual.shape[-1]
        return packed._reference_linear(mixed, self.proj, channels, self.d, *norm, 0, self.layer_scale, residual, None)


def _split(args):
    """Those, and what else a half takes."""
    return _Half(*args[:10]), args[10:]


def _fake_attention(x, *args):
    half, (index, cu, _, _, _, cls) = _split(args)
    lead = x.shape[:-1] if index is None else index.shape
    rows = lead[0] * lead[1] if cu is None else lead[0]
    stats = {"dtype": stat_dtype(x.dtype)}
    return (
        x.new_empty(*lead, x.shape[-1]),
        x.new_empty(*lead, 3 * half.heads * half.dim),
        x.new_empty(half.heads, rows, **stats),
        x.new_empty(rows if cls else 0, **stats),
    )


def _fake_merged(x, *args):
    _, (_, _, r, size, *protected) = _split(args)
    return merge._fake_step(x, x, r, size, *protected)


def _fake_sampled(x, *args):
    _, (cu, most, bias, _, initial, prefix, drop) = _split(args)
    padded = cu is None
    most = x.shape[1] if padded else most
    rows, source, starts = sorting._fake_tokens(None, x, initial, cu, most, bias, prefix, padded, drop)
    return x.new_empty(*(rows.shape if padded else source.shape), x.shape[-1]), rows, source, starts


def _fake_grouped(x, *args):
    half, (cu, most, *_) = _split(args)
    batch, most = x.shape[:2] if cu is None else (cu.shape[0] - 1, most)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(batch, half.heads, most, dtype=torch.int32)


def _fake_mlp(x, *args):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flops_attention(x, *args, out_val=None, **kwargs):
    half, (index, cu, most, *_) = _split(args)
    padded = cu is None
    pairs = x.shape[0] * x.shape[1] ** 2 if padded else attention._pairs(x, x, cu, cu, most, index, index)
    return 8 * out_val[0].numel() * half.heads * half.dim + 4 * half.heads * half.dim * pairs


def _flops_merged(x, *args, out_val=None, **kwargs):
    half, _ = _split(args)
    attention = 8 * x.numel() * half.heads * half.dim + 4 * half.heads * half.dim * x.shape[0] * x.shape[1] ** 2
    return attention + merge._flops_step(x, x.new_empty(0, half.dim))


def _flops_sampled(x, *args, out_val=None, **kwargs):
    """With the attention of the first tokens, which is computed ahead."""
    half, (cu, most, *_) = _split(args)
    _, _, source, starts = out_val
    first = torch.arange(starts.shape[0], dtype=torch.int32, device=x.device)
    keys, most = (first * x.shape[1], x.shape[1]) if cu is None else (cu, most)
    pairs = sum(
        attention._pairs(rows, x.flatten(0, -2), own, keys, most, None, None)
        for rows, own in ((source, starts), (first[1:], first))
    )
    return 2 * half.heads * half.dim * (3 * x.numel() + source.numel() * x.shape[-1] + 2 * pairs)


def _flops_grouped(x, *args, out_val=None, **kwargs):
    """Every token a group of its own where the groups cannot be read."""
    half, (_, _, _, _, projection, *_) = _split(args)
    ids, width = out_val[1].flatten(0, 1), half.heads * half.dim
    rows = x.numel() // max(x.shape[-1], 1)
    pairs = rows * half.heads * ids.shape[1]
    if ids.device.type == "cpu" and not isinstance(ids, torch._subclasses.FakeTensor) and pairs > 0:
        pairs = int(((ids >= 0).sum(1) * (ids.amax(1) + 1)).sum())
    return 8 * x.numel() * width + 2 * rows * width * projection.shape[1] + 4 * half.dim * pairs


def _flops_mlp(x, norm_weight, norm_bias, eps, first, bias_1, hidden, *args, out_val=None, **kwargs):
    return 4 * x.numel() * hidden


def _reference_attention(x, *args):
    half, (index, cu, most, bias, scale, cls) = _split(args)
    if cu is None:
        most = x.shape[1]
        cu = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * most
    wide = half.project(x, index)
    parts = wide.reshape(-1, 3, half.heads, half.dim).unbind(1)
    mixed, lse, row = attention._reference_attention(*parts, cu, cu, most, most, bias, None, None, scale, cls)
    mixed = mixed.reshape(*wide.shape[:-1], half.heads * half.dim)
    x = x if index is None else gather_tokens(x, index)
    y = half.finish(mixed, x)
    return y, wide, lse, row.mean(0)


def _reference_merged(x, *args):
    *parts, heads, dim, bias, scale, r, size, class_token, distill_token, prefix = args
    y, wide, *_ = _reference_attention(x, *parts, heads, dim, None, None, 0, bias, scale, False)
    keys = wide.view(*x.shape[:2], 3, heads, dim)[:, :, 1]
    return merge._reference_step(y, keys, r, size, class_token, distill_token, prefix)


def _reference_sampled(x, *args):
    half, (cu, most, bias, scale, initial, prefix, drop) = _split(args)
    padded = cu is None
    if padded:
        most = x.shape[1]
        cu = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * most
    x = x.flatten(0, -2)
    wide = half.project(x)
    q, k, v = wide.view(x.shape[0], 3, half.heads, half.dim).unbind(1)
    one = torch.arange(cu.shape[0], dtype=torch.int32, device=x.device)
    *_, row = attention._reference_attention(q, k, v, one, cu, 1, most, bias, cu[:-1], None, scale, True)
    rows, source, starts = sorting._reference_tokens(row, v, initial, cu, most, bias, prefix, padded, drop)
    mixed = attention._reference_attention(q, k, v, starts, cu, most, most, bias, source, None, scale, False)[0]
    residual = gather_tokens(x, source)
    y = half.finish(mixed.flatten(1), residual)
    y = torch.where(source[:, None] < 0, 0, y)
    return y.view(*rows.shape, x.shape[1]) if padded else y, rows, source, starts


def _reference_grouped(x, *args):
    half, (cu, most, bias, scale, projection, offset, bucket) = _split(args)
    padded = cu is None
    if padded:
        most = x.shape[1]
        cu = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * most
    wide = half.project(x)
    q, k, v = wide.reshape(-1, 3, half.heads, half.dim).permute(1, 2, 0, 3)
    mixed = torch.zeros_like(q)  # [H, T, D]
    all_ids = torch.full((cu.shape[0] - 1, half.heads, most), -1, dtype=torch.int32, device=x.device)
    for image, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist())):
        if begin == end:
            continue
        own = slice(begin, end)
        ids, counts = sorting._reference_groups(q[:, own], projection, offset, bucket, scale, None)
        all_ids[image, :, : end - begin] = ids
        place = ids.long()[..., None].expand(-1, -1, half.dim)
        stat = projection.dtype
        means = torch.zeros_like(place, dtype=stat).scatter_add(1, place, q[:, own].to(stat))
        means = (means / counts.clamp(min=1)[..., None]).to(x.dtype).to(stat)
        logits = means @ k[:, own].to(stat).mT * scale + (0 if bias is None else bias[own])
        mixed[:, own] = (logits.softmax(-1) @ v[:, own].to(stat)).to(x.dtype).gather(1, place)
    inner = mixed.transpose(0, 1).reshape(*x.shape[:-1], half.heads * half.dim)
    y = half.finish(inner, x)
    return y, all_ids


def _reference_mlp(x, norm_weight, norm_bias, eps, first, bias_1, hidden, act, second, bias_2, layer_scale):
    linear = packed._reference_linear
    h = linear(x, first, hidden, bias_1, True, norm_weight, norm_bias, eps, act, None, None, None)
    return linear(h, second, x.shape[-1], bias_2, False, None, None, 0.0, 0, layer_scale, x, None)


register("packed_attention", fake=_fake_attention, reference=_reference_attention, flops=_flops_attention)
register("packed_attention_sampled", fake=_fake_sampled, reference=_reference_sampled, flops=_flops_sampled)
register("packed_attention_grouped", fake=_fake_grouped, reference=_reference_grouped, flops=_flops_grouped)
register("packed_attention_merged", fake=_fake_merged, reference=_reference_merged, flops=_flops_merged)
register("packed_mlp", fake=_fake_mlp, reference=_reference_mlp, flops=_flops_mlp)
