# SPDX-License-Identifier: Apache-2.0
"""Back to the full grid along the trace."""

import torch
from torch import Tensor

from ..nn import TokenState
from ..ops import gather_tokens


def restore_by_parent(name: str, y: Tensor, state: TokenState) -> Tensor:
    """Every original patch takes the value of the token that stands for it now; zero where there is none.

    Args:
        name: of the method, for the error.
        y: values of the current tokens behind the prefix, ``[B, n, ...]``, or packed: one image after another.
        state: traced.

    Returns:
        ``[B, N0, ...]``.

    Raises:
        ValueError: the state has no trace.
    """
    if "parent" not in state.carry:
        raise ValueError(f"{name}.restore: the state must be traced (TokenState.with_trace), got one without sources")
    prefix = state.num_prefix
    parent = state.carry["parent"][:, prefix:] - prefix
    batch, tokens = parent.shape
    if state.packed:
        starts = state.cu_seqlens[:-1] - prefix * torch.arange(batch, dtype=torch.int32, device=y.device)
    else:
        starts = torch.arange(batch, dtype=torch.int32, device=y.device) * y.shape[1]
        y = y.flatten(0, 1)
    rows = torch.where(parent < 0, -1, parent + starts[:, None])
    flat = y[:, None] if y.dim() == 1 else y.flatten(1)
    return gather_tokens(flat, rows.flatten()).view(batch, tokens, *y.shape[1:])
