# SPDX-License-Identifier: Apache-2.0
"""EViT: keep the attentive tokens, fuse the others into one (Liang et al., arXiv 2202.07800).

Between attention and MLP of chosen layers, the patches with the highest attention scores stay, in descending order;
the rest may be summed, weighted with their scores, into one extra token (section 3.2).
"""

import math

import torch
from torch import Tensor

from ..nn import TokenState, pad_rows, row_positions, sequence_of_row
from ..ops import (
    Matching,
    gather_tokens,
    keep_top_tokens,
    merge_tokens,
    rank_tokens,
    scatter_tokens,
    select_tokens,
)
from ._base import Reducer, register

__all__ = ["EViT"]

# Per-token fields of the state, and what a fused token gets.
_FIELDS = (("index", -1), ("size", 1), ("key_bias", 0))


@register("evit")
class EViT(Reducer):
    """Attentive token selection.

    Args:
        depth: layers of the model.
        keep: keep rate in (0, 1] for ``layers``, or one rate per layer of the model.
        layers: layers that reduce when ``keep`` is one number; default: depth/4, depth/2 and 3 depth/4.
        fuse_token: append the score-weighted sum of the dropped tokens.
        score_mode: ``"cls"``: attention of the class token (the paper); ``"mean"``: attention received from all tokens
            (what the published EViT rows on SWAG models measure).
        num_prefix: leading tokens that are no patches; they are never dropped. The state's number wins while running.
        class_token: whether the first token is a class token, which ``"cls"`` needs.
        fast_idle: layers that keep everything run as plain blocks, the model's own ones if all layers do.
    """

    def __init__(
        self,
        *,
        depth: int,
        keep: float | list[float] = 0.7,
        layers: list[int] | None = None,
        fuse_token: bool = True,
        score_mode: str = "cls",
        num_prefix: int = 1,
        class_token: bool = True,
        fast_idle: bool = True,
    ):
        super().__init__()
        layers = sorted({depth // 4, depth // 2, 3 * depth // 4}) if layers is None else layers
        if isinstance(keep, (int, float)):
            if not all(0 <= layer < depth for layer in layers):
                raise ValueError(f"EViT: layers must lie in [0, {depth}), got {layers}")
            keep = [keep if layer in layers else 1.0 for layer in range(depth)]
        if len(keep) != depth or not all(0 < rate <= 1 for rate in keep):
            raise ValueError(f"EViT: keep must be {depth} rates in (0, 1], got {keep}")
        if score_mode not in ("cls", "mean"):
            raise ValueError(f"EViT: score_mode must be 'cls' or 'mean', got {score_mode!r}")
        if score_mode == "cls" and not class_token:
            raise ValueError(
                "EViT: score_mode 'cls' needs a class token, and the model has none: use score_mode='mean'"
            )
        self.keep, self.fuse_token, self.score_mode = list(keep), fuse_token, score_mode
        self.num_prefix, self.fast_idle = num_prefix, fast_idle

    @property
    def active(self) -> bool:
        """Whether any layer drops tokens."""
        return any(rate != 1 for rate in self.keep)

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """The plain block where everything is kept."""
        return run.idle(x, state) if self.keep[layer] == 1 and self.fast_idle else run(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Attention with the residual, then selection."""
        if self.keep[layer] == 1 and self.fast_idle:
            return super().attention(x, state, layer, branch)
        x, score = branch.add(x, state, want=self.score_mode)
        if state.uniform(x):
            packed = state.packed
            padded, state = state.as_padded(x)
            padded, state = self._select(padded, score.view(padded.shape[:2]), state, layer)
            return state.as_packed(padded) if packed else (padded, state)
        return self._select_ragged(x, score, state, layer)

    def restore(self, y: Tensor, state: TokenState) -> Tensor:
        """Stage by stage, backwards: a dropped patch copies the kept patch whose features were nearest when it left.

        Args:
            y: values of the current patch tokens ``[B, n, ...]`` (padded).

        Raises:
            ValueError: the state was not traced (``TokenState.with_trace``), or is packed.
        """
        stages = [name.removeprefix("kept.") for name in state.carry if name.startswith("kept.")]
        if not stages and "parent" not in state.carry:
            raise ValueError("EViT.restore: the state must be traced (TokenState.with_trace), got no stages")
        if state.packed:
            raise ValueError("EViT.restore: tokens must be padded [B, n, ...], got a packed state")
        for stage in reversed(stages):
            y = _undo(y, state.carry[f"kept.{stage}"], state.carry[f"features.{stage}"])
        return y

    def plan(self, depth: int, n: int) -> list[tuple[int, int]]:
        """Token counts; the keep counts are rounded up in double precision, as while running."""
        counts = []
        for layer in range(depth):
            patches = n - self.num_prefix
            left = math.ceil(self.keep[layer] * patches)
            after = n if left == patches else self.num_prefix + left + int(self.fuse_token)
            counts.append((n, after))
            n = after
        return counts

    def _select(self, x, score, state, layer):
        tokens = x.shape[1]
        prefix, patches = state.num_prefix, tokens - state.num_prefix
        left = math.ceil(self.keep[layer] * patches)
        if left == patches:
            return x, state
        chosen, order = keep_top_tokens(x, score, left, num_prefix=prefix, fuse=self.fuse_token)
        if "parent" in state.carry:
            stage = {f"kept.{layer}": (order[:, prefix:] - prefix).to(torch.int32), f"features.{layer}": x[:, prefix:]}
            state = _follow(state, order, tokens, self.fuse_token).with_carry(**stage)
        return chosen, _take(state, order, self.fuse_token)

    def _select_ragged(self, x, score, state, layer):
        cu_seqlens, prefix, rows = state.cu_seqlens, state.num_prefix, x.shape[0]
        lengths = cu_seqlens.diff()
        patches = (lengths - prefix).clamp(min=0)
        left = (patches.double() * self.keep[layer]).ceil().to(torch.int32)
        pruned = left < patches
        padded = pad_rows(score, cu_seqlens, state.max_seqlen, -math.inf)
        ranked, _ = rank_tokens(padded.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf), num_prefix=prefix)
        column = torch.arange(state.max_seqlen + 1, device=x.device)
        ranked = torch.where(pruned[:, None], ranked, column[:-1])
        # One slot per image behind its kept tokens is for the fused token.
        fused = pruned & self.fuse_token
        count = torch.where(pruned, prefix + left, lengths)
        slots = select_tokens(column < (count + fused.int())[:, None])
        source = torch.where(column[:-1] < count[:, None], ranked + cu_seqlens[:-1, None], -1)
        source = torch.nn.functional.pad(source, (0, 1), value=-1).flatten()
        source = source[slots.indices.long()].to(torch.int32)
        chosen = gather_tokens(x, source)
        place = row_positions(slots.cu_seqlens, source.shape[0])
        moved = torch.full((rows + 1,), -1, dtype=torch.int32, device=x.device)
        moved = moved.scatter(0, torch.where(source < 0, rows, source).long(), place)[:rows]
        if self.fuse_token:
            last = slots.cu_seqlens[1:] - 1
            chosen = self._fuse_ragged(
                x, torch.where(moved < 0, score, 0), chosen, cu_seqlens, torch.where(fused, last, -1)
            )
            owner = sequence_of_row(cu_seqlens, rows)
            moved = torch.where((moved < 0) & fused[owner], (slots.cu_seqlens.diff() - 1)[owner], moved)
        state = state.reparent(pad_rows(moved, cu_seqlens, state.max_seqlen, -1))
        longest = prefix + math.ceil(self.keep[layer] * (state.max_seqlen - prefix)) + int(self.fuse_token)
        fields = {}
        for name, made in _FIELDS:
            values = getattr(state, name)
            if values is not None:
                fields[name] = torch.where(source < 0, made, values[source.clamp(min=0).long()]).to(values.dtype)
        return chosen, state.replace(cu_seqlens=slots.cu_seqlens, max_seqlen=longest, **fields)

    def _fuse_ragged(self, x, weights, chosen, cu_seqlens, target):
        owner = sequence_of_row(cu_seqlens, x.shape[0]).to(torch.int32)[None]
        per_image = Matching(owner, owner, owner, owner, cu_seqlens.shape[0] - 1)
        sums = merge_tokens((x * weights.to(x.dtype)[:, None])[None], per_image, mode="sum")[0][0]
        return scatter_tokens(chosen, sums, target)


def _take(state, order, fuse):
    """The per-token fields of the chosen rows ``order [B, M]`` (and of a fused token behind them)."""
    fields = {}
    for name, made in _FIELDS:
        values = getattr(state, name)
        if values is not None:
            values = values.gather(1, order)
            fields[name] = torch.nn.functional.pad(values, (0, 1), value=made) if fuse else values
    return state.replace(**fields)


def _follow(state, order, tokens, fuse):
    """The trace through a selection: dropped tokens go to the fused one, or nowhere."""
    batch, count = order.shape
    rows = torch.full((batch, tokens), count if fuse else -1, dtype=torch.int32, device=order.device)
    place = torch.arange(count, dtype=torch.int32, device=order.device).expand(batch, -1)
    return state.reparent(rows.scatter(1, order, place))


def _undo(y, kept, features):
    """One stage back: ``y [B, >= left, ...]`` -> ``[B, patches, ...]``."""
    kept = kept.long()
    left, patches = kept.shape[1], features.shape[1]
    chosen = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    nearest = torch.cdist(features.float(), chosen.float()).argmin(-1)
    place = torch.arange(left, device=y.device).expand_as(kept)
    source = nearest.scatter(1, kept, place)  # a kept patch is its own source, whatever the distances say
    flat = y[:, :left].flatten(2) if y.dim() > 2 else y[:, :left, None]
    return flat.gather(1, source[..., None].expand(-1, -1, flat.shape[-1])).view(y.shape[0], patches, *y.shape[2:])
