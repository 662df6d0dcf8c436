# SPDX-License-Identifier: Apache-2.0
"""Token reduction in timm's ``VisionTransformer`` family: ViT, DeiT, distilled DeiT, DeiT-III, DINOv2, CLIP, SigLIP.

The model's own parts are walked; nothing is copied and no weight moves. What this file does not know exactly, it
refuses by name. EVA, DINOv3 and BEiT are in ``timm_eva.py`` and ``timm_beit.py``.
"""

from torch import Tensor, nn

from ..nn import AttentionBranch, BlockParts, MlpBranch, TokenState
from . import _timm, _walk

_FAMILY = _timm.Family("vision_transformer", "VisionTransformer", ("Block", "ResPostBlock"), ("Attention",))
find = _FAMILY.find
check = _FAMILY.check


def facts(model: nn.Module, owner: nn.Module | None = None) -> dict:
    """What reducers may want to know about the model."""
    return _timm.facts(model)


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
    state = _walk.start(x, grid, model.num_prefix_tokens, trace=trace, carry=carry)
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
    blocks, saving = [parts(block) for block in model.blocks], _walk.saves(model, model.grad_checkpointing)
    return _walk.walk(model, x, state, blocks, saving=saving, record=record, each=each)


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name."""
    return _timm.methods(model, forward)


def parts(block: nn.Module) -> BlockParts:
    """A timm block as branches over its own submodules."""
    own, inner = block._modules, block.attn._modules  # plain dictionaries: this runs at every forward
    post = "ls1" not in own  # ResPostBlock: the norm sits behind the branch, where LayerScale would be
    attn, norm1, norm2 = own["attn"], own["norm1"], own["norm2"]
    dropped, present = inner["attn_drop"], _walk.present
    attention = AttentionBranch(
        _walk.same if post else norm1,
        inner["qkv"],
        inner["proj"],
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        q_norm=present(inner["q_norm"]),
        k_norm=present(inner["k_norm"]),
        out_norm=present(inner.get("norm")),  # absent in older timm
        gate=inner.get("gate"),
        proj_drop=inner["proj_drop"],
        attn_drop=dropped.p if dropped.training else 0.0,
        layer_scale=norm1 if post else present(own["ls1"]),
        drop_path=own["drop_path1"],
    )
    mlp = MlpBranch(
        _walk.same if post else norm2,
        own["mlp"],
        layer_scale=norm2 if post else present(own["ls2"]),
        drop_path=own["drop_path2"],
    )
    return BlockParts(attention, mlp, block)
