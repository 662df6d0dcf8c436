# SPDX-License-Identifier: Apache-2.0
"""Selecting tokens, gathering them and scattering results back, at the sizes of SViT on detection images.

4200 patches are a 800 x 1333 image at stride 16; 0.49 is the share that SViT keeps in its middle layers.
``torch.gather`` with ``scatter_`` is what SViT's own code uses; ``index_select`` with ``index_copy_`` is the
fastest way in PyTorch. Moving rows is bound by memory: the inputs rotate through copies that are together four times larger
than the last cache, since between two layers of a real model they leave it; ``_hot`` shows one copy again and again.
"""

from functools import partial
from itertools import cycle

import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared, Target, copies

TOKENS, WIDTH, KEEP = 4200, 384, 0.49
SIZES = ((197, 384), (1025, 1024), (TOKENS, WIDTH), (8 * TOKENS, WIDTH))
SELECT_COPY, SELECT_ADD = "index_select + index_copy_", "index_select, layer_norm, index_add_"


def _kept(tokens: int, keep: float, device, generator) -> torch.Tensor:
    """Ascending row numbers, int64 (what PyTorch's indexing wants)."""
    count = round(tokens * keep)
    return torch.randperm(tokens, generator=generator)[:count].sort().values.to(device)


def _gather_scatter(context: Context, dtype: torch.dtype, shape: tuple[int, int], cold: bool) -> Prepared:
    count, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=generator).to(context.device, dtype)
    long = _kept(count, KEEP, context.device, generator)
    short, wide = long.int(), long[None, :, None].expand(1, -1, width)
    mask = torch.zeros(count, dtype=torch.bool, device=context.device).index_fill_(0, long, True)
    # Rows go back to where they came from: all copies keep their values, and everybody may take the next one.
    sets = cycle(copies((x, x), cold))

    def ours():
        source, features = next(sets)
        tokens = ops.gather_tokens(source, short)
        return tokens, ops.scatter_tokens_(features, tokens, short)

    def select_copy():
        source, features = next(sets)
        tokens = source.index_select(0, long)
        return tokens, features.index_copy_(0, long, tokens)

    def gather_scatter():
        source, features = next(sets)
        tokens = source[None].gather(1, wide)
        return tokens[0], features[None].scatter_(1, wide, tokens)[0]

    def masked():
        source, features = next(sets)
        tokens = source[mask]
        return tokens, features.masked_scatter_(mask[:, None], tokens)

    peers = {
        SELECT_COPY: Peer(select_copy),
        "torch.gather + scatter_ (as SViT)": Peer(gather_scatter),
        "x[mask] + masked_scatter_": Peer(masked),
    }
    promised = context.device.type == "cpu" and cold and count == TOKENS
    reference = x.double().cpu()
    return Prepared(
        ours=ours,
        peers=peers,
        flops=0,
        bytes=4 * len(long) * width * x.element_size(),
        targets=(Target(SELECT_COPY, (2.0 if dtype == torch.float32 else 3.0) if promised else None),),
        reference=lambda: (reference[long.cpu()], reference),
        cold=cold,
    )


def _alternating(tensors: tuple[torch.Tensor, ...], branch: torch.Tensor):
    """Copies with a branch to add: once all had it added, it is taken off again, so that values stay bounded."""
    sets = copies(tensors)
    return cycle([*((*one, branch) for one in sets), *((*one, -branch) for one in sets)])


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
    sets = {name: _alternating((x, x), branch) for name in ("ours", "select")}
    sets["packed"] = _alternating((packed, packed), branch)

    def ours():
        source, features, added = next(sets["ours"])
        normed = ops.gather_layer_norm(source, short, weight, bias, 1e-6)
        return normed, ops.scatter_tokens_(features, added, short, add=True)

    def select_add():
        source, features, added = next(sets["select"])
        normed = F.layer_norm(source.index_select(0, long), (WIDTH,), weight, bias, 1e-6)
        return normed, features.index_add_(0, long, added)

    def dense_rows():
        source, features, added = next(sets["packed"])
        return F.layer_norm(source, (WIDTH,), weight, bias, 1e-6), features.add_(added)

    before = x.double().cpu()

    def reference():
        normed = F.layer_norm(packed.double(), (WIDTH,), weight.double(), bias.double(), 1e-6).cpu()
        return normed, before.index_add(0, long.cpu(), branch.double().cpu())

    return Prepared(
        ours=ours,
        peers={
            SELECT_ADD: Peer(select_add),
            "layer_norm + add on packed rows (no selection)": Peer(dense_rows, same=False),
        },
        flops=8 * len(long) * WIDTH,
        bytes=5 * len(long) * WIDTH * x.element_size(),
        targets=(Target(SELECT_ADD),),
        reference=reference,
        cold=True,
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
        for shape in ((TOKENS, WIDTH),) if context.quick else SIZES:
            name = f"gather_scatter_n{shape[0]}_c{shape[1]}"
            make = partial(_gather_scatter, context, dtype, shape)
            yield Case(name, dtype, partial(make, True), headline=shape[0] == TOKENS)
            if shape[0] == TOKENS:
                yield Case(f"{name}_hot", dtype, partial(make, False))
        fused = f"gather_ln_residual_scatter_n{TOKENS}_c{WIDTH}"
        yield Case(fused, dtype, partial(_fused, context, dtype), headline=True)
    for batch in (1, 8):
        if torch.float32 in context.dtypes:  # masks have no dtype of their own
            yield Case(f"select_b{batch}_n{TOKENS}", torch.float32, partial(_compaction, context, batch))
