# SPDX-License-Identifier: Apache-2.0
"""What timm's vision transformers have in common: methods to replace, and checks."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import PackedLinear
from ..ops import packed_linear
from ._walk import NORMS, full_map, must_be, must_keep, must_run, no_more_parts, pools

MLPS = ("GeGluMlp", "GluMlp", "Mlp", "SwiGLU", "SwiGLUPacked")
SCALES = ("BranchScale", "Identity", "LayerScale")
DROPS = ("DropPath", "Identity")
_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


@dataclass(frozen=True)
class Family:
    """One of timm's model files: the classes that an adapter knows, by name (timm may not be imported yet).

    Attributes:
        module: of ``timm.models``.
        model: the class of its models.
        blocks, attentions: classes whose code is known.
    """

    module: str
    model: str
    blocks: tuple[str, ...]
    attentions: tuple[str, ...]

    def find(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """Models of the family in ``model`` (itself included), by name."""
        library = sys.modules.get(f"timm.models.{self.module}")
        if library is None:  # a timm model cannot exist before timm was imported
            return []
        cls = getattr(library, self.model)
        return [(name, part) for name, part in model.named_modules() if isinstance(part, cls)]

    def check(self, model: nn.Module, owner: nn.Module | None = None) -> None:
        """Refuse what would not be reproduced exactly.

        Raises:
            ValueError: names the component.
        """
        library = sys.modules[f"timm.models.{self.module}"]
        check_model(model, getattr(library, self.model))
        blocks, attentions = (tuple(getattr(library, n) for n in names) for names in (self.blocks, self.attentions))
        for number, block in enumerate(model.blocks):
            name = f"blocks.{number}"
            must_run(name, block, blocks, "timm")
            must_run(f"{name}.attn", block.attn, attentions, "timm")
            check_parts(name, block)


def facts(model: nn.Module, **different) -> dict:
    """What reducers may want to know about the model; ``different`` wins."""
    attn = model.blocks[0].attn
    return {
        "depth": len(model.blocks),
        "embed_dim": model.embed_dim,
        "head_dim": attn.proj.in_features // attn.num_heads,
        "num_heads": attn.num_heads,
        "num_prefix": model.num_prefix_tokens,
        "class_token": getattr(model, "cls_token", None) is not None,
        "distill_token": getattr(model, "dist_token", None) is not None,
        "pooling": model.global_pool,
        **different,
    }


def check_model(model: nn.Module, cls: type) -> None:
    """Refuse a model with methods of its own, or without blocks.

    Raises:
        ValueError: names what is wrong.
    """
    must_keep(model, cls, ("forward", "forward_features", "forward_intermediates"), "timm")
    if not len(model.blocks):
        raise ValueError("patch: model must have blocks, got none")
    pool = getattr(model, "attn_pool", None)
    if getattr(pool, "pos_embed", None) is not None:
        raise ValueError("patch: attn_pool must have no position embedding of its own, got one")


def check_parts(name: str, block: nn.Module) -> None:
    """Refuse unknown norms, MLPs, scales, and parts of a block.

    Raises:
        ValueError: names the component.
    """
    attn = block.attn
    must_be(f"{name}.mlp", block.mlp, MLPS)
    for owner, path, part in (
        (block, name, "norm1"),
        (block, name, "norm2"),
        *((attn, f"{name}.attn", part) for part in ("q_norm", "k_norm", "norm")),
    ):
        if hasattr(owner, part):
            must_be(f"{path}.{part}", getattr(owner, part), NORMS)
    for part, kinds in (("ls1", SCALES), ("ls2", SCALES), ("drop_path1", DROPS), ("drop_path2", DROPS)):
        if hasattr(block, part):
            must_be(f"{name}.{part}", getattr(block, part), kinds)
    no_more_parts(name, block, _PARTS)


class BiasedQkv:
    """A qkv projection whose bias is held apart from it (that of the keys is a buffer of zeros).

    Args:
        attn: the attention module, with ``qkv``, ``q_bias``, ``k_bias``, ``v_bias``.
    """

    def __init__(self, attn: nn.Module):
        self.linear, self.biases = attn.qkv, (attn.q_bias, attn.k_bias, attn.v_bias)

    def __call__(self, z: Tensor) -> Tensor:
        """``[..., C] -> [..., 3 * H * D]``."""
        linear, bias = self.linear, torch.cat(self.biases)
        pair = linear.take(z, bias) if isinstance(linear, PackedLinear) else None
        if pair is not None:
            return packed_linear(z, pair[0], linear.out_features, bias)
        return F.linear(z, linear.weight, bias)


def projection(attn: nn.Module):
    """The qkv projection of an attention module that has it in one, two or three pieces."""
    if attn.qkv is None:
        return attn.q_proj, attn.k_proj, attn.v_proj
    return attn.qkv if getattr(attn, "q_bias", None) is None else BiasedQkv(attn)


def methods(model: nn.Module, run: Callable) -> dict:
    """The functions that replace the model's own, by name. ``partial`` survives deepcopy and pickling.

    Args:
        model: with its reducer.
        run: the adapter's ``forward(model, images, *, trace, each)``.
    """
    own = {
        "forward_features": partial(_forward_features, run, model),
        "forward_intermediates": partial(_forward_intermediates, run, model),
    }
    # Pooling that reads the state happens in forward, the one place that has both.
    if pools(model) or hasattr(model, "forward_tokens"):
        own["forward"] = partial(_forward, run, model)
    return own


def _forward(run, model, x, attn_mask=None, is_causal=False):
    _no_mask(attn_mask, is_causal)
    x, state = run(model, x)
    if hasattr(model, "forward_tokens"):  # a head that reads every token, not a pooled one
        return model.forward_tokens(x, state)
    return model.forward_head(model.token_reducer.pool(x, state))


def _forward_features(run, model, x, attn_mask=None, is_causal=False):
    _no_mask(attn_mask, is_causal)
    x, state = run(model, x)
    if not state.packed:
        return x
    if hasattr(model, "forward_tokens"):
        raise ValueError(
            "forward_features: tokens must be padded for timm's forward_head, got images of different lengths (use "
            "tokenprune_ext.features, or the model itself)"
        )
    return model.token_reducer.pool(x, state)


def _forward_intermediates(
    run,
    model,
    x,
    indices=None,
    return_prefix_tokens=False,
    norm=False,
    stop_early=False,
    output_fmt="NCHW",
    intermediates_only=False,
    output_dict=False,
    attn_mask=None,
    is_causal=False,
):
    """timm's ``forward_intermediates``: the maps are restored to the full grid, the final features stay reduced."""
    _no_mask(attn_mask, is_causal)
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
    from timm.models._features import feature_take_indices

    wanted, _ = feature_take_indices(len(model.blocks), indices)
    maps, prefixes = [], []

    def take(layer, tokens, state):
        if layer in wanted:
            front, patches = full_map(model, model.norm(tokens) if norm else tokens, state)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, state.grid).contiguous()
            maps.append(patches)
            prefixes.append(front)

    features, _ = run(model, x, trace=True, each=take)
    with_prefix = return_prefix_tokens and model.num_prefix_tokens > 0
    if output_dict:
        result = {"image_intermediates": maps}
        if with_prefix:
            result["image_intermediates_prefix"] = prefixes
        return result if intermediates_only else {**result, "image_features": features}
    maps = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
    return maps if intermediates_only else (features, maps)


def _no_mask(attn_mask, is_causal):
    if attn_mask is not None or is_causal:
        raise ValueError(
            "patched model: attn_mask must be None and is_causal False (reduced tokens have no fixed places), "
            f"got {'is_causal=True' if is_causal else 'a mask'}"
        )
