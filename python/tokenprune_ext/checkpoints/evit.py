# SPDX-License-Identifier: Apache-2.0
"""EViT files (youweiliang/evit): the method adds no weights, so the layout is DeiT's."""

from torch import Tensor, nn

from . import deit

__all__ = ["convert", "matches"]


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of an EViT, which a DeiT has too."""
    return deit.matches(state)


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names are the model's names."""
    return deit.convert(state, model)
