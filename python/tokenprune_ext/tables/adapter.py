# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN on ViT-Adapter and SViT-Adapter (arXiv 2306.07050), counted from the published sizes alone.

No GFLOPs are published for them. Counted are multiply-adds of convolutions, linear layers and attention products; no
norms, activations, softmax, interpolation or deformable sampling (which is shown beside it).
"""

import re
from dataclasses import dataclass

from ._base import GIGA, Estimate, Row, published_row, read

SYSTEMS = ("svit",)
FILES = ("svit_detection_flops",)
RULE = "multiply-adds of convolutions, linear layers and attention products; no deformable sampling"
NOMINAL = "at the target shares of the selectors; every image keeps others"

_SHOWN = (800, 1344)  # size of most images behind the test pipeline
_WIDTHS = {"T": 192, "S": 384}
_STEM = 64  # channels of the spatial prior
_DEPTH, _INJECTORS, _EXTRACTORS = 12, 4, 6
_HEADS, _POINTS = 6, 4  # of the deformable attention; its projections are C wide
_FPN, _FC, _CLASSES, _ANCHORS = 256, 1024, 80, 3
_ROIS, _MASKS = 1000, 100


@dataclass(frozen=True)
class Sizes:
    """A backbone on one image size."""

    width: int
    height: int
    breadth: int

    @property
    def tokens(self) -> int:
        """Tokens of the ViT: cells of 16 pixels."""
        return self.height // 16 * (self.breadth // 16)

    @property
    def levels(self) -> tuple[int, ...]:
        """Cells of 4, 8, 16, 32 and 64 pixels; every second one of the fourth level is the fifth."""
        n = self.tokens
        return 16 * n, 4 * n, n, n // 4, -(-(self.height // 32) // 2) * -(-(self.breadth // 32) // 2)


def backbone(s: Sizes, shares: list[float] | None = None) -> dict[str, float]:
    """Multiply-adds of the backbone by part.

    Args:
        s: sizes.
        shares: tokens kept by the selective layers, the last ones of the ViT; None for the dense backbone.
    """
    n, c, p = s.tokens, s.width, _STEM
    cells = s.levels[:4]
    adapted = sum(cells[1:])
    kept = [1.0] * (_DEPTH - len(shares or ())) + list(shares or ())
    # 3x3 convolutions, and 1x1 ones to the width of the ViT
    stem = 4 * cells[0] * (27 * p + 18 * p * p)
    pyramid = cells[1] * 18 * p * p + cells[2] * 72 * p * p + cells[3] * 144 * p * p
    lateral = sum(count * width * p * c for count, width in zip(cells, (1, 2, 4, 4)))
    # sampling offsets (two numbers) and weights of every point, value and output projection
    points = 3 * _HEADS * _POINTS
    injector = adapted * c * c + n * c * 3 * points + n * c * c
    extractor = n * c * c + adapted * c * points + adapted * c * c
    feed_forward = adapted * (c * c / 2 + 9 * c / 4)
    return {
        "spatial prior": stem + pyramid + lateral,
        "patch embedding": n * 768 * c,
        "blocks": sum(12 * share * n * c * c + 2 * (share * n) ** 2 * c for share in kept),
        "selectors": len(shares or ()) * n * (c * c / 4 + c / 2),
        "injectors": _INJECTORS * injector,
        "extractors": _EXTRACTORS * (extractor + feed_forward),
        "upsampling": cells[1] * 4 * c * c,
    }


def detector(s: Sizes) -> dict[str, float]:
    """Multiply-adds of Mask R-CNN behind the backbone, by part."""
    f, convolution = _FPN, 9 * _FPN * _FPN
    box = f * 49 * _FC + _FC * _FC + _FC * (_CLASSES + 1 + 4 * _CLASSES)
    mask = 14 * 14 * (4 * convolution + 4 * f * f) + 28 * 28 * f * _CLASSES
    return {
        "FPN": sum(s.levels[:4]) * (f * s.width + convolution),
        "RPN": sum(s.levels) * (convolution + f * 5 * _ANCHORS),
        f"box head, {_ROIS} regions": _ROIS * box,
        f"mask head, {_MASKS} detections": _MASKS * mask,
    }


def sampling(s: Sizes) -> float:
    """Deformable sampling of all injectors and extractors, about 5 multiply-adds per sampled channel."""
    adapted = sum(s.levels[1:4])
    return 5 * s.width * _POINTS * (_INJECTORS * 3 * s.tokens + _EXTRACTORS * adapted)


def parameters(c: int, selectors: int = 0) -> int:
    """Parameters of backbone and detector, with that many selectors."""
    p, f = _STEM, _FPN
    pretrained = 768 * c + c + 197 * c + _DEPTH * (12 * c * c + 13 * c)
    convolutions = 27 * p + 18 * p * p + 18 * p * p + 72 * p * p + 144 * p * p
    prior = convolutions + 2 * (3 * p + 2 * p + 4 * p + 4 * p) + 11 * p * c + 4 * c + 3 * c
    points = _HEADS * _POINTS
    projections = 2 * (c * c + c)
    injector = 5 * c + 3 * (3 * points * (c + 1)) + projections
    feed_forward = 2 * c + c * (c // 4) + c // 4 + 10 * (c // 4) + (c // 4) * c + c
    extractor = 4 * c + 3 * points * (c + 1) + projections + feed_forward
    selector = 2 * c + (c + 1) * (c // 4) + (c // 4 + 1) * 2
    own = pretrained + prior + _INJECTORS * injector + _EXTRACTORS * extractor + 4 * c * c + c + 8 * c
    convolution = 9 * f * f + f
    pyramid = 4 * (c * f + f + convolution)
    rpn = convolution + (f + 1) * 5 * _ANCHORS
    box = (f * 49 + 1) * _FC + (_FC + 1) * _FC + (_FC + 1) * (5 * _CLASSES + 1)
    mask = 4 * convolution + 4 * f * f + f + (f + 1) * _CLASSES
    return own + selectors * selector + pyramid + rpn + box + mask


def _estimate(width, shares, size):
    s = Sizes(width, *size)
    inner, outer = backbone(s, shares), detector(s)
    given = {"keep_shares": sorted(set(shares), reverse=True)} if shares else None
    others = {
        "backbone": sum(inner.values()),
        **inner,
        **outer,
        "backbone, FPN and RPN": sum(inner.values()) + outer["FPN"] + outer["RPN"],
        "deformable sampling (not counted)": sampling(s),
    }
    total = (sum(inner.values()) + sum(outer.values())) / GIGA
    return Estimate(total, RULE, given), {name: value / GIGA for name, value in others.items()}


def _shares(sparse):
    return read(FILES[0])["nominal_keep_ratios"] if sparse else None


def published(row: dict) -> Row:
    """A row of ``published.json``, at the usual size of an image."""
    sparse, width = row["backbone"].startswith("SViT"), _WIDTHS[row["backbone"][-1]]
    shares = _shares(sparse)
    estimate, others = _estimate(width, shares, _SHOWN)
    return published_row(
        row,
        estimate,
        where=f"Mask R-CNN, {_SHOWN[0]} x {_SHOWN[1]}, {_ROIS} regions, {_MASKS} detections",
        others=others,
        parameters=parameters(width, len(shares or ())),
        note=NOMINAL if sparse else "",
    )


def counted(file: str) -> list[Row]:
    """The rows of ``svit_detection_flops.json``."""
    rows = []
    for place, name in enumerate(read(file)["rows"]):
        network, size, height, breadth = re.match(r"(S?ViT)-(\w)-(\d+)x(\d+)$", name).groups()
        sparse = network == "SViT"
        width, shares = _WIDTHS[size], _shares(sparse)
        estimate, others = _estimate(width, shares, (int(height), int(breadth)))
        rows.append(
            Row(
                id=f"{file}/{place:03d}",
                system=SYSTEMS[0],
                method="SViT" if sparse else "",
                backbone=f"{network}-Adapter-{size}",
                setting=f"Mask R-CNN, {height} x {breadth}, {_ROIS} regions, {_MASKS} detections",
                estimate=estimate,
                others=others,
                parameters=parameters(width, len(shares or ())),
                note=NOMINAL if sparse else "",
            )
        )
    return rows
