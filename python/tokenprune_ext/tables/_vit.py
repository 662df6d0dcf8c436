# SPDX-License-Identifier: Apache-2.0
"""Sizes of a vision transformer, and what all counting rules share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class Layer(NamedTuple):
    """Tokens of one image in the two halves of a block, prefix tokens included."""

    attention: float
    mlp: float


@dataclass(frozen=True)
class Counts:
    """How many tokens a model processes.

    Attributes:
        layers: per block.
        groups: by block, the groups that attention was computed for (ACT: the largest number over the heads).
    """

    layers: tuple[Layer, ...]
    groups: dict[int, float]


@dataclass(frozen=True)
class Dims:
    """Sizes of a ViT.

    Attributes:
        width, hidden, heads, depth: of the blocks; hidden is the width of the MLP (0: of a kind that has several).
        patches, prefix: tokens of an image, and those in front of them.
        classes, aux_classes: outputs of the classifier and of a second one on every patch (0: none).
        stem: multiply-adds of the patch embedding.
        projections, mlp: weights of the linear layers in the two halves of a block.
    """

    width: int
    hidden: int
    heads: int
    depth: int
    patches: int
    prefix: int
    classes: int
    aux_classes: int
    stem: int
    projections: int
    mlp: int

    @property
    def tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.patches + self.prefix


def dims_of(model: nn.Module) -> Dims | None:
    """Sizes of a model built like timm's ``VisionTransformer``, None for others."""
    blocks, stem = getattr(model, "blocks", None), getattr(model, "patch_embed", None)
    plain = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks) > 0
    stemmed = getattr(stem, "img_size", None) is not None and hasattr(stem, "num_patches")
    if not plain or not stemmed or not hasattr(model, "embed_dim") or _uneven(blocks):
        return None
    block = blocks[0]
    head, aux = getattr(model, "head", None), getattr(model, "aux_head", None)
    return Dims(
        width=model.embed_dim,
        hidden=getattr(getattr(block.mlp, "fc1", None), "out_features", 0),
        heads=block.attn.num_heads,
        depth=len(blocks),
        patches=stem.num_patches,
        prefix=getattr(model, "num_prefix_tokens", 0),
        classes=head.out_features if isinstance(head, nn.Linear) else 0,
        aux_classes=aux.out_features if isinstance(aux, nn.Linear) else 0,
        stem=_conv_macs(stem),
        projections=linear_weights(block.attn),
        mlp=linear_weights(block.mlp),
    )


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers below a module: their multiply-adds per token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _uneven(blocks):
    """Whether blocks differ in size, or are no transformer blocks."""
    if not all(hasattr(getattr(block, "attn", None), "num_heads") and hasattr(block, "mlp") for block in blocks):
        return True
    return len({(linear_weights(block.attn), linear_weights(block.mlp)) for block in blocks}) > 1


def _conv_macs(stem):
    """Convolutions one after another, from the image on."""
    side, macs = tuple(stem.img_size), 0
    for conv in (m for m in stem.modules() if isinstance(m, nn.Conv2d)):
        pads = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
        side = tuple(
            (length + 2 * pad - kernel) // step + 1
            for length, pad, kernel, step in zip(side, pads, conv.kernel_size, conv.stride)
        )
        macs += conv.weight.numel() * math.prod(side)
    return macs


def macs_by_part(dims: Dims, layers: Sequence[Layer]) -> dict[str, float]:
    """Multiply-adds of linear layers, convolutions and attention products at given token counts."""
    left = layers[-1].mlp - dims.prefix
    blocks = sum(dims.projections * layer.attention + dims.mlp * layer.mlp for layer in layers)
    return {
        "linear": blocks + dims.width * (dims.classes + left * dims.aux_classes),
        "conv": dims.stem,
        "attention": sum(2 * dims.width * layer.attention**2 for layer in layers),
    }


def matmul_macs(dims: Dims, layers: Sequence[Layer]) -> float:
    """All of :func:`macs_by_part`."""
    return sum(macs_by_part(dims, layers).values())


def uniform(counts: Sequence[float]) -> list[Layer]:
    """Layers with the same tokens in both halves."""
    return [Layer(count, count) for count in counts]


def planned(model: nn.Module) -> list[Layer] | None:
    """Tokens per block of a model, dense or patched; None when they depend on the data."""
    dims, reducer = dims_of(model), getattr(model, "token_reducer", None)
    if reducer is None:
        return uniform([dims.tokens] * dims.depth)
    plan = reducer.plan(dims.depth, dims.tokens)
    return None if plan is None else [Layer(*counts) for counts in plan]


def is_swag(model: nn.Module) -> bool:
    """Whether a model is one of ``models/swag.py``."""
    return str((getattr(model, "default_cfg", None) or {}).get("architecture", "")).startswith("swag_vit")
