# SPDX-License-Identifier: Apache-2.0
"""A classifier as the commands ``flops`` and ``bench`` name it: our name, timm's, or a row of a published table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ... import _patch, models, reducers, tables
from ..._errors import UserError
from ...models.swag_methods import METHODS
from .build import Wanted, build

__all__ = ["PLAIN", "Setting", "resolve", "turned"]

PLAIN = "none"  # the method that leaves a model dense
_DEFAULT_METHOD = "tome"
T = TypeVar("T")


def turned(function: Callable[[], T]) -> T:
    """Call a function; what it refuses becomes a :class:`UserError` of one line."""
    try:
        return function()
    except torch.OutOfMemoryError:
        raise UserError("out of memory: try a smaller --batch-size") from None
    except (ValueError, TypeError, AssertionError, KeyError, NotImplementedError, RuntimeError) as error:
        if "can't allocate memory" in str(error):  # of the CPU, which torch gives no type of its own
            raise UserError("out of memory: try a smaller --batch-size or --resolution") from None
        raise UserError((str(error).strip() or type(error).__name__).splitlines()[0]) from None


@dataclass(frozen=True)
class Setting:
    """A model and its method.

    Attributes:
        wanted: what to build.
        resolution: side of the input, None for the model's own.
        dense: take the model's own method out.
    """

    wanted: Wanted
    resolution: int | None = None
    dense: bool = False

    def build(self, meta: bool = False) -> nn.Module:
        """The model in evaluation mode, its weights seeded or from the file.

        Args:
            meta: without memory for weights.

        Raises:
            UserError: what model, method or checkpoint refuse.
        """
        with torch.device("meta" if meta else "cpu"):
            model = self._of_any_size() or build(replace(self.wanted, checkpoint=None) if meta else self.wanted)
        if self.dense and hasattr(model, "token_reducer"):
            _patch.unpatch(model)
        return model

    def without_method(self) -> "Setting":
        """The same model, dense."""
        wanted = self.wanted if self.wanted.method is None else replace(self.wanted, method=None, options={})
        return replace(self, wanted=wanted, dense=True)

    def _of_any_size(self):
        """The model, if it takes images of any size and therefore no size."""
        if self.resolution is None or self.wanted.model in models.list_models():
            return None
        model = build(replace(self.wanted, image_size=None, method=None, options={}, checkpoint=None))
        if hasattr(model, "patch_embed") or self.wanted.method is not None:
            return None
        return build(replace(self.wanted, image_size=None))


def resolve(
    model: str,
    method: str | None = None,
    options: dict | None = None,
    *,
    resolution: int | None = None,
    published: dict | None = None,
    checkpoint: str | None = None,
) -> Setting:
    """The setting that a command line asks for.

    Args:
        model: name of ours or of timm, or the id of a row of a published table.
        method: name of a reducer, ``"none"``, or None: what the model has built in (where it has none, options
            mean ToMe).
        options: of the method; without a method, keywords of the model.
        resolution: side of the square input, None for the model's own.
        published: values by keyword of the published hub functions (``num_cluster``, ``tome_r`` ...), for models that
            have them as keywords or, translated, for the method.
        checkpoint: file with weights.

    Raises:
        UserError: unknown row, method or keyword.
    """
    options = dict(options or {})
    published = {key: value for key, value in (published or {}).items() if value is not None}
    if resolution is not None and resolution < 1:
        raise UserError(f"--resolution must be at least 1, got {resolution}")
    name = model
    if "/" in model:  # a row, whose options can be replaced
        row = _row(model)
        model, options = row.model, row.options | options
    if method is None and options and model not in models.list_models():
        method = _DEFAULT_METHOD
    if method == PLAIN:
        if options or published:
            raise UserError(f"--method {PLAIN} takes no options, got {sorted(options | published)}")
        return Setting(Wanted(model, None, {}, checkpoint, image_size=resolution), resolution, dense=True)
    if method is not None:
        turned(lambda: reducers.get(method))
        published = _translated(method, published)
    twice = sorted(options.keys() & published.keys())
    if twice and "/" not in name:
        raise UserError(f"options must be given once, got {', '.join(twice)} twice")
    return Setting(Wanted(model, method, options | published, checkpoint, image_size=resolution), resolution)


def _row(name):
    row = next((row for row in tables.rows() if row.id == name), None)
    if row is None:
        raise UserError(f"no row {name!r} in the published tables (see: tokenprune tables)")
    if row.model is None:
        raise UserError(f"{name} has no model here yet, only a closed form: see tokenprune tables")
    return row


def _translated(method, published):
    """Published keywords -> options of the method."""
    entries = [entry.names for entry in METHODS.values() if entry.reducer == method]
    names = {key: option for entry in entries for key, option in entry.items() if option is not None}
    unknown = sorted(set(published) - set(names))
    if unknown:
        raise UserError(f"method {method} does not take {', '.join(unknown)}")
    return {names[key]: value for key, value in published.items()}
