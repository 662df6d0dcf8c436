# SPDX-License-Identifier: Apache-2.0
"""Compares every op on the GPU with the CPU kernels on small, odd, ragged and empty inputs.

Forward and backward; ``--small`` is short enough for compute-sanitizer: ``python tools/gpu_smoke.py``. With
``TOKENPRUNE_HOPPER=1`` the same comparison runs through the sm_90a units where they serve a case.
"""

import os
import sys
import warnings

import torch
from tokenprune_ext import _library, ops

# Twice the round-off that a sum of this length makes, relative to the largest value.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def attention(lengths, heads, dim, indexed):
    """A ragged batch with key bias and CLS row, rows through an index or not."""
    total = sum(lengths)
    rows = total + 5 if indexed else total

    def run(device, dtype):
        generator = torch.Generator().manual_seed(total)
        qkv = torch.randn(rows, 3, heads, dim, generator=generator).to(device, dtype).requires_grad_()
        bias = torch.rand(total, generator=generator).log().to(device).requires_grad_()
        index = torch.randperm(rows, generator=generator)[:total].int().to(device) if indexed else None
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        out, lse, cls = ops.sparse_attention_qkvpacked(
            qkv, cu_seqlens=starts, max_seqlen=max(lengths), key_bias=bias, index=index, want_cls=True
        )
        finite = torch.where(lse.isfinite(), lse, 0.0)
        loss = out.float().square().sum() + finite.sum() + cls.square().sum()
        return out, finite, cls, *torch.autograd.grad(loss, (qkv, bias))

    return run


def packed_attention(lengths, keys, heads, dim, biased):
    """What the sm_90a unit serves: packed rows without an index or a CLS row, cross lengths, with or without bias."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(sum(keys))
        values = torch.randn(sum(keys), 2, heads, dim, generator=generator).to(device, dtype).requires_grad_()
        queries = torch.randn(sum(lengths), heads, dim, generator=generator).to(device, dtype).requires_grad_()
        bias = torch.rand(sum(keys), generator=generator).log().to(device) if biased else None

        def starts(counts):
            return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)

        out, lse = ops.sparse_attention(
            queries,
            *values.unbind(1),
            cu_seqlens_q=starts(lengths),
            cu_seqlens_k=starts(keys),
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(keys),
            key_bias=bias,
        )
        finite = torch.where(lse.isfinite(), lse, 0.0)
        return out, finite, *torch.autograd.grad(out.float().square().sum() + finite.sum(), (queries, values))

    return run


def linear(rows, count, channels, width, activation, scattered):
    """A linear layer on gathered rows, with scatter-back or without."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(rows)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

        x, bias, features = random(rows, channels), random(width), random(rows, width)
        weight = (torch.randn(width, channels, generator=generator) / channels**0.5).to(device, dtype).requires_grad_()
        index = torch.randperm(rows, generator=generator)[:count].int().to(device)
        target = {"features": features, "add": True} if scattered else {}
        out = ops.gather_linear(x, weight, bias, index=index, activation=activation, **target)
        leaves = (x, weight, bias, features) if scattered else (x, weight, bias)
        return out, *torch.autograd.grad(out.float().square().mean(), leaves)

    return run


def tokens(batch, count, width):
    """Select, gather, gather with LayerNorm, scatter with residual."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(batch, count, width, generator=generator).to(device, dtype).requires_grad_()
        mask = (torch.rand(batch, count, generator=generator) < 0.5).to(device)
        weight = torch.randn(width, generator=generator).to(device, dtype).requires_grad_()
        index = ops.select_tokens(mask)
        normed = ops.gather_layer_norm(x, index, weight, weight, 1e-6)
        out = ops.scatter_tokens(x, normed + ops.gather_tokens(x, index), index, add=True)
        loss = out.float().square().sum() / max(batch * count, 1)  # the plain sum overflows float16
        return index.indices, index.cu_seqlens, out, *torch.autograd.grad(loss, (x, weight))

    return run


def merge(batch, count, width, r):
    """One ToMe step."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(batch, count, width, generator=generator).to(device, dtype).requires_grad_()
        # Metric of few distinct integers would tie; float32 keeps the choice the same on both devices.
        metric = torch.randn(batch, count, 16, generator=generator).to(device)
        matching = ops.bipartite_soft_matching(metric, r, class_token=True)
        y, size = ops.merge_tokens(x, matching, mode="weighted")
        parent = matching.parent if matching.parent is not None else torch.zeros(0, device=device)
        return parent, y, size, *torch.autograd.grad(y.float().square().sum(), (x,))

    return run


