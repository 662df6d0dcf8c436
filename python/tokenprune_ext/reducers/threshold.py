# SPDX-License-Identifier: Apache-2.0
"""SViT: every layer chooses its tokens anew, the others keep their place in the feature map.

A selector scores the tokens before each selective block; only the chosen ones pass through it, and are written back
(Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation", arXiv 2306.07050, section 3).
A skipped token is preserved and may be chosen again later.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import TokenState, pad_rows, row_positions, run_chain, sequence_of_row, unpad_rows
from ..ops import TokenIndex, rank_tokens, scatter_tokens, select_tokens
from ..ops._register import stat_dtype
from ._base import Reducer, register
from ._gates import draw_gumbel, gumbel_choice, straight_through

__all__ = ["MlpSelector", "ScoreSelect"]

_GELU = nn.GELU()
_MODES = ("sample", "threshold", "topk", "expected")


class MlpSelector(nn.Module):
    """Per-token keep and skip log-probabilities: LayerNorm, two linear layers, log-softmax.

    Args:
        embed_dim: channels C.
        hidden: hidden channels, default C // 4.
    """

    def __init__(self, embed_dim: int, hidden: int | None = None):
        super().__init__()
        hidden = embed_dim // 4 if hidden is None else hidden
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(embed_dim, hidden), "fc2": nn.Linear(hidden, 2)})

    def forward(self, tokens: Tensor) -> Tensor:
        """``[..., C] -> [..., 2]``: log-probabilities (keep, skip)."""
        hidden = run_chain((self.norm, self.mlp["fc1"], _GELU), tokens)
        return F.log_softmax(self.mlp["fc2"](hidden).to(stat_dtype(tokens.dtype)), dim=-1)


@register("threshold")
class ScoreSelect(Reducer):
    """Selection by score with a preserved feature map.

    Evaluation gathers the chosen tokens (fused with LayerNorm), runs the block on them alone, packed, and writes them
    back. Training computes ``d * block(x) + (1 - d) * x`` with the skipped keys hidden, which is the same function with
    a gradient for the decision ``d``.

    Args:
        depth, embed_dim: of the model.
        selector: ``"mlp"``: a learned :class:`MlpSelector` per layer; ``"norm"``: feature norm; ``"cls"``: similarity
            with the class token (both scaled to [0, 1] per image, without parameters); or any callable, or one per
            layer, ``[..., C] -> [..., 2]`` log-probabilities (keep, skip) or ``[...]`` scores (probabilities for
            ``"sample"``).
        layers: selective layers, default the last three quarters.
        mode: ``"sample"``: Gumbel sampling, also at evaluation (as published); ``"threshold"``: score above
            ``threshold``; ``"topk"``: the ``ceil(keep * n)`` best; ``"expected"``: the ``round(sum of scores)`` best.
        threshold: for mode ``"threshold"``.
        keep: share of the candidates, one number or one per selective layer: target of the ratio loss, count of
            ``"topk"``. Default 0.7, 0.49, 0.343 in thirds of the selective layers.
        candidate_prefix: selective layers whose prefix tokens can be skipped too; elsewhere they always pass.
        capacity: share of all tokens to reserve room for (fixed shapes, no host synchronisation); default: exact.
        generator: random generator of the sampling noise.
        ratio_per_sample: ratio loss per image instead of per batch.
        num_prefix: leading tokens that are no patches, for ``plan``. The state's number wins while running.
        class_token: whether the first token is a class token, which ``"cls"`` needs.
        fast_idle: other layers run as plain blocks, the model's own ones if no layer selects.
        dense: compute masked instead of gathered; default: while training, and whenever the decision needs a gradient.
        tau: temperature of the sampled decisions' gradient.

    Sampling noise of layer ``l`` can be given as ``state.carry["noise.l"]``: Gumbel, ``[B, n, 2]`` (keep, skip) for the
    n candidates. Decisions are left in ``state.carry["decisions.l"]``, ``[B, N]`` or ``[T]``: 0 = skipped.
    """

    def __init__(
        self,
        *,
        depth: int,
        embed_dim: int | None = None,
        selector: str | Callable | list[Callable] = "mlp",
        layers: list[int] | None = None,
        mode: str = "sample",
        threshold: float = 0.5,
        keep: float | list[float] | None = None,
        candidate_prefix: list[int] = (),
        capacity: float | None = None,
        generator: torch.Generator | None = None,
        ratio_per_sample: bool = False,
        num_prefix: int = 1,
        class_token: bool = True,
        fast_idle: bool = True,
        dense: bool | None = None,
        tau: float = 1.0,
    ):
        super().__init__()
        layers = list(range(depth // 4, depth)) if layers is None else list(layers)
        if mode not in _MODES:
            raise ValueError(f"ScoreSelect: mode must be one of {_MODES}, got {mode!r}")
        if not all(0 <= layer < depth for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError(f"ScoreSelect: layers must lie in [0, {depth}), each once, got {layers}")
        self.layers, self.mode, self.threshold = layers, mode, threshold
        self.keep = dict(zip(layers, _targets(keep, len(layers)), strict=True))
        self.candidate_prefix, self.capacity = tuple(candidate_prefix), capacity
        self.generator, self.ratio_per_sample = generator, ratio_per_sample
        self.num_prefix, self.fast_idle, self.dense, self.tau = num_prefix, fast_idle, dense, tau
        if capacity is not None and not 0 < capacity <= 1:
            raise ValueError(f"ScoreSelect: capacity must be a share in (0, 1], got {capacity}")
        if math.isnan(threshold):
            raise ValueError("ScoreSelect: threshold must be a number, got nan")
        if not tau > 0:
            raise ValueError(f"ScoreSelect: tau must be positive, got {tau}")
        self.scorer = selector if isinstance(selector, str) else None
        if self.scorer not in (None, "mlp", "norm", "cls"):
            raise ValueError(f"ScoreSelect: selector must be 'mlp', 'norm', 'cls' or callable, got {selector!r}")
        if self.scorer == "cls" and not class_token:
            raise ValueError("ScoreSelect: selector 'cls' needs a class token, and the model has none")
        self.selectors = _selectors(selector, layers, embed_dim)

    @property
    def active(self) -> bool:
        """Whether any layer selects."""
        return bool(self.layers)

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Draw the sampling noise of all layers, except where it is given."""
        if not self._sampled():
            return x, state
        batch, longest = (state.cu_seqlens.shape[0] - 1, state.max_seqlen) if state.packed else x.shape[:2]
        noise = {}
        for layer in self.layers:
            if f"noise.{layer}" not in state.carry:
                shape = (batch, longest - self._front(state, layer), 2)
                noise[f"noise.{layer}"] = draw_gumbel(shape, x, self.generator)
        return x, state.with_carry(**noise)

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """Decide; then the chosen tokens pass the block and the others stay as they are."""
        gate = self._gate_of(layer)
        if gate is None:
            return run.idle(x, state) if self.fast_idle else run(x, state)
        decision = self._decide(x, state, layer)
        after = state.with_carry(**{f"decisions.{layer}": decision})
        dense = self.training or decision.requires_grad if self.dense is None else self.dense
        if dense:
            return self._blend(x, state, decision, run), after
        return self._gathered(x, state, decision.detach() != 0, gate, run), after

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """On the chosen rows of the feature map: fused gather and LayerNorm, then packed attention."""
        return branch.add(x, state, rows=state.carry.get("rows")), state

    def losses(self, state: TokenState) -> dict[str, Tensor]:
        """``ratio``: squared distance of the kept share from its target, averaged over the layers."""
        terms = []
        for layer, target in self.keep.items():
            decision, front = state.carry[f"decisions.{layer}"], self._front(state, layer)
            if state.packed:
                decision = pad_rows(decision, state.cu_seqlens, state.max_seqlen, 0.0)
                count = (state.cu_seqlens.diff() - front).to(decision.dtype)
            else:
                count = decision.new_full((decision.shape[0],), decision.shape[1] - front)
            kept = decision[:, front:].sum(1)
            share = kept / count if self.ratio_per_sample else kept.sum() / count.sum()
            terms.append(((share - target) ** 2).mean())
        return {"ratio": torch.stack(terms).mean()}

    def plan(self, depth: int, n: int) -> list[tuple[int, int]] | None:
        """Token counts of mode ``"topk"``; the other modes depend on the data."""
        if self.mode != "topk":
            return None
        counts = []
        for layer in range(depth):
            front = 0 if layer in self.candidate_prefix else self.num_prefix
            kept = front + math.ceil(self.keep[layer] * (n - front)) if layer in self.keep else n
            counts.append((kept, kept))
        return counts

    def _gate_of(self, layer):
        """The layer whose selector decides for a layer, or None where all tokens pass."""
        return layer if layer in self.keep else None

    def _sampled(self):
        return self.mode == "sample"

    def _front(self, state, layer):
        return 0 if layer in self.candidate_prefix else state.num_prefix

    def _decide(self, x, state, layer):
        """Straight-through decisions in [0, 1], ``[B, N]`` or ``[T]``: 0 = skip."""
        front = self._front(state, layer)
        scores = self._scores(x, state, layer)
        if not state.packed:
            decision = straight_through(*self._choose(scores[:, front:], None, None, state, layer))
            return F.pad(decision, (front, 0), value=1.0)
        fill = -math.inf if scores.dim() == 1 else 0.0
        scores = pad_rows(scores, state.cu_seqlens, state.max_seqlen, fill)[:, front:]
        count = state.cu_seqlens.diff() - front
        real = torch.arange(scores.shape[1], device=x.device) < count[:, None]
        hard, soft = self._choose(scores, real, count, state, layer)
        decision = F.pad(torch.where(real, straight_through(hard & real, soft), 0), (front, 0), value=1.0)
        return unpad_rows(decision, state.cu_seqlens, x.shape[0])

    def _choose(self, scores, real, count, state, layer):
        """(hard choice, soft value) per candidate; ``real`` and ``count`` say which there are, None: all."""
        pair = scores.dim() == 3
        if self._sampled():
            logits = scores if pair else torch.stack([scores.log(), (-scores).log1p()], -1)
            soft, hard = gumbel_choice(logits, state.carry[f"noise.{layer}"], self.tau)
            return hard, soft
        soft = scores[..., 0].exp() if pair else scores
        if self.mode == "threshold":
            even = pair and self.threshold == 0.5  # compare the logs: exact at the tie, which means skip
            return scores[..., 0] > scores[..., 1] if even else soft > self.threshold, soft
        known = torch.ones_like(soft, dtype=torch.bool) if real is None else real
        if self.mode == "expected":
            wanted = torch.where(known, soft.detach(), 0).sum(1, keepdim=True).round()
        elif real is None:
            wanted = math.ceil(self.keep[layer] * soft.shape[1])
            order, _ = rank_tokens(soft, wanted)
            return torch.zeros_like(known).scatter(1, order[:, :wanted], True), soft
        else:
            wanted = (count.double() * self.keep[layer]).ceil()[:, None]
        rank = torch.where(known & ~soft.isnan(), soft.detach(), -math.inf).argsort(dim=1, descending=True, stable=True)
        chosen = torch.arange(soft.shape[1], device=soft.device) < wanted
        return torch.zeros_like(known).scatter(1, rank, chosen), soft

    def _scores(self, x, state, layer):
        """Scores ``[..., ]`` or log-probabilities ``[..., 2]`` of all tokens, prefix included."""
        if self.scorer in (None, "mlp"):
            return self.selectors[self.layers.index(layer)](x)
        x = x.detach()  # a rule without parameters learns nothing: its choice carries no gradient
        if self.scorer == "norm":
            scores = x.to(stat_dtype(x.dtype)).norm(dim=-1)
        else:
            scores = F.cosine_similarity(*(t.to(stat_dtype(x.dtype)) for t in (x, _first_rows(x, state))), dim=-1)
        return _unit_range(scores, state, self._front(state, layer))

    def _blend(self, x, state, decision, run):
        """Masked computation of all tokens; an image without chosen tokens stays as it is."""
        chosen = decision.detach() != 0
        some = _any_of_image(chosen, state)
        bias = torch.where(chosen | ~some, 0.0, -math.inf).to(decision.dtype)
        bias = bias if state.key_bias is None else bias + state.key_bias
        y, _ = run(x, state.replace(key_bias=bias))
        y = torch.where(some[..., None], y, x)
        decision = decision[..., None]
        return (decision * y + (1 - decision) * x).to(x.dtype)

    def _gathered(self, x, state, chosen, layer, run):
        index = self._index(chosen, state, layer)
        rows = index.indices
        y, _ = run(x, state.gathered(index, rows=rows))
        return scatter_tokens(x, y, rows)

    def _index(self, chosen, state, layer):
        """Where the chosen tokens are; without reading counts back where they are known or bounded."""
        capacity = None if self.capacity is None else math.ceil(self.capacity * chosen.numel())
        if not state.packed:
            batch, tokens = chosen.shape
            longest = tokens
            if self.mode == "topk":
                front = self._front(state, layer)
                longest = front + math.ceil(self.keep[layer] * (tokens - front))
                capacity = batch * longest
            index = select_tokens(chosen, capacity=capacity)
            return TokenIndex(index.indices, index.cu_seqlens, longest)
        index = select_tokens(chosen[None], capacity=capacity)
        before = F.pad(chosen.cumsum(0, dtype=torch.int32), (1, 0))
        return TokenIndex(index.indices, before[state.cu_seqlens.long()], state.max_seqlen)


