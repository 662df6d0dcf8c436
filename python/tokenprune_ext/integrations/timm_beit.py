# SPDX-License-Identifier: Apache-2.0
"""Token reduction in timm's ``Beit`` family: BEiT, BEiT v2.

The relative position bias of every pair of tokens follows them: it is gathered by the patches in ``state.index``, and the
attention runs in torch. Methods that compute their own attention are refused.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ..nn import AttentionBranch, BlockParts, MlpBranch, PairBias, TokenState
from . import _timm, _walk

_FAMILY = _timm.Family("beit", "Beit", ("Block",), ("Attention",))
find = _FAMILY.find
check = _FAMILY.check


def facts(model: nn.Module, owner: nn.Module | None = None) -> dict:
    """What reducers may want to know about the model."""
    own = model.blocks[0].attn.relative_position_bias_table
    return _timm.facts(model, pair_bias=model.rel_pos_bias is not None or own is not None)


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
    x = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
    x = model.pos_drop(x if model.pos_embed is None else x + model.pos_embed)
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
    blocks, saving = model.blocks, _walk.saves(model, model.grad_checkpointing)
    biased = shared is not None or blocks[0].attn.relative_position_bias_table is not None
    grid = tuple(model.patch_embed.grid_size)
    state = _walk.start(x, grid, model.num_prefix_tokens, index=biased, trace=trace, carry=carry)
    first = state if biased else None
    made = (parts(block, first, shared) for block in blocks)  # one by one: a layer's bias for pairs is large
    x, state = _walk.walk(model, x, state, made, saving=saving, record=record, each=each)
    return model.norm(x), state


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name."""
    return _timm.methods(model, forward)


def parts(block: nn.Module, first: TokenState | None = None, shared: Tensor | None = None) -> BlockParts:
    """A block as branches over its own submodules.

    Args:
        block: of a Beit.
        first: the state in front of the first block, where there are relative positions.
        shared: the relative position bias of all blocks, ``[H, N, N]``.
    """
    own, inner = block._modules, block.attn._modules  # plain dictionaries: this runs at every forward
    attn, dropped = own["attn"], inner["attn_drop"]
    pair_bias = None if first is None else PairBias(partial(_full_bias, attn, shared), first)
    attention = AttentionBranch(
        own["norm1"],
        _timm.projection(attn),
        inner["proj"],
        num_heads=attn.num_heads,
        head_dim=attn.proj.in_features // attn.num_heads,
        scale=attn.scale,
        pair_bias=pair_bias,
        proj_drop=inner["proj_drop"],
        attn_drop=dropped.p if dropped.training else 0.0,
        layer_scale=block.gamma_1,
        drop_path=own["drop_path1"],
    )
    mlp = MlpBranch(own["norm2"], own["mlp"], layer_scale=block.gamma_2, drop_path=own["drop_path2"])
    original = block if shared is None else partial(block, shared_rel_pos_bias=shared)
    return BlockParts(attention, mlp, original, None if pair_bias is None else pair_bias.start)


def _full_bias(attn, shared):
    if attn.relative_position_bias_table is None:
        return shared
    own = attn._get_rel_pos_bias()
    return own if shared is None else own + shared
