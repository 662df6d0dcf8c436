# SPDX-License-Identifier: Apache-2.0
"""``tokenprune visualize``: what a method does to one photograph."""

from dataclasses import dataclass, field

import torch

from ..._errors import UserError
from ..._images import load_photo
from ..._visualize import draw_method
from ...data import preprocessing
from .build import SEED, Wanted, build


@dataclass(frozen=True)
class Options:
    """Arguments of the command, see its help."""

    image: str | None = None
    wanted: Wanted = field(default_factory=Wanted)
    layers: str | None = None
    head: int = 0
    out: str = "out/visualize.jpg"


def visualize(options: Options) -> dict:
    """Draw merged regions, kept patches or groups of queries for some layers, and the tokens of every layer.

    Returns:
        Plain object, keys in docs/outputs.md.

    Raises:
        UserError: a model without a method, an image that cannot be read, or a file that cannot be written.
    """
    layers = _layers(options.layers)
    if options.head < 0:
        raise UserError(f"--head must be at least 0, got {options.head}")
    photo, description = load_photo(options.image)
    model = build(options.wanted)
    if not hasattr(model, "token_reducer"):
        raise UserError(f"{options.wanted.model} has no method to draw: give one with --method")
    setting = preprocessing(model, options.wanted.model)
    images = setting.transform()(photo)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (setting.mean, setting.std))
    picture = (images * std + mean).clamp(0, 1)
    torch.manual_seed(SEED)
    try:
        path, shown = draw_method(model, images[None], picture, options.out, layers=layers, head=options.head)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot write the picture {options.out}: {error.strerror or error}") from None
    wanted = options.wanted
    return {
        "model": wanted.model,
        "method": wanted.method,
        "options": wanted.options,
        "weights": wanted.weights,
        "image": description,
        "picture": str(path),
        **shown,
    }


def _layers(text):
    """``"3,6"`` -> [3, 6]."""
    if text is None:
        return None
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise UserError(f"--layers must be numbers with commas between them, got {text!r}") from None
