# SPDX-License-Identifier: Apache-2.0
"""DeiT (Touvron et al., arXiv 2012.12877): timm's ``VisionTransformer`` in the sizes of the token-pruning papers."""

from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer

from ._base import check_options, register

__all__ = ["SIZES", "deit", "evaluation_setting"]

# width, heads
SIZES = {"tiny": (192, 3), "256": (256, 4), "small": (384, 6), "base": (768, 12)}


def deit(
    *,
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    block_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    device=None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """A DeiT without distillation token, freshly initialised.

    Args:
        img_size: input size; others are refused.
        patch_size: side of a patch.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, width of the MLP over that of the block.
        qkv_bias: bias of the projection to queries, keys and values.
        num_classes: outputs.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 at the first.
        block_eps, norm_eps: eps of the LayerNorms in the blocks, and of the last one.
        device, dtype: of the parameters.
    """
    model = VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(LayerNorm, eps=block_eps),
        device=device,
        dtype=dtype,
    )
    model.norm.eps = norm_eps
    model.pretrained_cfg = model.default_cfg = evaluation_setting(model)
    return model


def evaluation_setting(model: VisionTransformer) -> dict:
    """How DeiT and LV-ViT are evaluated: short side to 8/7 of the input by bicubic interpolation, central crop."""
    return {
        "architecture": type(model).__name__.lower(),
        "input_size": (3, *model.patch_embed.img_size),
        "fixed_input_size": True,
        "num_classes": model.num_classes,
        "pool_size": None,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


@register("deit_256_patch16_224")
def deit_256_patch16_224(**options) -> VisionTransformer:
    """DeiT of width 256, which DynamicViT introduced. Options: those of :func:`deit`."""
    check_options("deit_256_patch16_224", options, deit)
    width, heads = SIZES["256"]
    return deit(**{"embed_dim": width, "num_heads": heads} | options)
