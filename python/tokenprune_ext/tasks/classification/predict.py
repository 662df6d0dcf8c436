# SPDX-License-Identifier: Apache-2.0
"""``tokenprune predict``: the most likely classes of single images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..._errors import UserError
from ..._images import load_photo
from ...data import preprocessing
from ...nn import pack
from .build import Wanted, build


@dataclass(frozen=True)
class Options:
    """Arguments of the command, see its help."""

    images: Sequence[str]
    wanted: Wanted = field(default_factory=Wanted)
    top: int = 5
    classes: str | None = None
    packed: bool = False


@torch.inference_mode()
def predict(options: Options) -> dict:
    """Classify images.

    Grey, palette and transparent pictures become RGB (transparency onto white), orientation tags are followed.

    Returns:
        Plain object, keys in docs/outputs.md.

    Raises:
        UserError: an image that cannot be read (before anything is computed), or a mistake in the options.
    """
    if options.top < 1:
        raise UserError(f"--top must be at least 1, got {options.top}")
    photos = [load_photo(path) for path in options.images]
    model = build(options.wanted)
    if not getattr(model, "num_classes", 0):
        raise UserError(f"{options.wanted.model} has no classifier (try its *_in1k name, or --num-classes)")
    names = _names(options, model)
    transform = preprocessing(model, options.wanted.model).transform()
    if options.packed:
        pack(model)
    rows = []
    for photo, path in photos:
        torch.manual_seed(0)  # a method that draws gives the same answer for the same image
        chances = model(transform(photo)[None]).float()[0].softmax(0)
        best = chances.topk(min(options.top, len(chances)))
        found = zip(best.values.tolist(), best.indices.tolist())
        rows.append(
            {
                "image": path,
                "classes": [
                    {"index": index, "name": None if names is None else names[index], "probability": chance}
                    for chance, index in found
                ],
            }
        )
    wanted = options.wanted
    return {
        "model": wanted.model,
        "method": wanted.method,
        "options": wanted.options,
        "weights": wanted.weights,
        "rows": rows,
    }


def _names(options, model):
    """Names of the outputs: of the user's file, ImageNet's, or None."""
    if options.classes is not None:
        try:
            names = Path(options.classes).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the class names {options.classes}: {error}") from None
        if len(names) != model.num_classes:
            raise UserError(
                f"the class names {options.classes} must have one line per class, got {len(names)} lines for "
                f"{model.num_classes} classes"
            )
        return names
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = "imagenet-1k" if model.num_classes == 1000 else infer_imagenet_subset(model)
    if subset is None:
        return None
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(model.num_classes)]


def show(result: dict, console: Console) -> None:
    """Print the classes of :func:`predict`."""
    table = Table("image", "class", "probability")
    table.columns[2].justify = "right"
    for row in result["rows"]:
        for place, found in enumerate(row["classes"]):
            name = f"class {found['index']}" if found["name"] is None else found["name"].split(",")[0]
            table.add_row(row["image"] if place == 0 else "", name, f"{found['probability']:.1%}", end_section=False)
    console.print(table)
    if result["weights"] == "seeded":
        console.print(
            "Seeded random weights: the classes mean nothing (--checkpoint FILE or --pretrained).", soft_wrap=True
        )
