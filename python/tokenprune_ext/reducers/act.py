# SPDX-License-Identifier: Apache-2.0
"""ACT: queries that hash alike share one row of the attention (Zheng et al., arXiv 2011.09315).

Locality-sensitive hashing gives every query of a head an integer code; queries with equal codes form a group, the mean of
a group attends to all keys, and every member receives its result. Keys may be grouped likewise, each group weighted with
its size. The number of groups depends on the data and is never read back: there is a slot for every token, and the slots
that no group fills belong to no sequence.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import TokenState
from ..ops import Matching, gather_tokens, hash_groups, merge_tokens, scatter_tokens, select_tokens, sparse_attention
from ..ops._register import check, check_floating, stat_dtype
from ..ops.sorting import MAX_HASHES, check_draws, code_groups, hash_codes
from ._base import Reducer, register
from ._heads import head_bias, head_rows, real_tokens, token_rows

__all__ = ["ACT", "Groups", "act_attention", "act_broadcast", "act_codes", "act_groups", "act_weighted_sum"]


class Groups(NamedTuple):
    """Groups of tokens, row by row.

    Attributes:
        ids: int32 ``[R, N]``, the group of every token; -1 = no token.
        counts: int32 ``[R, N]``, members of each group, 0 for the slots behind the last group.
    """

    ids: Tensor
    counts: Tensor


def act_codes(
    x: Tensor, projection: Tensor, offset: Tensor, *, width: float = 8.0, valid: Tensor | None = None
) -> Tensor:
    """Integer code of every token: ``L`` hashes of two bits each, larger ones carried into the next.

    ``h_l = floor((x w_l + b_l) / width)``, shifted so that the least of the row is 0, and ``code = sum_l h_l 4^l`` in
    64-bit arithmetic that wraps around. Computed in float32 at least, whatever the dtype, and without a gradient.

    Args:
        x: ``[R, N, D]``, rows of tokens (one row per image and head; queries already scaled).
        projection: normal draws, ``[D, L]`` or ``[1, D, L]``; ``L`` is at most 32.
        offset: uniform draws from [0, 1), ``[L]`` or ``[1, L, 1]``.
        width: of the hash buckets.
        valid: bool ``[R, N]``: the tokens that the least value is taken from (default all).

    Returns:
        int64 ``[R, N]``.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, no or too many hashes, or a width that is not positive.
    """
    op = "act_codes"
    check_floating(op, x=x)
    check(x.dim() == 3, op, "x", "have shape [R, N, D]", tuple(x.shape))
    check(projection.is_floating_point(), op, "projection", "be a floating tensor", projection.dtype, error=TypeError)
    check(offset.is_floating_point(), op, "offset", "be a floating tensor", offset.dtype, error=TypeError)
    projection, offset = _draws(projection, offset, x)
    check_draws(op, projection, offset, x, x.shape[2], width)
    return hash_codes(x, projection, offset, width, valid=valid)


def _draws(projection, offset, like):
    """``[D, L]`` and ``[L]``, of the dtype that codes are computed in."""
    stat = stat_dtype(like.dtype)
    projection = projection[0] if projection.dim() == 3 and projection.shape[0] == 1 else projection
    return projection.to(stat), offset.reshape(-1).to(stat)


def act_groups(codes: Tensor, valid: Tensor | None = None) -> Groups:
    """Tokens with equal codes, row by row; a group's number is the rank of its code among the row's, signed.

    Args:
        codes: int64 ``[R, N]``.
        valid: bool ``[R, N]``: slots that hold tokens (default all).
    """
    check(codes.dtype == torch.int64, "act_groups", "codes", "be int64", codes.dtype, error=TypeError)
    check(codes.dim() == 2, "act_groups", "codes", "have shape [R, N]", tuple(codes.shape))
    return Groups(*code_groups(codes, valid))


def act_weighted_sum(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """``y[r, c] = weights[r, c] * (sum of x[r, n] over ids[r, n] = c)``; ids outside ``0..C-1`` are skipped.

    Args:
        x: ``[R, N, D]``. ids: int32 or int64 ``[R, N]``. weights: ``[R, C]``.

    Returns:
        ``[R, C, D]``, differentiable in x and weights; summed in token order.
    """
    _check_ids("act_weighted_sum", "x", x, ids, weights)
    check(tuple(ids.shape) == tuple(x.shape[:2]), "act_weighted_sum", "ids", "have shape [R, N]", tuple(ids.shape))
    groups = weights.shape[1]
    parent = torch.where((ids < 0) | (ids >= groups), -1, ids).to(torch.int32)
    return merge_tokens(x, _matching(parent, groups), mode="sum")[0] * weights[..., None].to(x.dtype)


def act_broadcast(y: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """``x[r, n] = weights[r, ids[r, n]] * y[r, ids[r, n]]``; zeros for ids outside ``0..C-1``.

    Args:
        y: ``[R, C, D]``. ids: int32 or int64 ``[R, N]``. weights: ``[R, C]``.

    Returns:
        ``[R, N, D]``, differentiable in y and weights.
    """
    _check_ids("act_broadcast", "y", y, ids, weights)
    rows, groups, width = y.shape
    check(groups == weights.shape[1], "act_broadcast", "weights", "have shape [R, C]", tuple(weights.shape))
    start = torch.arange(rows, device=y.device)[:, None] * groups
    flat = torch.where((ids < 0) | (ids >= groups), -1, ids + start).flatten()
    return gather_tokens(y * weights[..., None].to(y.dtype), flat).view(*ids.shape, width)


def act_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_groups: Groups | None = None,
    k_groups: Groups | None = None,
    *,
    scale: float = 1.0,
    q_valid: Tensor | None = None,
    k_valid: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention in which every group of queries (and of keys) acts as its mean.

    Args:
        q: ``[R, N, D]``, rows of queries, already scaled; k, v: ``[R, S, D]``.
        q_groups, k_groups: from :func:`act_groups`; None: every token for itself. A group of keys weighs as much as it
            has members.
        scale: factor of the logits.
        q_valid, k_valid: bool ``[R, N]``, ``[R, S]``: slots that hold tokens, the same that the groups were made with.
        key_bias: ``[R, S]``, added to the logits of each key; only without ``k_groups``.

    Returns:
        ``[R, N, D]``, zeros in slots without a token; differentiable in q, k, v and key_bias, groups being constants.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device.
    """
    op = "act_attention"
    check_floating(op, q=q, k=k, v=v)
    check(q.dim() == 3, op, "q", "have shape [R, N, D]", tuple(q.shape))
    wanted = (q.shape[0], k.shape[-2], q.shape[2])
    check(tuple(k.shape) == wanted, op, "k", "have shape {}", tuple(k.shape), list(wanted))
    check(v.shape == k.shape, op, "v", "have the shape of k {}", tuple(v.shape), tuple(k.shape))
    check(k_groups is None or key_bias is None, op, "key_bias", "be None beside k_groups", "a tensor")
    rows, tokens, width = q.shape
    queries = _packed(q, q_groups, q_valid)
    keys = _packed(k, k_groups, k_valid)
    if k_groups is not None:
        v, size = merge_tokens(v.reshape(1, -1, width), _matching(keys.parent, rows * k.shape[1]))
        key_bias = size[0].log()  # -inf in the slots behind the last group, which no sequence reaches
    elif key_bias is not None:
        key_bias = key_bias.flatten() if keys.index is None else _rows_of(key_bias, keys.index)
    out, _ = sparse_attention(
        queries.values,
        keys.values,
        v.reshape(-1, 1, width),
        cu_seqlens_q=queries.starts,
        cu_seqlens_k=keys.starts,
        max_seqlen_q=tokens,
        max_seqlen_k=k.shape[1],
        key_bias=key_bias,
        scale=scale,
        index=queries.index,
        index_k=keys.index if keys.index is not None or queries.index is None else _all_rows(keys.values),
    )
    out = out.flatten(1)
    if queries.parent is not None:
        out = gather_tokens(out, queries.parent.flatten())
    elif queries.index is not None:
        out = scatter_tokens(torch.zeros_like(out), out, queries.index)
    return out.view(rows, tokens, width)


