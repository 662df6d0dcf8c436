# SPDX-License-Identifier: Apache-2.0
"""Attention over kept tokens: ragged batches, rows addressed through an index, per-key bias, scores from the same pass.

Proportional attention (log of the token size as key bias) is from ToMe (arXiv 2210.09461, eq. 1); the CLS row scores
tokens in EViT (arXiv 2202.07800); the key policy is from DynamicViT (arXiv 2106.02034, eq. 11).
"""

import torch
from torch import Tensor

from .._library import has_kernels
from ._register import autocast_cast, call, check, check_floating, check_index, default_scale, register, stat_dtype
from .tokens import TokenIndex

__all__ = ["attention_scores", "policy_attention", "sparse_attention", "sparse_attention_qkvpacked"]

_KINDS = {"cls": 0, "mean": 1}
_MOST_CUDA_DIM = 128  # kMostDim of csrc/attention/kernel_launch.cuh; docs/kernels.md says why


# ---------------------------------------------------------------- public functions


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    index: TokenIndex | Tensor | None = None,
    index_k: TokenIndex | Tensor | None = None,
    want_cls: bool = False,
) -> tuple[Tensor, ...]:
    """Softmax attention within each sequence of a packed batch.

    Args:
        q: ``[Tq, H, D]``; k, v: ``[Tk, H, D]``. Row and head strides are free (views of a packed qkv are not copied).
            On CUDA D is at most 128.
        cu_seqlens_q: int32 ``[B + 1]``, starts of the sequences; cu_seqlens_k: the same for keys (default: as q).
        max_seqlen_q: upper bound of the sequence lengths; max_seqlen_k likewise.
        key_bias: ``[Tk]``, added to the logits of every query (log size; ``-inf`` hides a key). float32 (float64 for
            float64 values).
        scale: factor of the logits, default ``D ** -0.5``.
        index: q, k and v are un-gathered rows, and sequence position ``t`` is row ``index[t]`` of them. A row may be
            taken several times; -1 is a row of zeros.
        index_k: the same for k and v alone (default: as ``index``).
        want_cls: also return the probabilities of each sequence's first query.

    Returns:
        ``(out [Tq, H, D], lse [H, Tq])`` or ``(out, lse, cls [H, Tk])``. A query without keys gives ``out = 0``,
        ``lse = -inf``. Differentiable in q, k, v and key_bias, also through lse and cls; deterministic.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device.
        RuntimeError: cu_seqlens or index contents wrong (CPU; on CUDA under TOKENPRUNE_VALIDATE=1).
    """
    op = "sparse_attention"
    q, k, v = autocast_cast(q, k, v)
    args = _ragged_arguments(
        op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_bias, scale, index, index_k
    )
    out, lse, cls = call(op, q.device, q, k, v, *args, want_cls)
    return (out, lse, cls) if want_cls else (out, lse)


def sparse_attention_qkvpacked(
    qkv: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    index: TokenIndex | Tensor | None = None,
    want_cls: bool = False,
) -> tuple[Tensor, ...]:
    """:func:`sparse_attention` straight from a packed projection ``qkv [T, 3, H, D]``, without a copy."""
    check(
        qkv.dim() == 4 and qkv.shape[1] == 3,
        "sparse_attention_qkvpacked",
        "qkv",
        "have shape [T, 3, H, D]",
        tuple(qkv.shape),
    )
    q, k, v = qkv.unbind(1)
    return sparse_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_q=max_seqlen,
        key_bias=key_bias,
        scale=scale,
        index=index,
        want_cls=want_cls,
    )


def attention_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kind: str = "cls",
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    index: TokenIndex | Tensor | None = None,
) -> Tensor:
    """How much attention each key receives, recomputed from the log-sum-exp of :func:`sparse_attention`.

    Args:
        kind: ``"cls"``: probabilities of the first query of the sequence; ``"mean"``: mean over its queries.
        lse: ``[H, Tq]``. Everything else as in :func:`sparse_attention`.

    Returns:
        ``[H, Tk]`` float32 (float64 for float64 values); differentiable in q, k, lse and key_bias.
    """
    op = "attention_scores"
    check(kind in _KINDS, op, "kind", "be 'cls' or 'mean'", repr(kind))
    q, k = autocast_cast(q, k)
    args = _ragged_arguments(
        op, q, k, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_bias, scale, index
    )
    count = q.shape[0] if args[5] is None else args[5].shape[0]
    check(tuple(lse.shape) == (q.shape[1], count), op, "lse", "have shape {}", tuple(lse.shape), [q.shape[1], count])
    check(lse.dtype == stat_dtype(q.dtype), op, "lse", "be {}", lse.dtype, stat_dtype(q.dtype), error=TypeError)
    check(lse.device == q.device, op, "lse", "be on {}", lse.device, q.device)
    return call(op, q.device, q, k, lse, *args, _KINDS[kind])


