# SPDX-License-Identifier: Apache-2.0
"""Learned token scores of DynamicViT and SPViT. Parameter names are those of the published checkpoints."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import run_chain, sequence_of_row
from ..nn.packed import activation_name, fusible, hooked, in_one_call, plain_norm
from ..ops import Matching, merge_tokens
from ..ops._register import call, stat_dtype


def image_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums over the rows of each packed image: ``[T, ...] -> [B, ...]``, in a fixed order."""
    if cu_seqlens.shape[0] == 2:
        return values.sum(0, keepdim=True)
    flat = values.flatten(1)
    owner = sequence_of_row(cu_seqlens, flat.shape[0]).to(torch.int32)[None]
    per_image = Matching(owner, owner, owner, owner, cu_seqlens.shape[0] - 1)
    sums = merge_tokens(flat[None], per_image, mode="sum")[0][0]
    return sums.view(-1, *values.shape[1:])


@dataclass(frozen=True)
class ImageMean:
    """Mean over the tokens of each image: values ``[B, N, ...]`` or packed ``[T, ...]``; 0 where none counts.

    The result broadcasts with the values.

    Attributes:
        counted: which tokens count, ``[B, N]`` or ``[T]``: bool, or 1 and 0 (differentiable); None: all.
        cu_seqlens: starts of the images where the values are packed.
    """

    counted: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        """The means."""
        counted, starts = self.counted, self.cu_seqlens
        if counted is None and starts is None:
            return values.mean(1, keepdim=True)
        counted = values.new_ones(values.shape[:1]) if counted is None else counted
        weights = counted.to(values.dtype).view(*counted.shape, *[1] * (values.dim() - counted.dim()))
        if starts is None:
            count, sums = weights.sum(1, keepdim=True), (values * weights).sum(1, keepdim=True)
            return sums / (count + (count == 0))
        count, sums = image_sums(weights, starts), image_sums(values * weights, starts)
        return (sums / (count + (count == 0)))[sequence_of_row(starts, values.shape[0])]


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

    def forward(self, x: Tensor, mean: ImageMean) -> tuple[Tensor, Tensor]:
        """``(log-probabilities, probabilities)``, both ``[..., 2]`` (keep, drop).

        Args:
            x: tokens ``[B, N, C]`` or ``[T, C]``.
            mean: over the tokens of an image that are still there.
        """
        whole = _at_once(self, x, mean, 1)
        if whole is not None:
            return whole
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

    def forward(self, x: Tensor, mean: ImageMean) -> tuple[Tensor, Tensor]:
        """``(score, keep probability)``, both ``[..., 2]`` (keep, drop): weighted means of log-softmax and of softmax.

        The score is not normalised: it is a mean of log-probabilities, not the log of ``keep probability``.

        Args:
            x: tokens ``[B, N, C]`` or ``[T, C]``.
            mean: over the tokens of an image that are still there.
        """
        whole = _at_once(self, x, mean, self.num_heads, self.senet)
        if whole is not None:
            return whole
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


def _at_once(selector, x, mean, num_heads, weigher=None):
    """``ops.packed_predictor``, or None where a part stands in the way."""
    if not in_one_call() or hooked(selector.in_conv) or hooked(selector.out_conv):
        return None
    if mean.counted is not None and mean.counted.dtype != torch.bool:
        return None
    chain = [*selector.in_conv, *selector.out_conv]
    norm, acts = plain_norm(chain[0]), [chain[2], chain[4], chain[6]]
    linear = [chain[1], chain[3], chain[5], chain[7]]
    if weigher is not None:
        acts.append(weigher[1])
        linear += [weigher[0], weigher[2]]
    plain = weigher is None or not (hooked(weigher) or hooked(weigher[3]))
    if norm is None or not plain or any(hooked(act) or activation_name(act) != "gelu" for act in acts):
        return None
    pairs = [fusible(layer, x, *norm[:2]) for layer in linear]
    if None in pairs:
        return None
    pairs += [(None, None)] * (6 - len(pairs))
    parts = [part for pair in pairs for part in pair]
    return call("packed_predictor", x.device, x, mean.counted, mean.cu_seqlens, num_heads, *norm, *parts)
