# SPDX-License-Identifier: Apache-2.0
"""Tokens by rank: the order, the best with the others fused into one (EViT, arXiv 2202.07800), the marked ones likewise
(SPViT, arXiv 2112.13890), running scores (Evo-ViT, arXiv 2108.01390).

Plain PyTorch can do all of this in a few ops; each of these is one, because small models at batch 1 spend more time on the
way from op to op than in them. CPU kernels; elsewhere they are compositions.
"""

import torch
from torch import Tensor

from ._register import call, check, check_floating, check_index, register, stat_dtype
from .merge import Matching, merge_tokens
from .tokens import TokenIndex, gather_tokens, select_tokens

__all__ = ["keep_marked_tokens", "keep_top_tokens", "rank_tokens", "running_scores"]


# ---------------------------------------------------------------- public functions


def rank_tokens(score: Tensor, count: int | None = None, *, num_prefix: int = 0) -> tuple[Tensor, TokenIndex]:
    """Prefix tokens in place, then the others by descending score. Ties as they stand, NaN last.

    Args:
        score: ``[B, N]``; what it says of prefix tokens is not read.
        count: how many of every image the index names, prefix included; default all.
        num_prefix: leading tokens that come first whatever their score.

    Returns:
        ``(order, index)``: positions by rank, int64 ``[B, N]``; and the flat rows of the first ``count``, by rank (so,
        other than usual, not ascending). Without gradients.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, or a count out of range.
    """
    op = "rank_tokens"
    _check_score(op, score, num_prefix)
    tokens = score.shape[1]
    count = tokens if count is None else count
    if not 0 <= count <= tokens:
        check(False, op, "count", "be in [0, {}]", count, tokens)
    arguments = score.detach(), num_prefix, count
    order, *index = _reference_rank(*arguments) if score.is_cuda else call(op, score.device, *arguments)
    return order, TokenIndex(*index, count)


def keep_top_tokens(
    x: Tensor, score: Tensor, keep: int, *, num_prefix: int = 0, fuse: bool = False, by_rank: bool = True
) -> tuple[Tensor, Tensor]:
    """The prefix tokens and the ``keep`` others of the highest score.

    Args:
        x: ``[B, N, C]``.
        score: ``[B, N]``.
        keep: tokens to keep besides the prefix.
        num_prefix: leading tokens that are always kept.
        fuse: append the sum of the dropped tokens, each times its score.
        by_rank: the best first; False: in the order of x.

    Returns:
        ``(y [B, num_prefix + keep (+ 1), C], order)``; order int64 ``[B, num_prefix + keep]``: the row of x of each row
        of y (but the fused one). Differentiable in x and score.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device, or keep out of range.
    """
    op = "keep_top_tokens"
    check_floating(op, x=x)
    if x.dim() != 3:
        check(False, op, "x", "have shape [B, N, C]", tuple(x.shape))
    _check_score(op, score, num_prefix)
    if score.shape != x.shape[:2]:
        check(False, op, "score", "have shape {}", tuple(score.shape), list(x.shape[:2]))
    if score.device != x.device:
        check(False, op, "score", "be on {}", score.device, x.device)
    if not 0 <= keep <= x.shape[1] - num_prefix:
        check(False, op, "keep", "be in [0, {}]", keep, x.shape[1] - num_prefix)
    arguments = x, score.to(stat_dtype(x.dtype)), num_prefix, keep, fuse, by_rank
    return _reference_keep(*arguments) if x.is_cuda else call(op, x.device, *arguments)