def policy_attention(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, eps: float = 1e-6, *, scale: float | None = None
) -> Tensor:
    """Attention in which ``policy`` says which keys are visible; every token always sees itself.

    ``A_ij = (E_ij P_ij + eps / N) / (sum_j E_ij P_ij + eps)`` with ``E = exp(logits - row max over all keys)``,
    ``P_ij = policy_j`` for ``i != j`` and 1 on the diagonal. Used in training, where dropped tokens must keep gradients.

    Args:
        q, k, v: ``[B, N, H, D]``, any strides. On CUDA D is at most 128.
        policy: ``[B, N]``, 0 or 1 (any value is legal).
        eps: 1e-6 in training, 0 for exact masking.
        scale: factor of the logits, default ``D ** -0.5``.

    Returns:
        ``[B, N, H, D]``; differentiable in q, k, v and policy.
    """
    op = "policy_attention"
    q, k, v = autocast_cast(q, k, v)
    check_floating(op, q=q, k=k, v=v)
    check(q.dim() == 4, op, "q", "have shape [B, N, H, D]", tuple(q.shape))
    for name, tensor in (("k", k), ("v", v)):
        check(tensor.shape == q.shape, op, name, "have the shape of q {}", tuple(tensor.shape), tuple(q.shape))
    _check_width(op, q)
    check(policy.shape == q.shape[:2], op, "policy", "have shape {}", tuple(policy.shape), list(q.shape[:2]))
    check(policy.device == q.device, op, "policy", "be on {}", policy.device, q.device)
    check(eps >= 0, op, "eps", "be >= 0", eps)
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return call(op, q.device, q, k, v, policy.to(stat_dtype(q.dtype)), eps, scale)[0]


# ---------------------------------------------------------------- checks


def _check_width(op, q):
    """The CUDA kernels keep a head's sums in registers, so its width has a limit there (the reference has none)."""
    if q.shape[-1] > _MOST_CUDA_DIM and q.device.type == "cuda" and has_kernels("cuda"):
        check(False, op, "the head dimension on CUDA", "be <= {}", q.shape[-1], _MOST_CUDA_DIM)


def _ragged_arguments(op, q, k, v, cu_q, cu_k, max_q, max_k, key_bias, scale, index, index_k=None):
    """The common tail (cu_seqlens_q .. scale) of every ragged op, checked."""
    check_floating(op, q=q, k=k, v=v)
    if q.dim() != 3:
        check(False, op, "q", "have shape [Tq, H, D]", tuple(q.shape))
    if k.dim() != 3 or k.shape[1:] != q.shape[1:]:
        check(False, op, "k", "have shape [Tk, {}, {}]", tuple(k.shape), *q.shape[1:])
    if v.shape != k.shape:
        check(False, op, "v", "have the shape of k {}", tuple(v.shape), tuple(k.shape))
    _check_width(op, q)
    cu_q = check_index(op, "cu_seqlens_q", cu_q, q.device)
    cu_k = cu_q if cu_k is None else check_index(op, "cu_seqlens_k", cu_k, q.device)
    if cu_q.shape[0] < 1:
        check(False, op, "cu_seqlens_q", "have at least one entry", tuple(cu_q.shape))
    if cu_k.shape != cu_q.shape:
        check(False, op, "cu_seqlens_k", "have shape {}", tuple(cu_k.shape), tuple(cu_q.shape))
    max_k = max_q if max_k is None else max_k
    check(max_q >= 0, op, "max_seqlen_q", "be >= 0", max_q)
    check(max_k >= 0, op, "max_seqlen_k", "be >= 0", max_k)
    rows = _row_numbers(op, "index", index, q)
    rows_k = rows if index_k is None else _row_numbers(op, "index_k", index_k, q)
    if key_bias is not None:
        count = k.shape[0] if rows_k is None else rows_k.shape[0]
        check(tuple(key_bias.shape) == (count,), op, "key_bias", "have shape [{}]", tuple(key_bias.shape), count)
        check(key_bias.device == q.device, op, "key_bias", "be on {}", key_bias.device, q.device)
        key_bias = key_bias.to(stat_dtype(q.dtype))
    scale = default_scale(q.shape[-1]) if scale is None else scale
    return cu_q, cu_k, max_q, max_k, key_bias, rows, rows_k, float(scale)


