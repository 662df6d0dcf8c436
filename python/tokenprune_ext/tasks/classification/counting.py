# SPDX-License-Identifier: Apache-2.0
"""GFLOPs of a classifier: traced ("true"), at its token counts, and as the published tables count them."""

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from ... import _patch, reducers, tables
from ..._flops import count_flops, traced_flops
from ..._images import load_photo, preprocess
from ...tables import Counts, Dims, Layer, dims_of, macs_by_part, planned
from .setting import Setting, turned

__all__ = ["Count", "count", "image_size", "split", "traced"]

GIGA = 1e9
PARTS = ("linear", "conv", "attention")
_SEED = 0
# Their attention is not that of all tokens of a layer with one another: it is taken from the trace.
_OWN_ATTENTION = ("act", "ats", "smyrf")
# More than this share beside blocks, embedding and classifier: not a plain ViT after all (windows, convolutions), or one
# whose classifier no table knows.
_UNEXPLAINED, _UNRULED = 0.02, 0.001


@dataclass(frozen=True)
class Count:
    """GFLOPs of one image, a multiply-add counted once.

    Attributes:
        parts: linear layers, convolutions and attention products of the model at the token counts that occur.
        overhead: what the method adds: selectors, matching, clustering, scores, hashes.
        tokens, tokens_mlp: per layer; None where the model is no plain ViT.
        rule: as the published tables count it, None where no table does.
        data_dependent: whether another image would give other numbers.
        parameters: of the model, the method's included.
    """

    parts: dict[str, float]
    overhead: float
    tokens: list[float] | None
    tokens_mlp: list[float] | None
    rule: tables.Estimate | None
    data_dependent: bool
    parameters: int

    @property
    def gflops(self) -> float:
        """The model's own work."""
        return sum(self.parts.values())

    @property
    def true(self) -> float:
        """The whole trace."""
        return self.gflops + self.overhead


def image_size(model: nn.Module, resolution: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width that a model takes."""
    stem = getattr(model, "patch_embed", None)
    if getattr(stem, "img_size", None) is not None:
        return (3, *stem.img_size)
    if resolution is not None:
        return 3, resolution, resolution
    return tuple(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224)))


def traced(model: nn.Module, resolution: int | None = None) -> dict[str, float] | None:
    """Multiply-adds by part of one image without running the model; None when they depend on the data."""
    if _data_dependent(model):
        return None
    return _halved(turned(lambda: traced_flops(model, (1, *image_size(model, resolution)))))


def count(setting: Setting, *, image: str | None = None) -> Count:
    """Count a setting: without running it where its counts are fixed, otherwise on a photograph.

    Args:
        setting: see :func:`.setting.resolve`.
        image: photograph for methods whose counts depend on the data, None for the example.

    Raises:
        UserError: something does not fit.
    """
    model, resolution = setting.build(meta=True), setting.resolution
    dense = setting.without_method().build(meta=True)
    dims, excess = _explained(dense, resolution)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs the slower PyTorch reference.*")
        if not _data_dependent(model):
            image is None or load_photo(image)  # a wrong file is an error, whether or not it is needed
            macs = traced(model, resolution)
            counts = Counts(tuple(planned(model)), {}) if dims else None
        else:
            macs, counts = _measured(setting.build(), image)
    parts, overhead = split(model, dims, macs, counts, excess)
    ruled = counts is not None and dims is not None and abs(excess) <= _UNRULED * sum(macs.values())
    return Count(
        parts={part: value / GIGA for part, value in parts.items()},
        overhead=overhead / GIGA,
        tokens=None if counts is None else [layer.attention for layer in counts.layers],
        tokens_mlp=None if counts is None else [layer.mlp for layer in counts.layers],
        rule=tables.rule_of(model, counts) if ruled else None,
        data_dependent=_data_dependent(model),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def _halved(flops):
    return {part: value / 2 for part, value in flops.items()}


def _reducer(model):
    """The method in a model, wherever it sits."""
    found = (m.token_reducer for m in model.modules() if isinstance(getattr(m, "token_reducer", None), nn.Module))
    return next(found, None)


def _data_dependent(model):
    reducer = _reducer(model)
    if reducer is None:
        return False
    groups = isinstance(reducer, reducers.get("act")) and reducer.layers
    return bool(groups) or reducer.plan(_depth(model), 10**4) is None


def _depth(model):
    return len(getattr(model, "blocks", ())) or getattr(_reducer(model), "depth", 0)


def _explained(dense, resolution):
    """Sizes of a plain ViT, and the multiply-adds that they do not explain (another kind of classifier)."""
    dims, macs = dims_of(dense), traced(dense, resolution)
    if dims is None:
        return None, 0.0
    excess = sum(macs.values()) - sum(macs_by_part(dims, planned(dense)).values())
    return (dims, excess) if abs(excess) <= _UNEXPLAINED * sum(macs.values()) else (None, 0.0)


def split(
    model: nn.Module, dims: Dims | None, macs: dict[str, float], counts: Counts | None, excess: float = 0.0
) -> tuple[dict[str, float], float]:
    """A trace as the model's own work by part, and what the method adds; together they are the trace.

    Args:
        model: traced.
        dims: its sizes, None where they do not explain it.
        macs: the trace by part.
        counts: tokens that were processed.
        excess: multiply-adds of the dense model that ``dims`` do not explain.
    """
    if dims is None or counts is None:
        return {part: macs[part] for part in PARTS}, macs["deformable"] + macs["reduction"] + macs["other"]
    parts, total = macs_by_part(dims, counts.layers), sum(macs.values())
    parts["linear"] += excess
    reducer = _reducer(model)
    if any(isinstance(reducer, reducers.get(name)) for name in _OWN_ATTENTION):
        parts["attention"] = macs["attention"]
    if isinstance(reducer, reducers.get("act")):  # hashes are matrix products too
        hashed = sum(counts.layers[place].attention for place in reducer.layers)
        parts["attention"] -= hashed * dims.width * sum(reducer.hashes.values())
    overhead = max(total - sum(parts.values()), macs["reduction"])
    # ATS projects sampled tokens only, and some classifiers read all that are left.
    parts["linear"] = total - overhead - parts["conv"] - parts["attention"]
    return parts, overhead


@torch.no_grad()
def _measured(model, image):
    """Multiply-adds and counts of one forward pass on a photograph."""
    photo, _ = load_photo(image)
    images, _ = turned(lambda: preprocess(photo, model))

    def seeded(function):
        torch.manual_seed(_SEED)  # a method that draws must count the tokens that it traced
        return turned(function)

    steps = seeded(lambda: _patch.trace(model, images))
    layers = [Layer(step.attention_tokens.float().mean().item(), step.tokens.float().mean().item()) for step in steps]
    groups, reducer = {}, _reducer(model)
    if isinstance(reducer, reducers.get("act")):
        carry = seeded(lambda: _patch.features(model, images))[1].carry
        groups = {place: _groups(carry, place) for place in reducer.layers if f"act.q_groups.{place}" in carry}
    macs = _halved(seeded(lambda: count_flops(lambda: model(images))))
    return macs, Counts(tuple(layers), groups)


def _groups(carry, place):
    """The largest number of groups of any head."""
    return carry[f"act.q_groups.{place}"][0].amax().item() + 1