def keep_marked_tokens(
    x: Tensor, keep: Tensor, cu_seqlens: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The marked rows of packed tokens, and the others of each sequence fused into one behind them.

    Args:
        x: ``[T, C]``.
        keep: bool ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, starts of the sequences.
        weights: ``[T]``; with them every sequence ends with the sum of its dropped tokens, each times its weight.

    Returns:
        ``(y [S, C], source, cu_seqlens')``: ``source`` int32 ``[S]``, the row of x of each row of y, -1 for the sums; and
        int32 ``[B + 1]``, where each sequence starts in y. Differentiable in x and weights.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: wrong contents of ``cu_seqlens`` (CPU).
    """
    op = "keep_marked_tokens"
    check_floating(op, x=x)
    if x.dim() != 2:
        check(False, op, "x", "have shape [T, C]", tuple(x.shape))
    check(keep.dtype == torch.bool, op, "keep", "be bool", keep.dtype, error=TypeError)
    for name, t in (("keep", keep), ("weights", weights)):
        if t is not None and t.shape != x.shape[:1]:
            check(False, op, name, "have shape {}", tuple(t.shape), list(x.shape[:1]))
        if t is not None and t.device != x.device:
            check(False, op, name, "be on {}", t.device, x.device)
    cu_seqlens = check_index(op, "cu_seqlens", cu_seqlens, x.device)
    arguments = x, keep, cu_seqlens, None if weights is None else weights.to(stat_dtype(x.dtype))
    return _reference_marked(*arguments) if x.is_cuda else call(op, x.device, *arguments)


def running_scores(score: Tensor, latest: Tensor, weight: float, index: TokenIndex | Tensor | None = None) -> Tensor:
    """Scores that follow the latest ones: ``score + weight * (latest - score)``.

    Args:
        score: ``[R]``, float32 or float64.
        latest: ``[T]``, of the same dtype; without an index T = R.
        weight: of the latest scores.
        index: TokenIndex, or flat int32/int64 rows ``[T]`` of ``score`` which ``latest`` speaks of, without duplicates, -1 for
            none; other scores stay.

    Returns:
        ``[R]``; differentiable in both scores.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device. RuntimeError: wrong contents of the index.
    """
    op = "running_scores"
    check_floating(op, score=score, latest=latest)
    if score.dim() != 1:
        check(False, op, "score", "have shape [R]", tuple(score.shape))
    rows = index
    if index is not None:
        rows = check_index(op, "index", index.indices if isinstance(index, TokenIndex) else index, score.device)
    expected = score.shape if rows is None else rows.shape
    if latest.shape != expected:
        check(False, op, "latest", "have shape {}", tuple(latest.shape), list(expected))
    learned = torch.is_grad_enabled() and (score.requires_grad or latest.requires_grad)
    arguments = score, latest, rows, weight
    return _reference_running(*arguments) if learned or score.is_cuda else call(op, score.device, *arguments)


# ---------------------------------------------------------------- checks, fake, autograd, flops


def _check_score(op, score, num_prefix):
    check_floating(op, score=score)
    if score.dim() != 2:
        check(False, op, "score", "have shape [B, N]", tuple(score.shape))
    if not 0 <= num_prefix <= score.shape[1]:
        check(False, op, "num_prefix", "be in [0, {}]", num_prefix, score.shape[1])


def _fake_rank(score, num_prefix, count):
    batch, tokens = score.shape
    ints = {"dtype": torch.int32}
    return (
        score.new_empty(batch, tokens, dtype=torch.int64),
        score.new_empty(batch * count, **ints),
        score.new_empty(batch + 1, **ints),
    )


def _fake_keep(x, score, num_prefix, keep, fuse, by_rank):
    batch, count = x.shape[0], num_prefix + keep
    return x.new_empty(batch, count + int(fuse), x.shape[2]), x.new_empty(batch, count, dtype=torch.int64)


def _fake_marked(x, keep, cu_seqlens, weights):
    rows = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(rows, x.shape[1]), *(x.new_empty(n, dtype=torch.int32) for n in (rows, cu_seqlens.shape[0]))


def _fake_running(score, latest, rows, weight):
    return torch.empty_like(score, memory_format=torch.contiguous_format)


def _setup_keep(ctx, inputs, output):
    x, score, _, _, ctx.fuse, _ = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(*(x, score) if ctx.fuse else (None, None), output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_keep(ctx, grad, _):
    x, score, order = ctx.saved_tensors
    (batch, tokens, _), count = ctx.shape, order.shape[1]
    starts = torch.arange(batch, device=order.device)[:, None] * tokens
    rows = (order + starts).flatten().to(torch.int32)
    kept = grad[:, :count].flatten(0, 1)
    grad_x = torch.ops.tokenprune.gather_tokens_backward(kept, rows, batch * tokens).view(ctx.shape)
    if not ctx.fuse:
        return grad_x, *(None,) * 5
    fused = grad[:, count:].to(score.dtype)
    weights = score.scatter(1, order, 0)
    grad_score = (x.to(score.dtype) @ fused.mT)[..., 0].scatter(1, order, 0)
    return (grad_x + weights[..., None] * fused).to(x.dtype), grad_score, *(None,) * 4


def _setup_marked(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_marked(ctx, grad, *_):
    x, keep, cu_seqlens, weights, source, cu_out = ctx.saved_tensors
    grad_x = torch.ops.tokenprune.gather_tokens_backward(grad, source, x.shape[0])
    if weights is None or cu_seqlens.shape[0] == 1:
        return grad_x, None, None, None if weights is None else torch.zeros_like(weights)
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    fused = grad[cu_out[1:].long() - 1][_owners(cu_seqlens, row)].to(weights.dtype)
    dropped = (~keep & (row < cu_seqlens[-1])).to(weights.dtype)
    grad_x = grad_x + (weights * dropped)[:, None] * fused
    return grad_x.to(x.dtype), None, None, (x.to(weights.dtype) * fused).sum(1) * dropped


def _flops_keep(x, score, num_prefix, keep, fuse, by_rank, *, out_val=None, **kwargs):
    return 2 * int(fuse) * (x.shape[1] - num_prefix - keep) * x.shape[0] * x.shape[2]


# ---------------------------------------------------------------- reference


def _reference_rank(score, num_prefix, count):
    batch, tokens = score.shape
    key = -score
    key[:, :num_prefix] = float("-inf")
    order = key.argsort(dim=1, stable=True)
    starts = torch.arange(batch + 1, device=score.device)
    rows = (order[:, :count] + starts[:-1, None] * tokens).flatten()
    return order, rows.to(torch.int32), (starts * count).to(torch.int32)


def _reference_keep(x, score, num_prefix, keep, fuse, by_rank):
    order = _reference_rank(score.detach(), num_prefix, 0)[0][:, : num_prefix + keep]
    order = order if by_rank else order.sort(1)[0]
    y = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    if fuse:  # in float32: PyTorch's product of such a thin matrix is slow in bfloat16
        with torch.autocast(x.device.type, enabled=False):
            fused = score.scatter(1, order, 0)[:, None] @ x.to(score.dtype)
        y = torch.cat([y, fused.to(x.dtype)], 1)
    return y, order


def _owners(cu_seqlens, rows):
    """The sequence of each of the ascending rows; the last one's for rows behind all."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True).clamp(max=cu_seqlens.shape[0] - 2)


def _reference_marked(x, keep, cu_seqlens, weights):
    row = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    keep = keep & (row < cu_seqlens[-1])
    starts = torch.cat([keep.new_zeros(1, dtype=torch.int32), keep.cumsum(0, dtype=torch.int32)])[cu_seqlens.long()]
    source = select_tokens(keep[None]).indices
    if weights is None:
        return gather_tokens(x, source), source, starts
    batch = cu_seqlens.shape[0] - 1
    image = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
    cu_out = starts + image
    if batch == 0:
        return x[:0], source, cu_out
    owner = torch.where(keep | (row >= cu_seqlens[-1]), -1, _owners(cu_seqlens, row)).to(torch.int32)[None]
    sums, _ = merge_tokens((x.to(weights.dtype) * weights[:, None])[None], Matching(*[owner] * 4, batch), mode="sum")
    wide = torch.cat([x, sums[0].to(x.dtype)])
    place = torch.arange(source.shape[0], device=x.device) + _owners(cu_seqlens, source)
    whole = source.new_full((source.shape[0] + batch,), -1).scatter(0, place, source)
    made = (image[:-1] + x.shape[0]).to(torch.int32)
    rows = whole.scatter(0, cu_out[1:].long() - 1, made)
    return gather_tokens(wide, rows), whole, cu_out


def _reference_running(score, latest, rows, weight):
    if rows is None:
        return torch.lerp(score, latest, weight)
    slots = torch.where(rows < 0, score.shape[0], rows).long()  # one spare entry takes what goes nowhere
    wide = torch.cat([score, score.new_zeros(1)])
    return wide.scatter(0, slots, torch.lerp(wide[slots], latest, weight))[:-1]


register("rank_tokens", fake=_fake_rank, reference=_reference_rank, composed=True)
register(
    "keep_top_tokens",
    fake=_fake_keep,
    reference=_reference_keep,
    setup_context=_setup_keep,
    backward=_backward_keep,
    flops=_flops_keep,
    composed=True,
)
register(
    "keep_marked_tokens",
    fake=_fake_marked,
    reference=_reference_marked,
    setup_context=_setup_marked,
    backward=_backward_marked,
    composed=True,
)
register("running_scores", fake=_fake_running, reference=_reference_running, composed=True)
