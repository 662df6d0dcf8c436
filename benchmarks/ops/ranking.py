# SPDX-License-Identifier: Apache-2.0
"""One EViT step: the best patches by the class token's attention, and the others fused into one token."""

import torch
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared, Target

EAGER, COMPILED = "EViT in eager PyTorch", "torch.compile of it"


def evit_step(x: torch.Tensor, score: torch.Tensor, keep: int) -> torch.Tensor:
    """EViT in eager PyTorch, written from the paper (arXiv 2202.07800, section 3.2), with a class token.

    Args:
        x: ``[B, N, C]``; score: ``[B, N - 1]``, of the patches.
        keep: patches to keep.

    Returns:
        ``[B, keep + 2, C]``: the class token, the best patches in descending order, the fused token.
    """
    order = score.argsort(dim=1, descending=True)
    wide = order[..., None].expand(-1, -1, x.shape[2])
    patches = x[:, 1:].gather(1, wide)
    weights = score.gather(1, order)[:, keep:, None]
    fused = (patches[:, keep:] * weights).sum(1, keepdim=True, dtype=torch.float32).to(x.dtype)
    return torch.cat((x[:, :1], patches[:, :keep], fused), 1)


def _step(context: Context, dtype: torch.dtype, tokens: int, width: int, keep: int) -> Prepared:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(1, tokens, width, generator=generator).to(context.device, dtype)
    score = torch.randn(1, tokens, generator=generator).softmax(-1).to(context.device)
    compiled = torch.compile(evit_step, dynamic=False)
    return Prepared(
        ours=lambda: ops.keep_top_tokens(x, score, keep, num_prefix=1, fuse=True)[0],
        peers={
            EAGER: Peer(lambda: evit_step(x, score[:, 1:], keep)),
            COMPILED: Peer(lambda: compiled(x, score[:, 1:], keep), slow=True),
            "copy of x": Peer(lambda: x.clone(), same=False),
        },
        flops=2 * (tokens - 1 - keep) * width,
        bytes=(tokens + keep + 2) * width * x.element_size(),
        targets=(Target(EAGER), Target(COMPILED)),
        reference=lambda: (evit_step(x.double(), score[:, 1:].double(), keep),),
    )


def cases(context: Context):
    """Cases of the family ranking."""
    for dtype in context.dtypes:
        for name, tokens, width in (("vit_l_512", 1025, 1024), ("deit_s_224", 197, 384)):
            keep = -(-7 * (tokens - 1) // 10)
            yield Case(
                f"evit_step_{name}_n{tokens}_keep{keep}",
                dtype,
                lambda d=dtype, n=tokens, c=width, k=keep: _step(context, d, n, c, k),
            )
