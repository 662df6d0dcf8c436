# SPDX-License-Identifier: Apache-2.0
"""A tiny transformer that the reducers' tests own, and plain formulas to compare with."""

import torch
from tokenprune_ext.nn import AttentionBranch, BlockParts, MlpBranch, TokenState, run_block
from torch import nn

WIDTH, HEADS, DEPTH = 24, 3, 4


class TinyBlock(nn.Module):
    """Pre-norm block with the attention written out, so that nothing of the package is in the reference."""

    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def attend(self, x, key_bias=None):
        """``(branch, probabilities [B, H, N, N], keys [B, N, H, D])``."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        logits = logits if key_bias is None else logits + key_bias[:, None, None]
        weights = logits.softmax(-1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)), weights, k

    def feed(self, x):
        return x + self.mlp(self.norm2(x))

    def forward(self, x):
        return self.feed(x + self.attend(x)[0])

    def parts(self):
        head_dim = self.qkv.in_features // self.heads
        attention = AttentionBranch(self.norm1, self.qkv, self.proj, num_heads=self.heads, head_dim=head_dim)
        return BlockParts(attention, MlpBranch(self.norm2, self.mlp), self)


def tiny_blocks(depth=DEPTH, dtype=torch.float64, seed=0):
    """Blocks with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    blocks = nn.ModuleList(TinyBlock() for _ in range(depth)).to(dtype).eval()
    for block in blocks:
        nn.init.normal_(block.qkv.weight, std=0.5)
    return blocks


def tokens(batch=2, count=17, dtype=torch.float64, seed=1):
    """Random tokens ``[B, N, C]``."""
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walk(blocks, x, reducer, state=None, record=None):
    """A model's loop over its blocks."""
    state = TokenState(num_prefix=1) if state is None else state
    x, state = reducer.begin(x, state)
    for layer, block in enumerate(blocks):
        x, state = run_block(block.parts(), x, state, layer, reducer, record)
    return x, state


def dense(blocks, x):
    """All blocks without reduction."""
    for block in blocks:
        x = block(x)
    return x


def pack_ragged(images, num_prefix=1):
    """Images ``[1, N_i, C]`` of different lengths -> packed tokens and their state."""
    lengths = torch.tensor([0] + [image.shape[1] for image in images])
    state = TokenState(
        num_prefix=num_prefix,
        cu_seqlens=lengths.cumsum(0).to(torch.int32),
        max_seqlen=int(lengths.max()),
    )
    return torch.cat([image[0] for image in images]), state


def split(x, state):
    """Packed tokens -> one ``[n, C]`` per image."""
    return x.split(state.cu_seqlens.diff().tolist())


def compile_over_counts(blocks, reducer, *, packed=False, backend="aot_eager", counts=range(30, 36), **config):
    """One compilation serves all token counts and gives the eager results; ``config``: of ``torch._dynamo``."""
    torch._dynamo.reset()

    def run(x):
        state = TokenState(num_prefix=1)
        x, state = state.as_packed(x) if packed else (x, state)
        return walk(blocks, x, reducer, state)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True, **config):
        for count in counts:
            x = tokens(2, count, seed=count)
            torch.manual_seed(count)
            expected, _ = run(x)
            torch.manual_seed(count)
            torch.testing.assert_close(compiled(x)[0], expected)


def nearest_rows(features, kept):
    """For every row of ``features [n, C]`` the position in ``kept`` of the closest kept row."""
    return ((features[:, None] - features[kept][None]) ** 2).sum(-1).argmin(1)


__all__ = [
    "DEPTH",
    "HEADS",
    "WIDTH",
    "TinyBlock",
    "compile_over_counts",
    "dense",
    "nearest_rows",
    "pack_ragged",
    "split",
    "tiny_blocks",
    "tokens",
    "walk",
]
