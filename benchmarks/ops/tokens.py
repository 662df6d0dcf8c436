# SPDX-License-Identifier: Apache-2.0
"""Selecting tokens, gathering them and scattering results back, at the sizes of SViT on detection images.

4200 patches are a 800 x 1333 image at stride 16; 0.49 is the share that SViT keeps in its middle layers.
``torch.gather`` with ``scatter_`` is what SViT's own code uses; ``index_select`` with ``index_copy_`` is the
fastest way in PyTorch.
"""

from itertools import cycle

import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared, Target

TOKENS, WIDTH, KEEP = 4200, 384, 0.49


def _kept(tokens: int, keep: float, device, generator) -> torch.Tensor:
    """Ascending row numbers, int64 (what PyTorch's indexing wants)."""
    count = round(tokens * keep)
    return torch.randperm(tokens, generator=generator)[:count].sort().values.to(device)


def _gather_scatter(context: Context, dtype: torch.dtype) -> Prepared:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator).to(context.device, dtype)
    long = _kept(TOKENS, KEEP, context.device, generator)
    short, wide = long.int(), long[None, :, None].expand(1, -1, WIDTH)
    maps = {name: x.clone() for name in ("ours", "select", "gather", "mask")}
    mask = torch.zeros(TOKENS, dtype=torch.bool, device=context.device).index_fill_(0, long, True)

    def ours():
        tokens = ops.gather_tokens(x, short)
        return tokens, ops.scatter_tokens_(maps["ours"], tokens, short)

    def select_copy():
        tokens = x.index_select(0, long)
        return tokens, maps["select"].index_copy_(0, long, tokens)

    def gather_scatter():
        tokens = x[None].gather(1, wide)
        return tokens[0], maps["gather"][None].scatter_(1, wide, tokens)[0]

    def masked():
        tokens = x[mask]
        return tokens, maps["mask"].masked_scatter_(mask[:, None], tokens)

    peers = {
        "index_select + index_copy_": Peer(select_copy),
        "torch.gather + scatter_ (as SViT)": Peer(gather_scatter),
        "x[mask] + masked_scatter_": Peer(masked),
    }
    targets = (Target("index_select + index_copy_", 2.0 if dtype == torch.float32 else 3.0),)
    reference = x.double().cpu()
    return Prepared(
        ours=ours,
        peers=peers,
        flops=0,
        bytes=4 * len(long) * WIDTH * x.element_size(),
        targets=targets if context.device.type == "cpu" else (),
        reference=lambda: (reference[long.cpu()], reference),
    )


def _fused(context: Context, dtype: torch.dtype) -> Prepared:
    """Gather folded into LayerNorm, scatter folded into the residual: what selection adds to a block."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(context.device, dtype)

    x, weight, bias = random(TOKENS, WIDTH), 1 + 0.1 * random(WIDTH), random(WIDTH)
    long = _kept(TOKENS, KEEP, context.device, generator)
    short = long.int()
    packed = x[long]
    branch = random(len(long), WIDTH)
    # The residual is added in place again and again: alternating signs keep the values bounded.
    maps = {name: x.clone() for name in ("ours", "select", "packed")}
    maps["packed"] = packed.clone()
    branches = {name: cycle((branch, -branch)) for name in maps}

    def ours():
        normed = ops.gather_layer_norm(x, short, weight, bias, 1e-6)
        return normed, ops.scatter_tokens_(maps["ours"], next(branches["ours"]), short, add=True)

    def select_add():
        normed = F.layer_norm(x.index_select(0, long), (WIDTH,), weight, bias, 1e-6)
        return normed, maps["select"].index_add_(0, long, next(branches["select"]))

    def dense_rows():
        return F.layer_norm(packed, (WIDTH,), weight, bias, 1e-6), maps["packed"].add_(next(branches["packed"]))

    before = x.double().cpu()

    def reference():
        normed = F.layer_norm(packed.double(), (WIDTH,), weight.double(), bias.double(), 1e-6).cpu()
        return normed, before.index_add(0, long.cpu(), branch.double().cpu())

    # ours runs first in the check and so adds the branch once; a peer's later turn is compared the same way.
    return Prepared(
        ours=ours,
        peers={
            "index_select, layer_norm, index_add_": Peer(select_add),
            "layer_norm + add on packed rows (no selection)": Peer(dense_rows, same=False),
        },
        flops=8 * len(long) * WIDTH,
        bytes=5 * len(long) * WIDTH * x.element_size(),
        targets=(Target("index_select, layer_norm, index_add_"),),
        reference=reference,
    )


def _compaction(context: Context, batch: int) -> Prepared:
    generator = torch.Generator().manual_seed(2)
    mask = (torch.rand(batch, TOKENS, generator=generator) < KEEP).to(context.device)
    op = (
        getattr(torch.ops.tokenprune, "select_tokens", None) if hasattr(torch.ops.tokenprune, "select_tokens") else None
    )

    def starts():
        return F.pad(mask.sum(1).cumsum(0), (1, 0))

    def nonzero_starts():
        return mask.view(-1).nonzero().view(-1).int(), starts().int()

    def stable_sort():
        kept = int(mask.sum())
        return mask.view(-1).to(torch.uint8).sort(descending=True, stable=True).indices[:kept].int(), starts().int()

    def ours():
        index = ops.select_tokens(mask)
        return index.indices, index.cu_seqlens

    peers = {
        "nonzero": Peer(lambda: mask.view(-1).nonzero(), same=False),
        "nonzero + cumsum": Peer(nonzero_starts),
        "stable sort + cumsum": Peer(stable_sort),
    }
    if op is not None:
        peers["ours, op called directly"] = Peer(lambda: op(mask), same=False)
    on_cpu = context.device.type == "cpu"
    targets = (Target("nonzero", 8.0),) if batch == 8 else (Target("nonzero"), Target(ms=0.004))
    return Prepared(
        ours=ours,
        peers=peers,
        flops=0,
        bytes=batch * TOKENS + 4 * round(batch * TOKENS * KEEP),
        targets=targets if on_cpu else (Target("nonzero"),),
        reference=lambda: tuple(t.cpu() for t in nonzero_starts()),
    )


def cases(context: Context):
    """Cases of the family tokens."""
    for dtype in context.dtypes:
        yield Case(f"gather_scatter_n{TOKENS}_c{WIDTH}", dtype, lambda d=dtype: _gather_scatter(context, d))
        yield Case(f"gather_ln_residual_scatter_n{TOKENS}_c{WIDTH}", dtype, lambda d=dtype: _fused(context, d))
    for batch in (1, 8):
        yield Case(f"select_b{batch}_n{TOKENS}", torch.float32, lambda b=batch: _compaction(context, b))