def policy(batch, count, heads, dim):
    """Attention under a key policy."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(count)
        shape = (batch, count, heads, dim)
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3))
        keep = (torch.rand(batch, count, generator=generator) < 0.6).float().to(device).requires_grad_()
        out = ops.policy_attention(q, k, v, keep)
        return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, keep))

    return run


def cluster(grid, clusters, width, window):
    """Clustering with labels, reconstruction of the nearest and of all centers."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(width)
        count = grid[0] * grid[1]
        # Close together, so that soft weights do not underflow in any dtype.
        x = (0.1 * torch.randn(2, count, width, generator=generator)).to(device, dtype).requires_grad_()
        values = torch.randn(2, clusters[0] * clusters[1], 5, generator=generator).to(device, dtype).requires_grad_()
        centers = ops.cluster_tokens(x, grid, clusters, iters=3, temperature=1.0, window=window)
        few = ops.reconstruct_tokens(x.float(), centers.float(), values.float(), k=-1, temperature=0.5)
        loss = centers.float().square().mean() + few.square().mean()
        return centers, few, *torch.autograd.grad(loss, (x, values))

    return run


def deform(levels, queries, heads, dim, points, fused):
    """Deformable attention in both call forms, with locations outside and a few that are not numbers."""

    def run(device, dtype):
        generator = torch.Generator().manual_seed(queries)
        total, count = sum(h * w for h, w in levels), len(levels)
        starts = [sum(h * w for h, w in levels[:i]) for i in range(count)]
        shapes, starts = torch.tensor(levels, device=device), torch.tensor(starts, device=device)
        value = torch.randn(2, total, heads, dim, generator=generator).to(device, dtype).requires_grad_()
        offsets = 2 * torch.randn(2, queries, heads, count, points, 2, generator=generator)
        logits = torch.randn(2, queries, heads, count, points, generator=generator)
        reference = torch.rand(2, queries, count, 2, generator=generator)
        if fused:
            offsets, logits = (t.to(device, dtype).requires_grad_() for t in (offsets, logits.flatten(3)))
            out = ops.ms_deform_attn_fused(value, shapes, starts, reference.to(device), offsets, logits)
            leaves = (value, offsets, logits)
        else:
            locations = (reference[:, :, None, :, None] + 0.1 * offsets).flatten(0, -1)
            locations[::97] = float("nan")
            locations = locations.view(offsets.shape).to(device).requires_grad_()
            weights = logits.flatten(3).softmax(-1).view(logits.shape).to(device, dtype).requires_grad_()
            out = ops.ms_deform_attn(value, shapes, starts, locations, weights)
            leaves = (value, weights)  # the reference at undefined locations has no gradient to compare
        return out, *torch.autograd.grad(out.float().square().mean(), leaves)

    return run


