# SPDX-License-Identifier: Apache-2.0
"""SViT for classification: selective blocks with the published gates (Liu et al., arXiv 2306.07050).

The mechanism is that of :mod:`.threshold`; this adds decisions shared by blocks and inherited masks, and the defaults of
the published model.
"""

import torch
from torch import Tensor

from ..nn import TokenState
from ._base import register
from .threshold import MlpSelector, ScoreSelect

__all__ = ["SViT"]


@register("svit")
class SViT(ScoreSelect):
    """Selective blocks: unchosen tokens are carried unchanged, and may be chosen again.

    Args:
        depth, embed_dim: of the model.
        layers: selective blocks, default the last three quarters (published: 3 to 11 of 12).
        share: a number per selective block, never falling: blocks with equal numbers share the decision of the first of
            them, without gradient at the later ones. Default: every block has its own gate.
        inherit: a token that was once skipped stays skipped (each decision is multiplied with the one before).
        keep: target share of every gate, or one for all; default 0.7, 0.49, 0.343 in thirds of the gates.
        candidate_prefix: gates (by their first block) for which the class token is a candidate like any other
            ("version 0"); default: the last one. For the others it always passes ("version 1").
        mode: at inference, ``"sample"``: with Gumbel noise (as published); ``"threshold"``: keep where keep is more
            probable than skip (what the authors intend; a tie skips). Training always samples.
        hidden: hidden channels of the gates, default C // 4.
        tau: temperature of the gradient.
        capacity, generator, ratio_per_sample, num_prefix, fast_idle, dense: as in :class:`ScoreSelect`.

    Noise and decisions: ``state.carry["noise.l"]`` by the gate's first block, ``state.carry["decisions.l"]`` by block.
    """

    def __init__(
        self,
        *,
        depth: int,
        embed_dim: int,
        layers: list[int] | None = None,
        share: list[int] | None = None,
        inherit: bool = False,
        keep: float | list[float] | None = None,
        candidate_prefix: list[int] | None = None,
        mode: str = "sample",
        hidden: int | None = None,
        tau: float = 1.0,
        capacity: float | None = None,
        generator: torch.Generator | None = None,
        ratio_per_sample: bool = False,
        num_prefix: int = 1,
        fast_idle: bool = True,
        dense: bool | None = None,
    ):
        if mode not in ("sample", "threshold"):
            raise ValueError(f"SViT: mode must be 'sample' or 'threshold', got {mode!r}")
        layers = list(range(depth // 4, depth)) if layers is None else list(layers)
        share = list(range(len(layers))) if share is None else list(share)
        if sorted(set(layers)) != layers or len(share) != len(layers) or sorted(share) != share:
            raise ValueError(
                f"SViT: layers must rise and share hold one number for each, never falling, got {layers} and {share}"
            )
        first = dict(zip(reversed(share), reversed(layers), strict=True))  # number -> its first block
        gates = sorted(first.values())
        super().__init__(
            depth=depth,
            embed_dim=embed_dim,
            selector=[MlpSelector(embed_dim, hidden) for _ in gates],
            layers=gates,
            mode=mode,
            keep=keep,
            candidate_prefix=gates[-1:] if candidate_prefix is None else candidate_prefix,
            capacity=capacity,
            generator=generator,
            ratio_per_sample=ratio_per_sample,
            num_prefix=num_prefix,
            fast_idle=fast_idle,
            dense=dense,
            tau=tau,
        )
        if not set(self.candidate_prefix) <= set(gates):
            raise ValueError(f"SViT: candidate_prefix must be among the gates {gates}, got {self.candidate_prefix}")
        self.gate_of = {layer: first[number] for layer, number in zip(layers, share, strict=True)}
        self.inherit = inherit

    def _gate_of(self, layer):
        return self.gate_of.get(layer)

    def _sampled(self):
        return self.training or self.mode == "sample"

    def _decide(self, x: Tensor, state: TokenState, layer: int) -> Tensor:
        gate = self.gate_of[layer]
        if gate != layer:
            return state.carry[f"decisions.{gate}"].detach()
        decision = super()._decide(x, state, layer)
        place = self.layers.index(layer)
        if self.inherit and place > 0:
            decision = decision * state.carry[f"decisions.{self.layers[place - 1]}"]
        return decision
