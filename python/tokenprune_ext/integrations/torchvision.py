# SPDX-License-Identifier: Apache-2.0
"""Token reduction in torchvision's ``VisionTransformer``.

The model's own parts are walked; nothing is copied and no weight moves. What this file does not know exactly, it
refuses by name.
"""

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import AttentionBranch, BlockParts, MlpBranch, TokenState
from . import _walk

_PARTS = ("ln_1", "self_attention", "dropout", "ln_2", "mlp")


def find(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """VisionTransformers of torchvision in ``model`` (itself included), by name."""
    library = sys.modules.get("torchvision.models.vision_transformer")
    if library is None:  # a torchvision model cannot exist before torchvision was imported
        return []
    return [(name, part) for name, part in model.named_modules() if isinstance(part, library.VisionTransformer)]


def facts(model: nn.Module, owner: nn.Module | None = None) -> dict:
    """What reducers may want to know about the model."""
    attn = model.encoder.layers[0].self_attention
    return {
        "depth": len(model.encoder.layers),
        "embed_dim": model.hidden_dim,
        "head_dim": attn.head_dim,
        "num_heads": attn.num_heads,
        "num_prefix": 1,
        "class_token": True,
        "distill_token": False,
        "pooling": "token",
    }


def check(model: nn.Module, owner: nn.Module | None = None) -> None:
    """Refuse what would not be reproduced exactly.

    Raises:
        ValueError: names the component.
    """
    library = sys.modules["torchvision.models.vision_transformer"]
    _walk.must_keep(model, library.VisionTransformer, ("forward", "_process_input"), "torchvision")
    _walk.must_run("encoder", model.encoder, (library.Encoder,), "torchvision")
    if not len(model.encoder.layers):
        raise ValueError("patch: model must have layers, got none")
    for label, block in model.encoder.layers.named_children():
        name = f"encoder.layers.{label}"
        _walk.must_run(name, block, (library.EncoderBlock,), "torchvision")
        _walk.must_run(f"{name}.self_attention", block.self_attention, (nn.MultiheadAttention,), "torch")
        _walk.must_be(f"{name}.mlp", block.mlp, ("MLPBlock",))
        for part in ("ln_1", "ln_2"):
            _walk.must_be(f"{name}.{part}", getattr(block, part), _walk.NORMS)
        _walk.no_more_parts(name, block, _PARTS)
        attn = block.self_attention
        plain = attn.batch_first and attn.in_proj_weight is not None and attn.bias_k is None and not attn.add_zero_attn
        if not plain:
            raise ValueError(
                f"patch: {name}.self_attention must be batch_first, with one input projection and without added keys, "
                "got another one"
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
    x = model._process_input(images)
    x = torch.cat([model.class_token.expand(x.shape[0], -1, -1), x], dim=1)
    encoder = model.encoder
    x = encoder.dropout(x + encoder.pos_embedding)
    side = model.image_size // model.patch_size
    state = _walk.start(x, (side, side), 1, trace=trace, carry=carry)
    x, state = _walk.walk(model, x, state, [parts(block) for block in encoder.layers], record=record, each=each)
    return encoder.ln(x), state


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name. ``partial`` survives deepcopy and pickling."""
    return {"forward": partial(_forward, model)}


def parts(block: nn.Module) -> BlockParts:
    """An EncoderBlock as branches over its own submodules."""
    own = block._modules  # a plain dictionary: this runs at every forward
    attn = own["self_attention"]
    attention = AttentionBranch(
        own["ln_1"],
        partial(_project, attn),
        attn._modules["out_proj"],
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        proj_drop=own["dropout"],
        attn_drop=attn.dropout if attn.training else 0.0,
    )
    return BlockParts(attention, MlpBranch(own["ln_2"], own["mlp"]), block)


def _project(attn, z):
    return F.linear(z, attn.in_proj_weight, attn.in_proj_bias)


def _forward(model, x):
    x, state = forward(model, x)
    return model.heads(model.token_reducer.pool(x, state)[:, 0])
