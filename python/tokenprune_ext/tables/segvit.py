# SPDX-License-Identifier: Apache-2.0
"""Tables of SegViT (arXiv 2210.05844) and of DToP on it (arXiv 2308.01045), counted from the published sizes alone.

The authors trace one crop through the whole segmentor: multiply-adds of convolutions, linear layers and matrix products,
LayerNorm 5 per element, bilinear upsampling 4 per output element (twice: to the crop, and once more to the same size);
softmax, activations, additions and indexing are free.
"""

import re
from dataclasses import dataclass

from ._base import GIGA, Estimate, Row, published_row, read

SYSTEMS = ("dtop",)
FILES = ("dtop_segvit_flops",)
RULE = "traced operators: LayerNorm 5, upsampling 4 per element, final head alone (auxiliary heads are dead code)"
RULE_PRUNED = "traced operators: LayerNorm 5, upsampling 4 per element, all three heads"
RULE_CASCADE = "traced operators: LayerNorm 5, upsampling 4 per element, three cascaded heads"
SOLVED = "tokens behind the first and second exit solved for from the published figure, taking both as equal"

_PATCH = 16
_DECODER_LAYERS = 3
_SHRINK_AT = 8  # layer whose queries are every second token of every second row
# width, layers, layers with a head behind them
_BACKBONES = {"ViT-B": (768, 12, (5, 7, 11)), "ViT-L": (1024, 24, (7, 15, 23))}


