# SPDX-License-Identifier: Apache-2.0
"""Token reduction in timm's ``VisionTransformer`` family: ViT, DeiT, distilled DeiT, DeiT-III, DINOv2, CLIP, SigLIP.

The model's own parts are walked; nothing is copied and no weight moves. What this file does not know exactly, it
refuses by name.
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import AttentionBranch, BlockParts, MlpBranch, TokenState, run_block, split_prefix
from ..reducers import Reducer

_MLPS = ("GeGluMlp", "GluMlp", "Mlp", "SwiGLU", "SwiGLUPacked")
_NORMS = (
    "Identity",
    "LayerNorm",
    "LayerNormFp32",
    "RMSNorm",
    "RmsNorm",
    "RmsNormFp32",
    "SimpleNorm",
    "SimpleNormFp32",
)
_INNER = ("q_norm", "k_norm", "norm")
_SCALES = ("BranchScale", "Identity", "LayerScale")
_DROPS = ("DropPath", "Identity")


def find(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """VisionTransformers of timm in ``model`` (itself included), by name."""
    library = sys.modules.get("timm.models.vision_transformer")
    if library is None:  # a timm model cannot exist before timm was imported
        return []
    return [(name, part) for name, part in model.named_modules() if isinstance(part, library.VisionTransformer)]


def facts(model: nn.Module) -> dict:
    """What reducers may want to know about the model."""
    return {
        "depth": len(model.blocks),
        "embed_dim": model.embed_dim,
        "head_dim": model.blocks[0].attn.head_dim,
        "num_heads": model.blocks[0].attn.num_heads,
        "num_prefix": model.num_prefix_tokens,
        "class_token": model.cls_token is not None,
        "distill_token": getattr(model, "dist_token", None) is not None,
        "pooling": model.global_pool,
    }


def check(model: nn.Module) -> None:
    """Refuse what would not be reproduced exactly.

    Raises:
        ValueError: names the component.
    """
    library = sys.modules["timm.models.vision_transformer"]
    for name in ("forward", "forward_features", "forward_intermediates"):
        if getattr(type(model), name) is not getattr(library.VisionTransformer, name) or name in vars(model):
            raise ValueError(f"patch: model must use timm's {name}, got an overridden one in {type(model).__name__}")
    for number, block in enumerate(model.blocks):
        _check_block(f"blocks.{number}", block, library)
    if not len(model.blocks):
        raise ValueError("patch: model must have blocks, got none")


def forward(
    model: nn.Module,
    images: Tensor,
    *,
    record: list | None = None,
    trace: bool = False,
    carry: dict[str, Tensor] | None = None,
    each=None,
) -> tuple[Tensor, TokenState]:
    """Features of the final norm, and the state of their tokens.

    Args:
        model: a patched VisionTransformer.
        images: ``[B, 3, H, W]``.
        record: see :func:`tokenprune_ext.nn.run_block`.
        trace: ask the method for a trace.
        carry: entries that the method finds in ``state.carry`` (given noise).
        each: called with ``(layer, x, state)`` after every block.
    """
    x, grid = embed(model, images)
    state = TokenState(grid=grid, num_prefix=model.num_prefix_tokens, carry=dict(carry or {}))
    state = state.with_trace(x) if trace else state
    x, state = walk(model, x, state, record=record, each=each)
    return model.norm(x), state


def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
    """Tokens ``[B, N, C]`` in front of the blocks and their grid (None when patches were dropped at random)."""
    x = model.patch_embed(images)
    grid = tuple(x.shape[1:3]) if x.dim() == 4 else tuple(model.patch_embed.grid_size)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    return x, grid if x.shape[1] == grid[0] * grid[1] + model.num_prefix_tokens else None


def walk(
    model: nn.Module, x: Tensor, state: TokenState, *, record: list | None = None, each=None
) -> tuple[Tensor, TokenState]:
    """Tokens through all blocks with the model's reducer."""
    reducer = model.token_reducer
    x, state = reducer.begin(x, state)
    saving = model.grad_checkpointing and torch.is_grad_enabled()
    for layer, block in enumerate(model.blocks):
        step = partial(run_block, parts(block), layer=layer, reducer=reducer, record=record)
        x, state = checkpoint(step, x, state, use_reentrant=False) if saving else step(x, state)
        if each is not None:
            each(layer, x, state)
    return x, state


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name. ``partial`` survives deepcopy and pickling."""
    own = {
        "forward_features": partial(_forward_features, model),
        "forward_intermediates": partial(_forward_intermediates, model),
    }
    # Pooling that reads the state happens in forward, the one place that has both.
    return own | {"forward": partial(_forward, model)} if _pools(model) else own


def parts(block: nn.Module) -> BlockParts:
    """A timm block as branches over its own submodules."""
    own, inner = block._modules, block.attn._modules  # plain dictionaries: this runs at every forward
    post = "ls1" not in own  # ResPostBlock: the norm sits behind the branch, where LayerScale would be
    attn, norm1, norm2 = own["attn"], own["norm1"], own["norm2"]
    dropped = inner["attn_drop"]
    attention = AttentionBranch(
        _same if post else norm1,
        inner["qkv"],
        inner["proj"],
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        q_norm=_present(inner["q_norm"]),
        k_norm=_present(inner["k_norm"]),
        out_norm=_present(inner.get("norm")),  # absent in older timm
        gate=inner.get("gate"),
        proj_drop=inner["proj_drop"],
        attn_drop=dropped.p if dropped.training else 0.0,
        layer_scale=norm1 if post else _present(own["ls1"]),
        drop_path=own["drop_path1"],
    )
    mlp = MlpBranch(
        _same if post else norm2,
        own["mlp"],
        layer_scale=norm2 if post else _present(own["ls2"]),
        drop_path=own["drop_path2"],
    )
    return BlockParts(attention, mlp, block)


def _pools(model):
    return type(model.token_reducer).pool is not Reducer.pool or hasattr(model, "forward_tokens")


def _forward(model, x, attn_mask=None, is_causal=False):
    _no_mask(attn_mask, is_causal)
    x, state = forward(model, x)
    if hasattr(model, "forward_tokens"):  # a head that reads every token, not a pooled one
        return model.forward_tokens(x, state)
    return model.forward_head(model.token_reducer.pool(x, state))


def _forward_features(model, x, attn_mask=None, is_causal=False):
    _no_mask(attn_mask, is_causal)
    x, state = forward(model, x)
    if not state.packed:
        return x
    if hasattr(model, "forward_tokens"):
        raise ValueError(
            "forward_features: tokens must be padded for timm's forward_head, got images of different lengths (use "
            "tokenprune_ext.features, or the model itself)"
        )
    return model.token_reducer.pool(x, state)


def _forward_intermediates(
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
            tokens = model.norm(tokens) if norm else tokens
            front, rest = split_prefix(tokens, state)
            patches = model.token_reducer.restore(rest, state)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, state.grid).contiguous()
            maps.append(patches)
            prefixes.append(front)

    features, _ = forward(model, x, trace=True, each=take)
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


def _check_block(name, block, library):
    known = (library.Block, library.ResPostBlock)
    if type(block).forward not in [cls.forward for cls in known] or "forward" in vars(block):
        names = " or ".join(cls.__name__ for cls in known)
        raise ValueError(f"patch: {name} must be a timm {names}, got {type(block).__name__}")
    attn = block.attn
    if type(attn).forward is not library.Attention.forward or "forward" in vars(attn):
        raise ValueError(f"patch: {name}.attn must be a timm Attention, got {type(attn).__name__}")
    _known(f"{name}.mlp", block.mlp, _MLPS)
    for owner, path, part in (
        (block, name, "norm1"),
        (block, name, "norm2"),
        *((attn, f"{name}.attn", n) for n in _INNER),
    ):
        if hasattr(owner, part):
            _known(f"{path}.{part}", getattr(owner, part), _NORMS)
    for part, kinds in (("ls1", _SCALES), ("ls2", _SCALES), ("drop_path1", _DROPS), ("drop_path2", _DROPS)):
        if hasattr(block, part):
            _known(f"{name}.{part}", getattr(block, part), kinds)
    for part, module in block.named_children():
        if part not in ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"):
            raise ValueError(f"patch: {name} must have known parts only, got {part} ({type(module).__name__})")


def _known(name, module, kinds):
    if type(module).__name__ not in kinds:
        raise ValueError(f"patch: {name} must be one of {list(kinds)}, got {type(module).__name__}")


def _present(module):
    return None if isinstance(module, nn.Identity) else module


def _same(x):
    return x
