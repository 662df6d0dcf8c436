# SPDX-License-Identifier: Apache-2.0
"""Whole attention steps of ACT, SMYRF and ATS at ViT-L/16 on 512 pixels: from q, k, v to the mixed values.

All random draws are given. Decisions (groups, orders, samples) may flip by round-off between ways to compute them, so
results are verified against float64 under our own decisions, and the opponents by the share of rows that agree.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.reducers.smyrf import smyrf_hashes, smyrf_order
from torch import Tensor

from benchmarks.core import FLOOR, Case, Context, Peer, Prepared, Target

TOKENS, HEADS, DIM = 1025, 16, 64
EAGER, COMPILED = "eager formulation", "torch.compile of it"


def rows_of(t: Tensor) -> Tensor:
    """``[B, N, H, D] -> [B * H, N, D]``."""
    return t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3])


def tokens_of(rows: Tensor, heads: int = HEADS) -> Tensor:
    """Inverse of :func:`rows_of`, heads concatenated: ``[B, N, H * D]``."""
    return rows.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)


def act_groups(q: Tensor, projection: Tensor, offset: Tensor) -> Tensor:
    """Group of every query from arXiv 2011.09315 in eager PyTorch."""
    h = ((q.float() @ projection[0] + offset[0, :, 0]) / 8).floor().long()
    h = h - h.amin(1, keepdim=True)
    codes = (h << torch.arange(0, 2 * h.shape[-1], 2, device=q.device)).sum(-1)
    ordered, order = codes.sort(1)
    rank = torch.zeros_like(codes)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    return torch.empty_like(rank).scatter_(1, order, rank)


def act_step(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, offset: Tensor) -> Tensor:
    """ACT in eager PyTorch: q, k, v ``[B, N, H, D] -> [B, N, H * D]``; the number of groups is read back."""
    q, k, v = rows_of(q * DIM**-0.5), rows_of(k), rows_of(v)
    return tokens_of(act_rows(q, k, v, act_groups(q, projection, offset)))


def act_rows(q, k, v, groups):
    """Group means attend, members receive: ``[R, N, D]``."""
    wide = groups[..., None].expand_as(q)
    count = int(groups.max()) + 1
    members = torch.zeros_like(groups[:, :count]).scatter_add_(1, groups, torch.ones_like(groups))
    centers = torch.zeros_like(q[:, :count]).scatter_add_(1, wide, q) / members.clamp(min=1)[..., None].to(q.dtype)
    return ((centers @ k.transpose(1, 2)).softmax(-1) @ v).gather(1, wide)


def smyrf_orders(q, k, alpha, beta):
    """Orders ``[rounds, R, N]`` from arXiv 2010.05315 in eager PyTorch."""
    q, k = q.float(), k.float()
    q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    total = q_norm.amax(1, keepdim=True) ** 2 + k_norm.amax(1, keepdim=True) ** 2
    none = torch.zeros_like(q_norm)
    q = torch.cat([q, none, (total - q_norm**2).sqrt()], -1)
    k = torch.cat([k, (total - k_norm**2).sqrt(), none], -1)
    return [(t @ alpha + beta).permute(2, 0, 1).argsort(-1) for t in (q, k)]


def smyrf_step(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, size: int) -> Tensor:
    """SMYRF in eager PyTorch, as published (one list of clusters): q, k, v ``[B, N, H, D] -> [B, N, H * D]``."""
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    return tokens_of(smyrf_rows(q, k, v, *smyrf_orders(q, k, alpha, beta), size))


def smyrf_rows(q, k, v, q_order, k_order, size):
    """Clusters of ``size`` attend, rounds are merged by their log-sum-exp: ``[R, N, D]``."""
    start = torch.arange(q.shape[0], device=q.device)[:, None] * q.shape[1]
    q_rows, k_rows = (q_order + start).flatten(), (k_order + start).flatten()
    q, k, v = (t.flatten(0, 1)[rows].unflatten(0, (-1, size)) for t, rows in ((q, q_rows), (k, k_rows), (v, k_rows)))
    logits = q @ k.transpose(1, 2) * DIM**-0.5
    lse = logits.logsumexp(-1, keepdim=True)
    out = (logits - lse).exp() @ v
    back = q_order.argsort(-1)
    lse = lse.view(q_order.shape).gather(2, back)
    out = out.view(*q_order.shape, -1).gather(2, back[..., None].expand(-1, -1, -1, out.shape[-1]))
    return (out * lse.softmax(0)[..., None]).sum(0)


def ats_step(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """ATS in eager PyTorch from arXiv 2111.15667 and its published behaviour; every token is real.

    Args:
        q, k, v: ``[B, N, H, D]``.

    Returns:
        ``(mixed [B, M, H * D], rows int64 [B, M])``: class token, then kept tokens, -1 = padding (zero rows).
    """
    batch, tokens = q.shape[:2]
    policy = torch.ones(batch, tokens, 1, 1, device=q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q * DIM**-0.5 @ k.transpose(2, 3)).float()
    eye = torch.eye(tokens, device=q.device)
    visible = policy.view(batch, 1, 1, tokens) * (1 - eye) + eye
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * visible
    weights = (weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps)
    scores = weights[:, :, 0, 1:].sum(1) * v.transpose(1, 2).flatten(2).float().norm(dim=-1)[:, 1:]
    ordered, order = (scores / scores.sum(1, keepdim=True)).sort(1)
    cdf = ordered.cumsum(1)
    cdf = (cdf - cdf[:, :1]) / (cdf[:, -1:] - cdf[:, :1])
    points = tokens - 1
    start = (cdf + (cdf == 0) * 1e8).amin(1, keepdim=True)
    k_ = torch.arange(points, device=q.device)
    grid = start + (torch.linspace(0, 1, points, device=q.device) * (points - 1) - start * k_) / (points - 1)
    pick = (grid[..., None] - cdf[:, None]).abs().argmin(-1)
    kept = torch.zeros_like(cdf, dtype=torch.bool).scatter_(1, pick, True)
    count = int(kept.sum(1).max())
    place = torch.where(kept, torch.arange(points, device=q.device), points).sort(1).values[:, :count]
    rows = torch.nn.functional.pad(order, (0, 1), value=-2).gather(1, place) + 1
    rows = torch.nn.functional.pad(rows, (1, 0))
    chosen = weights.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, HEADS, -1, tokens))
    chosen = chosen * (rows >= 0)[:, None, :, None]
    return (chosen.to(v.dtype) @ v).transpose(1, 2).flatten(2), rows


class _Bare:
    """An attention branch without its linear layers: the reducers' step alone."""

    logit_scale, head_dim = DIM**-0.5, DIM

    def __init__(self, q, k, v):
        self._qkv = q, k, v

    def check_own_attention(self):
        """Nothing stands in the way here."""

    def add_sampled(self, *arguments):
        """Not in one call."""

    add_grouped = add_sampled

    def start(self, x, state):
        return *self._qkv, x

    def finish(self, x, mixed, z, state):
        return mixed


