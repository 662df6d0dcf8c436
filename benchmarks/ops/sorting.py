# SPDX-License-Identifier: Apache-2.0
"""Sorted rows: the sort of SMYRF's hashes, attention in clusters cut from it, and ACT's groups, at ViT-L/16 on 512 pixels.

The whole attention steps of SMYRF, ACT and ATS, which these ops carry, are in ``methods.py``.
"""

import torch
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared, Target
from benchmarks.ops.methods import COMPILED, DIM, EAGER, HEADS, TOKENS, act_groups, smyrf_rows

ROUNDS = 32


def _argsort(context: Context, rows: int, columns: int) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator).to(context.device)

    def stable():
        return x.argsort(dim=1, stable=True)

    return Prepared(
        ours=lambda: ops.argsort_rows(x),
        peers={"torch.argsort, stable": Peer(stable), "torch.argsort": Peer(lambda: x.argsort(dim=1), same=False)},
        flops=0,
        bytes=8 * x.numel(),
        targets=(Target("torch.argsort, stable"),),
        reference=lambda: (stable().int().cpu(),),
    )


def _balanced(context: Context, dtype: torch.dtype, size: int) -> Prepared:
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, HEADS, TOKENS, DIM, generator=generator).to(context.device, dtype)
    keys = torch.randn(2, ROUNDS, HEADS, TOKENS, generator=generator).to(context.device)
    orders, short = keys.argsort(dim=-1), ops.argsort_rows(keys)
    eager = "eager attention in clusters, rounds merged by lse"

    def ours():
        return ops.balanced_attention(q, k, v, *short, q_size=size, k_size=size, per_row=False)

    return Prepared(
        ours=ours,
        peers={eager: Peer(lambda: smyrf_rows(q, k, v, *orders, size))},
        flops=4 * ROUNDS * HEADS * TOKENS * size * DIM,
        bytes=4 * q.numel() * q.element_size() + 2 * short[0].numel() * 4,
        targets=(Target(eager),),
        reference=lambda: (smyrf_rows(*(t.double().cpu() for t in (q, k, v)), *orders.cpu(), size),),
    )


def _groups(context: Context, dtype: torch.dtype, rows: int, tokens: int, hashes: int) -> Prepared:
    # Few binary digits: every way to sum gives the same hashes.
    generator = torch.Generator().manual_seed(2)
    x, projection, offset = (
        torch.randint(-8, 9, shape, generator=generator).to(context.device) / 4
        for shape in ((rows, tokens, DIM), (DIM, hashes), (hashes,))
    )
    x, draws = x.to(dtype), (projection[None], offset.abs()[None, :, None])

    def eager():
        return act_groups(x, *draws)

    return Prepared(
        ours=lambda: ops.hash_groups(x, projection, offset.abs())[0],
        peers={EAGER: Peer(eager), COMPILED: Peer(torch.compile(eager, dynamic=False), slow=True)},
        flops=2 * x.numel() * hashes,
        bytes=x.numel() * x.element_size() + 8 * rows * tokens,
        targets=(Target(EAGER, 2.0 if context.device.type == "cpu" else None),),
        reference=lambda: (eager().int().cpu(),),
    )


def cases(context: Context):
    """Cases of the family sorting."""
    if torch.float32 in context.dtypes:  # hashes are float32 whatever the model is
        for rows, columns in ((ROUNDS * HEADS, TOKENS),) if context.quick else ((8, 197), (ROUNDS * HEADS, TOKENS)):
            yield Case(f"argsort_r{rows}_n{columns}", torch.float32, lambda r=rows, n=columns: _argsort(context, r, n))
    for dtype in context.dtypes:
        for size in (32,) if context.quick else (16, 32, 64):
            name = f"balanced_vit_l_512_n{TOKENS}_h{HEADS}_c{size}_r{ROUNDS}"
            yield Case(name, dtype, lambda d=dtype, n=size: _balanced(context, d, n), headline=size == 32)
        for rows, tokens in ((HEADS, TOKENS),) if context.quick else ((6, 197), (HEADS, TOKENS)):
            name = f"hash_groups_r{rows}_n{tokens}_q32"
            yield Case(name, dtype, lambda d=dtype, r=rows, n=tokens: _groups(context, d, r, n, 32))