@dataclass(frozen=True)
class Sizes:
    """A ViT with attention-to-mask heads; the heads are half as wide."""

    width: int
    depth: int
    heads_behind: tuple[int, ...]
    classes: int
    crop: int

    @property
    def tokens(self) -> int:
        """Tokens of a crop."""
        return (self.crop // _PATCH) ** 2

    @property
    def channels(self) -> int:
        """Width of the heads."""
        return self.width // 2


def _embedding(s):
    return 3 * _PATCH**2 * s.width * s.tokens


def _layer(s, n):
    return 12 * s.width**2 * n + 2 * n * n * s.width + 10 * n * s.width


def _decoder_layer(c, queries, n):
    """Self-attention of the queries, attention to n tokens, two linear layers of 4c, three LayerNorms."""
    itself = 4 * c * c * queries + 2 * queries * queries * c
    memory = 2 * queries * c * c + 2 * n * c * c + 2 * queries * n * c
    return itself + memory + 8 * c * c * queries + 15 * queries * c


def _input(s, n):
    return n * s.width * s.channels + 5 * n * s.channels


def head(s: Sizes, n: float) -> float:
    """One head on n tokens; it tells two classes apart for every query."""
    decoder = _DECODER_LAYERS * _decoder_layer(s.channels, s.classes, n)
    return _input(s, n) + 2 * s.classes * s.channels + decoder


def _upsampling(s):
    return 2 * 4 * s.classes * s.crop**2


def exiting(s: Sizes, first: float | None = None, second: float | None = None) -> float:
    """DToP: ``first`` and ``second`` tokens behind the first two heads; without them nothing exits, and one head counts."""
    pruned = first is not None
    first, second = (first, second) if pruned else (s.tokens, s.tokens)
    places = s.heads_behind
    counts = [s.tokens if i <= places[0] else first if i <= places[1] else second for i in range(s.depth)]
    heads = (s.tokens, first, second) if pruned else (s.tokens,)
    return _embedding(s) + sum(_layer(s, n) for n in counts) + sum(head(s, n) for n in heads) + _upsampling(s)


def cascade(s: Sizes) -> int:
    """SegViT: three heads one after another, their classes and masks contracted at full resolution."""
    c, k, layers = s.channels, s.classes, len(s.heads_behind)
    heads = layers * (_input(s, s.tokens) + _DECODER_LAYERS * _decoder_layer(c, k, s.tokens) + k * c * (k + 1))
    return _embedding(s) + s.depth * _layer(s, s.tokens) + heads + k * k * s.crop**2 + _upsampling(s)


def shrunk(s: Sizes) -> int:
    """SegViT shrunk: a quarter of the tokens from one layer on; queries of the full grid bring them back."""
    n, m, d, c, k = s.tokens, s.tokens // 4, s.width, s.channels, s.classes
    layer = 5 * n * d + 2 * m * d * d + 2 * n * d * d + 2 * m * n * d + 5 * m * d + 8 * m * d * d
    encoder = _SHRINK_AT * _layer(s, n) + layer + (s.depth - _SHRINK_AT - 1) * _layer(s, m)
    restoring = sum(_input(s, count) + _DECODER_LAYERS * _decoder_layer(c, n, count) for count in (n, m))
    masks = _DECODER_LAYERS * (_decoder_layer(c, k, n) + k * c * (k + 1))
    return _embedding(s) + encoder + restoring + masks + k * k * s.crop**2 + _upsampling(s)


def parameters(s: Sizes, kind: str = "stages") -> int:
    """Parameters of a network.

    Args:
        s: sizes.
        kind: ``"stages"`` (DToP: a head of its own behind every stage), ``"cascade"`` or ``"shrunk"`` (SegViT).
    """
    d, c, k = s.width, s.channels, s.classes
    encoder = 3 * _PATCH**2 * d + d + d + (s.tokens + 1) * d + s.depth * (12 * d * d + 13 * d)
    decoder = _DECODER_LAYERS * (16 * c * c + 19 * c)
    entrance = d * c + 3 * c
    if kind == "stages":
        return encoder + len(s.heads_behind) * (entrance + decoder + k * c + 2 * (c + 1))
    queries = k * c + (k + 1) * (c + 1)
    if kind == "cascade":
        return encoder + len(s.heads_behind) * (entrance + decoder) + queries
    return encoder + s.tokens * c + 2 * (entrance + decoder) + decoder + queries


# Where a published row stands in dtop_segvit_flops.json.
_PUBLISHED = {
    ("Ade20k", "Vit-base"): 0,
    ("Ade20k", "Vit-large"): 1,
    ("Pascal Context", "Vit-large"): 2,
    ("COCO-Stuff-10K", "Vit-large"): 3,
}


def _sizes(row):
    return Sizes(row["embed_dims"], row["layers"], tuple(row["out_indices"]), row["classes"], row["input"])


def _implied(row):
    """Tokens behind the heads that the published figure implies, all heads counted."""
    for entry in row["implied"]:
        if entry["aux_heads_counted"] and entry["assumption"] == "N1=N2=f*N":
            return entry["N1"], entry["N2"]
    raise KeyError(row["row"])


def _estimate(row, pruned):
    s = _sizes(row)
    if not pruned:
        with_all = exiting(s, s.tokens, s.tokens) / GIGA
        return Estimate(exiting(s) / GIGA, RULE), {"all three heads": with_all}
    first, second = _implied(row)
    return Estimate(exiting(s, first, second) / GIGA, RULE_PRUNED, {"tokens": [first, second]}), {}


def published(row: dict) -> Row:
    """A row of ``published.json``."""
    dataset, pruned = row["section"][-1], row["method"] == "Segvit-prune"
    sized = read(FILES[0])["rows"][_PUBLISHED[dataset, row["backbone"]]]
    estimate, others = _estimate(sized, pruned)
    return published_row(
        row,
        estimate,
        where=f"{dataset} {sized['input']}",
        dense=not pruned,
        others=others,
        parameters=parameters(_sizes(sized)),
        note=SOLVED if pruned else "",
    )


def counted(file: str) -> list[Row]:
    """The rows of ``dtop_segvit_flops.json``: DToP as in the published table, then SegViT."""
    table, rows = read(file), []
    for row in table["rows"]:
        for pruned in (False, True):
            estimate, others = _estimate(row, pruned)
            rows.append(_row(file, len(rows), row, estimate, others, pruned))
    for row in table["segvit_rows"]:
        s, is_shrunk = _parse(row["row"])
        estimate = Estimate((shrunk if is_shrunk else cascade)(s) / GIGA, RULE_CASCADE)
        backbone, setting = row["row"].removeprefix("SegViT ").split(" ", 1)
        rows.append(
            Row(
                id=f"{file}/{len(rows):03d}",
                system="segvit",
                method="SegViT",
                backbone=backbone,
                setting=setting,
                estimate=estimate,
                published_gflops=row["published"],
                parameters=parameters(s, "shrunk" if is_shrunk else "cascade"),
            )
        )
    for point in table["check_points"]:
        rows.append(_point(file, len(rows), point, table))
    return rows


def _row(file, place, row, estimate, others, pruned):
    backbone = re.search(r"ViT-\w", row["row"])[0]
    return Row(
        id=f"{file}/{place:03d}",
        system="dtop",
        method="SegViT + DToP" if pruned else "SegViT, one head per stage",
        backbone=backbone,
        setting=row["row"].replace(f"{backbone} ", ""),
        estimate=estimate,
        published_gflops=row["pruned" if pruned else "base"]["published"],
        others=others,
        parameters=parameters(_sizes(row)),
        note=SOLVED if pruned else "",
    )


def _point(file, place, point, table):
    """A traced forward pass with the counts that it had."""
    crop = int(re.search(r"(\d+)\)", point["model"])[1])
    row = next(row for row in table["rows"] if row["input"] == crop and point["model"].split("(")[1][:5] in row["row"])
    s, counts = _sizes(row), (point["N1"], point["N2"])
    unpruned = counts == (s.tokens, s.tokens)
    value = exiting(s) if unpruned else exiting(s, *counts)
    given = None if unpruned else {"tokens": list(counts)}
    return Row(
        id=f"{file}/{place:03d}",
        system="dtop",
        method="SegViT + DToP",
        backbone=point["model"].split("(")[1][:5],
        setting=point["model"],
        estimate=Estimate(value / GIGA, RULE if unpruned else RULE_PRUNED, given),
        published_gflops=point["fvcore_gflops"],
        parameters=parameters(s),
        note="no row of a published table: a trace of the original implementation",
    )


def _parse(text):
    """``"SegViT ViT-L shrunk ADE20K 640, K=150"`` -> sizes, and whether it is shrunk."""
    backbone, crop, classes = re.match(r"SegViT (ViT-\w) .*?(\d+), K=(\d+)$", text).groups()
    width, depth, places = _BACKBONES[backbone]
    return Sizes(width, depth, places, int(classes), int(crop)), "shrunk" in text
