# SPDX-License-Identifier: Apache-2.0
"""Learning-rate and keep-rate schedules of the published recipes, as plain functions of epoch or step."""

import math

__all__ = [
    "dynamicvit_learning_rate",
    "dynamicvit_rates",
    "evit_keep_rate",
    "spvit_learning_rates",
    "svit_learning_rate",
]

_SPVIT_LATE_EPOCH, _SPVIT_LATE_RATE = 30, 5e-4


def spvit_learning_rates(
    epoch: int,
    epochs: int,
    rate: float,
    *,
    min_rate: float = 1e-5,
    freeze_epochs: int = 5,
    backbone_scale: float = 0.01,
    late_override: bool = True,
) -> tuple[float, float]:
    """SPViT's rates of one epoch: ``(selectors, backbone)``, both set once per epoch.

    Selectors follow a cosine without warm-up; the backbone rests for ``freeze_epochs`` (its weight decay too, which
    AdamW multiplies by the rate) and then has at most ``backbone_scale * rate``.

    Args:
        epoch, epochs: current one from 0, and their number.
        rate: base rate, already scaled: ``5e-4 * images per step / 512``.
        min_rate: where the cosine ends.
        freeze_epochs: epochs in which the backbone rests.
        backbone_scale: the backbone's share of the rate.
        late_override: from epoch 30 on the published script continues with 5e-4 whatever the base rate is (seen in
            60-epoch runs only); False: without that.
    """
    if late_override and epoch >= _SPVIT_LATE_EPOCH:
        rate = _SPVIT_LATE_RATE
    selectors = _cosine(epoch / epochs, rate, min_rate)
    return selectors, 0.0 if epoch < freeze_epochs else min(backbone_scale * rate, selectors)


def dynamicvit_learning_rate(
    step: int, steps_per_epoch: int, epochs: int, rate: float, *, min_rate: float = 1e-6, warmup_epochs: int = 5
) -> float:
    """DynamicViT's rate of one step: linear warm-up from 0 to ``rate`` (both included), then a cosine to ``min_rate``."""
    warmup, total = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch
    if step < warmup:
        return rate if warmup == 1 else rate * step / (warmup - 1)
    return _cosine((step - warmup) / (total - warmup), rate, min_rate)


def dynamicvit_rates(
    step: int,
    steps_per_epoch: int,
    epochs: int,
    rate: float,
    *,
    min_rate: float = 1e-6,
    warmup_epochs: int = 5,
    freeze_epochs: int = 5,
    backbone_scale: float = 0.01,
) -> tuple[float, float]:
    """``(predictors, backbone)`` of one step: the backbone rests for ``freeze_epochs``, then has a hundredth."""
    value = dynamicvit_learning_rate(
        step, steps_per_epoch, epochs, rate, min_rate=min_rate, warmup_epochs=warmup_epochs
    )
    return value, 0.0 if step // steps_per_epoch < freeze_epochs else backbone_scale * value


def evit_keep_rate(
    step: int, steps_per_epoch: int, base_keep_rate: float, *, shrink_start_epoch: int = 10, shrink_epochs: int = 100
) -> float:
    """EViT's keep rate of one step: 1, then a cosine down to ``base_keep_rate``, then that.

    Args:
        step: from 0.
        steps_per_epoch: steps in an epoch.
        base_keep_rate: where it ends.
        shrink_start_epoch, shrink_epochs: where it begins to shrink, and for how long (0: at once, as for fine-tuning).
    """
    start, length = shrink_start_epoch * steps_per_epoch, shrink_epochs * steps_per_epoch
    if shrink_epochs <= 0 or step >= start + length:
        return base_keep_rate
    if step < start:
        return 1.0
    return _cosine((step - start) / length, 1.0, base_keep_rate)


def svit_learning_rate(epoch: int, epochs: int, rate: float, *, min_rate: float = 1e-6) -> float:
    """SViT's rate of one epoch, the same for gates and backbone.

    The published training steps its cosine with the index of the epoch that has just ended: epochs 0 and 1 share the
    first value.
    """
    return _cosine(max(epoch - 1, 0) / epochs, rate, min_rate)


def _cosine(progress, high, low):
    return low + 0.5 * (1 + math.cos(math.pi * progress)) * (high - low)
