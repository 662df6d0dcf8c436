# SPDX-License-Identifier: Apache-2.0
"""ATS: adaptive token sampling (Fayyaz et al., arXiv 2111.15667).

The class token's attention times the norm of the values scores the tokens; inverse transform sampling on a fixed grid
picks from the scores' cumulative distribution, so that few tokens suffice where few hold the weight.
Only picked tokens are queries of the layer; keys and values stay complete. Every image keeps a number of its own.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import TokenState
from ..ops import gather_tokens, policy_attention, sample_rows, sample_tokens, sparse_attention
from ..ops._register import stat_dtype
from ..ops.sorting import place_samples
from ._base import Reducer, register
from ._trace import restore_by_parent

__all__ = ["ATS", "Sample", "ats_sample", "ats_scores", "ats_smooth_row"]


class Sample(NamedTuple):
    """Which patches are sampled; ``n`` patches, ``G`` grid points.

    Attributes:
        order: int64 ``[B, n]``, patches by ascending score, those that are no candidates first.
        cdf: ``[B, n]``, cumulative scores in that order, from 0 to 1.
        grid: ``[B, G]``, where the distribution is sampled.
        pick: int64 ``[B, G]``, the place in ``order`` whose ``cdf`` is nearest to each grid point.
        kept: bool ``[B, n]``, the places in ``order`` that are kept.
        rows: int32 ``[B, n]``, the kept patches by ascending score, -1 behind them.
    """

    order: Tensor
    cdf: Tensor
    grid: Tensor
    pick: Tensor
    kept: Tensor
    rows: Tensor


def ats_smooth_row(logits: Tensor, policy: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Attention of the class token (token 0) under a policy, as :func:`tokenprune_ext.ops.policy_attention` weighs it.

    Args:
        logits: ``[B, H, N]``. policy: ``[B, N]``, 0 = hidden (the class token itself is always seen).

    Returns:
        ``[B, H, N]``: ``(e_j p_j + eps / N) / (sum_j e_j p_j + eps)`` with ``e = exp(logits - max)``.
    """
    weight = (logits - logits.amax(-1, keepdim=True)).exp()
    if policy is not None:
        weight = weight * torch.cat([torch.ones_like(policy[:, :1]), policy[:, 1:]], 1)[:, None]
    return (weight + eps / logits.shape[-1]) / (weight.sum(-1, keepdim=True) + eps)


def ats_scores(attention: Tensor, v: Tensor) -> Tensor:
    """Significance of every token: attention of the class token, summed over heads, times the norm of its values.

    Args:
        attention: ``[B, H, N]``. v: ``[B, N, H, D]``.

    Returns:
        ``[B, N]`` float32 (float64 for float64 values); :func:`ats_sample` normalises it over the patches.
    """
    stat = stat_dtype(v.dtype)
    return attention.to(stat).sum(1) * v.to(stat).flatten(2).norm(dim=-1)


def ats_sample(
    scores: Tensor,
    grid_points: int,
    *,
    grid_counts: Tensor | None = None,
    valid: Tensor | None = None,
    published: bool = False,
) -> Sample:
    """:func:`tokenprune_ext.ops.sample_rows` of the patches' scores ``[B, n]``; ``grid_points``: the patches that entered
    the model, not those that are left.
    """
    return Sample(*sample_rows(scores, grid_points, grid_counts=grid_counts, valid=valid, published=published))


# Per-token fields of the state, and what a padding row gets.
_FIELDS = (("index", -1), ("size", 1), ("key_bias", -math.inf))
_POOLINGS = ("token", "avg", "token and avg", "none", "")


