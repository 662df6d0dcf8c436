# SPDX-License-Identifier: Apache-2.0
"""Halves of a DeiT-S block from packed weights in one call: all tokens of an image of 224 pixels, and what ToMe leaves last.
The attention half also with ATS's sampling inside.

The weights of one block stay in the cache here; what one call saves in a whole model is in the lines of the models.
"""

import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared, Target

CHANNELS, HEADS, HIDDEN, EPS = 384, 6, 1536, 1e-6
EAGER = "LayerNorm, linear layers, SDPA, residual in eager PyTorch"


def _half(context: Context, dtype: torch.dtype, tokens: int, attention: bool) -> Prepared:
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    x, norm_weight, norm_bias = random(1, tokens, CHANNELS), random(CHANNELS), random(CHANNELS)
    inner, between = (3 * CHANNELS, CHANNELS) if attention else (HIDDEN, HIDDEN)
    first, bias_1 = random(inner, CHANNELS) / CHANNELS**0.5, random(inner)
    second, bias_2 = random(CHANNELS, between) / between**0.5, random(CHANNELS)
    norm, scale = (norm_weight, norm_bias, EPS), (CHANNELS // HEADS) ** -0.5
    one, two = ops.pack_linear(first), ops.pack_linear(second)
    starts = torch.tensor([0, tokens], dtype=torch.int32)

    def eager(x, *parts):
        norm_weight, norm_bias, first, bias_1, second, bias_2 = parts
        z = F.linear(F.layer_norm(x, (CHANNELS,), norm_weight, norm_bias, EPS), first, bias_1)
        if attention:
            q, k, v = z.view(1, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            z = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(x.shape)
        else:
            z = F.gelu(z)
        return x + F.linear(z, second, bias_2)

    def one_by_one():
        act = None if attention else "gelu"
        z = ops.packed_linear(x, one, inner, bias_1, norm=norm, act=act)
        if attention:
            qkv = z.view(tokens, 3, HEADS, -1)
            z = ops.sparse_attention_qkvpacked(qkv, cu_seqlens=starts, max_seqlen=tokens)[0].view(x.shape)
        return ops.packed_linear(z, two, CHANNELS, bias_2, residual=x)

    def ours():
        pairs = (one, bias_1), (two, bias_2)
        if attention:
            return ops.packed_attention(x, *pairs, norm=norm, num_heads=HEADS, head_dim=CHANNELS // HEADS)[0]
        return ops.packed_mlp(x, *pairs, norm=norm, hidden=HIDDEN)

    parts = norm_weight, norm_bias, first, bias_1, second, bias_2
    products = 2 * tokens * CHANNELS * (inner + between) + attention * 4 * tokens**2 * CHANNELS
    return Prepared(
        ours=ours,
        peers={EAGER: Peer(lambda: eager(x, *parts)), "our packed layers, op by op": Peer(one_by_one)},
        flops=products,
        bytes=(first.numel() + second.numel() + 2 * x.numel()) * x.element_size(),
        targets=(Target(EAGER),),
        reference=lambda: (eager(*(t.double() for t in (x, *parts))),),
    )


def _sampled(context: Context, dtype: torch.dtype, tokens: int) -> Prepared:
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    x, norm = random(1, tokens, CHANNELS), (random(CHANNELS), random(CHANNELS), EPS)
    first, bias_1 = random(3 * CHANNELS, CHANNELS) / CHANNELS**0.5, random(3 * CHANNELS)
    first[:CHANNELS] *= 4  # attention as peaked as that of a trained model
    second, bias_2 = random(CHANNELS, CHANNELS) / CHANNELS**0.5, random(CHANNELS)
    one, two = ops.pack_linear(first), ops.pack_linear(second)
    initial = torch.ones(1, tokens, dtype=torch.bool)
    starts, single = torch.tensor([[0, tokens], [0, 1]], dtype=torch.int32)
    keys = {"cu_seqlens_k": starts, "max_seqlen_k": tokens}

    def one_by_one():
        qkv = ops.packed_linear(x, one, 3 * CHANNELS, bias_1, norm=norm)
        q, k, v = qkv.view(tokens, 3, HEADS, -1).unbind(1)
        *_, cls = ops.sparse_attention(q[:1], k, v, cu_seqlens_q=single, max_seqlen_q=1, want_cls=True, **keys)
        rows, source, kept = ops.sample_tokens(cls, v, initial, cu_seqlens=starts, max_seqlen=tokens, padded=True)
        chosen = ops.gather_tokens(q.flatten(1), source).view(-1, HEADS, CHANNELS // HEADS)
        z, _ = ops.sparse_attention(chosen, k, v, cu_seqlens_q=kept, max_seqlen_q=rows.shape[1], **keys)
        return ops.packed_linear(z.flatten(1), two, CHANNELS, bias_2, residual=ops.gather_tokens(x, source))[None]

    def ours():
        pairs, sizes = ((one, bias_1), (two, bias_2)), {"num_heads": HEADS, "head_dim": CHANNELS // HEADS}
        return ops.packed_attention_sampled(x, *pairs, initial, norm=norm, **sizes)[:2]

    rows = ours()[1]

    def reference():
        """Of all tokens; those that are kept."""
        z = F.layer_norm(x.double(), (CHANNELS,), *(t.double() for t in norm[:2]), EPS)
        q, k, v = F.linear(z, first.double(), bias_1.double()).view(1, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return (x.double() + F.linear(z, second.double(), bias_2.double()))[:, rows[0].long()], rows

    kept = rows.shape[1]
    apart = "our ops one by one"
    return Prepared(
        ours=ours,
        peers={apart: Peer(lambda: (one_by_one(), rows))},
        flops=2 * CHANNELS * (CHANNELS * (3 * tokens + kept) + 2 * tokens * kept),
        bytes=(first.numel() + second.numel() + 2 * x.numel()) * x.element_size(),
        targets=(Target(apart),),
        reference=reference,
    )


def cases(context: Context):
    """Cases of the family block; packed weights are for the CPU."""
    if context.device.type != "cpu":
        return
    for dtype in context.dtypes:
        for tokens in (197, 54):
            yield Case(f"deit_s_sampled_n{tokens}", dtype, lambda d=dtype, n=tokens: _sampled(context, d, n))
        for name, attention in (("attention", True), ("mlp", False)):
            for tokens in (197, 54):
                yield Case(
                    f"deit_s_{name}_n{tokens}", dtype, lambda d=dtype, n=tokens, a=attention: _half(context, d, n, a)
                )
