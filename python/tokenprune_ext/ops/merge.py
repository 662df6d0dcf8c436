# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching and token merging, from ToMe (arXiv 2210.09461, section 3).

A merge is described by its ``parent`` vector: the output row of every input token. Merging is a segment reduction over
it, unmerging a gather, tracking of sources its composition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._register import batched, call, check, check_floating, register, stat_dtype
from .tokens import gather_tokens

__all__ = [
    "Matching",
    "bipartite_soft_matching",
    "kth_bipartite_soft_matching",
    "match_and_merge",
    "merge_sources",
    "merge_tokens",
    "random_bipartite_soft_matching",
    "unmerge_tokens",
]

_MODES = {"sum": 0, "mean": 1, "amax": 2, "weighted": 3}


@dataclass(frozen=True)
class Matching:
    """Which tokens merge into which.

    Attributes:
        unm: int32 ``[B, Nu]``, source-side tokens that stay.
        src: int32 ``[B, r]``, source-side tokens that merge.
        dst: int32 ``[B, r]``, the destination-side token each of them merges into.
        parent: int32 ``[B, T]``, output row of every token (-1 = dropped), or None for the identity.
        num_tokens_out: tokens after the merge.
    """

    unm: Tensor
    src: Tensor
    dst: Tensor
    parent: Tensor | None
    num_tokens_out: int


# ---------------------------------------------------------------- public functions


