# SPDX-License-Identifier: Apache-2.0
"""LV-ViT files (zihangJiang/TokenLabeling): flat state dicts with stem, auxiliary head and BatchNorm statistics."""

from torch import Tensor, nn

from .deit import with_own_selectors

__all__ = ["convert", "matches"]


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of a dense LV-ViT."""
    wanted = {"cls_token", "pos_embed", "aux_head.weight", "blocks.0.attn.qkv.weight"}
    extra = ("score_predictor.", "token_reducer.")
    return wanted <= state.keys() and not any(key.startswith(extra) for key in state)


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names are the model's names."""
    return with_own_selectors(state, model)
