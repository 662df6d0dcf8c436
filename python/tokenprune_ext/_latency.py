# SPDX-License-Identifier: Apache-2.0
"""Latency of one transformer block over the share of tokens that it keeps, measured on this device."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

DEFAULT_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class LatencyTable:
    """What the parts of a model cost, in milliseconds per forward pass.

    Attributes:
        ratios: kept shares of the patches, rising.
        block_ms: one block at each share.
        selector_ms: one token selector at each share; zeros for a model without.
        other_ms: embedding and head.
        batch_size: images per forward pass.
    """

    ratios: tuple[float, ...]
    block_ms: tuple[float, ...]
    selector_ms: tuple[float, ...]
    other_ms: float
    batch_size: int = 1

    def __post_init__(self):
        rising = all(a < b for a, b in zip(self.ratios, self.ratios[1:]))
        if not self.ratios or not rising or not {len(self.block_ms), len(self.selector_ms)} == {len(self.ratios)}:
            raise ValueError(
                f"LatencyTable: ratios must rise, with one time for each, got {self.ratios} and {len(self.block_ms)}, "
                f"{len(self.selector_ms)} times"
            )

    def block(self, ratio: float) -> float:
        """One block at a kept share, interpolated linearly (and continued with the last slope)."""
        return _interpolated(self.ratios, self.block_ms, ratio)

    def selector(self, ratio: float) -> float:
        """One selector that sees a share of the patches."""
        return _interpolated(self.ratios, self.selector_ms, ratio)

    def model(self, keep: Sequence[float], selectors: Sequence[int] = ()) -> float:
        """A whole model.

        Args:
            keep: share that each block processes.
            selectors: blocks with a selector in front; it sees what the block before it processed.
        """
        seen = [1.0, *keep]
        return self.other_ms + sum(self.block(share) for share in keep) + sum(self.selector(seen[i]) for i in selectors)


def latency_table(
    model: nn.Module,
    *,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    batch_size: int = 1,
    budget_s: float = 2.0,
    clock: str = "auto",
) -> LatencyTable:
    """Measure a table with this package's kernels, all entries side by side (see :func:`..profiling.measure`).

    Args:
        model: a timm ``VisionTransformer`` (or LV-ViT) on the device of interest; the time of its reducer's selectors is
            measured when it is patched.
        ratios: kept shares in (0, 1]; 1 is always measured.
        batch_size: images per forward pass.
        budget_s, clock: of the measurement.

    Raises:
        ValueError: a share outside of (0, 1].
    """
    from .integrations import timm as adapter
    from .nn import TokenState, run_block
    from .profiling import measure
    from .reducers import Reducer

    ratios = sorted({float(ratio) for ratio in ratios} | {1.0})
    if not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ValueError(f"latency_table: ratios must lie in (0, 1], got {ratios}")
    anchor, plain = next(model.parameters()), Reducer()
    patches, prefix = model.patch_embed.num_patches, model.num_prefix_tokens
    parts = adapter.parts(model.blocks[len(model.blocks) // 2])
    state = TokenState(num_prefix=prefix)
    images = torch.randn(batch_size, 3, *model.patch_embed.img_size).to(anchor)
    selector = _selector_of(model)
    variants = {"embed": lambda: adapter.embed(model, images)}

    def add(ratio):
        x = torch.randn(batch_size, prefix + max(round(ratio * patches), 1), model.embed_dim).to(anchor)
        variants["block", ratio] = lambda: run_block(parts, x, state, 0, plain)
        if selector is not None:
            variants["selector", ratio] = lambda: selector(x[:, prefix:])
        if ratio == 1:
            variants["head"] = lambda: model.head(model.norm(x)[:, 0])

    for ratio in ratios:
        add(ratio)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            times = measure(variants, device=anchor.device, budget_s=budget_s, clock=clock)
    finally:
        model.train(training)
    ms = {name: samples.median_ms for name, samples in times.items()}
    return LatencyTable(
        tuple(ratios),
        tuple(ms["block", ratio] for ratio in ratios),
        tuple(ms.get(("selector", ratio), 0.0) for ratio in ratios),
        ms["embed"] + ms["head"],
        batch_size,
    )


def _selector_of(model):
    """A function of patch tokens that does what the model's reducer does to choose, or None."""
    from .reducers._predictors import ImageMean
    from .reducers._stages import StagedPruning

    reducer = getattr(model, "token_reducer", None)
    modules = getattr(reducer, "selectors", None)
    if not isinstance(modules, nn.ModuleList) or not len(modules):
        return None
    if isinstance(reducer, StagedPruning):
        return lambda x: modules[0](x, ImageMean())
    return modules[0]


def _interpolated(places, values, at):
    if len(places) == 1:
        return values[0] * at / places[0]
    upper = min(max(bisect_right(places, at), 1), len(places) - 1)
    low, high = places[upper - 1], places[upper]
    return values[upper - 1] + (at - low) / (high - low) * (values[upper] - values[upper - 1])
