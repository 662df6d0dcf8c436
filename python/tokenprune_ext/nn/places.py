# SPDX-License-Identifier: Apache-2.0
"""Attention that knows where tokens are: rotary embedding and biases of pairs, followed through ``state.index``.

A reduced token stands where the patch in ``state.index`` was (a merged one: where the first of its sources was). A token
that was made and stands for no single patch has no place.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._register import stat_dtype
from .state import TokenState, pad_rows, sequence_of_row, unpad_rows


class Rotary:
    """Rotary position embedding (Su et al., arXiv 2104.09864) of patch tokens, for one forward pass.

    Tokens without a place (prefix and made tokens) are not rotated.

    Args:
        sin, cos: of every patch ``[N, D]``, of every head ``[H, N, D]``, or of every image ``[B, 1 or H, N, D]``.
        state: of the tokens in front of the first block; its ``index`` must be there.
        half: the pairs that rotate are ``(i, i + D/2)``; otherwise ``(2i, 2i + 1)``.
        keep: remember the gathered values until the index changes. False where blocks run again in the backward pass
            (gradient checkpointing).
    """

    def __init__(self, sin: Tensor, cos: Tensor, state: TokenState, *, half: bool, keep: bool = True):
        self.start, self.half, self._keep = state.index, half, keep
        self._front = max(state.num_prefix, 1)
        if half:
            low, high = sin.chunk(2, -1)
            sin = torch.cat([-low, high], -1)
        else:
            sin = torch.stack([-sin[..., ::2], sin[..., 1::2]], -1).flatten(-2)
        # In front of the patches: rows that turn nothing, for the prefix, the last of them for index -1.
        self._sin = F.pad(_by_patch(sin), (0, 0, 0, 0, self._front, 0))
        self._cos = F.pad(_by_patch(cos), (0, 0, 0, 0, self._front, 0), value=1.0)
        dense = slice(self._front - state.num_prefix, None)
        self._dense = self._sin[:, dense], self._cos[:, dense]
        self._last = None

    def __call__(self, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[B, N, H, D]`` or ``[T, H, D]``, rotated."""
        sin, cos = self.at(state)
        return self._turn(q, sin, cos), self._turn(k, sin, cos)

    def at(self, state: TokenState) -> tuple[Tensor, Tensor]:
        """Sine (signed, for the partner of each channel) and cosine of the current tokens, ``[..., 1 or H, D]``."""
        if state.index is self.start:
            return self._dense
        if self._last is not None and self._last[0] is state.index:
            return self._last[1]
        rows = state.index.long() + self._front
        images, patches = self._sin.shape[:2]
        if images > 1:
            image = sequence_of_row(state.cu_seqlens, rows.shape[0]) if state.packed else _rows(rows)[:, None]
            rows = rows + image * patches
        found = self._sin.flatten(0, 1)[rows], self._cos.flatten(0, 1)[rows]
        if self._keep:
            self._last = state.index, found
        return found

    def _turn(self, x, sin, cos):
        if self.half:
            partner = x.roll(x.shape[-1] // 2, -1)
        else:
            partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (x * cos + partner * sin).to(x.dtype)


class PairBias:
    """A bias of the attention logits for every pair of tokens, for one forward pass.

    Tokens that were made are treated as the class token is; without a class token they have no bias.

    Args:
        full: makes the bias of all tokens in front of the first block, ``[H, N, N]``, or ``[1, H, N, N]``.
        state: of these tokens, padded; its ``index`` must be there. At most one prefix token.
    """

    def __init__(self, full: Callable[[], Tensor], state: TokenState):
        if state.num_prefix > 1:
            raise ValueError(f"PairBias: num_prefix must be at most 1, got {state.num_prefix}")
        self._full, self.start, self._class = full, state.index, state.num_prefix == 1

    def __call__(self, state: TokenState) -> Tensor:
        """Bias of the current tokens ``[1 or B, H, n, n]``; packed ones as if padded to ``max_seqlen``."""
        bias = self._full()
        bias = bias[0] if bias.dim() == 4 else bias
        if state.index is self.start:
            return bias[None]
        bias = bias if self._class else F.pad(bias, (1, 0, 1, 0))
        rows = (state.index if not state.packed else pad_rows(state.index, state.cu_seqlens, state.max_seqlen, -1)) + 1
        rows = rows.long()
        return bias[:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, pair_bias: PairBias, state: TokenState, scale: float, want: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """``AttentionBranch.mix`` with a bias for every pair, by torch's attention."""
    rows, lengths = q.shape[0], None
    product = k.mean(-2) if want == "key" else k
    if state.packed:
        q, k, v = (pad_rows(t, state.cu_seqlens, state.max_seqlen, 0.0) for t in (q, k, v))
        lengths = state.cu_seqlens.diff()
    bias = _with_keys(pair_bias(state), state, lengths)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=bias.to(q.dtype), scale=scale)
    out = out.transpose(1, 2).flatten(2)
    out = unpad_rows(out, state.cu_seqlens, rows) if state.packed else out
    if want in ("cls", "mean"):
        product = _received(*heads[:2], bias, lengths, scale, want)
        product = unpad_rows(product, state.cu_seqlens, rows) if state.packed else product
    return out, None if want is None else product


def biased_policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pair_bias: PairBias,
    state: TokenState,
    policy: Tensor,
    eps: float,
    scale: float,
) -> Tensor:
    """``AttentionBranch.mix_policy`` with a bias for every pair, written out."""
    stat = stat_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, k = (t.to(stat).transpose(1, 2) for t in (q, k))
        logits = q @ k.transpose(2, 3) * scale + pair_bias(state).to(stat)
        tokens = logits.shape[-1]
        visible = policy.to(stat)[:, None, None].expand(-1, -1, tokens, -1)
        itself = torch.eye(tokens, dtype=torch.bool, device=q.device)
        weights = (logits - logits.amax(-1, keepdim=True)).exp() * torch.where(itself, 1.0, visible)
        weights = (weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def _with_keys(bias, state, lengths):
    """The bias with that of the keys added, ``-inf`` behind the end of a sequence."""
    keys = state.key_bias
    if state.packed:
        keys = None if keys is None else pad_rows(keys, state.cu_seqlens, state.max_seqlen, 0.0)
        outside = torch.arange(state.max_seqlen, device=bias.device) >= lengths[:, None]
        keys = torch.where(outside, -math.inf, 0.0 if keys is None else keys)
    return bias if keys is None else bias + keys[:, None, None].to(bias.dtype)


def _received(q, k, bias, lengths, scale, want):
    """Attention that tokens receive, averaged over the heads: from the first query, or averaged over all, ``[B, n]``."""
    stat = stat_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        if want == "cls":
            q, bias = q[:, :, :1], bias[:, :, :1]
        weights = (q.to(stat) @ k.to(stat).transpose(2, 3) * scale + bias.to(stat)).softmax(-1)
        if want == "cls":
            return weights[:, :, 0].mean(1)
        if lengths is None:
            return weights.mean((1, 2))
        real = torch.arange(q.shape[2], device=q.device) < lengths[:, None]
        return (weights.mean(1) * real[:, :, None]).sum(1) / lengths[:, None]


def _by_patch(table):
    """``[N, D]``, ``[H, N, D]`` or ``[B, H, N, D]`` -> ``[1 or B, N, 1 or H, D]``."""
    table = table[None] if table.dim() == 2 else table
    table = table[None] if table.dim() == 3 else table
    return table.transpose(1, 2)


def _rows(values):
    return torch.arange(values.shape[0], device=values.device)
