# SPDX-License-Identifier: Apache-2.0
"""Ops on sorted rows: the sort itself, sampling from sorted scores, groups of equal hashes, attention in balanced clusters.

Inverse transform sampling is from ATS (arXiv 2111.15667), groups of equal hash codes from ACT (arXiv 2011.09315). Balanced
clusters are cut from rows sorted by a hash, from SMYRF (arXiv 2010.05315); where a query is clustered several times, all
its clusters are one softmax: the same as merging them by their log-sum-exp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import autocast_cast, call, check, check_floating, check_index, default_scale, register, stat_dtype
from .attention import sparse_attention
from .merge import Matching, merge_tokens
from .tokens import select_tokens

__all__ = ["argsort_rows", "balanced_attention", "hash_groups", "sample_rows", "sample_tokens"]

MAX_HASHES = 32  # two bits of a 64-bit code for each of them


# ---------------------------------------------------------------- public functions


def argsort_rows(x: Tensor) -> Tensor:
    """Positions by ascending value along the last dimension: ``x.argsort(dim=-1, stable=True)`` as int32, only faster.

    Equal values stay in order (-0 equals 0), NaN comes last.

    Args:
        x: ``[..., N]``, floating.

    Returns:
        int32 ``[..., N]``, without a gradient.

    Example:
        >>> argsort_rows(torch.tensor([3.0, 1.0, 2.0, 1.0]))
        tensor([1, 3, 2, 0], dtype=torch.int32)
    """
    op = "argsort_rows"
    check_floating(op, x=x)
    check(x.dim() >= 1, op, "x", "have shape [..., N]", tuple(x.shape))
    x = x.detach()
    if x.device.type == "cuda":
        return _reference_argsort(x)
    return call(op, x.device, x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).view(x.shape)


def sample_rows(
    scores: Tensor,
    grid_points: int,
    *,
    grid_counts: Tensor | None = None,
    valid: Tensor | None = None,
    published: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inverse transform sampling of the entries of every row on a fixed grid.

    The cumulative distribution of the ascending scores, scaled to [0, 1], is compared with a uniform grid from its least
    positive value to 1; the nearest entry of every grid point is kept, duplicates once. So the least significant entry
    is always dropped. Where there is no distribution (one entry, or no positive score) all are kept.

    Args:
        scores: ``[B, n]``, not negative.
        grid_points: G.
        grid_counts: int ``[B]``: the same per row, at most ``grid_points``; further points repeat the last one.
        valid: bool ``[B, n]``: candidates (default all); the others never count.
        published: as in the code behind the published numbers of ATS: other candidates are only told apart by their
            score 0 (so the least significant of the real ones can be kept beside them), and a largest pick at place 1 is
            lost (which happens with two entries: none is kept).

    Returns:
        ``order`` int64 ``[B, n]``, entries by ascending score, those that are no candidates first; ``cdf [B, n]``,
        cumulative scores in that order, from 0 to 1; ``grid [B, G]``, where the distribution is sampled; ``pick`` int64
        ``[B, G]``, the place in ``order`` whose ``cdf`` is nearest to each grid point; ``kept`` bool ``[B, n]``, the
        places in ``order`` that are kept; ``rows`` int32 ``[B, n]``, the kept entries by ascending score, -1 behind
        them. Where there is no distribution, ``cdf`` and ``grid`` may be NaN, and ``pick`` n. Without gradients.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device.
    """
    op = "sample_rows"
    check_floating(op, scores=scores)
    check(scores.dim() == 2, op, "scores", "have shape [B, n]", tuple(scores.shape))
    check(grid_points >= 0, op, "grid_points", "be >= 0", grid_points)
    scores = scores.detach().to(stat_dtype(scores.dtype))
    if valid is not None:
        check(valid.dtype == torch.bool, op, "valid", "be bool", valid.dtype, error=TypeError)
        check(valid.shape == scores.shape, op, "valid", "have shape {}", tuple(valid.shape), tuple(scores.shape))
        check(valid.device == scores.device, op, "valid", "be on {}", valid.device, scores.device)
        scores = torch.where(valid, scores, 0)
    grid_counts = _lengths(op, "grid_counts", grid_counts, scores)
    scores = scores / scores.sum(1, keepdim=True)
    # Hidden entries come first. Their order among each other is of no effect: as published, it is that of the sort.
    order = (scores if valid is None else torch.where(valid, scores, 0 if published else -1)).argsort(
        dim=1, stable=not published
    )
    arguments = scores, order, grid_points, grid_counts, valid, published
    if scores.device.type == "cuda":
        return order, *_reference_sample(*arguments)
    return order, *call(op, scores.device, *arguments)


