# SPDX-License-Identifier: Apache-2.0
"""SMYRF: attention within balanced clusters of queries and keys, over several rounds (Daras et al., arXiv 2010.05315).

An asymmetric transform makes the inner product of a query and a key a function of their distance; random projections
order queries and keys of every head alike, and the ordered lists are cut into clusters of equal size that attend among
themselves. Rounds are merged by their log-sum-exp.
"""

import math

import torch
from torch import Tensor

from ..nn import TokenState
from ..ops import argsort_rows, balanced_attention
from ..ops._register import check, check_floating, stat_dtype
from ._base import Reducer, register
from ._heads import head_bias, head_rows, real_tokens, token_rows

__all__ = ["SMYRF", "smyrf_attention", "smyrf_hashes", "smyrf_order", "smyrf_transform"]


def smyrf_transform(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of equal norms, ``[R, N, D] -> [R, N, D + 2]``, whose inner products are those of q and k.

    ``q+ = [q, 0, sqrt(S - |q|^2)]``, ``k+ = [k, sqrt(S - |k|^2), 0]``, ``S = max |q|^2 + max |k|^2`` over the row.
    In float32 at least, without a gradient.

    Args:
        q: ``[R, Nq, D]``, not scaled. k: ``[R, Nk, D]``.
    """
    stat = stat_dtype(q.dtype)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q, k = q.to(stat), k.to(stat)
        q_rest, k_rest = (rest[..., None] for rest in _rests(q, k))
        return torch.cat([q, torch.zeros_like(q_rest), q_rest], -1), torch.cat(
            [k, k_rest, torch.zeros_like(k_rest)], -1
        )


def _rests(q, k):
    """What the transform appends to queries and to keys, ``[R, Nq]``, ``[R, Nk]``."""
    q_norm, k_norm = (torch.linalg.vector_norm(t, dim=-1).square() for t in (q, k))
    if 0 in (q.shape[1], k.shape[1]):
        return q_norm, k_norm
    total = q_norm.amax(1, keepdim=True) + k_norm.amax(1, keepdim=True)
    return tuple((total - norm).clamp(min=0).sqrt() for norm in (q_norm, k_norm))


def smyrf_hashes(q: Tensor, k: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Real-valued hashes of transformed queries and keys, one per round.

    Args:
        q: ``[R, Nq, D]``, not scaled. k: ``[R, Nk, D]``.
        alpha: normal draws ``[D + 2, rounds]``. beta: uniform draws ``[rounds]`` or ``[1, rounds]``; it moves all values
            of a round alike, so the order does not depend on it.

    Returns:
        ``([rounds, R, Nq], [rounds, R, Nk])`` float32 (float64 for float64 values), without a gradient.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, or no round.
    """
    op = "smyrf_hashes"
    _check_rows(op, q, k)
    width = q.shape[2] + 2
    check(
        alpha.dim() == 2 and alpha.shape[0] == width, op, "alpha", "have shape [{}, rounds]", tuple(alpha.shape), width
    )
    rounds = alpha.shape[1]
    check(rounds > 0, op, "alpha", "hold at least one round", tuple(alpha.shape))
    check(beta.numel() == rounds, op, "beta", "have shape [{}]", tuple(beta.shape), rounds)
    for name, draw in (("alpha", alpha), ("beta", beta)):
        check(draw.device == q.device, op, name, "be on {}", draw.device, q.device)
    stat = stat_dtype(q.dtype)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        q, k = (t.to(stat, memory_format=torch.contiguous_format) for t in (q, k))
        alpha, beta = alpha.to(stat), beta.to(stat).reshape(-1, 1)
        q_rest, k_rest = _rests(q, k)
        # The products of the transformed rows, without making those; straight in the layout of the result.
        return tuple(
            torch.addmm(beta, alpha[: width - 2].T, t.reshape(-1, width - 2).T)
            .addr_(column, rest.flatten())
            .view(rounds, *rest.shape)
            for t, rest, column in ((q, q_rest, alpha[width - 1]), (k, k_rest, alpha[width - 2]))
        )


def smyrf_order(hashes: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Positions by ascending hash, int32 ``[rounds, R, N]``; ties in order of position.

    Args:
        hashes: ``[rounds, R, N]``.
        hidden: bool ``[R, N]``: tokens that come last.
    """
    return argsort_rows(hashes if hidden is None else hashes.masked_fill(hidden, math.inf))


def smyrf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    *,
    q_size: int,
    k_size: int,
    scale: float | None = None,
    per_row: bool = True,
    q_valid: Tensor | None = None,
    k_valid: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """:func:`balanced_attention` with masks instead of lengths.

    Args:
        q_order, k_order: from :func:`smyrf_order`; tokens that are not valid come last.
        q_valid, k_valid: bool ``[R, Nq]``, ``[R, Nk]``: slots that hold tokens (default all).

    Everything else as in :func:`balanced_attention`.
    """
    return balanced_attention(
        q,
        k,
        v,
        q_order,
        k_order,
        q_size=q_size,
        k_size=k_size,
        scale=scale,
        per_row=per_row,
        q_lengths=None if q_valid is None else q_valid.sum(1),
        k_lengths=None if k_valid is None else k_valid.sum(1),
        key_bias=key_bias,
    )


def _cluster_of(order, size, per_row):
    """The cluster of every query in one round, int64 ``[R, N]``, where all slots hold tokens."""
    rows, tokens = order.shape
    place = torch.arange(tokens, device=order.device).repeat(rows, 1)
    if per_row:
        place = ((place + 1) * -(-tokens // size) - 1) // tokens
    else:
        place = (place + torch.arange(rows, device=order.device)[:, None] * tokens) // size
    return torch.empty_like(place).scatter_(1, order.long(), place)


def _check_rows(op, q, k):
    check_floating(op, q=q, k=k)
    check(q.dim() == 3, op, "q", "have shape [R, N, D]", tuple(q.shape))
    wanted = (q.shape[0], k.shape[-2], q.shape[2])
    check(tuple(k.shape) == wanted, op, "k", "have shape {}", tuple(k.shape), list(wanted))


@register("smyrf")
class SMYRF(Reducer):
    """Attention in balanced clusters.

    The draws of layer ``l`` are made in ``begin``, fresh for every forward, or given in the carry: ``smyrf.alpha.l``
    ``[D + 2, rounds]`` (normal) and ``smyrf.beta.l`` ``[1, rounds]`` (uniform), shared by all heads and images, queries
    and keys.

    Args:
        depth: layers of the model.
        layers: layers with clustered attention, default the second half.
        rounds: how often clusters are formed.
        cluster_size: tokens per cluster.
        per_row: clusters stay within one head of one image, so that a result does not depend on the rest of the batch.
            False: as published for SWAG models, see :func:`balanced_attention`.
        width: of the range of the offsets.
        embed_dim, head_dim: of the model; one of them is needed for the draws.
        generator: random generator of the draws.
        fast_idle: other layers run the model's own block, or what is as good and faster.
    """

    def __init__(
        self,
        *,
        depth: int,
        layers: list[int] | None = None,
        rounds: int = 32,
        cluster_size: int = 64,
        per_row: bool = True,
        width: float = 1.0,
        embed_dim: int | None = None,
        head_dim: int | None = None,
        generator: torch.Generator | None = None,
        fast_idle: bool = True,
    ):
        super().__init__()
        layers = list(range(depth // 2, depth)) if layers is None else list(layers)
        if not all(0 <= layer < depth for layer in layers):
            raise ValueError(f"SMYRF: layers must lie in [0, {depth}), got {layers}")
        for name, value in (("rounds", rounds), ("cluster_size", cluster_size), ("width", width)):
            if value <= 0:
                raise ValueError(f"SMYRF: {name} must be positive, got {value}")
        self.layers, self.rounds, self.cluster_size, self.per_row = layers, rounds, cluster_size, per_row
        self.width, self.generator, self.fast_idle = width, generator, fast_idle
        self.head_dim = embed_dim if head_dim is None else head_dim  # heads are never wider than the model
        self.own_attention = bool(self.layers)

    @property
    def active(self) -> bool:
        """Whether any layer clusters."""
        return bool(self.layers)

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Draw the projections of all layers, except where they are given."""
        draws = {}
        width = x.shape[-1] if self.head_dim is None else self.head_dim
        options = {"dtype": stat_dtype(x.dtype), "device": x.device}
        for layer in self.layers:
            if f"smyrf.alpha.{layer}" not in state.carry:
                alpha, beta = torch.empty(width + 2, self.rounds, **options), torch.empty(1, self.rounds, **options)
                draws[f"smyrf.alpha.{layer}"] = alpha.normal_(generator=self.generator)
                draws[f"smyrf.beta.{layer}"] = beta.uniform_(0, self.width, generator=self.generator)
        return x, state.with_carry(**draws)

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """The model's own block in other layers."""
        return run.idle(x, state) if layer not in self.layers and self.fast_idle else run(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Clustered attention between the branch's projections."""
        if layer not in self.layers:
            return super().attention(x, state, layer, branch)
        branch.check_own_attention()
        like, k, v, z = branch.start(x, state)
        valid, bias = real_tokens(like, state), head_bias(like, state)
        q, k, v = (head_rows(t, state) for t in (like, k, v))
        alpha, beta = state.carry[f"smyrf.alpha.{layer}"], state.carry[f"smyrf.beta.{layer}"]
        hidden, seen = None if valid is None else ~valid, (q, k)
        if bias is not None:  # hidden tokens, which are last in every order, must not move the others either
            hidden = bias == -math.inf
            seen = [t.detach().masked_fill(hidden[..., None], 0) for t in seen]
        orders = [smyrf_order(h, hidden) for h in smyrf_hashes(*seen, alpha[: q.shape[-1] + 2], beta)]
        mixed = smyrf_attention(
            q,
            k,
            v,
            *orders,
            q_size=self.cluster_size,
            k_size=self.cluster_size,
            scale=branch.logit_scale,
            per_row=self.per_row,
            q_valid=valid,
            k_valid=valid,
            key_bias=bias,
        )
        if "parent" in state.carry:  # a trace
            clusters = _cluster_of(orders[0][0], self.cluster_size, self.per_row)
            state = state.with_carry(**{f"smyrf.q_clusters.{layer}": clusters.view(-1, like.shape[-2], q.shape[1])})
        return branch.finish(x, token_rows(mixed, state, like), z, state), state

    def plan(self, depth: int, n: int) -> list[tuple[int, int]]:
        """All tokens pass everywhere."""
        return [(n, n)] * depth
