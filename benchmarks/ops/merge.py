# SPDX-License-Identifier: Apache-2.0
"""One ToMe step: match by cosine similarity, merge weighted by size (without the mean over heads)."""

import torch
import torch.nn.functional as F
from tokenprune_ext import ops
from torch import Tensor

from benchmarks.core import Case, Context, Peer, Prepared, Target


def tome_step(metric: Tensor, x: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """ToMe in eager PyTorch, written from the paper (arXiv 2210.09461, section 3), with a class token.

    Args:
        metric: ``[B, T, D]``; x: ``[B, T, C]``; size: ``[B, T, 1]``.
        r: tokens to remove.

    Returns:
        ``(y [B, T - r, C], size [B, T - r, 1])``: unmerged even tokens in order, then the odd ones.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = float("-inf")
    best, target = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    source, rest = order[:, :r], order[:, r:].sort(1).values
    target = target[..., None].gather(1, source)

    def merge(values):
        even, odd = values[:, ::2], values[:, 1::2]
        width = values.shape[-1]
        kept = even.gather(1, rest.expand(-1, -1, width))
        merged = odd.scatter_reduce(
            1, target.expand(-1, -1, width), even.gather(1, source.expand(-1, -1, width)), "sum"
        )
        return torch.cat((kept, merged), 1)

    total = merge(size)
    return merge(x * size) / total, total


def _verify(metric: Tensor, x: Tensor, size: Tensor, r: int, dtype: torch.dtype):
    """Ties and round-off may change single pairs, so check what defines a right answer, in float64.

    The merged pairs must be of maximal similarity (up to round-off), and every output must be the weighted
    mean that the reported parents imply.
    """
    metric, x, size = metric.double().cpu(), x.double().cpu(), size.double().cpu()
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    scores[:, 0] = float("-inf")
    best = scores.max(-1).values.topk(r, dim=-1).values.sum(-1)
    slack = 1e-5 if dtype == torch.float32 else 2e-2

    def verify(output) -> str | None:
        y, total, matching = output
        parent = matching.parent.long().cpu()
        pairs = scores.gather(1, matching.src.long().cpu()[..., None].expand(-1, -1, scores.shape[2]))
        got = pairs.gather(2, matching.dst.long().cpu()[..., None]).sum((1, 2))
        if not torch.allclose(got, best, rtol=0, atol=slack * r):
            return f"merged pairs reach similarity {got.tolist()}, the best are {best.tolist()}"
        batch, rows, width = y.shape
        sums = torch.zeros(batch, rows, width, dtype=torch.float64)
        sums.scatter_add_(1, parent[..., None].expand(-1, -1, width), x * size[..., None])
        sizes = torch.zeros(batch, rows, dtype=torch.float64).scatter_add_(1, parent, size)
        if not torch.equal(total.double().cpu(), sizes):
            return "the sizes are not the sums of the merged sizes"
        error = ((sums / sizes[..., None]) - y.double().cpu()).abs().max().item()
        return None if error < slack else f"merged tokens are off by {error:.1e}"

    return verify


def _step(context: Context, dtype: torch.dtype, tokens: int, width: int, r: int, batch: int = 1) -> Prepared:
    generator = torch.Generator().manual_seed(tokens)
    device = context.device
    metric = torch.randn(batch, tokens, 64, generator=generator).to(device, dtype)
    x = torch.randn(batch, tokens, width, generator=generator).to(device, dtype)
    size = torch.randint(1, 5, (batch, tokens), generator=generator).to(device).float()
    column = size[..., None].to(dtype)

    def ours():
        matching = ops.bipartite_soft_matching(metric, r, class_token=True)
        merged, total = ops.merge_tokens(x, matching, size=size, mode="weighted")
        return merged, total, matching

    def eager():
        return tome_step(metric, x, column, r)

    compiled = torch.compile(tome_step, dynamic=False)
    even, odd = (tokens + 1) // 2, tokens // 2
    targets = (Target("torch.compile of it", 2.5), Target("ToMe in eager PyTorch", 4.0))
    return Prepared(
        ours=ours,
        peers={
            "torch.compile of it": Peer(lambda: compiled(metric, x, column, r), slow=True),
            "ToMe in eager PyTorch": Peer(eager),
            "copy of x": Peer(lambda: x.clone(), same=False),
        },
        flops=2 * batch * even * odd * 64,
        bytes=batch * ((2 * tokens - r) * width + tokens * 64) * x.element_size(),
        targets=targets if device.type == "cpu" else (Target("ToMe in eager PyTorch"),),
        verify=_verify(metric, x, size, r, dtype),
    )


def cases(context: Context):
    """Cases of the family merge."""
    shapes = (("vit_l_512", 1025, 1024, 40), ("deit_s_224", 197, 384, 13))
    for dtype in context.dtypes:
        for name, tokens, width, r in shapes:
            case = f"tome_step_{name}_n{tokens}_c{width}_r{r}"
            yield Case(case, dtype, lambda d=dtype, n=tokens, c=width, k=r: _step(context, d, n, c, k), True)
