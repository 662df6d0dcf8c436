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
from ..ops import gather_tokens, policy_attention, sample_rows, select_tokens, sparse_attention
from ..ops._register import stat_dtype
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
            return self._step(x, state, layer, branch)
        if not state.uniform(x) or state.key_bias is not None:
            raise ValueError(
                "ATS: per_image must be True for packed sequences of different lengths and for a key bias, got False"
            )
        padded, inner = state.as_padded(x)
        y, inner = self._step(padded, inner, layer, branch)
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

    def _step(self, x, state, layer, branch):
        q, k, v, z = branch.start(x, state)
        if self.per_image:
            policy = _visible(x, state)
            scores = _scores_alone(q, k, v, state, branch.logit_scale)
        else:
            policy = state.carry.get("ats.policy")
            if policy is not None:
                q, k, v = (t * policy[..., None, None].to(t.dtype) for t in (q, k, v))
            scores = _scores_smoothed(q, k, v, policy, self.eps, branch.logit_scale)
        kept = self._keep(scores, policy, state)
        if self.per_image:
            mixed = _attend_alone(q, k, v, kept, state, branch.logit_scale)
        else:
            policy = torch.ones(x.shape[:2], device=x.device) if policy is None else policy
            mixed = kept.take(policy_attention(q, k, v, policy, self.eps, scale=branch.logit_scale).flatten(2))
        after = _follow(state, kept, layer, hide=self.per_image)
        taken = kept.take(x) if self.residual != "normed" else kept.take(branch.norm(x) if z is None else z)
        y = branch.finish(taken, mixed, None if z is None else kept.take(z), after)
        return (y if state.packed else y * after.carry["ats.policy"][..., None].to(y.dtype)), after

    def _keep(self, scores, policy, state):
        prefix, initial = state.num_prefix, state.carry["ats.initial"]
        sample = ats_sample(
            scores[:, prefix:],
            initial.shape[1] - prefix,
            grid_counts=initial.sum(1) - prefix,
            valid=None if policy is None else policy[:, prefix:] != 0,
            published=not self.per_image,
        )
        batch, tokens = scores.shape
        front = torch.arange(prefix, dtype=torch.int32, device=scores.device).expand(batch, -1)
        rows = torch.cat([front, torch.where(sample.rows < 0, -1, sample.rows + prefix)], 1)
        if state.packed:
            slots = select_tokens(rows >= 0)
            source = (rows + state.cu_seqlens[:-1, None]).flatten()[slots.indices.long()]
            return _Kept(rows, source, slots.cu_seqlens, state.max_seqlen, tokens, None)
        if self.drop_tokens and batch != 0:  # of no images, none is the longest
            rows = rows.index_select(1, (rows >= 0).any(0).nonzero()[:, 0])  # in every image the kept rows come first
        batches = torch.arange(batch + 1, dtype=torch.int32, device=scores.device)
        source = torch.where(rows < 0, -1, rows + batches[:-1, None] * tokens).flatten()
        return _Kept(rows, source, batches * rows.shape[1], rows.shape[1], tokens, rows.shape)


class _Kept(NamedTuple):
    """What a layer keeps: ``rows [B, M]`` within each image, and the same as flat row numbers ``source [S]``."""

    rows: Tensor
    source: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    tokens: int  # of each image, before
    shape: tuple | None  # [B, M] of padded tokens

    def take(self, values):
        """The kept rows of ``[B, N, C]`` or ``[T, C]``, zeros for padding."""
        taken = gather_tokens(values.reshape(-1, values.shape[-1]), self.source)
        return taken if self.shape is None else taken.view(*self.shape, values.shape[-1])


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
    """Keys and values as packed rows ``[T, H, D]``, and the arguments that say so."""
    cu_seqlens, max_seqlen = state.sequences(q)
    bias = None if state.key_bias is None else state.key_bias.reshape(-1)
    flat = [t.reshape(-1, *t.shape[-2:]) for t in (q, k, v)]
    return flat, {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen, "key_bias": bias}


def _scores_alone(q, k, v, state, scale):
    """Significance ``[B, N]`` among the tokens of each image."""
    (q, k, v), keys = _ragged(*(t.detach() for t in (q, k, v)), state)
    starts = keys["cu_seqlens_k"]
    one = torch.arange(starts.shape[0], dtype=torch.int32, device=q.device)
    first = gather_tokens(q.flatten(1), starts[:-1]).view(-1, *q.shape[1:])
    *_, attention = sparse_attention(first, k, v, cu_seqlens_q=one, max_seqlen_q=1, scale=scale, want_cls=True, **keys)
    scores = ats_scores(attention[None], v[None])[0]
    if state.packed:
        return _padded(scores, state, 0.0)
    return scores.unflatten(0, (starts.shape[0] - 1, keys["max_seqlen_k"]))


def _scores_smoothed(q, k, v, policy, eps, scale):
    """Significance ``[B, N]`` by the smoothed attention under a policy."""
    stat = stat_dtype(q.dtype)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bhd,bnhd->bhn", q[:, 0].to(stat), k.to(stat)) * scale
        return ats_scores(ats_smooth_row(logits, policy, eps), v)


def _attend_alone(q, k, v, kept, state, scale):
    """Attention of the kept queries to all keys of their image, ``[..., H * D]``."""
    heads, width = q.shape[-2:]
    (q, k, v), keys = _ragged(q, k, v, state)
    chosen = gather_tokens(q.flatten(1), kept.source).view(-1, heads, width)
    out, _ = sparse_attention(
        chosen, k, v, cu_seqlens_q=kept.cu_seqlens, max_seqlen_q=kept.max_seqlen, scale=scale, **keys
    )
    out = out.flatten(1)
    return out if kept.shape is None else out.view(*kept.shape, heads * width)


def _follow(state, kept, layer, hide):
    """The state of the kept tokens; ``hide``: padding is hidden from attention."""
    padding = kept.source < 0
    fields = {}
    for name, made in _FIELDS:
        values = getattr(state, name)
        if values is not None:
            values = torch.where(padding, made, values.reshape(-1)[kept.source.clamp(min=0).long()])
        elif name == "key_bias" and hide and kept.shape is not None:
            values = torch.where(padding, made, 0.0)
        fields[name] = values if values is None or kept.shape is None else values.view(kept.shape)
    place = torch.arange(kept.rows.shape[1], dtype=torch.int32, device=padding.device).expand_as(kept.rows)
    moved = torch.full((kept.rows.shape[0], kept.tokens + 1), -1, dtype=torch.int32, device=padding.device)
    moved = moved.scatter(1, torch.where(kept.rows < 0, kept.tokens, kept.rows).long(), place)[:, : kept.tokens]
    state = state.reparent(moved).replace(**fields).with_carry(**{f"ats.rows.{layer}": kept.rows})
    if kept.shape is None:
        return state.replace(cu_seqlens=kept.cu_seqlens)
    return state.with_carry(**{"ats.policy": kept.rows >= 0})
