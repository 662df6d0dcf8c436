# SPDX-License-Identifier: Apache-2.0
"""Token reduction in the vision towers of transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, BEiT.

A tower is found by itself or within a larger model (a classifier, CLIPModel, a vision-language model). The model's own parts
are walked; nothing is copied and no weight moves. What this file does not know exactly, it refuses by name. The layout of
each family is in ``_transformers.py``. Deformable detectors get their attention from here as well
(:func:`patch_deformable_attention`).
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn

from ..nn import TokenState
from . import _walk
from ._transformers import FAMILIES, LAYERS, Tower, layer_parts
from ._transformers_deform import (  # noqa: F401  (deformable detectors of the same library)
    MultiScaleDeformableAttention,
    patch_deformable_attention,
    unpatch_deformable_attention,
)

# What a head reads that is no pooler_output; the others read what the tower's pooling says.
_READERS = {
    "CLIPForImageClassification": "avg",
    "Dinov2ForImageClassification": "token and avg",
    "Dinov2WithRegistersForImageClassification": "token and avg",
    "SiglipForImageClassification": "avg",
}
# They take last_hidden_state for a map of all patches.
_REFUSED = ("BeitForMaskedImageModeling", "DeiTForMaskedImageModeling", "ViTForMaskedImageModeling")
_IGNORED = ("num_items_in_batch",)  # what the trainer hands through for the loss


def find(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Vision towers of transformers in ``model`` (itself included), by name."""
    if "transformers" not in sys.modules:  # such a model cannot exist before transformers was imported
        return []
    return [(name, part) for name, part in model.named_modules() if _family(part) is not None]


def facts(model: nn.Module, owner: nn.Module | None = None) -> dict:
    """What reducers may want to know about the model."""
    tower, config = _family(model), model.config
    heads = config.num_attention_heads
    layer = tower.layers(model)[0]
    return {
        "depth": len(tower.layers(model)),
        "embed_dim": config.hidden_size,
        "head_dim": getattr(layer, LAYERS[type(layer).__name__].attention).head_dim,
        "num_heads": heads,
        "num_prefix": tower.prefix(model),
        "class_token": tower.prefix(model) > 0,
        "distill_token": tower.distilled,
        "pooling": _READERS.get(type(owner).__name__, tower.pooling(model)),
        "pair_bias": tower.pair_bias(model),
    }


def check(model: nn.Module, owner: nn.Module | None = None) -> None:
    """Refuse what would not be reproduced exactly.

    Raises:
        ValueError: names the component.
    """
    tower = _family(model)
    if type(owner).__name__ in _REFUSED:
        raise ValueError(
            f"patch: model must not read every patch from the last layer, as {type(owner).__name__} does (it would find "
            "reduced tokens there)"
        )
    if "forward" in vars(model):
        raise ValueError(
            f"patch: model must use transformers' forward, got an overridden one in {type(model).__name__}"
        )
    try:
        layers = tower.layers(model)
    except AttributeError as error:
        raise ValueError(f"patch: {type(model).__name__} must be laid out as in transformers 5.23, {error}") from error
    if not len(layers):
        raise ValueError("patch: model must have layers, got none")
    for number, layer in enumerate(layers):
        _check_layer(f"layers.{number}", layer)


def forward(
    model: nn.Module,
    images: Tensor,
    *,
    record: list | None = None,
    trace: bool = False,
    carry: dict[str, Tensor] | None = None,
    each=None,
    before=None,
    **options,
) -> tuple[Tensor, TokenState]:
    """Features of the final norm (of CLIP: in front of it), and the state of their tokens; see :func:`.timm.forward`.

    Args:
        before: called with the tokens in front of the first layer.
        options: of the tower's embeddings: ``bool_masked_pos``, ``interpolate_pos_encoding``.
    """
    tower = _family(model)
    images, x, grid = tower.embed(model, images, options)
    layers = tower.layers(model)
    saving = _walk.saves(model, model.training and getattr(layers[0], "gradient_checkpointing", False))
    placed = tower.rotary or tower.pair_bias(model)
    first = _walk.start(x, grid, tower.prefix(model), index=placed, trace=trace, carry=carry)
    if before is not None:
        before(x)
    places = tower.places(model, images, first, options, not saving)
    made = (layer_parts(layer, places, saving) for layer in layers)  # one by one: a layer's bias for pairs is large
    x, state = _walk.walk(model, x, first, made, saving=saving, record=record, each=each)
    return tower.norm(model, x), state


def methods(model: nn.Module) -> dict:
    """The functions that replace the model's own, by name. ``partial`` survives deepcopy and pickling."""
    return {"forward": partial(_forward, model)}


