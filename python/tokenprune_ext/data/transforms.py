# SPDX-License-Identifier: Apache-2.0
"""How an image is resized, cropped and normalised for a model, as in its published evaluation."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn

from .._errors import UserError

# timm evaluates these with other crops than their authors do (short side to 8/7 of the input).
_PUBLISHED_CROPS = ((re.compile(r"deit_(tiny|small|base)_(distilled_)?patch16_(224|384)"), 0.875),)
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """An evaluation transform.

    Attributes:
        image_size: ``(height, width)`` of the input.
        crop_pct: share of the resized short side that the central crop takes.
        interpolation: of the resizing.
        mean, std: per channel, in 0..1.
        crop_mode: as timm names it.
    """

    image_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_mode: str = "center"

    def transform(self) -> Callable:
        """PIL image in RGB -> float32 ``[3, H, W]``."""
        from timm.data import create_transform

        return create_transform(
            (3, *self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def preprocessing(
    model: nn.Module, name: str = "", *, crop_pct: float | None = None, interpolation: str | None = None
) -> Preprocessing:
    """The published preprocessing of a model.

    Args:
        model: of timm or of this package; its ``pretrained_cfg`` and the size that it was built for decide.
        name: of the model; DeiT's crop is its authors', not timm's.
        crop_pct: instead of the published one.
        interpolation: instead of the published one.

    Raises:
        UserError: a crop outside of 0..1, or an unknown interpolation.
    """
    from timm.data import resolve_model_data_config

    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"--crop-pct must lie between 0 and 1, got {crop_pct}")
    if interpolation is not None and interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation}")
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    published = next((crop for rule, crop in _PUBLISHED_CROPS if rule.match(name)), config["crop_pct"])
    return Preprocessing(
        image_size=tuple(size),
        crop_pct=published if crop_pct is None else crop_pct,
        interpolation=config["interpolation"] if interpolation is None else interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_mode=config.get("crop_mode", "center"),
    )
