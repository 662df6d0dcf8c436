# SPDX-License-Identifier: Apache-2.0
"""The registry of our models, shared with timm's."""

import difflib
import fnmatch
import inspect
import os
import sys
from collections.abc import Callable, Mapping

from timm.models import register_model
from torch import Tensor, nn

_builders: dict[str, Callable[..., nn.Module]] = {}


def register(name: str):
    """Decorator of a function ``build(**options) -> model``: make it known under ``name``, here and in timm.

    The model should carry a ``pretrained_cfg`` (input size, mean, std, crop), as timm's do.

    Raises:
        ValueError: the name is taken by another function.
    """

    def decorate(build):
        if name in _builders and _builders[name].__module__ != build.__module__:
            raise ValueError(f"models.register: name must be new, got {name!r} (taken by {_builders[name].__module__})")
        _builders[name] = build
        register_model(_timm_entry(name, build))
        return build

    return decorate


def _timm_entry(name, build):
    """What timm calls; its names and module are those of the builder's file."""

    def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        if pretrained:
            raise ValueError(
                f"{name}: pretrained must be False (the weights are not on a hub of timm); download the official file "
                "and give it as checkpoint_path to timm, or as checkpoint to tokenprune_ext.create_model"
            )
        return build(**options)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = build.__module__
    entry.__doc__ = build.__doc__
    setattr(sys.modules[build.__module__], name, entry)
    return entry


def list_models(pattern: str = "*") -> list[str]:
    """Names of our models.

    Args:
        pattern: with shell wildcards, e.g. ``"tome_*"``.
    """
    return sorted(fnmatch.filter(_builders, pattern))


def entry_points() -> dict[str, Callable[..., nn.Module]]:
    """Name to ``build(**options)`` of all models."""
    return dict(_builders)


def create_model(
    name: str, *, checkpoint: str | os.PathLike | Mapping[str, Tensor] | None = None, **overrides
) -> nn.Module:
    """Build a published model.

    Args:
        name: one of :func:`list_models`.
        checkpoint: weights in their official form, see :func:`tokenprune_ext.load_checkpoint`; default: freshly
            initialised.
        overrides: of the published setting, e.g. ``tome_r=40``, ``image_size=384``, ``num_classes=10``.

    Raises:
        ValueError: unknown name or option, or a checkpoint that does not fit.

    Example:
        >>> model = create_model("tome_vit_l16_in1k", tome_r=40, checkpoint="vit_l16_in1k.torch")  # doctest: +SKIP
    """
    if not isinstance(name, str) or name not in _builders:
        near = difflib.get_close_matches(str(name), _builders, 3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"create_model: name must be one of list_models(), got {name!r}{hint}")
    try:
        model = _builders[name](**overrides)
    except TypeError as error:  # a keyword that cannot be compared, counted or iterated
        raise ValueError(f"{name}: options must be of the documented types, got {overrides} ({error})") from error
    if checkpoint is not None:
        from ..checkpoints import load_checkpoint

        load_checkpoint(model, checkpoint)
    return model


def check_options(name: str, options: Mapping, accepted: Callable | list[str]) -> None:
    """Refuse options that ``accepted`` (a function, or names) does not take.

    Raises:
        ValueError: names them.
    """
    known = list(inspect.signature(accepted).parameters) if callable(accepted) else list(accepted)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"{name}: options must be among {sorted(known)}, got {unknown}")