def _step(name: str, qkv: tuple[Tensor, ...], carry: dict[str, Tensor], **options) -> Callable:
    """``() -> (tokens, state)``: the reducer's attention, the residual being zeros."""
    reducer = reducers.create(name, depth=1, layers=[0], **options)
    x = torch.zeros(*qkv[0].shape[:2], HEADS * DIM, dtype=qkv[0].dtype, device=qkv[0].device)
    branch = _Bare(*qkv)
    x, state = reducer.begin(x, TokenState(num_prefix=1, carry=carry))

    @torch.no_grad()
    def run():
        return reducer.attention(x, state, 0, branch)

    return run


def _inputs(context: Context, dtype: torch.dtype, batch: int, spread: float) -> SimpleNamespace:
    """Queries of a head scatter around their mean, ``spread`` far: that sets how many of them hash alike."""
    generator = torch.Generator().manual_seed(TOKENS)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    qkv = draw(batch, TOKENS, 3, HEADS, DIM)
    qkv[:, :, 0] = 4 * draw(batch, 1, HEADS, DIM) + spread * qkv[:, :, 0]
    uniform = torch.rand(64, generator=generator)
    q, k, v = qkv.to(context.device, dtype).unbind(2)
    return SimpleNamespace(
        q=q, k=k, v=v, normal=draw(DIM + 2, 64).to(context.device), uniform=uniform.to(context.device)
    )


def _agree(name, ours, theirs, dtype, share=0.95):
    """Rows that agree within a coarse tolerance; a flipped decision changes single rows."""
    limit = 100 * FLOOR[dtype] * ours.abs().max()
    same = ((ours - theirs).abs().amax(-1) <= limit).float().mean().item()
    if same < share:
        raise RuntimeError(f"{name}: only {same:.1%} of the rows agree with {EAGER}")


def _prepared(context, dtype, ours, eager, reference, flops, like) -> Prepared:
    def verify(output):
        want = reference()
        error = ((output[0].double() - want).abs().max() / want.abs().max()).item()
        return None if error < 4 * FLOOR[dtype] else f"off by {error:.1e} from float64 under the same decisions"

    return Prepared(
        ours=ours,
        peers={EAGER: Peer(eager), COMPILED: Peer(torch.compile(eager, dynamic=False), slow=True)},
        flops=flops,
        bytes=4 * like.numel() * like.element_size(),
        targets=(Target(EAGER, 2.0 if context.device.type == "cpu" else None),),
        verify=verify,
    )