def _forward(model, *args, output_attentions=None, output_hidden_states=None, return_dict=None, **given):
    """The tower's forward: hidden states are restored to the full grid, ``last_hidden_state`` stays reduced."""
    tower, config = _family(model), model.config
    given |= dict(zip(tower.arguments, args, strict=False))
    options = _options(tower, given)
    if output_attentions or (output_attentions is None and getattr(config, "output_attentions", False)):
        raise ValueError("patched model: output_attentions must be False (reduced tokens have no full maps), got True")
    if output_hidden_states is None:
        output_hidden_states = getattr(config, "output_hidden_states", False)
    hidden, collect = [], {}
    if output_hidden_states is not False:
        collect = {"trace": True, "before": hidden.append, "each": partial(_restored, model, hidden)}
    x, state = forward(model, given["pixel_values"], **collect, **options)
    x = model.token_reducer.pool(x, state)
    library = sys.modules[type(model).__module__]
    kind = getattr(library, "BeitModelOutputWithPooling", None) or library.BaseModelOutputWithPooling
    output = kind(last_hidden_state=x, pooler_output=tower.pool(model, x))
    if collect:
        output["hidden_states"] = _selected(hidden, output_hidden_states)
    return_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return output if return_dict else output.to_tuple()


def _options(tower: Tower, given: dict) -> dict:
    """The arguments that are for the embeddings; refuses what reduced tokens cannot follow."""
    if given.get("pixel_values") is None:
        raise ValueError("patched model: pixel_values must be given, got None")
    if given.get("attention_mask") is not None:
        raise ValueError("patched model: attention_mask must be None (reduced tokens have no fixed places), got a mask")
    known = {*tower.arguments, "interpolate_pos_encoding", "attention_mask", *_IGNORED}
    unknown = [name for name, value in given.items() if not (name in known or value is None or value is False)]
    if unknown:
        raise ValueError(f"patched model: arguments must be among {sorted(known)}, got {unknown}")
    return {name: given[name] for name in tower.options if given.get(name) is not None}


def _restored(model, hidden, layer, x, state):
    hidden.append(torch.cat(_walk.full_map(model, x, state), 1))


def _selected(hidden, wanted):
    """All hidden states, or None in place of those that were not asked for (an index, or a list of them)."""
    if wanted is True:
        return tuple(hidden)
    numbers = {number % len(hidden) for number in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(values if number in numbers else None for number, values in enumerate(hidden))


def _family(module: nn.Module) -> Tower | None:
    """How a tower of transformers is laid out; None for anything else."""
    cls = type(module)
    return FAMILIES.get(cls.__name__) if cls.__module__.startswith("transformers.models.") else None


def _check_layer(name: str, layer: nn.Module) -> None:
    names = LAYERS.get(type(layer).__name__)
    _ours(name, layer, names is not None)
    missing = [part for part in (*names[:3], "mlp") if not hasattr(layer, part)]
    if missing:
        raise ValueError(f"patch: {name} must be laid out as in transformers 5.23, got one without {missing}")
    attn = getattr(layer, names.attention)
    _ours(f"{name}.{names.attention}", attn, True)
    parts = ("q_proj", "k_proj", "v_proj", names.out, names.logit_scale, names.attn_drop, "head_dim")
    missing = [part for part in parts if not hasattr(attn, part)]
    if missing:
        raise ValueError(
            f"patch: {name}.{names.attention} must be laid out as in transformers 5.23, got one without {missing}"
        )
    _ours(f"{name}.mlp", layer.mlp, True)
    for part in (names.norm1, names.norm2):
        _walk.must_be(f"{name}.{part}", getattr(layer, part), _walk.NORMS)
    for part in names.scales or ():
        scale = getattr(layer, part)
        if isinstance(scale, nn.Module) and not hasattr(scale, "lambda1"):
            raise ValueError(f"patch: {name}.{part} must be a LayerScale of transformers, got {type(scale).__name__}")
    if not isinstance(getattr(layer, "drop_path", None), (nn.Identity, type(None))):
        _ours(f"{name}.drop_path", layer.drop_path, True)
    known = (*names[:3], *(names.scales or ()), "mlp", "dropout", "drop_path", "relative_position_bias")
    _walk.no_more_parts(name, layer, known)


def _ours(name, module, known):
    library = type(module).__module__.startswith("transformers.models.")
    if not (library and known) or "forward" in vars(module):
        raise ValueError(f"patch: {name} must be a known module of transformers, got {type(module).__name__}")
