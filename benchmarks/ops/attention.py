# SPDX-License-Identifier: Apache-2.0
"""Attention over kept tokens: rows through an index, log-size key bias and CLS row; and ragged batches.

The opponent in PyTorch must give the same three outputs: gather the rows, attend with the bias as mask
(SDPA, or an eager softmax, which has the CLS row for free), compute the CLS row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared, Target


@dataclass(frozen=True)
class Shape:
    """``kept`` of ``rows`` tokens, ``heads`` of width ``dim``."""

    name: str
    rows: int
    kept: int
    heads: int
    dim: int = 64
    quick: bool = False


SDPA = "index_select + SDPA with mask + CLS row"
EAGER = "index_select + eager softmax with bias"
FLEX = "index_select + compiled FlexAttention + CLS row"
SHAPES = (
    Shape("deit_s_224_keep.7", 197, 137, 6, quick=True),
    Shape("vit_l_512_keep.5", 1025, 512, 16, quick=True),
    Shape("vit_l_1370_keep.75", 1370, 1025, 16),
    Shape("svit_s_800x1333_keep.49", 4200, 2058, 6),
)


def _targets(shape: Shape, dtype: torch.dtype) -> tuple[Target, ...]:
    """CPU targets: over SDPA where that is the best way, over eager bf16 where oneDNN makes it faster."""
    if shape.kept < 200:
        return Target(SDPA, 2.0), Target(EAGER, 2.0)
    if dtype == torch.float32:
        return (Target(SDPA, 2.6),)
    return (Target(SDPA, 4.5),) if shape.kept >= 1025 else (Target(EAGER, 2.2),)


def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def _attend_eager(q, k, v, bias, scale):
    """q, k, v [B, H, n, D]; returns out [B, n, H, D] and the CLS row [B, H, n]."""
    weights = (q @ k.transpose(-2, -1) * scale + bias).softmax(-1)
    return (weights @ v).transpose(1, 2), weights[:, :, 0]


def _indexed(context: Context, shape: Shape, dtype: torch.dtype) -> Prepared:
    generator = torch.Generator().manual_seed(shape.kept)
    device, scale = context.device, shape.dim**-0.5
    qkv = torch.randn(shape.rows, 3, shape.heads, shape.dim, generator=generator).to(device, dtype)
    size = torch.randint(1, 5, (shape.kept,), generator=generator).to(device).float()
    long = torch.randperm(shape.rows, generator=generator)[: shape.kept].sort().values.to(device)
    short, log_size = long.int(), size.log()
    bias = log_size.to(dtype)
    cu_seqlens = torch.tensor([0, shape.kept], dtype=torch.int32, device=device)

    def ours():
        out, _, cls = ops.sparse_attention_qkvpacked(
            qkv,
            cu_seqlens=cu_seqlens,
            max_seqlen=shape.kept,
            key_bias=log_size,
            scale=scale,
            index=short,
            want_cls=True,
        )
        return out, cls

    def gathered():
        return qkv.index_select(0, long).permute(1, 2, 0, 3)[:, None].unbind(0)

    def sdpa():
        q, k, v = gathered()
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 1, shape.kept, -1), scale=scale)
        cls = (q[:, :, :1] @ k.transpose(-2, -1) * scale + bias).softmax(-1)
        return out.transpose(1, 2).contiguous()[0], cls[0, :, 0]

    def eager():
        out, cls = _attend_eager(*gathered(), bias, scale)
        return out.contiguous()[0], cls[0]

    def sdpa_plain():
        q, k, v = gathered()
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()

    def reference():
        q, k, v = (t.double().cpu() for t in gathered())
        out, cls = _attend_eager(q, k, v, log_size.double().cpu(), scale)
        return out[0], cls[0]

    flexible = torch.compile(_flex_attention(), dynamic=False)

    def by_key(score, batch, head, row, column):
        return score + log_size[column]

    def flex():
        q, k, v = gathered()
        out = flexible(q, k, v, score_mod=by_key, scale=scale)
        cls = (q[:, :, :1] @ k.transpose(-2, -1) * scale + bias).softmax(-1)
        return out.transpose(1, 2).contiguous()[0], cls[0, :, 0]

    compiled = torch.compile(eager, dynamic=False)
    element, pairs = qkv.element_size(), shape.kept * shape.kept * shape.heads
    return Prepared(
        ours=ours,
        peers={
            SDPA: Peer(sdpa),
            EAGER: Peer(eager),
            "torch.compile of the eager way": Peer(compiled, slow=True),
            FLEX: Peer(flex, slow=True),
            "index_select + SDPA (no bias, no CLS row)": Peer(sdpa_plain, same=False),
        },
        plain=SDPA,
        flops=4 * pairs * shape.dim,
        bytes=4 * shape.kept * shape.heads * shape.dim * element,
        targets=_targets(shape, dtype) if device.type == "cpu" else (Target(SDPA),),
        reference=reference,
    )


def _lengths(batch: int, low: int, high: int) -> list[int]:
    return torch.linspace(low, high, batch).round().int().tolist()


def _ragged(context: Context, dtype: torch.dtype, heads: int = 16, dim: int = 64) -> Prepared:
    generator = torch.Generator().manual_seed(3)
    lengths = _lengths(8, 256, 768)
    total, longest, device = sum(lengths), max(lengths), context.device
    qkv = torch.randn(total, 3, heads, dim, generator=generator).to(device, dtype)
    cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device)
    short = cu_seqlens.int()
    position = torch.arange(longest, device=device)
    valid = position[None] < torch.tensor(lengths, device=device)[:, None]

    def ours():
        return ops.sparse_attention_qkvpacked(qkv, cu_seqlens=short, max_seqlen=longest)[0]

    def loop(attend):
        pieces = [attend(*part.permute(1, 2, 0, 3)[:, None].unbind(0)) for part in qkv.split(lengths)]
        return torch.cat([piece[0].transpose(0, 1) for piece in pieces])

    def eager(q, k, v):
        return (q @ k.transpose(-2, -1) * dim**-0.5).softmax(-1) @ v

    def nested():
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                t.contiguous(), cu_seqlens, min_seqlen=min(lengths), max_seqlen=longest
            )
            for t in qkv.unbind(1)
        )
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2).values()

    def padded():
        rows = torch.zeros(len(lengths), longest, 3, heads, dim, dtype=dtype, device=device)
        rows[valid] = qkv
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None].expand(-1, 1, longest, -1))
        return out.transpose(1, 2)[valid]

    owner = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    flexible = torch.compile(_flex_attention(), dynamic=False)

    def blocks():
        from torch.nn.attention.flex_attention import create_block_mask

        same = lambda batch, head, row, column: owner[row] == owner[column]
        return create_block_mask(same, None, None, total, total, device=device.type)

    mask = []  # made at the first call: a device without FlexAttention must not stop the others

    def flex():
        mask[:] = mask or [blocks()]
        q, k, v = (t.transpose(0, 1)[None] for t in qkv.unbind(1))
        return flexible(q, k, v, block_mask=mask[0])[0].transpose(0, 1)

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = qkv.unbind(1)
        return varlen_attn(q, k, v, short, short, longest, longest)

    def reference():
        double = qkv.double().cpu()
        parts = (part.permute(1, 2, 0, 3).unbind(0) for part in double.split(lengths))
        return (torch.cat([eager(*part).transpose(0, 1) for part in parts]),)

    peers = {
        "loop of SDPA": Peer(lambda: loop(F.scaled_dot_product_attention)),
        "loop of eager": Peer(lambda: loop(eager)),
        "nested (jagged) tensor SDPA": Peer(nested),
        "padded SDPA with mask": Peer(padded),
        "compiled FlexAttention with block mask": Peer(flex, slow=True),
    }
    if device.type == "cuda":
        peers["varlen_attn"] = Peer(varlen)
    pairs = sum(n * n for n in lengths) * heads
    return Prepared(
        ours=ours,
        peers=peers,
        plain="loop of SDPA",
        flops=4 * pairs * dim,
        bytes=4 * total * heads * dim * qkv.element_size(),
        targets=(Target("loop of SDPA", 2.5 if device.type == "cpu" else None),),
        reference=reference,
    )


def cases(context: Context):
    """Cases of the family attention."""
    for dtype in context.dtypes:
        for shape in SHAPES:
            if shape.quick or not context.quick:
                name = f"{shape.name}_n{shape.kept}_h{shape.heads}_index_bias_cls"
                headline = shape.name.startswith("vit_l_512")
                yield Case(name, dtype, lambda s=shape, d=dtype: _indexed(context, s, d), headline)
        yield Case("ragged_b8_256..768_h16", dtype, lambda d=dtype: _ragged(context, d), True)
