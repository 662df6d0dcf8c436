# SPDX-License-Identifier: Apache-2.0
"""The model that a command names: ours or timm's, with its method, its size and its weights."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ..._errors import UserError
from ..._patch import patch
from ...checkpoints import load_checkpoint

SEED = 0


@dataclass(frozen=True)
class Wanted:
    """What a user says about a model.

    Attributes:
        model: name in this package or in timm.
        method: token-reduction method to put into it; None or ``"none"``: as it is (published names bring theirs).
        options: of the method, or keywords of the published model.
        checkpoint: file with weights.
        pretrained: download timm's weights.
        image_size: side of the input; None: the model's own.
        num_classes: outputs; None: the model's own.
    """

    model: str = "deit_small_patch16_224"
    method: str | None = None
    options: dict = field(default_factory=dict)
    checkpoint: str | None = None
    pretrained: bool = False
    image_size: int | None = None
    num_classes: int | None = None

    @property
    def weights(self) -> str:
        """The checkpoint, ``"pretrained"`` or ``"seeded"``."""
        return self.checkpoint or ("pretrained" if self.pretrained else "seeded")


def build(wanted: Wanted) -> nn.Module:
    """Build a model in evaluation mode, float32, on the CPU; random weights are seeded.

    Raises:
        UserError: unknown model, method or option, sizes that do not fit, or a checkpoint that does not.
    """
    method = None if wanted.method in (None, "none") else wanted.method
    if method is None and wanted.method is not None and wanted.options:
        raise UserError(f"--method none takes no options, got {', '.join(wanted.options)}")
    _check_size(wanted)
    torch.manual_seed(SEED)
    try:
        model = _create(wanted, {} if method else dict(wanted.options))
        _check_grid(wanted, model)
        if method is not None:
            if hasattr(model, "token_reducer"):
                raise UserError(
                    f"{wanted.model} brings its own method: give its options (-o NAME=VALUE) without --method"
                )
            patch(model, method, **wanted.options)
        if wanted.checkpoint is not None:
            load_checkpoint(model, wanted.checkpoint)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(str(error) or f"{wanted.model} cannot be built so") from None
    return model.eval()


def _check_size(wanted):
    if wanted.image_size is not None and wanted.image_size < 1:
        raise UserError(f"--image-size must be at least 1, got {wanted.image_size}")
    if wanted.num_classes is not None and wanted.num_classes < 1:
        raise UserError(f"--num-classes must be at least 1, got {wanted.num_classes}")
    if wanted.pretrained and wanted.checkpoint is not None:
        raise UserError("--pretrained and --checkpoint exclude each other")


def _create(wanted, keywords):
    import timm

    from ... import models

    if wanted.image_size is not None:
        keywords["img_size"] = wanted.image_size
    if wanted.num_classes is not None:
        keywords["num_classes"] = wanted.num_classes
    if wanted.model in models.list_models():
        if wanted.pretrained:
            raise UserError(
                f"{wanted.model} has no weights on a hub of timm: fetch the official file (tokenprune download --list) and "
                "give it with --checkpoint"
            )
        return models.create_model(wanted.model, **keywords)
    if not timm.is_model(wanted.model):
        raise UserError(f"there is no model {wanted.model!r}{_similar(wanted.model, timm.list_models(), models)}")
    own = {key: value for key, value in keywords.items() if key not in ("img_size", "num_classes")}
    if own:
        raise UserError(f"options need a method (--method) in {wanted.model}, got {', '.join(own)}")
    if not wanted.pretrained:
        return timm.create_model(wanted.model, **keywords)
    try:
        return timm.create_model(wanted.model, pretrained=True, **keywords)
    except Exception as error:  # the hub client raises many types when there is no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the pretrained weights of {wanted.model} cannot be had: {reason[:200]}") from None


def _similar(name, names, models):
    import difflib

    close = difflib.get_close_matches(name, [*models.list_models(), *names], 3)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _check_grid(wanted, model):
    embed = getattr(model, "patch_embed", None)
    grid, patch_size, size = (getattr(embed, name, None) for name in ("grid_size", "patch_size", "img_size"))
    if not (grid and patch_size and size):
        return
    if min(grid) < 1:
        raise UserError(f"--image-size must be at least a patch of {patch_size[0]} in {wanted.model}, got {size[0]}")
    if any(side % step for side, step in zip(size, patch_size)):
        raise UserError(
            f"--image-size must be a multiple of the patch {patch_size[0]} in {wanted.model}, got {size[0]}"
        )