def bipartite_soft_matching(
    metric: Tensor, r: int, *, class_token: bool = False, distill_token: bool = False, num_prefix: int | None = None
) -> Matching:
    """Match the ``r`` most similar pairs between even (source) and odd (destination) tokens.

    Similarity is the cosine. ``src`` and ``unm`` count even tokens (token ``2 i``), ``dst`` odd ones (``2 j + 1``).
    ``src`` comes in order of similarity; ``unm`` ascending with protected tokens, otherwise by similarity (the order in
    the merged sequence). Ties: lower index first. NaN similarities (a zero or NaN row) rank last. The merged sequence
    is ``[unm..., odd...]``, with prefix tokens kept in front, in place. No gradient flows to the metric.

    Args:
        metric: ``[B, T, C]``, or ``[B, T, H, D]`` (keys), averaged over the heads.
        r: merges wanted; at most half of the unprotected tokens merge.
        class_token: token 0 never merges. distill_token: nothing merges into token 1 either.
        num_prefix: the first ``num_prefix`` tokens never merge (instead of the two flags).

    Raises:
        ValueError: metric is not 3-D, r is negative, or num_prefix is given beside a flag.
    """
    op = "bipartite_soft_matching"
    if metric.dim() == 4 and metric.device.type != "cpu":
        metric = metric.mean(2)  # elsewhere not part of the kernel
    _check_metric(op, metric, heads=True)
    r = count_merges(op, metric.shape[1], r, class_token, distill_token, num_prefix)
    if r <= 0:
        return _identity(metric)
    metric = metric.detach()
    unm, src, dst, parent = call(op, metric.device, metric, r, class_token, distill_token, num_prefix or 0)
    return Matching(unm, src, dst, parent, metric.shape[1] - r)


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> Matching:
    """Keep every k-th token as destination; all others merge into their most similar destination.

    Tokens beyond ``T // k * k`` are dropped. ``src``/``dst`` are token and destination numbers.

    Raises:
        ValueError: k > T (nothing would be left), or metric is not 3-D.
    """
    op = "kth_bipartite_soft_matching"
    _check_metric(op, metric)
    batch, tokens, _ = metric.shape
    if k <= 1:
        return _identity(metric)
    check(tokens >= k, op, "k", "be at most the number of tokens ({})", k, tokens)
    runs = torch.arange(tokens // k * k, device=metric.device, dtype=torch.int32).view(-1, k)
    source, destination = (t.reshape(1, -1).expand(batch, -1).contiguous() for t in (runs[:, :-1], runs[:, -1]))
    nearest = call("nearest_tokens", metric.device, metric.detach(), source, destination)[1]
    parent = _parent(tokens, source, nearest, destination)
    return Matching(source[:, :0], source, nearest, parent, tokens // k)


def random_bipartite_soft_matching(metric: Tensor, r: int, *, noise: Tensor | None = None) -> Matching:
    """Merge ``r`` randomly chosen tokens into their most similar of the others.

    Args:
        metric: ``[B, T, C]``.
        r: tokens to merge, less than T.
        noise: uniform ``[B, T]``; the ``r`` smallest entries are the sources. Drawn here when absent.
    """
    op = "random_bipartite_soft_matching"
    _check_metric(op, metric)
    batch, tokens, _ = metric.shape
    if r <= 0:
        return _identity(metric)
    check(r < tokens, op, "r", "be less than the number of tokens ({})", r, tokens)
    noise = torch.rand(batch, tokens, device=metric.device) if noise is None else noise
    check(noise.device == metric.device, op, "noise", "be on {}", noise.device, metric.device)
    check(tuple(noise.shape) == (batch, tokens), op, "noise", "have shape {}", tuple(noise.shape), [batch, tokens])
    order = noise.argsort(dim=1, stable=True).to(torch.int32)
    source, destination = order[:, :r].contiguous(), order[:, r:].contiguous()
    nearest = call("nearest_tokens", metric.device, metric.detach(), source, destination)[1]
    parent = _parent(tokens, source, nearest, destination)
    return Matching(source[:, :0], source, nearest, parent, tokens - r)


def merge_tokens(
    x: Tensor, matching: Matching, *, size: Tensor | None = None, mode: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Reduce every group of the matching to one token.

    Args:
        x: ``[B, T, C]``.
        size: ``[B, T]``, how many original tokens each token stands for (default ones).
        mode: ``"mean"``, ``"sum"`` or ``"amax"`` over the group (its destination included), or ``"weighted"``:
            ``sum(size * x) / sum(size)``.

    Returns:
        ``(y [B, T', C], size' [B, T'])``, differentiable in x and (weighted) size. Sums run in token order.
    """
    op = "merge_tokens"
    check_floating(op, x=x)
    if x.dim() != 3:
        check(False, op, "x", "have shape [B, T, C]", tuple(x.shape))
    if mode not in _MODES:
        check(False, op, "mode", "be one of {}", repr(mode), list(_MODES))
    lead = x.shape[:2]
    parent, stat = matching.parent, stat_dtype(x.dtype)
    if size is not None:
        if size.shape != lead:
            check(False, op, "size", "have shape {}", tuple(size.shape), list(lead))
        if size.device != x.device:
            check(False, op, "size", "be on {}", size.device, x.device)
        size = size if size.dtype == stat else size.to(stat)
    if parent is None:
        return x, torch.ones(lead, dtype=stat, device=x.device) if size is None else size
    if parent.shape != lead:
        check(False, op, "matching", "be of {} tokens", tuple(parent.shape), list(lead))
    if parent.device != x.device:
        check(False, op, "matching", "be on {}", parent.device, x.device)
    if mode == "weighted" and size is None:
        mode = "mean"  # the same thing when every token counts once
    return call(op, x.device, x, parent, matching.num_tokens_out, size, _MODES[mode])


def match_and_merge(
    x: Tensor,
    metric: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    class_token: bool = False,
    distill_token: bool = False,
    num_prefix: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A whole step of ToMe: :func:`bipartite_soft_matching`, then :func:`merge_tokens` weighted by size.

    Args:
        x: ``[B, T, C]``.
        metric, r, class_token, distill_token, num_prefix: as in :func:`bipartite_soft_matching`.
        size: ``[B, T]``, how many original tokens each token stands for (default ones).

    Returns:
        ``(y [B, T', C], size' [B, T'], log(size') [B, T'], parent)``; parent int32 ``[B, T]``, or None where nothing
        merges. Differentiable in x and size.

    Raises:
        As the two.
    """
    op = "match_and_merge"
    _check_metric(op, metric, heads=True)
    if metric.shape[:2] != x.shape[:2]:
        check(False, op, "metric", "be of {} tokens", tuple(metric.shape), list(x.shape[:2]))
    one_call = x.device.type != "cuda" and x.dim() == 3 and (size is None or size.shape == x.shape[:2])
    options = {"class_token": class_token, "distill_token": distill_token, "num_prefix": num_prefix}
    merges = count_merges(op, x.shape[1], r, *options.values())
    if not one_call or merges == 0:
        matching = bipartite_soft_matching(metric, r, **options)
        y, size = merge_tokens(x, matching, size=size, mode="weighted")
        return y, size, size.log(), matching.parent
    check_floating(op, x=x)
    for name, tensor in (("metric", metric), ("size", x if size is None else size)):
        if tensor.device != x.device:
            check(False, op, name, "be on {}", tensor.device, x.device)
    size = None if size is None else size.to(stat_dtype(x.dtype))
    return call(op, x.device, x, metric.detach(), merges, size, class_token, distill_token, num_prefix or 0)


def unmerge_tokens(y: Tensor, matching: Matching) -> Tensor:
    """Give every original token the value of its group: ``[B, T', C] -> [B, T, C]`` (dropped tokens get zeros)."""
    check(y.dim() == 3, "unmerge_tokens", "y", "have shape [B, T', C]", tuple(y.shape))
    if matching.parent is None:
        return y
    check(
        y.shape[1] == matching.num_tokens_out,
        "unmerge_tokens",
        "y",
        "have {} tokens",
        tuple(y.shape),
        matching.num_tokens_out,
    )
    batch, tokens = matching.parent.shape
    return gather_tokens(y, _flat(matching.parent, y.shape[1])).view(batch, tokens, y.shape[2])


def merge_sources(matching: Matching, source: Tensor | None = None) -> Tensor | None:
    """Compose parent vectors: the current row of every original token, int32 ``[B, T0]`` (None: nothing merged yet)."""
    if matching.parent is None:
        return source
    if source is None:
        return matching.parent
    parent = matching.parent.gather(1, source.clamp(min=0).long())
    return torch.where(source < 0, source, parent)


# ---------------------------------------------------------------- checks and helpers


def _check_metric(op, metric, heads=False):
    check_floating(op, metric=metric)
    if metric.dim() != 3 and not (heads and metric.dim() == 4):
        check(False, op, "metric", "have shape [B, T, C]{}", tuple(metric.shape), " or [B, T, H, D]" if heads else "")


def count_merges(op, tokens, r, class_token, distill_token, num_prefix):
    """How many merge: at most half of the unprotected tokens."""
    if r < 0:
        check(False, op, "r", "be >= 0", r)
    protected = int(class_token) + int(distill_token)
    if num_prefix is not None:
        check(protected == 0, op, "num_prefix", "not be given with class_token or distill_token", num_prefix)
        check(num_prefix >= 0, op, "num_prefix", "be >= 0", num_prefix)
        protected = num_prefix
    return max(min(r, (tokens - protected) // 2), 0)


def _identity(metric):
    batch, tokens = metric.shape[:2]
    even = torch.arange((tokens + 1) // 2, dtype=torch.int32, device=metric.device).expand(batch, -1)
    return Matching(even, even[:, :0], even[:, :0], None, tokens)


def _flat(index, stride):
    """Per-image positions [B, T] -> flat rows [B * T]; -1 stays."""
    start = torch.arange(index.shape[0], device=index.device, dtype=torch.int32)[:, None] * stride
    return torch.where(index < 0, index, index + start).flatten()


def _parent(tokens, source, nearest, destination):
    """Parent vector when the output is the destinations in their order; tokens on neither side are dropped."""
    batch, count = destination.shape
    parent = destination.new_full((batch, tokens), -1)
    rows = torch.arange(count, device=parent.device, dtype=torch.int32).expand(batch, -1)
    parent.scatter_(1, destination.long(), rows)
    return parent.scatter_(1, source.long(), nearest)


# ---------------------------------------------------------------- fake


def _fake_matching(metric, r, class_token, distill_token, num_prefix):
    batch, tokens = metric.shape[:2]
    src = metric.new_empty(batch, r, dtype=torch.int32)
    unm = metric.new_empty(batch, (tokens + 1) // 2 - r, dtype=torch.int32)
    return unm, src, torch.empty_like(src), metric.new_empty(batch, tokens, dtype=torch.int32)


def _fake_nearest(metric, a_index, b_index):
    return metric.new_empty(a_index.shape, dtype=stat_dtype(metric.dtype)), metric.new_empty(
        a_index.shape, dtype=torch.int32
    )


def _fake_merge(x, parent, out_len, size, mode):
    batch, _, channels = x.shape
    return x.new_empty(batch, out_len, channels), x.new_empty(batch, out_len, dtype=stat_dtype(x.dtype))


def _fake_step(x, metric, r, size, class_token, distill_token, num_prefix):
    batch, tokens, channels = x.shape
    sizes = x.new_empty(batch, tokens - r, dtype=stat_dtype(x.dtype))
    parent = x.new_empty(batch, tokens, dtype=torch.int32)
    return x.new_empty(batch, tokens - r, channels), sizes, torch.empty_like(sizes), parent


def _fake_merge_backward(grad, x, y, parent, size, size_out, grad_size_out, mode):
    return x.new_empty(x.shape), size_out.new_empty(x.shape[:2])


# ---------------------------------------------------------------- autograd


def _setup_merge(ctx, inputs, output):
    x, parent, _, size, ctx.mode = inputs
    ctx.save_for_backward(x, parent, size, *output)


def _backward_merge(ctx, grad, grad_size_out):
    x, parent, size, y, size_out = ctx.saved_tensors
    grad_x, grad_size = torch.ops.tokenprune.merge_tokens_backward(
        grad, x, y, parent, size, size_out, grad_size_out, ctx.mode
    )
    return grad_x, None, None, None if size is None else grad_size, None


def _setup_step(ctx, inputs, output):
    y, size_out, _, parent = output
    ctx.save_for_backward(inputs[0], parent, inputs[3], y, size_out)
    ctx.mark_non_differentiable(parent)


def _backward_step(ctx, grad, grad_size_out, grad_log, _):
    x, parent, size, y, size_out = ctx.saved_tensors
    mode = _MODES["mean" if size is None else "weighted"]
    grad_size_out = grad_size_out + grad_log / size_out
    grad_x, grad_size = torch.ops.tokenprune.merge_tokens_backward(
        grad, x, y, parent, size, size_out, grad_size_out, mode
    )
    return grad_x, None, None, None if size is None else grad_size, None, None, None


def _vmap_merge(info, dims, x, parent, out_len, size, mode):
    x, parent = batched(x, dims[0], info.batch_size), batched(parent, dims[1], info.batch_size)
    size = batched(size, dims[3], info.batch_size)
    size = None if size is None else size.flatten(0, 1)
    y, size_out = torch.ops.tokenprune.merge_tokens(x.flatten(0, 1), parent.flatten(0, 1), out_len, size, mode)
    return (y.unflatten(0, x.shape[:2]), size_out.unflatten(0, x.shape[:2])), (0, 0)


def _flops_nearest(na, nb, channels, batch):
    return 2 * batch * na * nb * channels


# ---------------------------------------------------------------- reference


def _reference_nearest(metric, a_index, b_index):
    stat = stat_dtype(metric.dtype)
    unit = metric.to(stat)
    unit = unit / unit.norm(dim=-1, keepdim=True)

    def rows(index):
        return unit.gather(1, index.long()[..., None].expand(-1, -1, unit.shape[-1]))

    scores = rows(a_index) @ rows(b_index).transpose(1, 2)
    scores = scores.nan_to_num(nan=float("-inf"))
    if scores.shape[2] == 0:
        return scores.new_full(a_index.shape, float("-inf")), torch.zeros_like(a_index)
    best, nearest = scores.max(-1)
    return best, torch.where(best == float("-inf"), 0, nearest).to(torch.int32)


def _reference_matching(metric, r, class_token, distill_token, num_prefix):
    metric = metric.mean(2) if metric.dim() == 4 else metric
    batch, tokens, _ = metric.shape
    na, nb = (tokens + 1) // 2, tokens // 2
    protect_a = (num_prefix + 1) // 2 or int(class_token)
    protect_b = num_prefix // 2 or int(distill_token)
    interleave = num_prefix or (2 if distill_token else 0)
    even = torch.arange(0, tokens, 2, device=metric.device, dtype=torch.int32).expand(batch, -1)
    odd = torch.arange(1 + 2 * protect_b, tokens, 2, device=metric.device, dtype=torch.int32).expand(batch, -1)
    best, nearest = _reference_nearest(metric, even, odd)
    nearest = nearest + protect_b
    order = best[:, protect_a:].argsort(dim=1, descending=True, stable=True).to(torch.int32) + protect_a
    src, unm = order[:, :r], order[:, r:]
    first = torch.arange(protect_a, device=metric.device, dtype=torch.int32).expand(batch, -1)
    unm = torch.cat([first, unm.sort(1).values], 1) if class_token or num_prefix else torch.cat([first, unm], 1)
    dst = nearest.gather(1, src.long())
    # Output order: the interleaved front, the other unmerged tokens, the other destinations.
    front_a, front_b = (interleave + 1) // 2, interleave // 2
    a_rows = torch.arange(na - r, device=metric.device, dtype=torch.int32)
    a_rows = torch.where(a_rows < front_a, 2 * a_rows, a_rows + front_b)
    b_rows = torch.arange(nb, device=metric.device, dtype=torch.int32)
    b_rows = torch.where(b_rows < front_b, 2 * b_rows + 1, b_rows + na - r)
    parent = metric.new_empty(batch, tokens, dtype=torch.int32)
    parent[:, 1::2] = b_rows
    parent.scatter_(1, 2 * unm.long(), a_rows.expand(batch, -1))
    parent.scatter_(1, 2 * src.long(), b_rows[dst.long()])
    return unm.contiguous(), src.contiguous(), dst, parent


def _reference_merge(x, parent, out_len, size, mode):
    batch, tokens, channels = x.shape
    stat = stat_dtype(x.dtype)
    weights = x.new_ones(batch, tokens, dtype=stat) if size is None else size
    target = torch.where(parent < 0, out_len, parent).long()  # one spare row takes the dropped tokens
    size_out = weights.new_zeros(batch, out_len + 1).scatter_add(1, target, weights)[:, :out_len]
    wide = target[..., None].expand(-1, -1, channels)
    values = x.to(stat) * weights[..., None] if mode == 3 else x.to(stat)
    if mode == 2:
        y = values.new_zeros(batch, out_len + 1, channels).scatter_reduce(1, wide, values, "amax", include_self=False)
        return y[:, :out_len].to(x.dtype), size_out
    y = values.new_zeros(batch, out_len + 1, channels).scatter_add(1, wide, values)[:, :out_len]
    if mode == 1:
        count = weights.new_zeros(batch, out_len + 1).scatter_add(1, target, torch.ones_like(weights))[:, :out_len]
        y = y / count.clamp(min=1)[..., None]
    elif mode == 3:
        y = torch.where(size_out[..., None] == 0, 0, y / torch.where(size_out == 0, 1, size_out)[..., None])
    return y.to(x.dtype), size_out


def _reference_step(x, metric, r, size, class_token, distill_token, num_prefix):
    parent = _reference_matching(metric, r, class_token, distill_token, num_prefix)[3]
    mode = _MODES["mean" if size is None else "weighted"]
    y, size = _reference_merge(x, parent, x.shape[1] - r, size, mode)
    return y, size, size.log(), parent


def _composed_step(x, metric, r, size, class_token, distill_token, num_prefix):
    metric = metric.mean(2) if metric.dim() == 4 else metric
    parent = torch.ops.tokenprune.bipartite_soft_matching(metric, r, class_token, distill_token, num_prefix)[3]
    mode = _MODES["mean" if size is None else "weighted"]
    y, size = torch.ops.tokenprune.merge_tokens(x, parent, x.shape[1] - r, size, mode)
    return y, size, size.log(), parent


def _flops_step(x, metric, *args, out_val=None, **kwargs):
    batch, tokens = x.shape[:2]
    return _flops_nearest((tokens + 1) // 2, tokens // 2, metric.shape[-1], batch)


register(
    "bipartite_soft_matching",
    fake=_fake_matching,
    reference=_reference_matching,
    flops=lambda metric, *args, out_val=None, **kwargs: _flops_nearest(
        (metric.shape[1] + 1) // 2, metric.shape[1] // 2, metric.shape[-1], metric.shape[0]
    ),
)
register(
    "nearest_tokens",
    fake=_fake_nearest,
    reference=_reference_nearest,
    flops=lambda metric, a, b, *, out_val=None, **kwargs: _flops_nearest(
        a.shape[1], b.shape[1], metric.shape[2], metric.shape[0]
    ),
)
register(
    "merge_tokens",
    fake=_fake_merge,
    reference=_reference_merge,
    setup_context=_setup_merge,
    backward=_backward_merge,
    vmap=_vmap_merge,
)
register("merge_tokens_backward", fake=_fake_merge_backward)
register(
    "match_and_merge",
    fake=_fake_step,
    reference=_reference_step,
    setup_context=_setup_step,
    backward=_backward_step,
    flops=_flops_step,
    composed=_composed_step,
)