@register("ats")
class ATS(Reducer):
    """Adaptive token sampling.

    ``ats.rows.l`` (int32 ``[B, M]``) in the carry tells which rows of its input layer l kept: prefix tokens, then patches
    by ascending score, -1 for padding.

    Args:
        depth: layers of the model.
        layers: layers that sample, default all behind the first quarter.
        per_image: images do not influence each other: padding is hidden from every later layer (through
            ``state.key_bias``), packed tokens stay packed without any. False: as published for SWAG models, padding rows
            are zeroed, but layers that do not sample take them for tokens; equal lengths only.
        residual: what the skip connection of a sampling layer carries: ``"input"``, or ``"normed"``, the normalised
            input (as published for SWAG models).
        eps: with ``per_image=False``, smooths the attention of sampling layers, as ``policy_attention`` does.
        drop_tokens: cut padded tokens to the longest image (on CUDA this reads its length back); False: shapes stay
            fixed. Packed tokens are always cut.
        num_prefix: leading tokens that are no patches; they are always kept. The state's number wins while running.
        class_token: whether the first token is a class token, which is needed.
        pooling: what the model's classifier reads: the class token, a mean, both or nothing; padding would enter others.
        fast_idle: other layers run the model's own block, or what is as good and faster.
    """

    def __init__(
        self,
        *,
        depth: int,
        layers: list[int] | None = None,
        per_image: bool = True,
        residual: str = "input",
        eps: float = 1e-6,
        drop_tokens: bool = True,
        num_prefix: int = 1,
        class_token: bool = True,
        pooling: str = "token",
        fast_idle: bool = True,
    ):
        super().__init__()
        layers = list(range(depth // 4, depth)) if layers is None else list(layers)
        if not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"ATS: layers must lie in [0, {depth}), got {layers}")
        if residual not in ("input", "normed"):
            raise ValueError(f"ATS: residual must be 'input' or 'normed', got {residual!r}")
        if eps < 0:
            raise ValueError(f"ATS: eps must be >= 0, got {eps}")
        if not class_token:
            raise ValueError("ATS: the model must have a class token, whose attention scores the others, got none")
        if layers and pooling not in _POOLINGS:
            raise ValueError(f"ATS: pooling must be one of {_POOLINGS} (padding would enter others), got {pooling!r}")
        self.layers, self.per_image, self.residual, self.eps = layers, per_image, residual, eps
        self.drop_tokens, self.num_prefix, self.fast_idle = drop_tokens, num_prefix, fast_idle
        self.own_attention = bool(self.layers)

    @property
    def active(self) -> bool:
        """Whether any layer samples."""
        return bool(self.layers)

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Note which tokens each image starts with (``ats.initial``, bool ``[B, N]``): they make the sampling grid."""
        return x, state.with_carry(**{"ats.initial": _visible(x, state)})

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """The model's own block in other layers."""
        return run.idle(x, state) if layer not in self.layers and self.fast_idle else run(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Score, sample, and attend with the sampled queries only."""
        if layer not in self.layers:
            return super().attention(x, state, layer, branch)
        branch.check_own_attention()
        if self.per_image:
            return self._alone(x, state, layer, branch)
        if not state.uniform(x) or state.key_bias is not None:
            raise ValueError(
                "ATS: per_image must be True for packed sequences of different lengths and for a key bias, got False"
            )
        padded, inner = state.as_padded(x)
        y, inner = self._together(padded, inner, layer, branch)
        return inner.as_packed(y) if state.packed else (y, inner)

    def mlp(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Padding rows of sampling layers stay zero."""
        y, state = super().mlp(x, state, layer, branch)
        policy = state.carry.get("ats.policy") if layer in self.layers else None
        return (y if policy is None else y * policy.reshape(*y.shape[:-1], 1).to(y.dtype)), state

    def pool(self, x: Tensor, state: TokenState) -> Tensor:
        """Padding counts for nothing, the patches scaled so that their plain mean is the mean over the real ones."""
        policy = state.carry.get("ats.policy")
        if policy is None or state.packed or not self.per_image:
            return x
        patches = policy[:, state.num_prefix :].to(x.dtype)
        weight = patches * (patches.shape[1] / patches.sum(1, keepdim=True).clamp(min=1))
        return x * F.pad(weight, (state.num_prefix, 0), value=1.0)[..., None]

    def restore(self, y: Tensor, state: TokenState) -> Tensor:
        """Sampled patches go back to their places, zeros elsewhere: ``[B, n, ...] -> [B, N0, ...]``."""
        return restore_by_parent("ATS", y, state)

    def plan(self, depth: int, n: int) -> list[tuple[int, int]] | None:
        """The counts depend on the data."""
        return None if self.layers else [(n, n)] * depth

    def _alone(self, x, state, layer, branch):
        """Images by themselves."""
        initial, tokens = state.carry["ats.initial"], state.max_seqlen if state.packed else x.shape[1]
        whole = None if self.residual == "normed" else branch.add_sampled(x, state, initial, self.drop_tokens)
        if whole is not None:
            kept = _Kept(*whole[1:], tokens, state.packed)
            return whole[0], self._follow(state, kept, layer)
        q, k, v, z = branch.start(x, state)
        (q, k, v), keys = _ragged(q, k, v, state)
        attention = _class_attention(q, k, v, keys, branch.logit_scale)
        sampled = sample_tokens(
            attention,
            v,
            initial,
            cu_seqlens=keys["cu_seqlens_k"],
            max_seqlen=tokens,
            num_prefix=state.num_prefix,
            key_bias=keys["key_bias"],
            padded=not state.packed,
            drop=self.drop_tokens,
        )
        kept = _Kept(*sampled, tokens, state.packed)
        mixed = _attend(q, k, v, kept, keys, branch.logit_scale)
        after = self._follow(state, kept, layer)
        return self._finish(x, mixed, z, kept, after, branch), after

    def _together(self, x, state, layer, branch):
        """Padded images, as published."""
        q, k, v, z = branch.start(x, state)
        policy, prefix, initial = state.carry.get("ats.policy"), state.num_prefix, state.carry["ats.initial"]
        if policy is not None:
            q, k, v = (t * policy[..., None, None].to(t.dtype) for t in (q, k, v))
        sample = ats_sample(
            _scores_smoothed(q, k, v, policy, self.eps, branch.logit_scale)[:, prefix:],
            initial.shape[1] - prefix,
            grid_counts=initial.sum(1) - prefix,
            valid=None if policy is None else policy[:, prefix:] != 0,
            published=True,
        )
        starts, tokens = state.sequences(x)
        kept = _Kept(*place_samples(sample.rows, starts, prefix, True, self.drop_tokens), tokens, False)
        policy = torch.ones(x.shape[:2], device=x.device) if policy is None else policy
        mixed = kept.take(policy_attention(q, k, v, policy, self.eps, scale=branch.logit_scale).flatten(2))
        after = self._follow(state, kept, layer)
        return self._finish(x, mixed, z, kept, after, branch), after

    def _finish(self, x, mixed, z, kept, after, branch):
        taken = kept.take(x) if self.residual != "normed" else kept.take(branch.norm(x) if z is None else z)
        y = branch.finish(taken, mixed, None if z is None else kept.take(z), after)
        policy = after.carry.get("ats.policy")
        return y if policy is None else y * policy[..., None].to(y.dtype)

    def _follow(self, state, kept, layer):
        """The state of the kept tokens; padding is hidden from attention where images are by themselves."""
        # One image is as long as the longest: nothing is padding, which spares its later layers the bias.
        whole = kept.packed or (self.per_image and self.drop_tokens and kept.rows.shape[0] == 1)
        changes = {}
        for name, made in _FIELDS:
            values = getattr(state, name)
            if values is not None:
                values = values.reshape(-1)[kept.source.clamp(min=0).long()]
                values = values if whole else torch.where(kept.source < 0, made, values)
            elif name == "key_bias" and self.per_image and not whole:
                values = torch.where(kept.source < 0, made, 0.0)
            if values is not None:
                changes[name] = values if kept.packed else values.view(kept.rows.shape)
        if "parent" in state.carry:
            state = state.reparent(kept.moved())
        carry = {**state.carry, f"ats.rows.{layer}": kept.rows}
        if kept.packed:
            changes["cu_seqlens"] = kept.cu_seqlens
        elif not whole:
            carry["ats.policy"] = kept.rows >= 0
        return state.replace(carry=carry, **changes)


class _Kept(NamedTuple):
    """What a layer keeps, as ``sample_tokens`` says it: ``rows [B, M]`` within each image, and as flat row numbers."""

    rows: Tensor
    source: Tensor
    cu_seqlens: Tensor
    tokens: int  # of each image, before
    packed: bool

    def take(self, values):
        """The kept rows of ``[B, N, C]`` or ``[T, C]``, zeros for padding."""
        return self.shaped(gather_tokens(values.reshape(-1, values.shape[-1]), self.source))

    def shaped(self, values):
        """Rows ``[S, C]``, padded where the tokens are."""
        return values if self.packed else values.view(*self.rows.shape, values.shape[-1])

    def moved(self):
        """The new row of every row, -1 = dropped: int32 ``[B, tokens]``."""
        place = torch.arange(self.rows.shape[1], dtype=torch.int32, device=self.rows.device).expand_as(self.rows)
        moved = torch.full((self.rows.shape[0], self.tokens + 1), -1, dtype=torch.int32, device=self.rows.device)
        return moved.scatter(1, torch.where(self.rows < 0, self.tokens, self.rows).long(), place)[:, : self.tokens]


def _visible(x, state):
    """Tokens that exist and are not hidden, bool ``[B, N]``."""
    bias = state.key_bias
    if not state.packed:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if bias is None else bias > -math.inf
    column = torch.arange(state.max_seqlen, dtype=torch.int32, device=x.device)
    inside = column < state.cu_seqlens.diff()[:, None]
    return inside if bias is None else inside & (_padded(bias, state, -math.inf) > -math.inf)


def _padded(values, state, fill):
    """Packed ``[T]`` -> ``[B, max_seqlen]``, ``fill`` behind each end; T may be unknown to the compiler."""
    column = torch.arange(state.max_seqlen, dtype=torch.int32, device=values.device)
    rows = state.cu_seqlens[:-1, None] + column
    rows = torch.where(rows < state.cu_seqlens[1:, None], rows, values.shape[0])
    return F.pad(values, (0, 1), value=fill)[rows.long()]


def _ragged(q, k, v, state):
    """Queries, keys and values as packed rows ``[T, H, D]``, and the arguments that say so."""
    cu_seqlens, max_seqlen = state.sequences(q)
    bias = None if state.key_bias is None else state.key_bias.reshape(-1)
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)]
    return flat, {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, "key_bias": bias}