def _row_numbers(op, name, index, like):
    if index is None:
        return None
    return check_index(op, name, index.indices if isinstance(index, TokenIndex) else index, like.device)


def _counts(q, k, q_index, kv_index):
    return (q if q_index is None else q_index).shape[0], (k if kv_index is None else kv_index).shape[0]


# ---------------------------------------------------------------- fake


def _fake_attention(q, k, v, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale, want_cls):
    tq, tk = _counts(q, k, q_index, kv_index)
    stat = stat_dtype(q.dtype)
    heads = q.shape[1]
    return (
        q.new_empty(tq, heads, q.shape[2]),
        q.new_empty(heads, tq, dtype=stat),
        q.new_empty(heads, tk if want_cls else 0, dtype=stat),
    )


def _fake_attention_backward(
    grad_out, q, k, v, out, lse, grad_lse, grad_scores, kind, cu_q, cu_k, max_q, max_k, bias, q_index, kv_index, scale
):
    tq, tk = _counts(q, k, q_index, kv_index)
    heads, dim = q.shape[1:]
    grad_k = q.new_empty(tk, heads, dim)
    return (
        q.new_empty(tq, heads, dim),
        grad_k,
        torch.empty_like(grad_k),
        q.new_empty(heads, tk, dtype=stat_dtype(q.dtype)),
    )


def _fake_scores(q, k, lse, cu_q, cu_k, max_q, max_k, key_bias, q_index, kv_index, scale, kind):
    return lse.new_empty(q.shape[1], _counts(q, k, q_index, kv_index)[1])


def _fake_scores_grad_lse(grad, q, k, lse, *tail):
    return lse.new_empty(lse.shape)


def _fake_policy(q, k, v, policy, eps, scale):
    batch, tokens, heads, _ = q.shape
    row = policy.new_empty(batch, heads, tokens)
    return q.new_empty(q.shape), row, torch.empty_like(row)


def _fake_policy_backward(grad_out, q, k, v, policy, out, row_max, row_sum, eps, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape), row_max.new_empty(row_max.shape)


# ---------------------------------------------------------------- autograd


def _to_rows(grads, x, index):
    """Gradients of packed positions [T, H, D] -> gradients of the rows of x."""
    if index is None:
        return grads
    flat = torch.ops.tokenprune.gather_tokens_backward(grads.flatten(1), index, x.shape[0])
    return flat.view(x.shape[0], *x.shape[1:])


def _setup_attention(ctx, inputs, output):
    q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, key_bias, q_index, kv_index, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k, key_bias, q_index, kv_index, output[0], output[1])
    ctx.set_materialize_grads(False)


def _backward_attention(ctx, grad_out, grad_lse, grad_cls):
    q, k, v, cu_q, cu_k, key_bias, q_index, kv_index, out, lse = ctx.saved_tensors
    tail = (cu_q, cu_k, ctx.max_q, ctx.max_k, key_bias, q_index, kv_index, ctx.scale)
    if grad_cls is not None and grad_cls.numel() == 0:
        grad_cls = None
    if grad_out is None and grad_lse is None and grad_cls is None:
        return (None,) * 12
    if grad_cls is not None:
        # The CLS row is exp(logits - lse): its own path, plus the one through lse.
        through_lse = torch.ops.tokenprune.attention_scores_grad_lse(grad_cls, q, k, lse, *tail, 0)
        grad_lse = through_lse if grad_lse is None else grad_lse + through_lse
    out = None if grad_out is None else out
    grad_q, grad_k, grad_v, grad_bias = torch.ops.tokenprune.sparse_attention_backward(
        grad_out, q, k, v, out, lse, grad_lse, grad_cls, 0, *tail
    )
    grad_bias = grad_bias.sum(0) if ctx.needs_input_grad[7] else None
    return (
        _to_rows(grad_q, q, q_index),
        _to_rows(grad_k, k, kv_index),
        _to_rows(grad_v, v, kv_index),
        *(None,) * 4,
        grad_bias,
        *(None,) * 4,
    )


