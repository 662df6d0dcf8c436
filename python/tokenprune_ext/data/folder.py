# SPDX-License-Identifier: Apache-2.0
"""ImageNet and every other folder with one folder of images per class."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from .._errors import UserError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Where the validation images lie below the root: the usual name, SWAG's, others.
_PLACES = {"val": ("val", "img_val", "validation"), "train": ("train", "img_train", "training")}


@dataclass(frozen=True)
class BrokenImage:
    """What :class:`ImageFolder` gives instead of an image that cannot be read."""

    message: str


def find_folder(root: str | os.PathLike, split: str | None = None) -> Path:
    """The folder that holds the class folders.

    Args:
        root: of the data set: it, or a folder ``val``, ``img_val`` or ``validation`` in it, holds the class folders.
        split: ``"val"`` or ``"train"``: must be there; None: ``val`` where it is there, otherwise the root itself.

    Raises:
        UserError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"the data folder {root} does not exist")
    if split is not None and split not in _PLACES:
        raise UserError(f"the split must be one of {', '.join(sorted(_PLACES))}, got {split}")
    for name in _PLACES[split or "val"]:
        if (root / name).is_dir():
            return root / name
    if split is not None:
        raise UserError(f"the data folder {root} has no folder {' or '.join(_PLACES[split])}")
    return root


class ImageFolder(Dataset):
    """Images in one folder per class, in the order of torchvision's ``ImageFolder``: classes, then files, by name.

    Images become RGB as in the published evaluations: orientation tags are ignored, transparency is dropped. Grey
    values of 16 bits are brought to 8.

    Args:
        folder: holds the class folders; images may lie deeper.
        transform: PIL image in RGB -> anything.

    Raises:
        UserError: no class folders, or no images.

    Attributes:
        classes: names of the class folders with images.
        files: ``(path below the folder, number of the class folder)``.
    """

    def __init__(self, folder: str | os.PathLike, transform: Callable):
        self.folder, self.transform = Path(folder), transform
        self.classes, self.files = _scan(self.folder)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[object, int]:
        """``(transformed image or BrokenImage, number of the class folder)``."""
        name, label = self.files[index]
        try:
            return self.transform(_read_rgb(self.folder / name)), label
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            # Exceptions lose their shape on the way out of a worker process: this one is data.
            return BrokenImage(f"the image {self.folder / name} cannot be read: {error}"), label


def _scan(folder):
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        flat = any(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(folder))
        hint = "its images must lie in one folder per class" if flat else "it has no class folders"
        raise UserError(f"the data folder {folder} cannot be used: {hint}")
    classes, files = [], []
    for name in names:
        found = []
        for place, below, images in os.walk(folder / name, followlinks=True):
            below.sort()
            found += [Path(place, image).relative_to(folder) for image in images if image.lower().endswith(SUFFIXES)]
        if found:
            files += [(str(file), len(classes)) for file in sorted(found)]
            classes.append(name)
    if not files:
        raise UserError(f"the data folder {folder} holds no images (of {len(names)} class folders)")
    return classes, files


def _read_rgb(path):
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        if image.mode.startswith("I;16"):  # convert() would clip it
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        return image.convert("RGB")


def class_numbers(classes: Sequence[str], num_classes: int, labels: Sequence[str] | None = None) -> list[int]:
    """Which output of a model each class folder stands for.

    Folders named like the model's labels (ImageNet's ``n01440764`` ...) are found by name, so that a part of the
    classes can be evaluated. Folders named ``0`` to ``num_classes - 1`` are numbers (as in ImageNetV2). Otherwise there
    must be as many folders as outputs, in the order of their names.

    Args:
        classes: names of the class folders, sorted.
        num_classes: outputs of the model.
        labels: names of the outputs, or None.

    Raises:
        UserError: the folders do not fit the model.
    """
    known = {label: number for number, label in enumerate(labels or ())}
    if classes and all(name in known for name in classes):
        return [known[name] for name in classes]
    if all(name.isdecimal() and str(int(name)) == name and int(name) < num_classes for name in classes):
        return [int(name) for name in classes]
    if len(classes) == num_classes:
        return list(range(num_classes))
    strange = next((name for name in classes if known and name not in known), classes[0])
    raise UserError(
        f"the model has {num_classes} classes and the data folder {len(classes)}, whose names (such as {strange}) do not "
        "tell which: use ImageNet's names (n01440764 ...), numbers from 0, or a model with --num-classes "
        f"{len(classes)}"
    )
