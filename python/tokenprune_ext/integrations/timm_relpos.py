# SPDX-License-Identifier: Apache-2.0
"""Token reduction in timm's ``VisionTransformerRelPos`` family; relative positions as in ``timm_beit.py``."""

from functools import partial

import torch
from torch import Tensor, nn

from ..nn import AttentionBranch, BlockParts, MlpBranch, PairBias, TokenState
from . import _timm, _walk

_FAMILY = _timm.Family(
    "vision_transformer_relpos", "VisionTransformerRelPos", ("RelPosBlock", "ResPostRelPosBlock"), ("RelPosAttention",)
)
find = _FAMILY.find


def facts(model: nn.Module, owner: nn.Module | None = None) -> dict:
    """What reducers may want to know about the model."""
    return _timm.facts(model, pair_bias=True)


def check(model: nn.Module, owner: nn.Module | None = None) -> None:
    """Refuse what would not be reproduced exactly.

    Raises:
        ValueError: names the component.
    """
    _FAMILY.check(model)
    for number, block in enumerate(model.blocks):
        if block.attn.rel_pos is None and model.shared_rel_pos is None:
            raise ValueError(
                f"patch: blocks.{number}.attn must have relative positions, or the model shared ones, got none"
            )


def forward(
    model: nn.Module,
    images: Tensor,
    *,
    record: list | None = None,
    trace: bool = False,
    carry: dict[str, Tensor] | None = None,
    each=None,
) -> tuple[Tensor, TokenState]:
    """Features of the final norm, and the state of their tokens; see :func:`.timm.forward`."""
    x = model.patch_embed(images)
    if model.cls_token is not None:
        x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    shared = None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()
    grid = tuple(model.patch_embed.grid_size)
    first = _walk.start(x, grid, model.num_prefix_tokens, index=True, trace=trace, carry=carry)
    blocks, saving = model.blocks, _walk.saves(model, model.grad_checkpointing)
    made = (parts(block, first, shared) for block in blocks)  # one by one: a layer's bias for pairs is large
    x, state = _walk.walk(model, x, first, made, saving=saving, record=record, each=each)
    return model.norm(x), state


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name."""
    return _timm.methods(model, forward)


def parts(block: nn.Module, first: TokenState, shared: Tensor | None = None) -> BlockParts:
    """A block as branches over its own submodules.

    Args:
        block: a RelPosBlock or ResPostRelPosBlock.
        first: the state in front of the first block.
        shared: the relative position bias of all blocks, ``[1, H, N, N]``, where they have none of their own.
    """
    own, inner = block._modules, block.attn._modules  # plain dictionaries: this runs at every forward
    post = "ls1" not in own  # the norm sits behind the branch, where LayerScale would be
    attn, norm1, norm2 = own["attn"], own["norm1"], own["norm2"]
    dropped, present = inner["attn_drop"], _walk.present
    pair_bias = PairBias(partial(_full_bias, attn, shared), first)
    attention = AttentionBranch(
        _walk.same if post else norm1,
        inner["qkv"],
        inner["proj"],
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        q_norm=present(inner["q_norm"]),
        k_norm=present(inner["k_norm"]),
        pair_bias=pair_bias,
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
    return BlockParts(attention, mlp, partial(block, shared_rel_pos=shared), first.index)


def _full_bias(attn, shared):
    return shared if attn.rel_pos is None else attn.rel_pos.get_bias()
