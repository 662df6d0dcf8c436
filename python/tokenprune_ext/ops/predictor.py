# SPDX-License-Identifier: Apache-2.0
"""Learned scores of tokens in one call, from packed weights: inference on the CPU.

The predictor of DynamicViT (arXiv 2106.02034, eq. 1 to 4), and with several heads the selector of SPViT (arXiv 2112.13890,
section 4.2): a handful of small layers, whose cost at batch 1 is the way from one to the next.
"""

from itertools import pairwise

import torch
from torch import Tensor

from . import packed
from ._register import call, check, check_floating, check_index, register, stat_dtype

__all__ = ["packed_predictor"]

Layer = tuple[Tensor, Tensor | None]


def packed_predictor(
    x: Tensor,
    layers: tuple[Layer, Layer, Layer, Layer],
    *,
    norm: tuple[Tensor | None, Tensor | None, float],
    num_heads: int = 1,
    weigher: tuple[Layer, Layer] | None = None,
    counted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities to keep and to drop each token; inference only.

    Each head's channels (W of them) go by themselves: LayerNorm, layer 0 and GELU; the second half of the result becomes
    its mean over the image's tokens; layers 1 and 2 with GELU, and layer 3. The results are averaged over the heads.

    Args:
        x: ``[B, N, C]``, or packed ``[T, C]`` with ``cu_seqlens``.
        layers: weights from :func:`pack_linear`, of the dtype of x, and their biases or None: ``[W, W]``, ``[W // 2, W]``,
            ``[W // 4, W // 2]``, ``[2, W // 4]`` with W = C / H.
        norm: ``(weight [W] or None, bias [W] or None, eps)``.
        num_heads: H.
        weigher: likewise ``[H // 2, H]`` (then GELU) and ``[H, H // 2]`` (then a sigmoid): from the mean of each head's
            channels the weight that the head has for this token.
        counted: bool ``[B, N]`` or ``[T]``: the tokens that the means are of (default all); 0 where there are none.
        cu_seqlens: int32 ``[B + 1]``, starts of the sequences of packed tokens; rows behind the last one belong to it.

    Returns:
        ``(scores, probabilities)``, both ``[..., 2]`` (keep, drop), float32 (float64 for a float64 x): means of log-softmax
        and of softmax. With several heads the score is not the log of the probability.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: wrong contents of ``cu_seqlens``, or a weight that
            is not packed for these sizes. NotImplementedError: when differentiated.
    """
    op = "packed_predictor"
    check_floating(op, x=x)
    packed.check_on_cpu(op, "x", x)
    if cu_seqlens is None:
        check(x.dim() == 3, op, "x", "have shape [B, N, C] without cu_seqlens", tuple(x.shape))
    else:
        check(x.dim() == 2, op, "x", "have shape [T, C] with cu_seqlens", tuple(x.shape))
        cu_seqlens = check_index(op, "cu_seqlens", cu_seqlens, x.device)
    fits = x.shape[-1] > 0 and num_heads >= 1 and x.shape[-1] % num_heads == 0
    check(fits, op, "num_heads", "divide the channels ({})", num_heads, x.shape[-1])
    if counted is not None:
        check(counted.dtype == torch.bool, op, "counted", "be bool", counted.dtype, error=TypeError)
        fits = counted.shape == x.shape[:-1]
        check(fits, op, "counted", "have shape {}", tuple(counted.shape), list(x.shape[:-1]))
    weights = [part for layer in (*layers, *(weigher or ((None, None),) * 2)) for part in layer]
    return call(op, x.device, x, counted, cu_seqlens, num_heads, *norm, *weights)


def _fake(x, *args):
    return tuple(x.new_empty(*x.shape[:-1], 2, dtype=stat_dtype(x.dtype)) for _ in range(2))


def _flops(x, counted, cu_seqlens, heads, norm_weight, norm_bias, eps, *weights, out_val=None, **kwargs):
    width = x.shape[-1] // heads
    tokens = out_val[0].numel() // 2
    layers = width * width + width * (width // 2) + (width // 2) * (width // 4) + 2 * (width // 4)
    weigher = 0 if weights[8] is None else 2 * heads * (heads // 2)
    return 2 * tokens * (heads * layers + weigher)


def _reference(x, counted, cu_seqlens, heads, norm_weight, norm_bias, eps, *weights):
    def layer(z, i, out, act=1):
        return packed._reference_linear(z, weights[2 * i], out, weights[2 * i + 1], *plain, act, *rest)

    plain, rest = (False, None, None, 0.0), (None, None, None)
    width = x.shape[-1] // heads
    parts = x.unflatten(-1, (heads, width))
    features = packed._reference_linear(
        parts, weights[0], width, weights[1], True, norm_weight, norm_bias, eps, 1, None, None, None
    )
    rows = features.reshape(-1, heads, width)
    tokens = rows.shape[0]
    seen = torch.ones(tokens, 1, 1) if counted is None else counted.reshape(-1, 1, 1)
    starts = [b * x.shape[1] for b in range(x.shape[0] + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    starts = starts if len(starts) == 1 else [*starts[:-1], tokens]
    stat = stat_dtype(x.dtype)
    for begin, end in pairwise(starts):
        own = slice(begin, end)
        here = seen[own].to(stat)
        pooled = (rows[own, :, width // 2 :].to(stat) * here).sum(0) / here.sum().clamp(min=1)
        rows[own, :, width // 2 :] = pooled.to(x.dtype)
    hidden = layer(layer(rows.view(features.shape), 1, width // 2), 2, width // 4)
    logs = layer(hidden, 3, 2, 0).to(stat).log_softmax(-1)
    if weights[8] is None:
        return logs.mean(-2), logs.exp().mean(-2)
    share = layer(layer(parts.mean(-1), 4, heads // 2), 5, heads, 0).to(stat).sigmoid()[..., None]
    total = share.sum(-2)
    return (share * logs).sum(-2) / total, (share * logs.exp()).sum(-2) / total


register("packed_predictor", fake=_fake, reference=_reference, flops=_flops)