class _Packed(NamedTuple):
    """What attends: values ``[R * N, 1, D]``, where the rows start, and the slot or row of each."""

    values: Tensor
    starts: Tensor
    parent: Tensor | None = None  # [1, R * N]: slot of every token
    index: Tensor | None = None  # [R * N]: row of every slot


def _packed(x, groups, valid):
    rows, tokens, width = x.shape
    if groups is not None:
        starts = F.pad((groups.counts > 0).sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
        parent = torch.where(groups.ids < 0, -1, groups.ids + starts[:-1, None]).view(1, -1)
        merged, _ = merge_tokens(x.reshape(1, -1, width), _matching(parent, rows * tokens))
        return _Packed(merged.view(-1, 1, width), starts, parent=parent)
    values = x.reshape(-1, 1, width)
    if valid is None:
        return _Packed(values, torch.arange(rows + 1, dtype=torch.int32, device=x.device) * tokens)
    chosen = select_tokens(valid, capacity=rows * tokens)
    return _Packed(values, chosen.cu_seqlens, index=chosen.indices)


def _matching(parent, slots):
    return Matching(parent, parent, parent, parent, slots)


def _rows_of(bias, index):
    return bias.flatten()[index.clamp(min=0).long()]


def _all_rows(values):
    return torch.arange(values.shape[0], dtype=torch.int32, device=values.device)


def _check_ids(op, name, values, ids, weights):
    check_floating(op, **{name: values})
    check(values.dim() == 3, op, name, "be 3-dimensional", tuple(values.shape))
    check(ids.dtype in (torch.int32, torch.int64), op, "ids", "be int32 or int64", ids.dtype, error=TypeError)
    rows = values.shape[0]
    check(ids.dim() == 2 and ids.shape[0] == rows, op, "ids", "have shape [{}, N]", tuple(ids.shape), rows)
    fits = weights.dim() == 2 and weights.shape[0] == rows
    check(fits, op, "weights", "have shape [{}, C]", tuple(weights.shape), rows)


@register("act")
class ACT(Reducer):
    """Attention of grouped queries.

    The draws of layer ``l`` are made in ``begin``, fresh for every forward, or given in the carry:
    ``act.q_projection.l`` ``[1, D, L]`` (normal) and ``act.q_offset.l`` ``[1, L, 1]`` (uniform), shared by all heads and
    images; the same with ``k`` for grouped keys. ``act.q_groups.l`` (int32 ``[B, H, N]``, -1 = no token) and
    ``act.k_groups.l`` are left there.

    Args:
        depth: layers of the model.
        layers: layers with grouped attention, default all.
        q_hashes, k_hashes: hashes L per code, at most 32. More of them make more and smaller groups.
        group_q, group_k: what is grouped.
        width: of the hash buckets.
        embed_dim, head_dim: of the model; one of them is needed for the draws.
        generator: random generator of the draws.
        fast_idle: other layers run the model's own block, or what is as good and faster.
    """

    def __init__(
        self,
        *,
        depth: int,
        layers: list[int] | None = None,
        q_hashes: int = 32,
        k_hashes: int = 32,
        group_q: bool = True,
        group_k: bool = False,
        width: float = 8.0,
        embed_dim: int | None = None,
        head_dim: int | None = None,
        generator: torch.Generator | None = None,
        fast_idle: bool = True,
    ):
        super().__init__()
        layers = list(range(depth)) if layers is None else list(layers)
        if not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"ACT: layers must lie in [0, {depth}), got {layers}")
        for name, hashes in (("q_hashes", q_hashes), ("k_hashes", k_hashes)):
            if not 1 <= hashes <= MAX_HASHES:
                raise ValueError(f"ACT: {name} must lie in [1, {MAX_HASHES}], got {hashes}")
        if width <= 0:
            raise ValueError(f"ACT: width must be positive, got {width}")
        self.hashes = {name: n for name, n, on in (("q", q_hashes, group_q), ("k", k_hashes, group_k)) if on}
        self.layers = layers if self.hashes else []
        self.width, self.generator, self.fast_idle = width, generator, fast_idle
        self.head_dim = embed_dim if head_dim is None else head_dim  # heads are never wider than the model
        self.own_attention = bool(self.layers)

    @property
    def active(self) -> bool:
        """Whether any layer groups."""
        return bool(self.layers)

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Draw the projections and offsets of all layers, except where they are given."""
        draws = {}
        width = x.shape[-1] if self.head_dim is None else self.head_dim
        for layer in self.layers:
            for name, hashes in self.hashes.items():
                if f"act.{name}_projection.{layer}" in state.carry:
                    continue
                for kind, shape in (("projection", (1, width, hashes)), ("offset", (1, hashes, 1))):
                    draw = torch.empty(shape, dtype=stat_dtype(x.dtype), device=x.device)
                    draw = draw.normal_ if kind == "projection" else draw.uniform_
                    draws[f"act.{name}_{kind}.{layer}"] = draw(generator=self.generator)
        return x, state.with_carry(**draws)

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """The model's own block in other layers."""
        return run.idle(x, state) if layer not in self.layers and self.fast_idle else run(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Attention of the groups between the branch's projections."""
        if layer not in self.layers:
            return super().attention(x, state, layer, branch)
        branch.check_own_attention()
        if "k" not in self.hashes:
            whole = branch.add_grouped(x, state, *self._layer_draws(state, "q", layer, x, branch.head_dim), self.width)
            if whole is not None:
                return whole[0], state.with_carry(**{f"act.q_groups.{layer}": whole[1]})
        like, k, v, z = branch.start(x, state)
        valid, bias = real_tokens(like, state), head_bias(like, state)
        q, k, v = (head_rows(t, state) for t in (like * branch.logit_scale, k, v))
        groups = {name: self._group(t, name, layer, state, valid) for name, t in (("q", q), ("k", k))}
        mixed = act_attention(q, k, v, groups["q"], groups["k"], q_valid=valid, k_valid=valid, key_bias=bias)
        y = branch.finish(x, token_rows(mixed, state, like), z, state)
        heads = like.shape[-2]
        found = {f"act.{name}_groups.{layer}": g.ids for name, g in groups.items() if g is not None}
        found = {name: ids.unflatten(0, (ids.shape[0] // heads, heads)) for name, ids in found.items()}
        return y, state.with_carry(**found)

    def plan(self, depth: int, n: int) -> list[tuple[int, int]]:
        """All tokens pass everywhere; only the attention is cheaper."""
        return [(n, n)] * depth

    def _group(self, rows, name, layer, state, valid):
        if name not in self.hashes:
            return None
        draws = self._layer_draws(state, name, layer, rows, rows.shape[-1])
        return Groups(*hash_groups(rows, *draws, width=self.width, valid=valid))

    def _layer_draws(self, state, name, layer, like, width):
        projection, offset = (state.carry[f"act.{name}_{kind}.{layer}"] for kind in ("projection", "offset"))
        # Drawn for the width of the model where only that is known.
        return tuple(draw.detach() for draw in _draws(projection[..., :width, :], offset, like))
