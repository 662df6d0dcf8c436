# SPDX-License-Identifier: Apache-2.0
"""A small data set of real photographs: those that scikit-image's wheel ships."""

from importlib import resources
from pathlib import Path

PHOTOS = {
    "n02123045": ("chelsea.png",),
    "n04266014": ("rocket.jpg", "astronaut.png"),
    "n07930864": ("coffee.png",),
    "n09193705": ("gravel.png", "grass.png", "camera.png"),
}
COUNT = sum(len(files) for files in PHOTOS.values())


def make_folder(root: Path, place: str = "val", size: int = 96) -> Path:
    """Write the photographs, made small, into class folders below ``root / place``."""
    from PIL import Image

    for name, files in PHOTOS.items():
        (root / place / name).mkdir(parents=True)
        for file in files:
            with resources.as_file(resources.files("skimage") / "data" / file) as path, Image.open(path) as image:
                image.resize((size, size * image.height // image.width)).save(root / place / name / file)
    return root
