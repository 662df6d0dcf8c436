# SPDX-License-Identifier: Apache-2.0
"""DynamicViT: predictors in front of three blocks drop a growing share of the tokens (Rao et al., arXiv 2106.02034).

Training samples the decisions (Gumbel softmax) and hides dropped keys from attention (section 3.2 and 3.3). Inference
keeps the ``floor(n * rate)`` best of the n original patches at every stage.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from ..nn import pad_rows, unpad_rows
from ..ops import keep_top_tokens
from ._base import register
from ._gates import gumbel_choice, straight_through
from ._predictors import ImageMean, TokenPredictor
from ._stages import StagedPruning, follow_masked, follow_order, keep_map, rank_choice, take_rows

__all__ = ["DynamicViT"]


@register("dynamicvit")
class DynamicViT(StagedPruning):
    """Dynamic token sparsification.

    Args:
        depth, embed_dim: of the model.
        layers: blocks with a predictor in front; default depth/4, depth/2 and 3 depth/4 (3, 6, 9 of DeiT; 4, 8, 12 and
            5, 10, 15 of LV-ViT-S and -M).
        keep: base rate (stage s keeps ``keep ** (s + 1)`` of the patches), or one share per stage.
        eps: of the key policy while training.
        ratio_per_sample: ratio loss of every image, averaged (as published); False: of the whole batch.
        dense: compute masked instead of gathered; default: while training.
        generator: random generator of the noise.
        num_prefix: leading tokens that are no patches; they always stay. The state's number wins while running.
        pooling: what the model's classifier reads, which must be the class token.
        fast_idle: blocks without a key policy run as plain ones, the model's own if there is no selector.

    Training noise of layer ``l`` can be given as ``state.carry["noise.l"]``, Gumbel ``[B, n, 2]`` (keep, drop). Keep
    masks are left in ``state.carry["keep.l"]``, ``[B, n]``.
    """

    def __init__(
        self,
        *,
        depth: int,
        embed_dim: int,
        layers: list[int] | None = None,
        keep: float | list[float] = 0.7,
        eps: float = 1e-6,
        ratio_per_sample: bool = True,
        dense: bool | None = None,
        generator: torch.Generator | None = None,
        num_prefix: int = 1,
        pooling: str = "token",
        fast_idle: bool = True,
    ):
        layers = sorted({depth // 4, depth // 2, 3 * depth // 4}) if layers is None else layers
        super().__init__(
            name="DynamicViT",
            depth=depth,
            layers=layers,
            keep=keep,
            selectors=[TokenPredictor(embed_dim) for _ in layers],
            mode="topk",
            eps=eps,
            dense=dense,
            generator=generator,
            num_prefix=num_prefix,
            pooling=pooling,
            fast_idle=fast_idle,
        )
        self.ratio_per_sample = ratio_per_sample
        if any(later > earlier for earlier, later in pairwise(self.keep)):
            raise ValueError(f"DynamicViT: keep must not rise from stage to stage, got {self.keep}")

    def plan(self, depth: int, n: int) -> list[tuple[int, int]] | None:
        """Token counts at inference; None for masked computation, which keeps all tokens."""
        if self.dense:
            return None
        patches, counts = n - self.num_prefix, []
        for layer in range(depth):
            if layer in self.layers:
                n = self.num_prefix + self._count(layer, patches)
            counts.append((n, n))
        return counts

    def _count(self, layer, patches):
        return math.floor(patches * self.keep[self.layers.index(layer)])

    def _stage_masked(self, x, state, layer):
        prefix, before = state.num_prefix, state.carry["keep"]
        scores, _ = self.selectors[self.layers.index(layer)](x[:, prefix:], ImageMean(before))
        if self._sampled():
            soft, choice = gumbel_choice(scores, state.carry[f"noise.{layer}"])
            keep = straight_through(choice, soft) * before
        else:
            count = self._count(layer, before.shape[1])
            keep = rank_choice(scores[..., 0], before > 0, count).to(before.dtype)
        state = follow_masked(state, keep, -1)
        policy = torch.cat([keep.new_ones(keep.shape[0], prefix), keep], 1)
        return x, state.with_carry(keep=keep, policy=policy, **{f"keep.{layer}": keep})

    def _stage_gathered(self, x, state, layer):
        selector = self.selectors[self.layers.index(layer)]
        if "patches" not in state.carry and state.uniform(x):
            packed = state.packed
            x, state = self._keep_best(*state.as_padded(x), selector, layer)
            return state.as_packed(x) if packed else (x, state)
        here = state.index >= 0
        scores, _ = selector(x, ImageMean(here, state.cu_seqlens))
        choice = self._best_of_packed(scores[:, 0], here, state, layer) | ~here
        keep = keep_map(state.index, choice, state.cu_seqlens, state.carry["keep"])
        x, state = take_rows(x, state, choice)
        return x, state.with_carry(keep=keep, **{f"keep.{layer}": keep})

    def _keep_best(self, x, state, selector, layer):
        """Equally many of every image: padded tokens."""
        prefix, everything = state.num_prefix, state.carry["keep"]
        scores, _ = selector(x[:, prefix:], ImageMean())
        count = self._count(layer, everything.shape[1])
        y, order = keep_top_tokens(x, F.pad(scores[..., 0], (prefix, 0)), count, num_prefix=prefix, by_rank=False)
        state = follow_order(state, order)
        keep = torch.zeros_like(everything).scatter(1, state.index[:, prefix:].long(), 1)
        return y, state.with_carry(keep=keep, **{f"keep.{layer}": keep})

    def _best_of_packed(self, scores, here, state, layer):
        padded = pad_rows(scores, state.cu_seqlens, state.max_seqlen, -math.inf)
        real = pad_rows(here, state.cu_seqlens, state.max_seqlen, False)
        count = (state.carry["patches"].double() * self.keep[self.layers.index(layer)]).floor()
        chosen = rank_choice(padded, real, count[:, None])
        return unpad_rows(chosen, state.cu_seqlens, scores.shape[0])