def _setup_scores(ctx, inputs, output):
    q, k, lse, cu_q, cu_k, ctx.max_q, ctx.max_k, key_bias, q_index, kv_index, ctx.scale, ctx.kind = inputs
    ctx.save_for_backward(q, k, lse, cu_q, cu_k, key_bias, q_index, kv_index)


def _backward_scores(ctx, grad):
    q, k, lse, cu_q, cu_k, key_bias, q_index, kv_index = ctx.saved_tensors
    tail = (cu_q, cu_k, ctx.max_q, ctx.max_k, key_bias, q_index, kv_index, ctx.scale)
    grad_q, grad_k, _, grad_bias = torch.ops.tokenprune.sparse_attention_backward(
        None, q, k, k, None, lse, None, grad, ctx.kind, *tail
    )
    grad_lse = torch.ops.tokenprune.attention_scores_grad_lse(grad, q, k, lse, *tail, ctx.kind)
    grad_bias = grad_bias.sum(0) if ctx.needs_input_grad[7] else None
    return _to_rows(grad_q, q, q_index), _to_rows(grad_k, k, kv_index), grad_lse, *(None,) * 4, grad_bias, *(None,) * 4


def _setup_policy(ctx, inputs, output):
    q, k, v, policy, ctx.eps, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, policy, *output)
    ctx.set_materialize_grads(False)


def _backward_policy(ctx, grad_out, grad_max, grad_sum):
    if grad_out is None:
        return (None,) * 6
    grads = torch.ops.tokenprune.policy_attention_backward(grad_out, *ctx.saved_tensors, ctx.eps, ctx.scale)
    return grads[0], grads[1], grads[2], grads[3].sum(1), None, None


# ---------------------------------------------------------------- flop formulas


def _pairs(q, k, cu_q, cu_k, max_k, q_index, kv_index):
    """Query-key pairs: exact where the lengths can be read, otherwise the bound of the padded batch."""
    if cu_q.device.type == "cpu" and not isinstance(cu_q, torch._subclasses.FakeTensor):
        return int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return _counts(q, k, q_index, kv_index)[0] * max_k


def _flops_attention(
    q, k, v, cu_q, cu_k, max_q, max_k, bias, q_index, kv_index, scale, want_cls, *, out_val=None, **kwargs
):
    return 4 * q.shape[1] * q.shape[2] * _pairs(q, k, cu_q, cu_k, max_k, q_index, kv_index)


def _flops_attention_backward(
    grad_out,
    q,
    k,
    v,
    out,
    lse,
    grad_lse,
    grad_scores,
    kind,
    cu_q,
    cu_k,
    max_q,
    max_k,
    bias,
    q_index,
    kv_index,
    scale,
    *,
    out_val=None,
    **kwargs,
):
    products = 5 if grad_out is not None else 3
    return 2 * products * q.shape[1] * q.shape[2] * _pairs(q, k, cu_q, cu_k, max_k, q_index, kv_index)


def _flops_scores(q, k, lse, cu_q, cu_k, max_q, max_k, bias, q_index, kv_index, scale, kind, *, out_val=None, **kwargs):
    keys = _counts(q, k, q_index, kv_index)[1]
    pairs = keys if kind == 0 else _pairs(q, k, cu_q, cu_k, max_k, q_index, kv_index)
    return 2 * q.shape[1] * q.shape[2] * pairs


def _flops_policy(q, k, v, policy, eps, scale, *, out_val=None, **kwargs):
    batch, tokens, heads, dim = q.shape
    return 4 * batch * heads * tokens * tokens * dim


def _flops_policy_backward(grad_out, q, k, v, policy, out, row_max, row_sum, eps, scale, *, out_val=None, **kwargs):
    batch, tokens, heads, dim = q.shape
    return 10 * batch * heads * tokens * tokens * dim


# ---------------------------------------------------------------- reference


def _sequences(q, k, cu_q, cu_k, q_index, kv_index):
    """Positions and rows of every sequence: (q positions, q rows, k positions, k rows)."""
    for qs, qe, ks, ke in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist()):
        qp, kp = torch.arange(qs, qe, device=q.device), torch.arange(ks, ke, device=q.device)
        yield qp, (qp if q_index is None else q_index[qp].long()), kp, (kp if kv_index is None else kv_index[kp].long())