def _act(context: Context, dtype: torch.dtype, hashes: int, batch: int) -> Prepared:
    # Groups as the published GFLOPs imply them: 425 and 785 in the fullest head.
    data = _inputs(context, dtype, batch, {16: 1.47, 32: 0.7}[hashes])
    projection, offset = data.normal[None, :DIM, :hashes], data.uniform[None, :hashes, None]
    carry = {"act.q_projection.0": projection, "act.q_offset.0": offset}
    ours = _step("act", (data.q, data.k, data.v), carry, q_hashes=hashes)
    groups = ours()[1].carry["act.q_groups.0"].flatten(0, 1).long()

    def eager():
        return act_step(data.q, data.k, data.v, projection, offset)

    def reference():
        q, k, v = (rows_of(t).double() for t in (data.q, data.k, data.v))
        return tokens_of(act_rows(q * DIM**-0.5, k, v, groups))

    _agree("act", ours()[0], eager(), dtype)
    pairs = int((groups.amax(1) + 1).sum()) * TOKENS
    return _prepared(context, dtype, ours, eager, reference, 4 * pairs * DIM, data.q)


def _smyrf(context: Context, dtype: torch.dtype, size: int, batch: int, rounds: int) -> Prepared:
    data = _inputs(context, dtype, batch, 1.0)
    alpha, beta = data.normal[:, :rounds].contiguous(), data.uniform[None, :rounds]
    carry = {"smyrf.alpha.0": alpha, "smyrf.beta.0": beta}
    ours = _step("smyrf", (data.q, data.k, data.v), carry, rounds=rounds, cluster_size=size, per_row=False)

    def eager():
        return smyrf_step(data.q, data.k, data.v, alpha, beta, size)

    def reference():
        q, k, v = (rows_of(t) for t in (data.q, data.k, data.v))
        orders = (smyrf_order(hashes) for hashes in smyrf_hashes(q, k, alpha, beta))
        return tokens_of(smyrf_rows(q.double(), k.double(), v.double(), *orders, size))

    _agree("smyrf", ours()[0], eager(), dtype)
    flops = 4 * rounds * batch * HEADS * TOKENS * size * DIM
    return _prepared(context, dtype, ours, eager, reference, flops, data.q)


def _ats(context: Context, dtype: torch.dtype, batch: int, per_image: bool) -> Prepared:
    data = _inputs(context, dtype, batch, 1.0)
    data.q = data.q * 0.74  # about as many tokens stay as the published GFLOPs imply for layer 16: 415
    ours = _step("ats", (data.q, data.k, data.v), {}, per_image=per_image, residual="input")
    found = ours()[1].carry["ats.rows.0"].long()

    def reference():
        q, k, v = (t.double().transpose(1, 2) for t in (data.q, data.k, data.v))
        out = ((q * DIM**-0.5 @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out.gather(1, found.clamp(min=0)[..., None].expand(-1, -1, out.shape[-1])) * (found >= 0)[..., None]

    def eager():
        return ats_step(data.q, data.k, data.v)[0]

    theirs = ats_step(data.q, data.k, data.v)[1]
    mine, other = ({(b, row) for b, rows in enumerate(r.tolist()) for row in rows if row >= 0} for r in (found, theirs))
    wanted = 0.98 if dtype == torch.float32 else 0.6  # eager rounds the logits to half precision before it scores
    if len(mine & other) < wanted * max(len(mine), len(other)):
        raise RuntimeError(f"ats: of {len(mine)} tokens only {len(mine & other)} are kept by {EAGER}, too")
    pairs = batch * HEADS * TOKENS * (TOKENS if not per_image else found.shape[1])

    return _prepared(context, dtype, ours, eager, reference, 4 * pairs * DIM, data.q)


def cases(context: Context):
    """Cases of the methods."""
    for dtype in context.dtypes:
        for batch in (1,) if context.quick else (1, 8):
            name = f"vit_l_512_n{TOKENS}_h{HEADS}_b{batch}"
            for hashes in (16, 32):
                yield Case(f"act_{name}_q{hashes}", dtype, lambda d=dtype, b=batch, n=hashes: _act(context, d, n, b))
            # The eager formulation of a batch of 8 gathers 1 GB each of queries, keys and values per 32 rounds.
            rounds, sizes = (32, (16, 64)) if batch == 1 else (4, (32,))
            for n in sizes:
                text = f"smyrf_{name}_c{n}_r{rounds}"
                yield Case(text, dtype, lambda d=dtype, b=batch, n=n, r=rounds: _smyrf(context, d, n, b, r))
            for alone in (False, True):
                mode = "per_image" if alone else "published"
                yield Case(f"ats_{name}_{mode}", dtype, lambda d=dtype, b=batch, a=alone: _ats(context, d, b, a))
