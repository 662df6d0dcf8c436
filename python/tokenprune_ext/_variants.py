# SPDX-License-Identifier: Apache-2.0
"""One ViT, dense and with each token-reduction method, on shared weights; and the tokens they process."""

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from ._errors import UserError
from ._flops import LayerTokens, count_flops, total_macs, vit_macs
from ._patch import LayerTrace, patch, trace


@dataclass(frozen=True)
class Variant:
    """A model ready to run.

    Attributes:
        name: as shown in tables.
        method: name of the reducer, or None for the library's own dense model.
        options: of the reducer.
        model: shares its weights with the other variants.
    """

    name: str
    method: str | None
    options: dict
    model: nn.Module = field(repr=False)


def share(model: nn.Module) -> nn.Module:
    """A second model object over the same submodules and weights, so that it can be patched on its own."""
    twin = copy.copy(model)
    for name in ("_modules", "_parameters", "_buffers"):
        setattr(twin, name, dict(getattr(model, name)))
    return twin


def make(model: nn.Module, name: str, method: str | None, **options) -> Variant:
    """Patch a twin of ``model``.

    Raises:
        UserError: the model or the options do not fit.
    """
    twin = share(model)
    if method is not None:
        try:
            patch(twin, method, **options)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
    return Variant(name, method, options, twin.eval())


def dense(model: nn.Module) -> Variant:
    """The dense model on this package's own attention: the fair opponent of a reduced model."""
    return make(model, "dense", "tome", r=0, fast_idle=False)


def layer_tokens(variant: Variant, images: Tensor) -> tuple[list[LayerTokens], list[LayerTrace] | None]:
    """Tokens per layer and image, and the trace they come from (None for a library's dense model)."""
    model = variant.model
    batch, depth = images.shape[0], len(model.blocks)
    start = model.patch_embed.num_patches + model.num_prefix_tokens
    if variant.method is None:
        return [LayerTokens((start,) * batch, (start,) * batch)] * depth, None
    steps = trace(model, images)
    plan = model.token_reducer.plan(depth, start)
    if plan is not None:
        return [LayerTokens((before,) * batch, (after,) * batch) for before, after in plan], steps
    # Without a plan the method chooses before the attention: both sub-layers see the same tokens.
    counts = [tuple(step.tokens.tolist()) for step in steps]
    return [LayerTokens(count, count) for count in counts], steps


def macs_of(variant: Variant, layers: list[LayerTokens]) -> dict[str, float]:
    """Multiply-adds per image by part; see :func:`tokenprune_ext.profiling.vit_macs`."""
    return vit_macs(variant.model, layers)


def overhead_macs(variant: Variant, images: Tensor, macs: dict[str, float]) -> float:
    """What the method adds per image (selectors, matching): traced multiply-adds less those in ``macs``."""
    traced = sum(count_flops(lambda: variant.model(images)).values()) / 2 / images.shape[0]
    return max(traced - total_macs(macs), 0.0)


def ideal_speedup(dense_macs: dict[str, float], macs: dict[str, float]) -> float:
    """Speed-up if time were proportional to multiply-adds (linear, convolution and attention)."""
    return total_macs(dense_macs) / total_macs(macs)