def cases(small: bool):
    """``(name, run)`` pairs."""
    for lengths, heads, dim in (((5,), 1, 32), ((17, 0, 1, 40), 3, 64), ((3, 70), 2, 80)):
        yield f"attention {lengths} h{heads} d{dim}", attention(lengths, heads, dim, False)
        yield f"attention {lengths} h{heads} d{dim} indexed", attention(lengths, heads, dim, True)
    for dim in (64, 80, 128):
        yield f"packed attention d{dim}", packed_attention((5, 0, 67, 1, 0), (270, 3, 0, 1, 4), 2, dim, True)
        yield f"packed attention d{dim} no bias", packed_attention((130, 64), (400, 128), 3, dim, False)
    for shape in ((50, 40, 72, 40, None, False), (300, 20, 520, 264, "gelu", True), (9, 9, 64, 24, None, True)):
        yield f"linear {shape}", linear(*shape)
    for shape in ((1, 1, 1), (2, 37, 24), (3, 0, 8), (2, 65, 390)):
        yield f"tokens {shape}", tokens(*shape)
    for shape in ((1, 2, 3, 1), (2, 33, 24, 9), (1, 197, 384, 13)):
        yield f"merge {shape}", merge(*shape)
    yield "policy (2, 19, 2, 64)", policy(2, 19, 2, 64)
    for shape in (((7, 5), (3, 4), 24, 5), ((8, 8), (4, 4), 33, 3), ((3, 3), (5, 5), 8, 7)):
        yield f"cluster {shape}", cluster(*shape)
    for shape in (([(6, 4), (3, 2)], 11, 2, 32, 4), ([(5, 7)], 9, 3, 64, 4), ([(4, 4), (2, 2), (1, 1)], 1, 1, 5, 7)):
        yield f"deform {shape}", deform(*shape, False)
        yield f"deform {shape} fused", deform(*shape, True)
    if not small:
        yield "attention 8 x 256..768", attention((256, 329, 402, 475, 549, 622, 695, 768), 16, 64, True)
        lengths = (256, 329, 402, 475, 549, 622, 695, 768)
        for dim in (64, 80, 128):
            yield f"packed attention d{dim} 8 x 256..768", packed_attention(lengths, lengths, 16, dim, True)
        yield "linear 4200 of 384 to 1536", linear(4200, 2058, 384, 1536, "gelu", False)
        yield "linear 4200 of 1536 to 384", linear(4200, 2058, 1536, 384, None, True)
        yield "tokens (8, 4200, 384)", tokens(8, 4200, 384)
        yield "merge (4, 1025, 1024, 40)", merge(4, 1025, 1024, 40)
        yield "policy (2, 197, 6, 64)", policy(2, 197, 6, 64)
        yield "cluster 32x32 to 23x23", cluster((32, 32), (23, 23), 1024, 5)
        yield "cluster 32x32 to 16x16", cluster((32, 32), (16, 16), 1024, 5)
        for fused in (False, True):
            pyramid = [(50, 84), (25, 42), (13, 21)]
            yield f"deform injector {'fused' if fused else ''}", deform(pyramid, 1050, 6, 64, 4, fused)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error relative to the largest value; infinite for other shapes, integers must be equal."""
    got, want = got.detach().cpu(), want.detach().cpu()
    if got.shape != want.shape:
        return float("inf")
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    if not want.numel():
        return 0.0
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-6)
    return error.item() if error == error else float("inf")


def main(arguments: list[str]) -> int:
    """Run all cases; returns 1 when one differs."""
    device = "cpu" if "--cpu" in arguments else "cuda"  # --cpu tries the script itself where there is no GPU
    small = "--small" in arguments
    if os.environ.get("TOKENPRUNE_HOPPER") == "1":
        unit = device == "cuda" and _library.hopper_unit("gather_linear", torch.device("cuda"))
        print(f"sm_90a units: {'on' if unit else 'not built, or not for this device'}")
    warnings.filterwarnings("error", message=".*runs the slower PyTorch reference.*")
    wrong = 0
    for name, run in cases(small):
        for dtype, tolerance in TOLERANCE.items():
            pairs = zip(run(device, dtype), run("cpu", dtype), strict=True)
            errors = [difference(got, want) for got, want in pairs]
            if not max(errors) <= tolerance:
                wrong += 1
                print(f"WRONG {name} {dtype}: {', '.join(f'{error:.1e}' for error in errors)}")
    print(f"{wrong} wrong" if wrong else "all equal to the CPU kernels")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
