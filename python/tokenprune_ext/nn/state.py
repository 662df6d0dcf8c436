# SPDX-License-Identifier: Apache-2.0
"""What is known about the tokens that a model currently processes. The tokens themselves travel beside it."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ops import TokenIndex


@dataclass(frozen=True)
class TokenState:
    """Description of the current tokens: ``[B, N, C]`` (padded) or ``[T, C]`` (packed: ``cu_seqlens`` is set).

    Nothing in it is ever changed in place: every step returns a new state.

    Attributes:
        grid: ``(height, width)`` of the original patch map, None when there is none (patches dropped at random).
        num_prefix: leading tokens of every sequence that are no patches (class, distillation, register tokens).
        cu_seqlens: int32 ``[B + 1]``, where each packed sequence starts; None for padded tokens.
        max_seqlen: upper bound of the sequence lengths when packed, otherwise 0.
        index: int32 ``[B, N]`` or ``[T]``: the original patch of each token (of a merged one: of its first source), -1
            for a token that is no patch (prefix, fused); None when it is not followed.
        size: ``[B, N]`` or ``[T]``: how many original tokens each token stands for; None means one each.
        key_bias: ``[B, N]`` or ``[T]``: added to the attention logits of each key (log size; ``-inf`` hides a key).
        carry: tensors of the method by name. ``"parent"`` (int32 ``[B, N0]``: the current row, within its image, of
            every original token, -1 = dropped) is kept up to date by every method when it is there, as ``index`` is:
            that is the trace.
    """

    grid: tuple[int, int] | None = None
    num_prefix: int = 0
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    index: Tensor | None = None
    size: Tensor | None = None
    key_bias: Tensor | None = None
    carry: dict[str, Tensor] = field(default_factory=dict)

    def with_trace(self, x: Tensor) -> "TokenState":
        """The state of not yet reduced tokens ``x`` with a trace (``index`` and ``carry["parent"]``) begun.

        An index that is there already stays (models that need to know their tokens' places start with one).
        """
        if "parent" in self.carry:
            return self
        if self.packed:
            row = row_positions(self.cu_seqlens, x.shape[0])
            column = torch.arange(self.max_seqlen, dtype=torch.int32, device=x.device)
            parent = torch.where(column < self.cu_seqlens.diff()[:, None], column, -1)
        else:
            batch, tokens = x.shape[:2]
            row = parent = torch.arange(tokens, dtype=torch.int32, device=x.device).repeat(batch, 1)
        index = torch.where(row < self.num_prefix, -1, row - self.num_prefix) if self.index is None else self.index
        return replace(self, index=index, carry={**self.carry, "parent": parent})

    def with_index(self, x: Tensor) -> "TokenState":
        """The state of not yet reduced, padded tokens ``x`` with ``index`` begun, without the rest of a trace."""
        row = torch.arange(-self.num_prefix, x.shape[1] - self.num_prefix, dtype=torch.int32, device=x.device)
        return replace(self, index=row.clamp(min=-1).repeat(x.shape[0], 1))

    def replace(self, **changes) -> "TokenState":
        """A copy with some attributes changed."""
        return replace(self, **changes)

    def with_carry(self, **tensors: Tensor) -> "TokenState":
        """A copy with entries of ``carry`` added or replaced."""
        return replace(self, carry={**self.carry, **tensors})

    @property
    def packed(self) -> bool:
        """Whether the tokens are ``[T, C]`` with ``cu_seqlens``."""
        return self.cu_seqlens is not None

    def sequences(self, x: Tensor) -> tuple[Tensor, int]:
        """``(cu_seqlens, max_seqlen)`` of tokens ``x``, packed or padded, for the ragged ops."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens, self.max_seqlen
        batch, tokens = x.shape[:2]
        return torch.arange(batch + 1, dtype=torch.int32, device=x.device) * tokens, tokens

    def lengths(self, x: Tensor) -> Tensor:
        """Tokens per image, int32 ``[B]``."""
        return self.sequences(x)[0].diff()

    def as_packed(self, x: Tensor) -> tuple[Tensor, "TokenState"]:
        """The same tokens as ``[T, C]`` with ``cu_seqlens``; packed tokens are returned as they are."""
        if self.cu_seqlens is not None:
            return x, self
        cu_seqlens, max_seqlen = self.sequences(x)
        fields = {name: _flatten(getattr(self, name)) for name in ("index", "size", "key_bias")}
        return x.flatten(0, 1), replace(self, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **fields)

    def as_padded(self, x: Tensor) -> tuple[Tensor, "TokenState"]:
        """Packed tokens of equal lengths as ``[B, N, C]``; padded tokens are returned as they are.

        Raises:
            ValueError: the lengths differ (``T != B * max_seqlen``).
        """
        if self.cu_seqlens is None:
            return x, self
        batch = self.cu_seqlens.shape[0] - 1
        if not self.uniform(x):
            raise ValueError(
                f"TokenState.as_padded: sequences must all have max_seqlen ({self.max_seqlen}) tokens, "
                f"got {x.shape[0]} tokens in {batch} sequences"
            )
        shape = (batch, self.max_seqlen)
        fields = {
            name: None if getattr(self, name) is None else getattr(self, name).view(shape)
            for name in ("index", "size", "key_bias")
        }
        return x.view(*shape, x.shape[-1]), replace(self, cu_seqlens=None, max_seqlen=0, **fields)

    def gathered(self, index: TokenIndex, extra: int = 0, **carry: Tensor) -> "TokenState":
        """The packed state of chosen tokens.

        Args:
            index: flat rows of the current tokens (a row of -1 may say anything), their ``cu_seqlens`` and bound.
            extra: number of rows behind those of the current tokens, made by the method: no patches, of size 1.
            carry: entries to add.
        """
        fields = {}
        for name, made in (("index", -1), ("size", 1), ("key_bias", 0)):
            values = getattr(self, name)
            if values is not None:
                values = values.flatten()
                values = torch.cat([values, values.new_full((extra,), made)]) if extra else values
                fields[name] = values[index.indices.clamp(min=0).long()]
        carry = {**self.carry, **carry}
        return replace(self, cu_seqlens=index.cu_seqlens, max_seqlen=index.max_seqlen, carry=carry, **fields)

    def uniform(self, x: Tensor) -> bool:
        """Whether all sequences are known, from shapes alone, to be equally long."""
        return self.cu_seqlens is None or x.shape[0] == (self.cu_seqlens.shape[0] - 1) * self.max_seqlen

    def reparent(self, rows: Tensor) -> "TokenState":
        """Follow the trace through one step; ``rows`` int32 ``[B, N]``: the new row of every current row, -1 = dropped."""
        if "parent" not in self.carry:
            return self
        parent = self.carry["parent"]
        moved = rows.gather(1, parent.clamp(min=0).long())
        return self.with_carry(parent=torch.where(parent < 0, parent, moved.to(torch.int32)))


torch.export.register_dataclass(TokenState, serialized_type_name="tokenprune_ext.TokenState")


def sequence_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The sequence each packed row belongs to: int64 ``[T]``."""
    if cu_seqlens.shape[0] == 2:
        return torch.zeros(rows, dtype=torch.int64, device=cu_seqlens.device)
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True).clamp(max=cu_seqlens.shape[0] - 2)


def row_positions(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Position of each packed row within its sequence: int32 ``[T]``."""
    row = torch.arange(rows, dtype=torch.int32, device=cu_seqlens.device)
    if cu_seqlens.shape[0] == 2:
        return row
    return row - cu_seqlens[sequence_of_row(cu_seqlens, rows)].to(torch.int32)


def pad_rows(values: Tensor, cu_seqlens: Tensor, max_seqlen: int, fill: float) -> Tensor:
    """Packed ``[T, ...]`` -> ``[B, max_seqlen, ...]``, ``fill`` behind the end of each sequence."""
    column = torch.arange(max_seqlen, dtype=torch.int32, device=values.device)
    rows = cu_seqlens[:-1, None] + column
    inside = rows < cu_seqlens[1:, None]
    padded = (
        values[rows.clamp(max=values.shape[0] - 1).long()]
        if values.shape[0]
        else values.new_zeros(*rows.shape, *values.shape[1:])
    )
    return torch.where(inside.view(*inside.shape, *[1] * (values.dim() - 1)), padded, fill)


def unpad_rows(values: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """Inverse of :func:`pad_rows`: ``[B, max_seqlen, ...]`` -> ``[rows, ...]``."""
    sequence = sequence_of_row(cu_seqlens, rows)
    return values[sequence, row_positions(cu_seqlens, rows).long()]


def split_prefix(x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """Prefix tokens ``[B, P, ...]``, and the others: ``[B, n, ...]``, or packed, one image after another."""
    prefix = state.num_prefix
    if not state.packed:
        return x[:, :prefix], x[:, prefix:]
    front = (state.cu_seqlens[:-1, None] + torch.arange(prefix, dtype=torch.int32, device=x.device)).long()
    return x[front], x[row_positions(state.cu_seqlens, x.shape[0]) >= prefix]


def _flatten(values):
    return None if values is None else values.flatten()
