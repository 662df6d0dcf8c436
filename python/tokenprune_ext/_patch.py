# SPDX-License-Identifier: Apache-2.0
"""Put a token-reduction method into a model of another library, take it out again, and look at what it does."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import reducers
from .integrations import adapters
from .nn import PackedLinear, TokenState, pack

_NAME = "token_reducer"


@dataclass(frozen=True)
class LayerTrace:
    """What a layer did to the tokens.

    Attributes:
        layer: number of the layer.
        tokens: int32 ``[B]``, tokens of each image that passed the MLP.
        attention_tokens: int32 ``[B]``, tokens of each image that took part in attention.
        index: int32 ``[B, n]`` or packed ``[T]``: the original patch of each of them (-1: prefix or fused token).
        cu_seqlens: int32 ``[B + 1]``, starts of the images in a packed ``index``, otherwise None.
        parent: int32 ``[B, N0]``: row of every original token (prefix included) behind the layer, -1 = dropped.
    """

    layer: int
    tokens: Tensor
    attention_tokens: Tensor
    index: Tensor
    cu_seqlens: Tensor | None
    parent: Tensor


def patch(model: nn.Module, method: str | reducers.Reducer = "tome", **options) -> nn.Module:
    """Reduce tokens in a vision transformer of another library (timm, torchvision, transformers), in place.

    The method becomes the submodule ``token_reducer``, so that learned parts train and are saved with the model. In a
    packed model (:func:`pack`) it is packed, too.

    Args:
        model: a supported model, or a module that contains exactly one.
        method: name of a method (``tokenprune_ext.reducers.names()``), or a finished reducer.
        options: of the method, e.g. ``r=8`` for ``"tome"``, ``keep=0.7`` for ``"evit"``.

    Returns:
        ``model``, for chaining.

    Raises:
        ValueError: nothing or several models found, an unknown component, method or option, or already patched.

    Example:
        >>> model = timm.create_model("deit_small_patch16_224")  # doctest: +SKIP
        >>> tokenprune_ext.patch(model, "tome", r=13)  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch: model must be a module, got {type(model).__name__}")
    found = [(adapter, name, part) for adapter in adapters() for name, part in adapter.find(model)]
    if len(found) != 1:
        names = [name or type(part).__name__ for _, name, part in found]
        raise ValueError(
            "patch: model must hold exactly one supported vision transformer, got "
            f"{names or 'none in ' + type(model).__name__}"
        )
    adapter, name, part = found[0]
    owner = model.get_submodule(name.rpartition(".")[0]) if name else None
    if hasattr(part, _NAME):
        raise ValueError(f"patch: model must be unpatched first, got one with {type(part.token_reducer).__name__}")
    adapter.check(part, owner)
    facts = adapter.facts(part, owner)
    told = sorted(facts.keys() & options.keys())
    if told:
        raise ValueError(f"patch: options must be those of the method, got {told}, which the model itself tells")
    reducer = reducers.create(method, facts, **options)
    if facts.get("pair_bias") and reducer.own_attention:
        raise ValueError(
            f"patch: {type(reducer).__name__} must not be put into {type(part).__name__}: the method computes its own "
            "attention, which has no bias for pairs of tokens (relative positions)"
        )
    anchor = next(part.parameters())
    part.add_module(_NAME, reducer.to(device=anchor.device, dtype=anchor.dtype).train(part.training))
    if any(isinstance(layer, PackedLinear) for layer in part.modules()):
        pack(part.token_reducer)
    for name, function in adapter.methods(part).items():
        setattr(part, name, function)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo :func:`patch`.

    Raises:
        ValueError: the model is not patched.
    """
    adapter, part = _patched("unpatch", model)
    for name in adapter.methods(part):
        delattr(part, name)
    delattr(part, _NAME)
    return model


@contextmanager
def patched(model: nn.Module, method: str | reducers.Reducer = "tome", **options):
    """:func:`patch` for the length of a ``with`` block."""
    patch(model, method, **options)
    try:
        yield model
    finally:
        unpatch(model)


def features(
    model: nn.Module, images: Tensor, *, trace: bool = False, carry: dict[str, Tensor] | None = None
) -> tuple[Tensor, TokenState]:
    """Features of a patched model together with the state of their tokens (for losses, restoring, pictures).

    Args:
        model: patched.
        images: ``[B, 3, H, W]``.
        trace: follow the tokens (``state.index``, ``state.carry["parent"]``), which ``restore`` may need.
        carry: tensors for the method, e.g. given noise.

    Returns:
        ``(features [B, n, C], state)``; ``model.forward_head(features)`` gives the logits,
        ``model.token_reducer.losses(state)`` the training terms. A method that keeps different numbers of tokens per
        image gives packed features ``[T, C]`` (``state.packed``).
    """
    adapter, part = _patched("features", model)
    return adapter.forward(part, images, trace=trace, carry=carry)


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> list[LayerTrace]:
    """Run a patched model and tell, layer by layer, which tokens it processed and where every patch went.

    Args:
        model: patched.
        images: ``[B, 3, H, W]``.
    """
    adapter, part = _patched("trace", model)
    record, after = [], []
    adapter.forward(part, images, record=record, trace=True, each=lambda layer, x, state: after.append(state))
    return layer_traces(record, after)


def layer_traces(record: list, after: list[TokenState]) -> list[LayerTrace]:
    """The trace of a forward: its records (see :func:`tokenprune_ext.nn.run_block`) and the states behind the layers."""
    return [
        LayerTrace(
            step.layer,
            step.mlp,
            step.attention,
            step.state.index,
            step.state.cu_seqlens,
            after[step.layer].carry["parent"],
        )
        for step in record
    ]


def _patched(caller, model):
    for adapter in adapters():
        for _, part in adapter.find(model):
            if hasattr(part, _NAME):
                return adapter, part
    raise ValueError(f"{caller}: model must be patched (tokenprune_ext.patch), got {type(model).__name__}")