def _logits(q, k, bias, qr, kp, kr, scale):
    stat = stat_dtype(q.dtype)
    logits = torch.einsum("qhd,khd->hqk", q[qr].to(stat), k[kr].to(stat)) * scale
    return logits if bias is None else logits + bias[kp]


def _probabilities(logits, lse):
    """exp(logits - lse), zero (with zero gradients) where every key is hidden."""
    hidden = lse == float("-inf")
    return torch.where(hidden, 0, (logits - torch.where(hidden, 0, lse)).exp())


def _reference_attention(q, k, v, cu_q, cu_k, max_q, max_k, bias, q_index, kv_index, scale, want_cls):
    tq, tk = _counts(q, k, q_index, kv_index)
    heads, dim = q.shape[1:]
    stat = stat_dtype(q.dtype)
    out = q.new_zeros(tq, heads, dim)
    lse = q.new_full((heads, tq), float("-inf"), dtype=stat)
    cls = q.new_zeros(heads, tk if want_cls else 0, dtype=stat)
    for qp, qr, kp, kr in _sequences(q, k, cu_q, cu_k, q_index, kv_index):
        if len(qp) == 0 or len(kp) == 0:
            continue
        logits = _logits(q, k, bias, qr, kp, kr, scale)
        hidden = (logits == float("-inf")).all(-1)  # logsumexp has no gradient there
        row = torch.where(hidden, float("-inf"), torch.where(hidden[..., None], 0, logits).logsumexp(-1))
        probabilities = _probabilities(logits, row[..., None])
        lse = lse.index_copy(1, qp, row)
        out = out.index_copy(0, qp, torch.einsum("hqk,khd->qhd", probabilities, v[kr].to(stat)).to(q.dtype))
        if want_cls:
            cls = cls.index_copy(1, kp, probabilities[:, 0])
    return out, lse, cls


def _reference_scores(q, k, lse, cu_q, cu_k, max_q, max_k, bias, q_index, kv_index, scale, kind):
    scores = lse.new_zeros(q.shape[1], _counts(q, k, q_index, kv_index)[1])
    for qp, qr, kp, kr in _sequences(q, k, cu_q, cu_k, q_index, kv_index):
        if len(qp) == 0 or len(kp) == 0:
            continue
        row = lse[:, qp][..., None]
        probabilities = _probabilities(_logits(q, k, bias, qr, kp, kr, scale), row)
        scores = scores.index_copy(1, kp, probabilities[:, 0] if kind == 0 else probabilities.mean(1))
    return scores


def _reference_policy(q, k, v, policy, eps, scale):
    stat = stat_dtype(q.dtype)
    tokens = q.shape[1]
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(stat), k.to(stat)) * scale
    row_max = logits.amax(-1, keepdim=True) if tokens else logits.new_zeros(*logits.shape[:3], 1)
    eye = torch.eye(tokens, dtype=stat, device=q.device)
    visible = policy[:, None, None, :] * (1 - eye) + eye
    weights = (logits - row_max).exp() * visible
    row_sum = weights.sum(-1, keepdim=True)
    total = row_sum + eps
    attention = (weights + eps / max(tokens, 1)) / torch.where(total == 0, 1, total)
    out = torch.einsum("bhqk,bkhd->bqhd", attention, v.to(stat)).to(q.dtype)
    return out, row_max.squeeze(-1), row_sum.squeeze(-1)


register(
    "sparse_attention",
    fake=_fake_attention,
    reference=_reference_attention,
    setup_context=_setup_attention,
    backward=_backward_attention,
    flops=_flops_attention,
)
register("sparse_attention_backward", fake=_fake_attention_backward, flops=_flops_attention_backward)
register(
    "attention_scores",
    fake=_fake_scores,
    reference=_reference_scores,
    setup_context=_setup_scores,
    backward=_backward_scores,
    flops=_flops_scores,
)
register("attention_scores_grad_lse", fake=_fake_scores_grad_lse)
register(
    "policy_attention",
    fake=_fake_policy,
    reference=_reference_policy,
    setup_context=_setup_policy,
    backward=_backward_policy,
    flops=_flops_policy,
)
register("policy_attention_backward", fake=_fake_policy_backward, flops=_flops_policy_backward)
