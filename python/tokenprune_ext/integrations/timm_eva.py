# SPDX-License-Identifier: Apache-2.0
"""Token reduction in timm's ``Eva`` family: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary embedding.

The rotary embedding follows the tokens: each is rotated by the place of the patch in ``state.index``.
"""

from functools import partial

from torch import Tensor, nn

from ..nn import AttentionBranch, BlockParts, MlpBranch, Rotary, TokenState
from . import _timm, _walk

_FAMILY = _timm.Family("eva", "Eva", ("EvaBlock", "EvaBlockPostNorm"), ("EvaAttention", "AttentionRope"))
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
    """Features of the final norm, and the state of their tokens; see :func:`.timm.forward`."""
    x = model.patch_embed(images)
    grid = tuple(x.shape[1:3]) if x.dim() == 4 else tuple(model.patch_embed.grid_size)
    x, rope = model._pos_embed(x)
    x, prefix = model.norm_pre(x), model.num_prefix_tokens
    grid = grid if x.shape[1] == grid[0] * grid[1] + prefix else None  # patches were dropped at random
    state = _walk.start(x, grid, prefix, index=rope is not None, trace=trace, carry=carry)
    blocks, saving = model.blocks, _walk.saves(model, model.grad_checkpointing)
    if rope is None:
        places = [(None, None)] * len(blocks)
    elif model.rope_mixed:
        places = [(rope[layer], _rotary(block, rope[layer], state, False)) for layer, block in enumerate(blocks)]
    else:
        places = [(rope, _rotary(blocks[0], rope, state, not saving))] * len(blocks)
    made = [parts(block, *place) for block, place in zip(blocks, places, strict=True)]
    x, state = _walk.walk(model, x, state, made, saving=saving, record=record, each=each)
    return model.norm(x), state


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name."""
    return _timm.methods(model, forward)


def parts(block: nn.Module, rope: Tensor | None = None, rotary: Rotary | None = None) -> BlockParts:
    """A block as branches over its own submodules.

    Args:
        block: an EvaBlock or EvaBlockPostNorm.
        rope: the embedding that the block itself takes.
        rotary: the same, for reduced tokens.
    """
    own, inner = block._modules, block.attn._modules  # plain dictionaries: this runs at every forward
    # In a post-norm block the norm sits behind the branch, where LayerScale would be.
    post = "gamma_1" not in block._parameters and "gamma_1" not in block.__dict__
    attn, norm1, norm2 = own["attn"], own["norm1"], own["norm2"]
    dropped, present = inner["attn_drop"], _walk.present
    attention = AttentionBranch(
        _walk.same if post else norm1,
        _timm.projection(attn),
        inner["proj"],
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        q_norm=present(inner["q_norm"]),
        k_norm=present(inner["k_norm"]),
        rotary=rotary,
        out_norm=present(inner["norm"]),
        gate=inner.get("gate"),
        proj_drop=inner["proj_drop"],
        attn_drop=dropped.p if dropped.training else 0.0,
        layer_scale=norm1 if post else block.gamma_1,
        drop_path=own["drop_path1"],
    )
    mlp = MlpBranch(
        _walk.same if post else norm2,
        own["mlp"],
        layer_scale=norm2 if post else block.gamma_2,
        drop_path=own["drop_path2"],
    )
    if rotary is None:
        return BlockParts(attention, mlp, block)
    return BlockParts(attention, mlp, partial(block, rope=rope), rotary.start)


def _rotary(block, rope, state, keep):
    sin, cos = rope.chunk(2, -1)
    return Rotary(sin, cos, state, half=getattr(block.attn, "rotate_half", False), keep=keep)