def _targets(keep, count):
    if keep is None:
        return [(0.7, 0.49, 0.343)[3 * slot // count] for slot in range(count)]
    keep = [keep] * count if isinstance(keep, (int, float)) else list(keep)
    if len(keep) != count or not all(0 < share <= 1 for share in keep):
        raise ValueError(f"ScoreSelect: keep must be {count} shares in (0, 1], got {keep}")
    return keep


def _selectors(selector, layers, embed_dim):
    """One callable per selective layer, as a ModuleList where they are modules."""
    if selector in ("norm", "cls"):
        return None
    if selector == "mlp":
        if embed_dim is None:
            raise ValueError("ScoreSelect: embed_dim must be given for selector 'mlp', got None")
        return nn.ModuleList(MlpSelector(embed_dim) for _ in layers)
    several = isinstance(selector, (list, tuple, nn.ModuleList))
    per_layer = list(selector) if several else [selector] * len(layers)
    if len(per_layer) != len(layers):
        raise ValueError(f"ScoreSelect: selector must be one callable or {len(layers)}, got {len(per_layer)}")
    return nn.ModuleList(per_layer) if all(isinstance(one, nn.Module) for one in per_layer) else per_layer


def _first_rows(x, state):
    """The first token of each token's image; broadcasts with ``x``."""
    if not state.packed:
        return x[:, :1]
    return x[state.cu_seqlens[:-1].long()[sequence_of_row(state.cu_seqlens, x.shape[0])]]


def _any_of_image(chosen, state):
    """Whether the image of each token has a chosen one; shape broadcasts with ``chosen``."""
    if not state.packed:
        return chosen.any(1, keepdim=True)
    before = F.pad(chosen.cumsum(0, dtype=torch.int32), (1, 0))[state.cu_seqlens.long()]
    return (before.diff() > 0)[sequence_of_row(state.cu_seqlens, chosen.shape[0])]


def _unit_range(scores, state, front):
    """Scale the candidates' scores of every image to [0, 1]."""
    if not state.packed:
        low, high = scores[:, front:].amin(1, keepdim=True), scores[:, front:].amax(1, keepdim=True)
    else:
        candidate = row_positions(state.cu_seqlens, scores.shape[0]) >= front
        lows, highs = (torch.where(candidate, scores, fill) for fill in (math.inf, -math.inf))
        owner = sequence_of_row(state.cu_seqlens, scores.shape[0])
        low = pad_rows(lows, state.cu_seqlens, state.max_seqlen, math.inf).amin(1)[owner]
        high = pad_rows(highs, state.cu_seqlens, state.max_seqlen, -math.inf).amax(1)[owner]
    return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
