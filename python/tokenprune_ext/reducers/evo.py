# SPDX-License-Identifier: Apache-2.0
"""Evo-ViT: slow updates for the attentive tokens, no or cheap ones for the others (Xu et al., arXiv 2108.01390).

Every layer keeps a running class attention of all patches (section 3.2). A pruned layer processes the class token and
the patches where it is highest; the others ("placeholders") keep their place and may come back in the next layer.
Tokens stay in their original order: what the published code sorts is a permutation here, ``carry["order"]``.
"""

import math

import torch
from torch import Tensor

from ..nn import TokenState, pad_rows, sequence_of_row
from ..ops import Matching, TokenIndex, merge_tokens, rank_tokens, running_scores, scatter_tokens, select_tokens
from ._base import Reducer, register

__all__ = ["EvoViT"]


@register("evo")
class EvoViT(Reducer):
    """Evolution of tokens.

    Args:
        depth: layers of the model.
        ratio: share of the patches in the slow path, truncated to a count, of the layers from ``layer`` on; or one
            share per layer of the model, where 1 means a plain layer.
        layer: first pruned layer, when ``ratio`` is one number (default 4); at least 1, as the first layer makes the scores.
        tradeoff: weight of a layer's own class attention in the running one, one number or one per layer.
        summary: add the score-weighted mean of the placeholders to the slow path; the placeholders get its residual
            updates (section 3.3). Off in the tables of arXiv 2210.01035.
        num_prefix: leading tokens that are no patches, always slow. The state's number wins while running.
        class_token: whether the model has a class token, which the scores need.
        fast_idle: plain layers behind the last pruned one make no scores; they are the model's own if nothing is pruned.

    ``carry["score"]`` (of all tokens, inside a pruned layer too; what it says of prefix tokens is never read) is the running
    class attention, ``carry["order"]`` (``[B, N]``) the tokens in the order of the last sorting, prefix first.
    """

    def __init__(
        self,
        *,
        depth: int,
        ratio: float | list[float] = 0.5,
        layer: int | None = None,
        tradeoff: float | list[float] = 0.5,
        summary: bool = False,
        num_prefix: int = 1,
        class_token: bool = True,
        fast_idle: bool = True,
    ):
        super().__init__()
        if isinstance(ratio, (int, float)):
            layer = min(4, depth) if layer is None else layer
            if type(layer) is not int or not 0 <= layer <= depth:
                raise ValueError(f"EvoViT: layer must be whole and in [0, {depth}], got {layer!r}")
            if not 0 <= ratio <= 1:
                raise ValueError(f"EvoViT: ratio must lie in [0, 1], got {ratio}")
            ratio = [1.0] * layer + [ratio] * (depth - layer)
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
        if state.uniform(x) and not self.summary:
            return self._prune(x, state, layer, run)
        return self._prune_any(x, state, layer, run)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Attention with the residual, and the running class attention."""
        rows, running = state.carry.get("rows"), state.carry.get("score")
        x, score = branch.add(x, state, "cls", rows=rows)
        score = score if self.summary else score.detach()
        if running is not None:
            flat = running.flatten().to(score.dtype)
            score = running_scores(flat, score.flatten(), self.tradeoff[layer], rows).view(running.shape)
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

    def _prune(self, x, state, layer, run):
        """A pruned layer for images of the same length, without summary tokens: few and small steps."""
        batch, tokens = (state.cu_seqlens.shape[0] - 1, state.max_seqlen) if state.packed else x.shape[:2]
        count = state.num_prefix + math.floor((tokens - state.num_prefix) * self.ratio[layer])
        score = state.carry["score"].view(batch, tokens)
        order, index = rank_tokens(score, count, num_prefix=state.num_prefix)
        y, after = run(x.flatten(0, -2), state.gathered(index, rows=index.indices))
        return scatter_tokens(x, y, index), state.with_carry(score=after.carry["score"], order=order)

    def _prune_any(self, x, state, layer, run):
        """A pruned layer for packed images of any length, and for summary tokens.

        The row of image b's summary token is the number of tokens plus b.
        """
        packed_x, packed = state.as_packed(x)
        count, score = packed_x.shape[0], state.carry["score"].flatten()
        index, order, held_back = self._slow(score, packed, layer)
        rows, tokens, extra = index.indices, packed_x, 0
        if self.summary:
            summary = _summary(packed_x, score, rows, packed)
            tokens, extra = torch.cat([packed_x, summary]), summary.shape[0]
        running = torch.cat([score, score.new_zeros(extra)])
        y, after = run(tokens, packed.gathered(index, extra, rows=rows, score=running))
        if self.summary:
            last = index.cu_seqlens[1:].long() - 1
            update = torch.where(held_back[:, None], y[last] - summary, 0)
            packed_x = packed_x + update[sequence_of_row(packed.cu_seqlens, count)]
            rows = torch.where(rows < count, rows, -1)  # the summaries themselves go nowhere
        carry = {"score": after.carry["score"][:count].view(x.shape[:-1]), "order": order}
        return scatter_tokens(packed_x, y, rows).view(x.shape), state.with_carry(**carry)

    def _slow(self, score, state, layer):
        """Rows of the slow path; the tokens in the order of their score; which images hold patches back."""
        cu_seqlens, prefix, longest = state.cu_seqlens, state.num_prefix, state.max_seqlen
        lengths, device = cu_seqlens.diff(), score.device
        patches = (lengths - prefix).clamp(min=0)
        slow = (patches.double() * self.ratio[layer]).floor().to(torch.int32)
        # What is no token ties with the worst score and comes behind it, being behind the end.
        padded = pad_rows(score, cu_seqlens, longest, -math.inf)
        order, _ = rank_tokens(padded.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), num_prefix=prefix)
        column = torch.arange(longest, dtype=torch.int32, device=device)
        first = column < torch.minimum(lengths, prefix + slow)[:, None]
        chosen = torch.zeros_like(first).scatter(1, order, first)
        held_back = (slow < patches) & self.summary
        slots = select_tokens(torch.cat([chosen, held_back[:, None]], 1))
        places = torch.cat(
            [
                cu_seqlens[:-1, None] + column,
                score.shape[0] + torch.arange(lengths.shape[0], dtype=torch.int32, device=device)[:, None],
            ],
            1,
        )
        bound = prefix + math.floor((longest - prefix) * self.ratio[layer]) + int(self.summary)
        return TokenIndex(places.flatten()[slots.indices.long()], slots.cu_seqlens, bound), order, held_back


def _summary(x, score, slow, state):
    """Mean of each image's placeholders, weighted with their scores: ``[B, C]``."""
    count, images = x.shape[0], state.cu_seqlens.shape[0] - 1
    kept = torch.where(slow < count, slow, count).long()
    weight = torch.cat([score, score.new_zeros(1)]).scatter(0, kept, 0.0)[:-1]
    owner = sequence_of_row(state.cu_seqlens, count)
    total = weight.new_zeros(images).scatter_add(0, owner, weight)
    weight = weight / total.clamp(min=torch.finfo(weight.dtype).tiny)[owner]
    parent = owner.to(torch.int32)[None]
    per_image = Matching(parent, parent, parent, parent, images)
    return merge_tokens((x * weight.to(x.dtype)[:, None])[None], per_image, mode="sum")[0][0]
