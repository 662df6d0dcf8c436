# SPDX-License-Identifier: Apache-2.0
"""Loads a photograph for the demo and prepares it as the model was trained."""

import io
import os
from importlib import resources
from pathlib import Path

import torch

from ._errors import UserError

# Largest picture that is decoded; guards against decompression bombs.
MAX_PIXELS = 100_000_000


def _photograph() -> tuple[bytes, str]:
    """The portrait of Eileen Collins (NASA, public domain) that is inside scikit-image's wheel."""
    try:
        file = resources.files("skimage") / "data" / "astronaut.png"
        return file.read_bytes(), "astronaut (NASA, from scikit-image)"
    except (ModuleNotFoundError, FileNotFoundError):
        raise UserError("no example photograph: pip install scikit-image, or give one with --image PATH") from None


def load_photo(path: str | os.PathLike | None = None):
    """Open a photograph as an RGB image.

    Grey, palette and transparent pictures are converted (transparency onto white); the orientation tag is
    applied.

    Args:
        path: picture file; None takes the photograph that scikit-image ships.

    Returns:
        ``(PIL image in RGB, description)``.

    Raises:
        UserError: missing, unreadable, truncated or empty file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path is None:
        data, description = _photograph()
    else:
        description = str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error.strerror or error}") from None
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"the image {description} is too large: {image.width} x {image.height} pixels")
        image.load()
    except UnidentifiedImageError:
        raise UserError(f"{description} is not an image that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {description} is damaged: {error}") from None
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    elif image.mode.startswith(("I", "F")):  # 16-bit and float grey: convert() would clip them
        image = image.convert("F")
        low, high = image.getextrema()
        image = image.point(lambda value: (value - low) * (255.0 / max(high - low, 1e-9))).convert("L")
    return image.convert("RGB"), description


def preprocess(image, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize, crop and normalise with the model's own evaluation transform.

    Args:
        image: PIL image in RGB.
        model: timm model.

    Returns:
        ``(normalised [1, 3, H, W], the same crop in 0..1 [3, H, W])``, float32.
    """
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    built_for = getattr(model.patch_embed, "img_size", None)
    if built_for is not None:  # a model created for another size than its weights were trained at
        config["input_size"] = (3, *built_for)
    transform = create_transform(**config, is_training=False)
    normalised = transform(image)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return normalised[None], (normalised * std + mean).clamp(0, 1)
