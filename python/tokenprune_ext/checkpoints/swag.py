# SPDX-License-Identifier: Apache-2.0
"""SWAG files (``vit_l16_in1k.torch`` ...), and the same weights under torchvision's names."""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["convert", "matches", "resize_pos_embedding"]

# Official and torchvision's names -> timm's. The first of each pair is a regular expression.
_RULES = (
    (r"class_token", "cls_token"),
    (r"conv_proj\.", "patch_embed.proj."),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.(?:encoder_)?layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
    (r"encoder\.layers\.(?:encoder_)?layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"encoder\.layers\.(?:encoder_)?layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"encoder\.layers\.(?:encoder_)?layer_(\d+)\.mlp\.(?:linear_1|0)\.", r"blocks.\1.mlp.fc1."),
    (r"encoder\.layers\.(?:encoder_)?layer_(\d+)\.mlp\.(?:linear_2|3)\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
    (r"(?:head\.layers|heads)\.head\.", "head."),
)


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of a SWAG vision transformer."""
    return "encoder.pos_embedding" in state and "conv_proj.weight" in state


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names -> those of timm's ``VisionTransformer``; position embeddings are resized to the model's grid."""
    converted = {_renamed(key): value for key, value in state.items()}
    own = dict(model.named_parameters())
    if "pos_embed" in own and "pos_embed" in converted:
        converted["pos_embed"] = _fitted(converted["pos_embed"], own["pos_embed"], model)
    return converted


def _renamed(key):
    for pattern, name in _RULES:
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return key


def _fitted(embedding, own, model):
    """``[tokens, 1, D]`` or ``[1, tokens, D]`` -> the model's ``[1, tokens', D]``."""
    if embedding.dim() == 3 and embedding.shape[1] == 1:
        embedding = embedding.transpose(0, 1)
    if embedding.dim() == 3 and embedding.shape[1] != own.shape[1]:
        embedding = resize_pos_embedding(
            embedding.transpose(0, 1), model.patch_embed.grid_size, class_token=model.cls_token is not None
        ).transpose(0, 1)
    return embedding.contiguous()


def resize_pos_embedding(embedding: Tensor, grid: tuple[int, int], *, class_token: bool = True) -> Tensor:
    """Resize a square map of position embeddings as SWAG does: bicubic, corners aligned, the class entry kept.

    Args:
        embedding: ``[tokens, 1, D]``.
        grid: rows and columns wanted.
        class_token: whether the first entry belongs to a class token.

    Returns:
        ``[grid[0] * grid[1] (+ 1), 1, D]``, of the embedding's dtype.

    Raises:
        ValueError: the patches' entries are no square map.
    """
    front, patches = embedding[: int(class_token)], embedding[int(class_token) :]
    side = math.isqrt(patches.shape[0])
    if side * side != patches.shape[0] or side == 0:
        raise ValueError(
            f"resize_pos_embedding: embedding must have a square number of patch entries, got {patches.shape[0]}"
        )
    if (side, side) == tuple(grid):
        return embedding
    maps = patches[:, 0].T.reshape(1, -1, side, side).float()
    maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=True).to(embedding.dtype)
    return torch.cat([front, maps.flatten(2)[0].T[:, None]])