def _class_attention(q, k, v, keys, scale):
    """Attention of the first token of each image ``[H, T]``."""
    starts, (q, k, v) = keys["cu_seqlens_k"], (t.detach() for t in (q, k, v))
    one = torch.arange(starts.shape[0], dtype=torch.int32, device=q.device)
    first = gather_tokens(q.flatten(1), starts[:-1]).view(-1, *q.shape[1:])
    *_, attention = sparse_attention(first, k, v, cu_seqlens_q=one, max_seqlen_q=1, scale=scale, want_cls=True, **keys)
    return attention


def _attend(q, k, v, kept, keys, scale):
    """Attention of the kept queries to all keys of their image, ``[..., H * D]``."""
    heads, width = q.shape[-2:]
    chosen = gather_tokens(q.flatten(1), kept.source).view(-1, heads, width)
    most = kept.tokens if kept.packed else kept.rows.shape[1]
    out, _ = sparse_attention(chosen, k, v, cu_seqlens_q=kept.cu_seqlens, max_seqlen_q=most, scale=scale, **keys)
    return kept.shaped(out.flatten(1))


def _scores_smoothed(q, k, v, policy, eps, scale):
    """Significance ``[B, N]`` by the smoothed attention under a policy."""
    stat = stat_dtype(q.dtype)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bhd,bnhd->bhn", q[:, 0].to(stat), k.to(stat)) * scale
        return ats_scores(ats_smooth_row(logits, policy, eps), v)