def sample_tokens(
    attention: Tensor,
    v: Tensor,
    initial: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_prefix: int = 1,
    key_bias: Tensor | None = None,
    padded: bool = False,
    drop: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive token sampling: :func:`sample_rows` of every sequence by attention received times the norm of the values.

    Args:
        attention: ``[H, T]``, of the first token of each sequence (``want_cls`` of :func:`sparse_attention`), float32
            (float64 for float64 values).
        v: ``[T, H, D]``.
        initial: bool ``[B, N]``, the tokens that each sequence had once, prefix included: without it they are the grid
            points.
        cu_seqlens: int32 ``[B + 1]``, starts of the sequences; max_seqlen bounds their lengths.
        num_prefix: leading tokens of every sequence that are kept in any case.
        key_bias: ``[T]``, -inf hides a token.
        padded: lay out the kept tokens padded, not packed.
        drop: cut padding to the longest sequence (on CUDA this reads its length back).

    Returns:
        ``rows`` int32 ``[B, M]``, what is kept of each sequence: the prefix, then tokens by ascending score, -1 behind
        them; M is ``max_seqlen``, or where padding is cut the largest number kept. ``source`` int32 ``[S]``, the same as
        rows of ``v``, and int32 ``[B + 1]`` where each sequence starts in it; padded, every sequence has M, -1 behind
        the kept ones. Without gradients.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: wrong contents of ``cu_seqlens``, or a sequence
            shorter than the prefix (CPU).
    """
    op = "sample_tokens"
    check_floating(op, v=v)
    check(v.dim() == 3, op, "v", "have shape [T, H, D]", tuple(v.shape))
    stat = stat_dtype(v.dtype)
    wanted = (v.shape[1], v.shape[0])
    check(tuple(attention.shape) == wanted, op, "attention", "have shape {}", tuple(attention.shape), list(wanted))
    check(attention.device == v.device, op, "attention", "be on {}", attention.device, v.device)
    cu_seqlens = check_index(op, "cu_seqlens", cu_seqlens, v.device)
    check(initial.dtype == torch.bool, op, "initial", "be bool", initial.dtype, error=TypeError)
    check(initial.device == v.device, op, "initial", "be on {}", initial.device, v.device)
    fits = initial.dim() == 2 and initial.shape[0] == cu_seqlens.shape[0] - 1 and initial.shape[1] >= num_prefix
    check(fits, op, "initial", "have a row per sequence with at least the prefix", tuple(initial.shape))
    check(num_prefix >= 0, op, "num_prefix", "be >= 0", num_prefix)
    if key_bias is not None:
        check(key_bias.shape == v.shape[:1], op, "key_bias", "have shape {}", tuple(key_bias.shape), list(v.shape[:1]))
        check(key_bias.device == v.device, op, "key_bias", "be on {}", key_bias.device, v.device)
        key_bias = key_bias.detach().to(stat)
    attention, v = attention.detach().to(stat), v.detach()
    arguments = attention, v, initial, cu_seqlens, max_seqlen, key_bias, num_prefix, padded, drop
    return _reference_tokens(*arguments) if v.device.type == "cuda" else call(op, v.device, *arguments)


def place_samples(
    sampled: Tensor, cu_seqlens: Tensor, num_prefix: int, padded: bool, drop: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`sample_tokens` returns, from the ``rows [B, n]`` of :func:`sample_rows`."""
    batch, starts = sampled.shape[0], cu_seqlens[:-1, None]
    front = torch.arange(num_prefix, dtype=torch.int32, device=sampled.device).expand(batch, -1)
    rows = torch.cat([front, torch.where(sampled < 0, -1, sampled + num_prefix)], 1)
    if not padded:
        slots = select_tokens(rows >= 0)
        return rows, (rows + starts).flatten()[slots.indices.long()], slots.cu_seqlens
    if drop and batch != 0:  # of no sequences, none is the longest
        rows = rows.index_select(1, (rows >= 0).any(0).nonzero()[:, 0])  # everywhere the kept rows come first
    source = torch.where(rows < 0, -1, rows + starts).flatten()
    return rows, source, torch.arange(batch + 1, dtype=torch.int32, device=rows.device) * rows.shape[1]


def hash_groups(
    x: Tensor,
    projection: Tensor,
    offset: Tensor,
    *,
    width: float = 8.0,
    scale: float = 1.0,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Groups of the tokens of every row that have equal hash codes (:func:`hash_codes`, :func:`code_groups`) in one go.

    Args:
        x: ``[R, N, D]``. Row and token strides are free.
        projection, offset: ``[D, L]`` and ``[L]``, float32 (float64 for a float64 x), L in 1..32.
        width: of the hash buckets.
        scale: factor of x.
        valid: bool ``[R, N]``, slots that hold tokens (default all).

    Returns:
        ``ids`` int32 ``[R, N]``, the rank of a token's code among its row's, -1 = no token; ``counts`` int32 ``[R, N]``,
        members of each group, then zeros. Without gradients.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, no or too many hashes, or a width that is not positive.
    """
    op = "hash_groups"
    check_hashes(op, x, projection, offset, width)
    x, projection, offset = x.detach(), projection.detach(), offset.detach()
    if valid is not None:
        check(valid.dtype == torch.bool, op, "valid", "be bool", valid.dtype, error=TypeError)
        check(valid.shape == x.shape[:2], op, "valid", "have shape {}", tuple(valid.shape), list(x.shape[:2]))
        check(valid.device == x.device, op, "valid", "be on {}", valid.device, x.device)
    arguments = x, projection, offset, float(width), float(scale), valid
    return _reference_groups(*arguments) if x.device.type == "cuda" else call(op, x.device, *arguments)


def check_hashes(op: str, x: Tensor, projection: Tensor, offset: Tensor, width: float) -> None:
    """The rules of tokens ``[R, N, D]`` and the draws that hash them."""
    check_floating(op, x=x)
    check(x.dim() == 3, op, "x", "have shape [R, N, D]", tuple(x.shape))
    check_draws(op, projection, offset, x, x.shape[2], width)


def check_draws(op: str, projection: Tensor, offset: Tensor, x: Tensor, dim: int, width: float) -> None:
    """The rules of the draws that hash tokens of ``dim`` channels with the dtype and device of ``x``."""
    stat = stat_dtype(x.dtype)
    for name, draw in (("projection", projection), ("offset", offset)):
        check(draw.dtype == stat, op, name, "be {}", draw.dtype, stat, error=TypeError)
        check(draw.device == x.device, op, name, "be on {}", draw.device, x.device)
    fits = projection.dim() == 2 and projection.shape[0] == dim
    check(fits, op, "projection", "have shape [{}, L]", tuple(projection.shape), dim)
    hashes = projection.shape[1]
    check(1 <= hashes <= MAX_HASHES, op, "projection", "hold 1 to {} hashes", hashes, MAX_HASHES)
    check(tuple(offset.shape) == (hashes,), op, "offset", "have shape [{}]", tuple(offset.shape), hashes)
    check(width > 0, op, "width", "be positive", width)


def hash_codes(
    x: Tensor, projection: Tensor, offset: Tensor, width: float, scale: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """int64 ``[R, N]``: ``sum_l h_l 4^l``, ``h_l = floor((scale x w_l + b_l) / width)`` less the row's least, wrapping."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[:2], dtype=torch.int64)
    # Large temporaries are what costs here: the floats are rounded in place, and the least hashes of a row, which only
    # shift the sum, are subtracted from the codes.
    shifts = torch.arange(0, 2 * projection.shape[1], 2, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.to(projection.dtype)
        h = (x if scale == 1 else x * scale) @ projection
        h = h.add_(offset).div_(width).floor_()
        least = (h if valid is None else torch.where(valid[..., None], h, math.inf)).amin(1, keepdim=True)
        least = torch.where(least.isfinite(), least, 0)
        return _code(h, shifts) - _code(least, shifts)


def _code(h, shifts):
    return h.to(torch.int64).bitwise_left_shift_(shifts).sum(-1)


def code_groups(codes: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens with equal int64 ``codes [R, N]``, row by row: ids and counts, as of :func:`hash_groups`."""
    if codes.shape[1] == 0:
        return codes.to(torch.int32), codes.to(torch.int32)
    if valid is not None:  # a slot without a token repeats a code of its row: no group comes from it
        codes = torch.where(valid, codes, codes.gather(1, valid.int().argmax(1, keepdim=True)))
    ordered, order = codes.sort(dim=1)
    rank = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(1, dtype=torch.int32)
    ids = torch.empty_like(rank).scatter(1, order, rank)
    member = torch.ones_like(ids) if valid is None else valid.to(torch.int32)
    counts = torch.zeros_like(ids).scatter_add(1, ids.long(), member)
    return ids if valid is None else torch.where(valid, ids, -1), counts


def balanced_attention(
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
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Attention within clusters of ``q_size`` queries and ``k_size`` keys, over all rounds.

    A key that a query meets in several rounds counts several times.

    Args:
        q: ``[R, Nq, D]``; k, v: ``[R, Nk, D]``; rows of tokens, one per image and head. Row and token strides are free.
        q_order, k_order: int32 or int64 ``[rounds, R, Nq]``, ``[rounds, R, Nk]``: every position of a row once, as from
            :func:`argsort_rows`.
        q_size, k_size: cluster sizes. Clusters of one row are as equal as can be and never larger.
        scale: factor of the logits, default ``D ** -0.5``.
        per_row: clusters end where a row ends. False: the rounds and rows are one list that is cut every ``q_size``
            queries and ``k_size`` keys, so that the end of a row may share a cluster with the start of the next one.
        q_lengths, k_lengths: ``[R]``, how many of a row's tokens are real: the first ones of each of its orders.
        key_bias: ``[R, Nk]``, added to the logits of each key.

    Returns:
        ``[R, Nq, D]``; zeros for queries that met no key. Differentiable in q, k, v and key_bias; the orders are
        constants.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; sizes that are not positive; with ``per_row=False`` also
            lengths, a list that is no multiple of its size, or lists with different numbers of clusters.
        RuntimeError: an order points outside its row (CPU).
    """
    op = "balanced_attention"
    q, k, v = autocast_cast(q, k, v)
    check_floating(op, q=q, k=k, v=v)
    check(q.dim() == 3, op, "q", "have shape [R, N, D]", tuple(q.shape))
    wanted = (q.shape[0], k.shape[-2], q.shape[2])
    check(tuple(k.shape) == wanted, op, "k", "have shape {}", tuple(k.shape), list(wanted))
    check(v.shape == k.shape, op, "v", "be like k {}", tuple(v.shape), tuple(k.shape))
    q_order, k_order = (
        check_index(op, "q_order", q_order, q.device, 3),
        check_index(op, "k_order", k_order, q.device, 3),
    )
    for name, order, like in (("q_order", q_order, q), ("k_order", k_order, k)):
        wanted = (q_order.shape[0], *like.shape[:2])
        check(tuple(order.shape) == wanted, op, name, "have shape {}", tuple(order.shape), list(wanted))
    for name, size in (("q_size", q_size), ("k_size", k_size)):
        check(size > 0, op, name, "be positive", size)
    if not per_row:
        _check_list(op, q_order, k_order, q_size, k_size, q_lengths, k_lengths)
    q_lengths, k_lengths = (_lengths(op, *pair, q) for pair in (("q_lengths", q_lengths), ("k_lengths", k_lengths)))
    if key_bias is not None:
        check(key_bias.shape == k.shape[:2], op, "key_bias", "have shape {}", tuple(key_bias.shape), list(k.shape[:2]))
        check(key_bias.device == q.device, op, "key_bias", "be on {}", key_bias.device, q.device)
        key_bias = key_bias.to(stat_dtype(q.dtype))
    scale = float(default_scale(q.shape[2]) if scale is None else scale)
    arguments = (q, k, v, q_order, k_order, q_lengths, k_lengths, key_bias, q_size, k_size, per_row, scale)
    return _composite(*arguments)[0] if q.device.type == "cuda" else call(op, q.device, *arguments)[0]


# ---------------------------------------------------------------- checks and helpers


def _lengths(op, name, lengths, like):
    if lengths is None:
        return None
    lengths = check_index(op, name, lengths, like.device)
    check(lengths.shape[0] == like.shape[0], op, name, "have shape [{}]", tuple(lengths.shape), like.shape[0])
    return lengths


def _check_list(op, q_order, k_order, q_size, k_size, q_lengths, k_lengths):
    check(q_lengths is None and k_lengths is None, op, "per_row", "be True for rows of different lengths", False)
    for name, order, size in (("q_size", q_order, q_size), ("k_size", k_order, k_size)):
        slots = order.numel()
        check(slots % size == 0, op, name, "divide rounds * rows * tokens ({})", size, slots)
    made = [order.numel() // size for order, size in ((q_order, q_size), (k_order, k_size))]
    inside = [order.shape[2] // size for order, size in ((q_order, q_size), (k_order, k_size))]
    same = made[0] == made[1] and inside[0] == inside[1]
    check(same, op, "q_size and k_size", "make as many clusters of queries as of keys", (*made, *inside))


def _cut(q_order, k_order, q_lengths, k_lengths, q_size, k_size, per_row):
    """Clusters as sequences of a packed batch: ``(index, starts)`` of queries and of keys."""
    cut = _cut_rows if per_row else _cut_list
    return cut(q_order, k_order, q_size, k_size, q_lengths, k_lengths)


def _cut_list(q_order, k_order, q_size, k_size, q_lengths, k_lengths):
    sides = []
    for order, size in ((q_order, q_size), (k_order, k_size)):
        starts = torch.arange(0, order.numel() // size + 1, dtype=torch.int32, device=order.device) * size
        sides.append((_flat(order), starts))
    return sides


def _cut_rows(q_order, k_order, q_size, k_size, q_lengths, k_lengths):
    """Every row by itself: the fewest clusters that keep to both sizes, as equal as can be."""
    orders, given = (q_order, k_order), (q_lengths, k_lengths)
    lengths = [
        torch.full(order.shape[1:2], order.shape[2], device=order.device)
        if length is None
        else length.long().clamp(0, order.shape[2])
        for order, length in zip(orders, given)
    ]
    needed = [-(-length // size) for length, size in zip(lengths, (q_size, k_size))]
    clusters = torch.maximum(*needed).clamp(min=1)
    slots = torch.sym_max(-(-q_order.shape[2] // q_size), -(-k_order.shape[2] // k_size))
    number = torch.arange(slots, dtype=torch.int64, device=q_order.device)
    sides = []
    for order, length, ragged in zip(orders, lengths, given):
        index, begin = _flat(order), None
        if ragged is None:
            begin = (
                torch.arange(order.shape[0] * order.shape[1], dtype=torch.int32, device=order.device) * order.shape[2]
            )
        else:
            place = torch.arange(order.shape[2], device=order.device) < length[:, None]
            chosen = select_tokens(place.expand(order.shape).flatten(0, 1), capacity=order.numel())
            index = torch.where(chosen.indices < 0, -1, index[chosen.indices.clamp(min=0).long()])
            begin = chosen.cu_seqlens[:-1]
        bounds = number.clamp(max=clusters[:, None]) * length[:, None] // clusters[:, None]
        starts = (begin.view(*order.shape[:2], 1) + bounds).flatten().to(torch.int32)
        end = length.sum(0, keepdim=True).to(torch.int32) * order.shape[0]
        sides.append((index, torch.cat([starts, end])))
    return sides


def _flat(order):
    """Positions within rows -> row numbers of ``[R * N]``, int32 ``[rounds * R * N]``."""
    rows, tokens = order.shape[1:]
    return (order + torch.arange(rows, device=order.device, dtype=torch.int32)[:, None] * tokens).flatten()


def _most(q, k, q_size, k_size, per_row):
    """Upper bounds of the clusters' sizes."""
    if not per_row:
        return q_size, k_size
    return torch.sym_min(q_size, q.shape[1]), torch.sym_min(k_size, k.shape[1])


# ---------------------------------------------------------------- fake


def _fake_sample(scores, order, grid_points, grid_counts, valid, published):
    grid = scores.new_empty(scores.shape[0], grid_points)
    cdf, kept, rows = (scores.new_empty(scores.shape, dtype=d) for d in (scores.dtype, torch.bool, torch.int32))
    return cdf, grid, torch.empty_like(grid, dtype=torch.int64), kept, rows


def _fake_tokens(attention, v, initial, cu_seqlens, max_seqlen, key_bias, num_prefix, padded, drop):
    batch, columns = initial.shape[0], max_seqlen
    if padded and drop and batch != 0:
        columns = torch.library.get_ctx().new_dynamic_size()
    total = batch * columns if padded else torch.library.get_ctx().new_dynamic_size()
    return tuple(v.new_empty(size, dtype=torch.int32) for size in ((batch, columns), (total,), (batch + 1,)))


def _fake_groups(x, projection, offset, width, scale, valid):
    return tuple(x.new_empty(x.shape[:2], dtype=torch.int32) for _ in range(2))


def _fake_balanced(q, k, v, q_order, k_order, q_lengths, k_lengths, key_bias, q_size, k_size, per_row, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=stat_dtype(q.dtype))


# ---------------------------------------------------------------- autograd


def _setup_balanced(ctx, inputs, output):
    *tensors, ctx.q_size, ctx.k_size, ctx.per_row, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_balanced(ctx, grad_out, grad_lse):
    """With the log-sum-exp of all rounds, the gradient of every round is that of plain attention."""
    q, k, v, q_order, k_order, q_lengths, k_lengths, key_bias, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 12
    sizes = ctx.q_size, ctx.k_size, ctx.per_row
    (q_index, q_starts), (k_index, k_starts) = _cut(q_order, k_order, q_lengths, k_lengths, *sizes)
    tokenprune, width, queries, keys = torch.ops.tokenprune, q.shape[2], q_index.clamp(min=0).long(), k_index
    grad_rows, out_rows = (
        None if grad_out is None else tokenprune.gather_tokens(t.reshape(-1, width), q_index)[:, None]
        for t in (grad_out, out)
    )
    lse_rows, grad_lse_rows = (None if t is None else t.flatten()[queries][None] for t in (lse, grad_lse))
    bias_rows = None if key_bias is None else key_bias.flatten()[keys.clamp(min=0).long()]
    grad_q, grad_k, grad_v, grad_bias = tokenprune.sparse_attention_backward(
        grad_rows,
        *(t.reshape(-1, 1, width) for t in (q, k, v)),
        out_rows,
        lse_rows,
        grad_lse_rows,
        None,
        0,
        q_starts,
        k_starts,
        *_most(q, k, *sizes),
        bias_rows,
        q_index,
        k_index,
        ctx.scale,
    )

    def to_rows(grads, index, like):
        return tokenprune.gather_tokens_backward(grads, index, like.shape[0] * like.shape[1]).view(like.shape)

    return (
        to_rows(grad_q.flatten(1), q_index, q),
        to_rows(grad_k.flatten(1), k_index, k),
        to_rows(grad_v.flatten(1), k_index, v),
        *(None,) * 4,
        to_rows(grad_bias.view(-1, 1), k_index, key_bias) if ctx.needs_input_grad[7] else None,
        *(None,) * 4,
    )


# ---------------------------------------------------------------- flop formula


def _flops_balanced(
    q, k, v, q_order, k_order, q_lengths, k_lengths, bias, q_size, k_size, per_row, scale, *, out_val=None, **kwargs
):
    """Exact where the lengths can be read, otherwise those of full rows."""
    rounds = q_order.shape[0]
    if not per_row:
        return 4 * q.shape[2] * q_order.numel() * k_size
    readable = q.device.type == "cpu" and not isinstance(q_order, torch._subclasses.FakeTensor)
    counts = [
        lengths.clamp(0, t.shape[1]).tolist() if readable and lengths is not None else [t.shape[1]] * t.shape[0]
        for t, lengths in ((q, q_lengths), (k, k_lengths))
    ]
    pairs = sum(_pairs(nq, nk, q_size, k_size) for nq, nk in zip(*counts))
    return 4 * q.shape[2] * rounds * pairs


def _pairs(nq, nk, q_size, k_size):
    clusters = max(-(-nq // q_size), -(-nk // k_size), 1)
    cuts = [[n * c // clusters for c in range(clusters + 1)] for n in (nq, nk)]
    return sum((b - a) * (d - c) for a, b, c, d in zip(cuts[0], cuts[0][1:], cuts[1], cuts[1][1:]))


# ---------------------------------------------------------------- reference; serves CUDA, too


def _reference_groups(x, projection, offset, width, scale, valid):
    return code_groups(hash_codes(x, projection, offset, width, scale, valid), valid)


def _reference_argsort(x):
    return x.argsort(dim=-1, stable=True).to(torch.int32)


def _reference_sample(scores, order, grid_points, grid_counts, valid, published):
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    candidate = valid.gather(1, order)
    total = scores.gather(1, order).cumsum(1)
    first = torch.zeros_like(candidate.sum(1, keepdim=True)) if published else (~candidate).sum(1, keepdim=True)
    least = F.pad(total, (0, 1)).gather(1, first)
    spread = F.pad(total, (1, 0))[:, -1:] - least
    cdf = ((total - least) / spread).clamp(min=0)
    grid = _grid(cdf, grid_points, grid_counts)
    pick = _nearest(cdf, grid)
    kept = F.pad(torch.zeros_like(valid), (0, 1)).scatter(1, pick, True)[:, :-1]
    if published and grid_points > 0:
        lost = torch.arange(kept.shape[1], device=kept.device) == 1
        kept = kept & ~(lost & (pick.amax(1, keepdim=True) == 1))
    kept = torch.where(spread > 0, kept, True) & candidate
    return cdf, grid, pick, kept, _front(order, kept)


def _reference_tokens(attention, v, initial, cu_seqlens, max_seqlen, key_bias, num_prefix, padded, drop):
    scores = attention.sum(0) * v.to(attention.dtype).flatten(1).norm(dim=-1)
    column = torch.arange(max_seqlen, dtype=torch.int32, device=v.device)
    valid = column < cu_seqlens.diff()[:, None]
    place = torch.where(valid, cu_seqlens[:-1, None] + column, v.shape[0]).long()
    if key_bias is not None:
        valid = F.pad(key_bias > -math.inf, (0, 1))[place]
    sampled = sample_rows(
        F.pad(scores, (0, 1))[place][:, num_prefix:],
        initial.shape[1] - num_prefix,
        grid_counts=initial.sum(1) - num_prefix,
        valid=valid[:, num_prefix:],
    )[-1]
    return place_samples(sampled, cu_seqlens, num_prefix, padded, drop)


def _grid(cdf, points, counts):
    """``y_k = y_0 + (l_k (G - 1) - y_0 k) / (G - 1)``, ``l`` from 0 to 1 in G equal steps; ``[B, points]``."""
    if counts is None:
        counts = torch.full((cdf.shape[0],), points, device=cdf.device)
    counts = counts[:, None].long().clamp(min=1)
    k = torch.minimum(torch.arange(points, device=cdf.device), counts - 1)
    last = (counts - 1).clamp(min=1).to(cdf.dtype)
    # Both ends exact, as torch.linspace has them.
    steps = torch.where(k < counts // 2, k / last, 1 - (counts - 1 - k) / last)
    start = F.pad(torch.where(cdf == 0, math.inf, cdf), (0, 1), value=math.inf).amin(1, keepdim=True)
    return start + (steps * last - start * k) / last


def _nearest(cdf, grid):
    """The first entry of the ascending ``cdf [B, n]`` that is nearest to each value of ``grid [B, G]``."""
    cdf, last = F.pad(cdf, (0, 1), value=math.inf), cdf.shape[1]  # a last entry that is nearest to nothing
    above = torch.searchsorted(cdf, grid.contiguous()).clamp(max=last)
    lower = cdf.gather(1, (above - 1).clamp(min=0))
    below = torch.searchsorted(cdf, lower).clamp(max=last)  # the first of equal ones
    return torch.where((cdf.gather(1, above) - grid).abs() < (grid - lower).abs(), above, below)


def _front(order, kept):
    """The kept entries of ``order``, moved to the front, -1 behind them; int32."""
    batch, patches = order.shape
    place = torch.where(kept, kept.cumsum(1) - 1, patches)
    rows = torch.full((batch, patches + 1), -1, dtype=torch.int32, device=order.device)
    return rows.scatter(1, place, order.to(torch.int32))[:, :patches]


def _composite(q, k, v, q_order, k_order, q_lengths, k_lengths, key_bias, q_size, k_size, per_row, scale):
    """Every cluster is a sequence; the rounds of a query are weighted with ``exp(lse)``."""
    rows, tokens, width = q.shape
    sizes = q_size, k_size, per_row
    (q_index, q_starts), (k_index, k_starts) = _cut(q_order, k_order, q_lengths, k_lengths, *sizes)
    if key_bias is not None:
        key_bias = key_bias.flatten()[k_index.clamp(min=0).long()]
    most_q, most_k = _most(q, k, *sizes)
    out, lse = sparse_attention(
        *(t.reshape(-1, 1, width) for t in (q, k, v)),
        cu_seqlens_q=q_starts,
        cu_seqlens_k=k_starts,
        max_seqlen_q=most_q,
        max_seqlen_k=most_k,
        key_bias=key_bias,
        scale=scale,
        index=q_index,
        index_k=k_index,
    )
    query = q_index[None]
    matching = Matching(query, query, query, query, rows * tokens)
    top = merge_tokens(lse.detach()[..., None], matching, mode="amax")[0][0, :, 0]
    unseen = lse == -math.inf
    weight = torch.where(unseen, 0, (torch.where(unseen, 0, lse) - top[query.clamp(min=0).long()]).exp())
    out, total = merge_tokens(out.view(1, -1, width), matching, size=weight, mode="weighted")
    lse = torch.where(total == 0, -math.inf, top + torch.where(total == 0, 1, total).log())
    return out.view(q.shape), lse.view(rows, tokens)


register(
    "argsort_rows",
    fake=lambda x: x.new_empty(x.shape, dtype=torch.int32),
    reference=_reference_argsort,
    composed=True,
)
register("sample_rows", fake=_fake_sample, reference=_reference_sample, composed=True)
register("sample_tokens", fake=_fake_tokens, reference=_reference_tokens, composed=True)
register(
    "hash_groups",
    fake=_fake_groups,
    reference=_reference_groups,
    flops=lambda x, projection, *args, out_val=None, **kwargs: 2 * x.numel() * projection.shape[1],
    composed=True,
)
register(
    "balanced_attention",
    fake=_fake_balanced,
    reference=_composite,
    setup_context=_setup_balanced,
    backward=_backward_balanced,
    flops=_flops_balanced,
    composed=True,
)
