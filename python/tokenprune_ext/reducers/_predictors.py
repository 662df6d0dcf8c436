# SPDX-License-Identifier: Apache-2.0
"""Learned token scores of DynamicViT and SPViT. Parameter names are those of the published checkpoints."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import run_chain
from ..ops._register import stat_dtype


def masked_mean(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean over the tokens of each image with ``mask [B, N]`` = 1, for values ``[B, N, ...]``; 0 where there are none.

    The result keeps the token dimension (of size 1) and broadcasts with the values.
    """

    def mean(values):
        weights = mask.to(values.dtype).view(*mask.shape, *[1] * (values.dim() - 2))
        count = weights.sum(1, keepdim=True)
        return (values * weights).sum(1, keepdim=True) / (count + (count == 0))

    return mean


class TokenPredictor(nn.Module):
    """Keep and drop log-probabilities from local and pooled features (DynamicViT, arXiv 2106.02034, eq. 1 to 4).

    Args:
        embed_dim: channels C, divisible by 4.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        half, quarter = embed_dim // 2, embed_dim // 4
        self.in_conv = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(embed_dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, x: Tensor, mean: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``(log-probabilities, probabilities)``, both ``[..., 2]`` (keep, drop).

        Args:
            x: tokens ``[B, N, C]`` or ``[T, C]``.
            mean: mean over the tokens of an image that are still there, as :func:`masked_mean` makes it.
        """
        scores = run_chain(self.out_conv, _with_pooled(run_chain(self.in_conv, x), mean))
        scores = F.log_softmax(scores.to(stat_dtype(x.dtype)), -1)
        return scores, scores.exp()


class HeadSelector(nn.Module):
    """Scores from every attention head's channels, averaged over the heads (SPViT, arXiv 2112.13890, section 4.2).

    One MLP serves all heads; with ``weighted`` a squeeze-and-excite branch weighs them per token.

    Args:
        embed_dim: channels C.
        num_heads: heads H; C / H must be even.
        weighted: weigh the heads ("senet"), which needs two heads or more; otherwise their plain mean ("multihead").
    """

    def __init__(self, embed_dim: int, num_heads: int, weighted: bool = True):
        super().__init__()
        width = embed_dim // num_heads
        if embed_dim % num_heads or width % 2:
            raise ValueError(
                f"HeadSelector: embed_dim / num_heads must be an even number, got {embed_dim} / {num_heads}"
            )
        if weighted and num_heads < 2:
            raise ValueError(f"HeadSelector: num_heads must be at least 2 for weighted heads, got {num_heads}")
        self.num_heads = num_heads
        half, quarter = width // 2, width // 4
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )
        self.senet = None
        if weighted:
            squeezed = num_heads // 2
            self.senet = nn.Sequential(
                nn.Linear(num_heads, squeezed), nn.GELU(), nn.Linear(squeezed, num_heads), nn.Sigmoid()
            )

    def forward(self, x: Tensor, mean: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``(score, keep probability)``, both ``[..., 2]`` (keep, drop): weighted means of log-softmax and of softmax.

        The score is not normalised: it is a mean of log-probabilities, not the log of ``keep probability``.

        Args:
            x: tokens ``[B, N, C]`` or ``[T, C]``.
            mean: mean over the tokens of an image that are still there, for values ``[..., H, k]``.
        """
        heads = x.unflatten(-1, (self.num_heads, -1))
        logits = run_chain(self.out_conv, _with_pooled(run_chain(self.in_conv, heads), mean)).to(stat_dtype(x.dtype))
        logs = F.log_softmax(logits, -1)
        if self.senet is None:
            return logs.mean(-2), logs.exp().mean(-2)
        weights = run_chain(self.senet, heads.mean(-1)).to(logs.dtype)[..., None]
        total = weights.sum(-2)
        return (weights * logs).sum(-2) / total, (weights * logs.exp()).sum(-2) / total


def _with_pooled(features, mean):
    """The second half of the channels replaced by its mean over the image."""
    half = features.shape[-1] // 2
    local, pooled = features[..., :half], mean(features[..., half:])
    return torch.cat([local, pooled.expand(*local.shape[:-1], pooled.shape[-1])], -1)
