# SPDX-License-Identifier: Apache-2.0
"""Every head of every image as a row of its own, for methods that sort or cluster tokens per head."""

import math

import torch
from torch import Tensor

from ..nn import TokenState, pad_rows, unpad_rows


def head_rows(values: Tensor, state: TokenState) -> Tensor:
    """``[B, N, H, D]`` or packed ``[T, H, D]`` -> ``[B * H, N, D]``, row ``b * H + h``; zeros behind a sequence's end."""
    if state.packed:
        images = state.cu_seqlens.shape[0] - 1
        values = (
            values.unflatten(0, (images, state.max_seqlen))
            if state.uniform(values)
            else pad_rows(values, state.cu_seqlens, state.max_seqlen, 0.0)
        )
    return values.transpose(1, 2).flatten(0, 1)


def token_rows(rows: Tensor, state: TokenState, like: Tensor) -> Tensor:
    """Inverse of :func:`head_rows`: ``[B * H, N, D]`` -> ``[..., H * D]``, shaped like the values that came in."""
    rows = rows.unflatten(0, (rows.shape[0] // like.shape[-2], like.shape[-2])).transpose(1, 2).flatten(2)
    if not state.packed:
        return rows
    return rows.flatten(0, 1) if state.uniform(like) else unpad_rows(rows, state.cu_seqlens, like.shape[0])


def real_tokens(values: Tensor, state: TokenState) -> Tensor | None:
    """Which slots of :func:`head_rows` hold tokens, bool ``[B * H, N]``; None when all do."""
    if not state.packed or state.uniform(values):
        return None
    column = torch.arange(state.max_seqlen, dtype=torch.int32, device=values.device)
    return (column < state.cu_seqlens.diff()[:, None]).repeat_interleave(values.shape[-2], 0)


def head_bias(values: Tensor, state: TokenState) -> Tensor | None:
    """``state.key_bias`` as ``[B * H, N]``, ``-inf`` behind a sequence's end."""
    bias = state.key_bias
    if bias is None:
        return None
    if state.packed:
        bias = (
            bias.unflatten(0, (-1, state.max_seqlen))
            if state.uniform(values)
            else pad_rows(bias, state.cu_seqlens, state.max_seqlen, -math.inf)
        )
    return bias.repeat_interleave(values.shape[-2], 0)
