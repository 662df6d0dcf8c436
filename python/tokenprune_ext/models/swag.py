# SPDX-License-Identifier: Apache-2.0
"""SWAG vision transformers (Singh et al., arXiv 2201.08371): timm's ``VisionTransformer`` with LayerNorm eps 1e-6.

Their token reductions are in ``swag_methods.py``.
"""

from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ._base import check_options, register

__all__ = ["OPTIONS", "SIZES", "swag_sized", "swag_vit"]

# patch size, width, MLP width, layers, heads, resolution of the *_in1k weights
SIZES = {
    "b16": (16, 768, 3072, 12, 12, 384),
    "l16": (16, 1024, 4096, 24, 16, 512),
    "h14": (14, 1280, 5120, 32, 16, 518),
}
_PRETRAINING = 224  # resolution of the weights without a classifier
_ALIASES = {"img_size": "image_size", "embed_dim": "hidden_dim", "depth": "num_layers"}


def swag_vit(
    *,
    image_size: int = 224,
    patch_size: int = 16,
    num_layers: int = 12,
    num_heads: int = 12,
    hidden_dim: int = 768,
    mlp_dim: int = 3072,
    num_classes: int | None = 1000,
    classifier: str = "token",
    dropout_rate: float = 0.0,
    attention_dropout_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    dynamic_img_size: bool = False,
    device=None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """The dense SWAG vision transformer.

    Args:
        image_size: side of the square input, a multiple of ``patch_size``.
        patch_size: side of a patch.
        num_layers, num_heads, hidden_dim, mlp_dim: blocks, heads, width D, width of the MLP.
        num_classes: outputs of the classifier; None: the D features are returned.
        classifier: ``"token"``: a class token is read; ``"gap"``: no class token, the mean of all tokens.
        dropout_rate: behind position embedding, attention and both layers of the MLP.
        attention_dropout_rate: of the attention weights.
        drop_path_rate: stochastic depth of the last block (0 in all published models).
        dynamic_img_size: accept other image sizes in ``forward``, with interpolated position embeddings.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes that do not divide, or an unknown classifier.
    """
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(
            f"swag_vit: image_size must be a positive multiple of patch_size {patch_size}, got {image_size}"
        )
    if hidden_dim % num_heads:
        raise ValueError(f"swag_vit: hidden_dim must be a multiple of num_heads {num_heads}, got {hidden_dim}")
    if classifier not in ("token", "gap"):
        raise ValueError(f"swag_vit: classifier must be 'token' or 'gap', got {classifier!r}")
    token = classifier == "token"
    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        depth=num_layers,
        num_heads=num_heads,
        embed_dim=hidden_dim,
        mlp_ratio=(mlp_dim + 0.5) / hidden_dim,  # timm truncates the product: half a unit keeps it exact
        num_classes=num_classes or 0,
        class_token=token,
        global_pool="token" if token else "avg",
        fc_norm=False,  # the last norm is in front of the mean
        norm_layer=partial(LayerNorm, eps=1e-6),
        pos_drop_rate=dropout_rate,
        proj_drop_rate=dropout_rate,
        attn_drop_rate=attention_dropout_rate,
        drop_path_rate=drop_path_rate,
        dynamic_img_size=dynamic_img_size,
        weight_init="skip",
        device=device,
        dtype=dtype,
    )
    _initialise(model)
    # Shorter side to the resolution by bicubic interpolation, central crop, ImageNet statistics.
    model.pretrained_cfg = model.default_cfg = {
        "architecture": f"swag_vit_{num_layers}x{hidden_dim}_patch{patch_size}",
        "input_size": (3, image_size, image_size),
        "fixed_input_size": not dynamic_img_size,
        "num_classes": num_classes or 0,
        "pool_size": None,
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return model


@torch.no_grad()
def _initialise(model):
    """As published, for training from scratch; it decides nothing once weights are loaded."""
    conv = model.patch_embed.proj
    nn.init.trunc_normal_(conv.weight, std=(conv.weight[0].numel()) ** -0.5)
    nn.init.zeros_(conv.bias)
    nn.init.normal_(model.pos_embed, std=0.02)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    for block in model.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)
        for linear in (block.mlp.fc1, block.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)
    if isinstance(model.head, nn.Linear):
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)


def swag_sized(size: str, published: bool = True, **options) -> VisionTransformer:
    """A network of one of ``SIZES``.

    Args:
        size: ``"b16"``, ``"l16"`` or ``"h14"``.
        published: with the classifier and the resolution of the ``*_in1k`` weights.
        options: ``OPTIONS``; they win.
    """
    patch_size, hidden_dim, mlp_dim, num_layers, num_heads, resolution = SIZES[size]
    setting = {
        "image_size": resolution if published else _PRETRAINING,
        "patch_size": patch_size,
        "hidden_dim": hidden_dim,
        "mlp_dim": mlp_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_classes": 1000 if published else None,
    }
    return swag_vit(**setting | {_ALIASES.get(name, name): value for name, value in options.items()})


# Keywords of swag_vit, and timm's names for some of them.
OPTIONS = (*swag_vit.__kwdefaults__, *_ALIASES)


def _register(size, published):
    name = f"vit_{size}_in1k" if published else f"vit_{size}"

    def build(**options):
        check_options(name, options, OPTIONS)
        return swag_sized(size, published, **options)

    what = "fine-tuned on ImageNet-1k" if published else "pre-trained, without a classifier"
    build.__doc__ = f"SWAG ViT-{size[0].upper()}/{size[1:]}, {what}. Options: those of :func:`swag_vit`."
    build.__module__ = __name__
    register(name)(build)


for _size in SIZES:
    for _published in (False, True):
        _register(_size, _published)
