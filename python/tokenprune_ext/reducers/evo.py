# SPDX-License-Identifier: Apache-2.0
"""Evo-ViT: slow updates for the attentive tokens, no or cheap ones for the others (Xu et al., arXiv 2108.01390).

Every layer keeps a running class attention of all patches (section 3.2). A pruned layer processes the class token and
the patches where it is highest; the others ("placeholders") keep their place and may come back in the next layer.
Tokens stay in their original order: what the published code sorts is a permutation here, ``carry["order"]``.
"""

import math

import torch
from torch import Tensor

from ..nn import TokenState, gather_norm, pad_rows, sequence_of_row
from ..ops import Matching, TokenIndex, gather_tokens, merge_tokens, scatter_tokens, select_tokens
from ._base import Reducer, register

__all__ = ["EvoViT"]


@register("evo")
class EvoViT(Reducer):
    """Evolution of tokens.

    Args:
        depth: layers of the model.
        ratio: share of the patches in the slow path, truncated to a count, of the layers from ``layer`` on; or one
            share per layer of the model, where 1 means a plain layer.
        layer: first pruned layer, when ``ratio`` is one number; at least 1, as the first layer makes the scores.
        tradeoff: weight of a layer's own class attention in the running one, one number or one per layer.
        summary: add the score-weighted mean of the placeholders to the slow path; the placeholders get its residual
            updates (section 3.3). Off in the tables of arXiv 2210.01035.
        num_prefix: leading tokens that are no patches, always slow. The state's number wins while running.
        class_token: whether the model has a class token, which the scores need.
        fast_idle: plain layers behind the last pruned one make no scores; they are the model's own if nothing is pruned.

    ``carry["score"]`` (aligned with the tokens; what it says of prefix tokens is never read) is the running class
    attention, ``carry["order"]`` (``[B, n]``) the patches in the order of the last sorting.
    """

    def __init__(
        self,
        *,
        depth: int,
        ratio: float | list[float] = 0.5,
        layer: int = 4,
        tradeoff: float | list[float] = 0.5,
        summary: bool = False,
        num_prefix: int = 1,
        class_token: bool = True,
        fast_idle: bool = True,
    ):
        super().__init__()
        if isinstance(ratio, (int, float)):
            if layer < 0:
                raise ValueError(f"EvoViT: layer must be >= 0, got {layer}")
            if not 0 <= ratio <= 1:
                raise ValueError(f"EvoViT: ratio must lie in [0, 1], got {ratio}")
            ratio = [1.0] * min(layer, depth) + [ratio] * max(depth - layer, 0)
        tradeoff = [tradeoff] * depth if isinstance(tradeoff, (int, float)) else list(tradeoff)
        for name, values in (("ratio", ratio), ("tradeoff", tradeoff)):
            if len(values) != depth or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"EvoViT: {name} must be {depth} numbers in [0, 1], got {list(values)}")
        if ratio and ratio[0] != 1:
            raise ValueError(f"EvoViT: layer 0 must be a plain one (ratio 1): there is no score yet, got {ratio[0]}")
        if not class_token:
            raise ValueError("EvoViT: the model must have a class token, got one without")
        self.ratio, self.tradeoff, self.summary = list(ratio), tradeoff, summary
        self.num_prefix, self.fast_idle = num_prefix, fast_idle
        # Behind the last pruned layer nobody reads the scores.
        self.last_pruned = max((layer for layer, share in enumerate(self.ratio) if share != 1), default=-1)

    @property
    def active(self) -> bool:
        """Whether any layer is pruned."""
        return self.last_pruned >= 0

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """Plain layers run on all tokens, pruned ones on the slow tokens."""
        if self.ratio[layer] == 1:
            idle = self.fast_idle and layer > self.last_pruned
            return run.idle(x, state) if idle else run(x, state)
        if "score" not in state.carry:
            raise ValueError(f"EvoViT: state.carry must hold 'score' in front of pruned layer {layer}, got none")
        flat, score = x.flatten(0, -2), state.carry["score"].flatten()
        count = flat.shape[0]
        index, order, held_back = self._slow(score, x, state, layer)
        rows = index.indices
        summary = None if held_back is None else _summary(flat, score, rows, x, state)
        tokens = flat if summary is None else torch.cat([flat, summary])
        extra = tokens.shape[0] - count
        inner = state.gathered(index, extra)
        inner = inner.with_carry(rows=rows, score=torch.cat([score, score.new_zeros(extra)])[rows.long()])
        y, after = run(tokens, inner)
        if summary is not None:
            x = self._spread(x, y, summary, index, held_back, state)
            rows = torch.where(rows < count, rows, -1)  # the summaries themselves go nowhere
        slots = torch.where(rows < 0, count, rows).long()
        score = torch.cat([score, score.new_zeros(1)]).scatter(0, slots, after.carry["score"])[:count]
        return scatter_tokens(x, y, rows), state.with_carry(score=score.view(x.shape[:-1]), order=order)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Attention with the residual, and the running class attention."""
        rows = state.carry.get("rows")
        if rows is None:
            y, score = branch(x, state, want="cls")
            x = x + y
        else:
            y, score = branch.core(gather_norm(branch.norm, x, rows), state, "cls")
            x = gather_tokens(x, rows) + branch.scale(y, state)
        score = score if self.summary else score.detach()
        share = self.tradeoff[layer]
        if "score" in state.carry:
            score = (1 - share) * state.carry["score"] + share * score
        return x, state.with_carry(score=score)

    def plan(self, depth: int, n: int) -> list[tuple[int, int]]:
        """Tokens of the slow path, a summary token included; counts are truncated in double precision, as while running."""
        counts = []
        for share in self.ratio[:depth]:
            slow = math.floor((n - self.num_prefix) * share)
            held_back = slow < n - self.num_prefix
            count = self.num_prefix + slow + int(self.summary and held_back)
            counts.append((count, count))
        return counts

    def _slow(self, score, x, state, layer):
        """Rows of the slow path; the patches in order of their score; which images hold patches back (summary only).

        The row of image b's summary token is the number of tokens plus b.
        """
        prefix, device = state.num_prefix, score.device
        if not state.uniform(x):
            return self._slow_ragged(score, state, layer)
        batch, tokens = (state.cu_seqlens.shape[0] - 1, state.max_seqlen) if state.packed else x.shape[:2]
        slow = math.floor((tokens - prefix) * self.ratio[layer])
        order = _ranking(score.view(batch, tokens)[:, prefix:])
        starts = torch.arange(batch, device=device)[:, None]
        front = torch.arange(prefix, device=device).expand(batch, -1)
        rows = torch.cat([front, order[:, :slow] + prefix], 1) + starts * tokens
        held_back = None
        if self.summary and slow < tokens - prefix:
            rows = torch.cat([rows, starts + score.shape[0]], 1)
            held_back = torch.ones(batch, dtype=torch.bool, device=device)
        count = rows.shape[1]
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * count
        return TokenIndex(rows.flatten().to(torch.int32), cu_seqlens, count), order, held_back

    def _slow_ragged(self, score, state, layer):
        cu_seqlens, prefix, longest = state.cu_seqlens, state.num_prefix, state.max_seqlen
        patches = (cu_seqlens.diff() - prefix).clamp(min=0)
        slow = (patches.double() * self.ratio[layer]).floor().to(torch.int32)
        held_back = (slow < patches) if self.summary else None
        padded = pad_rows(score, cu_seqlens, longest, -math.inf)[:, prefix:]
        column = torch.arange(longest - prefix, dtype=torch.int32, device=score.device)
        # An -inf score of a real patch ties with the padding: real patches come first, being in front.
        order = _ranking(padded)
        chosen = torch.zeros_like(padded, dtype=torch.bool).scatter(1, order, column < slow[:, None])
        front = torch.arange(prefix, device=score.device) < cu_seqlens.diff()[:, None]
        last = torch.zeros_like(slow, dtype=torch.bool) if held_back is None else held_back
        slots = select_tokens(torch.cat([front, chosen, last[:, None]], 1))
        place = torch.arange(longest + 1, dtype=torch.int32, device=score.device)
        rows = cu_seqlens[:-1, None] + place
        rows[:, longest] = score.shape[0] + torch.arange(rows.shape[0], dtype=torch.int32, device=score.device)
        bound = prefix + math.floor((longest - prefix) * self.ratio[layer]) + int(self.summary)
        return TokenIndex(rows.flatten()[slots.indices.long()], slots.cu_seqlens, bound), order, held_back

    def _spread(self, x, y, summary, index, held_back, state):
        """The residual updates of the summary tokens, added to all tokens of their images."""
        last = index.cu_seqlens[1:].long() - 1
        update = torch.where(held_back[:, None], y[last] - summary, 0)
        if state.packed:
            return x + update[sequence_of_row(state.cu_seqlens, x.shape[0])]
        return x + update[:, None]


def _ranking(score):
    """Patches by descending score; ties and NaN in order of position, NaN last."""
    score = score.detach()
    return torch.where(score.isnan(), -math.inf, score).argsort(dim=1, descending=True, stable=True)


def _summary(flat, score, slow, x, state):
    """Mean of each image's placeholders, weighted with their scores: ``[B, C]``."""
    kept = torch.where(slow < score.shape[0], slow, score.shape[0]).long()
    weight = torch.cat([score, score.new_zeros(1)]).scatter(0, kept, 0.0)[:-1]
    tiny = torch.finfo(weight.dtype).tiny
    if not state.packed:
        weight = weight.view(x.shape[:2])
        weight = weight / weight.sum(1, keepdim=True).clamp(min=tiny)
        return (weight.to(x.dtype)[:, None] @ x)[:, 0]
    owner = sequence_of_row(state.cu_seqlens, x.shape[0])
    images = state.cu_seqlens.shape[0] - 1
    total = weight.new_zeros(images).scatter_add(0, owner, weight)
    weight = weight / total.clamp(min=tiny)[owner]
    parent = owner.to(torch.int32)[None]
    per_image = Matching(parent, parent, parent, parent, images)
    return merge_tokens((flat * weight.to(x.dtype)[:, None])[None], per_image, mode="sum")[0][0]
