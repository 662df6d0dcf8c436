# SPDX-License-Identifier: Apache-2.0
"""Tables of Segmenter with token reductions (arXiv 2210.01035), counted from the published sizes alone.

The authors hook modules of one crop: multiply-adds of convolutions, linear layers (without bias) and the encoder's
attention products; LayerNorm and GELU 2 per element, softmax 2 per weight. The decoder's attention products, masks and
interpolation are left out. Some published figures come from another state of their counter or leave the decoder out:
``RULE_*`` says which rule a row follows.
"""

import functools
import math
from dataclasses import dataclass

from ._base import GIGA, Estimate, Row, number, pair, published_row, read

SYSTEMS = ("expedit-segmenter",)
FILES = ("segmenter_flops",)

RULE_RELEASED = "module hooks as released: LayerNorm, GELU, softmax 2 per element, no attention products in the decoder"
RULE_FITTED = "module hooks with clustering as fitted to the nine published rows (not read anywhere), no reconstruction"
RULE_NO_FUSE = f"{RULE_RELEASED}; without fused token, reconstruction from 20 tokens (inferred from the figure)"
RULE_ENCODER = f"{RULE_RELEASED}; encoder alone, the decoder is missing from the published figure (inferred from it)"
SOLVED = "clusters per layer solved for from the published figure, which was measured on an uninitialised image"

_DATASETS = {"ADE20K": "ade20k", "Cityscapes": "cityscapes", "Pascal Context": "pascal_context"}
_SHORT = {"ade": "ADE20K", "city": "Cityscapes", "pc": "Pascal Context"}
# Published EViT figures that are not those of the released configuration.
_EVIT_RULES = {
    ("ADE20K", 0.9): RULE_NO_FUSE,
    ("ADE20K", 0.8): RULE_NO_FUSE,
    ("Cityscapes", 0.9): RULE_ENCODER,
    ("Cityscapes", 0.8): RULE_ENCODER,
    ("Pascal Context", 0.9): RULE_ENCODER,
}


@dataclass(frozen=True)
class Sizes:
    """A Segmenter: encoder and mask transformer."""

    width: int
    hidden: int
    heads: int
    depth: int
    patch: int
    patches: int
    classes: int
    decoder_layers: int
    decoder_hidden: int

    @property
    def tokens(self) -> int:
        """Patches and class token."""
        return self.patches + 1


@functools.cache
def sizes(dataset: str) -> Sizes:
    """The published model of a dataset, named as in the tables."""
    table = read("segmenter_configs")
    config, encoder = table["datasets"][_DATASETS[dataset]], table["common"]["backbone"]
    return Sizes(
        width=encoder["embed_dims"],
        hidden=encoder["embed_dims"] * encoder["mlp_ratio"],
        heads=encoder["num_heads"],
        depth=encoder["num_layers"],
        patch=encoder["patch_size"],
        patches=(config["img_size"] // encoder["patch_size"]) ** 2,
        classes=config["n_cls"],
        decoder_layers=config["decoder_layers"],
        decoder_hidden=table["common"]["decode_head"]["d_ff"],
    )


def parameters(s: Sizes) -> int:
    """Parameters of encoder and decoder."""

    def blocks(depth, hidden):
        return depth * (4 * s.width**2 + 4 * s.width + 2 * s.width * hidden + hidden + s.width + 4 * s.width)

    encoder = s.patch**2 * 3 * s.width + s.width + s.width + s.tokens * s.width + 2 * s.width
    decoder = s.width**2 + s.width + s.classes * s.width + 2 * s.width + 2 * s.width**2 + 2 * s.classes
    return encoder + blocks(s.depth, s.hidden) + decoder + blocks(s.decoder_layers, s.decoder_hidden)


def _embedding(s):
    return s.patches * 3 * s.patch**2 * s.width + s.patches * s.width


def _attention(s, n, groups=None):
    """Projections, scaling of the queries, products and softmax of n tokens (of that many groups of queries)."""
    queries = n if groups is None else groups
    return 4 * n * s.width**2 + n * s.width + 2 * queries * n * s.width + 2 * s.heads * queries * n


def _mlp(s, n):
    return 2 * n * s.width * s.hidden + 2 * n * s.hidden


def _norms(s, n, count=1):
    return count * 2 * n * s.width


def _block(s, n):
    return _norms(s, n, 2) + _attention(s, n) + _mlp(s, n)


def decoder(s: Sizes, patches: int) -> int:
    """The mask transformer over a number of patch tokens; its attention products are not counted."""
    n, hidden = patches + s.classes, s.decoder_hidden
    layer = _norms(s, n, 2) + 4 * n * s.width**2 + 2 * n * s.width * hidden + 2 * n * hidden
    return patches * s.width**2 + s.decoder_layers * layer + _norms(s, n) + 2 * patches * s.classes


def dense(s: Sizes) -> int:
    """The unreduced model."""
    return _embedding(s) + s.depth * _block(s, s.tokens) + _norms(s, s.tokens) + decoder(s, s.patches)


def clustered(s: Sizes, alpha: int, clusters: int, released: bool = True) -> int:
    """Layers from ``alpha`` on, last norm and decoder on clusters."""
    n, k, d, iters, window = s.patches, clusters, s.width, 5, 25
    blocks = alpha * _block(s, s.tokens) + (s.depth - alpha) * _block(s, k + 1)
    if released:
        clustering = n * d + 2 * (n + k) + iters * (2 * window * n * d + 3 * window * n + window * n * d + k * d)
        restoring = n * d + k * d + n * k * (d + 1) + 60 * n + 20 * n * d
    else:
        distances = n * d + k * d + n * k * (d + 1)
        clustering, restoring = n * d + 2 * n * k + iters * (distances + 3 * n * k + 49 * n * d + k * d), 0
    return _embedding(s) + blocks + _norms(s, k + 1) + decoder(s, k) + clustering + restoring


def evit(s: Sizes, keep: float, fuse: bool = True, k: int = 1, head: bool = True) -> int:
    """Tokens dropped in three layers, and restored stage by stage in front of the decoder."""
    places = read("segmenter_configs")["variants"]["evit"]["prune_layers_0_based"]
    n, total, stages = s.patches, 0, []
    for layer in range(s.depth):
        total += _norms(s, n + 1) + _attention(s, n + 1)
        if layer in places:
            kept = math.ceil(keep * n)
            stages.append((n - kept, kept))
            n = kept + int(fuse)
        total += _norms(s, n + 1) + _mlp(s, n + 1)
    total += _norms(s, n + 1)
    for dropped, kept in stages:
        nearest = min(k, kept)
        total += (dropped + kept) * s.width + dropped * kept * (s.width + 1)
        total += 3 * dropped * nearest + dropped * nearest * s.width
    return _embedding(s) + total + (decoder(s, s.patches) if head else 0)


def tome(s: Sizes, share: float) -> int:
    """Tokens merged for each half of a layer and put back behind it; the matching is not counted."""
    left = s.tokens - min(int(share * s.tokens), (s.tokens - 1) // 2)
    block = _norms(s, s.tokens, 2) + _attention(s, left) + _mlp(s, left)
    return _embedding(s) + s.depth * block + _norms(s, s.tokens) + decoder(s, s.patches)


def act(s: Sizes, groups: float) -> float:
    """All layers with attention of grouped queries, the same number of groups in each."""
    block = _norms(s, s.tokens, 2) + _attention(s, s.tokens, groups) + _mlp(s, s.tokens)
    return _embedding(s) + s.depth * block + _norms(s, s.tokens) + decoder(s, s.patches)


def _estimate(method, dataset, row):
    """Our value by the rule of a published row, and by other rules."""
    s = sizes(dataset)
    if method == "Ours":
        alpha, clusters = int(row["alpha"]), math.prod(row["grid"])
        return Estimate(clustered(s, alpha, clusters, released=False) / GIGA, RULE_FITTED), {
            "released counter": clustered(s, alpha, clusters) / GIGA
        }
    if method == "EViT":
        keep = row["keep"]
        found = _EVIT_RULES.get((dataset, keep), RULE_RELEASED)
        options = {RULE_NO_FUSE: {"fuse": False, "k": 20}, RULE_ENCODER: {"head": False}}.get(found, {})
        others = {"released counter": evit(s, keep) / GIGA} if options else {}
        return Estimate(evit(s, keep, **options) / GIGA, found), others
    if method == "ToMe":
        return Estimate(tome(s, row["share"]) / GIGA, RULE_RELEASED), {}
    if method == "ACT":
        groups = _implied(dataset, row["hashes"])
        bounds = {"one cluster": act(s, 1) / GIGA, "no two queries alike": dense(s) / GIGA}
        return Estimate(act(s, groups) / GIGA, RULE_RELEASED, {"clusters": groups}), bounds
    return Estimate(dense(s) / GIGA, RULE_RELEASED), {}


def _implied(dataset, hashes):
    """Clusters per layer that a published figure implies."""
    for row in read("segmenter_flops")["rows"]:
        if (_SHORT[row["dataset"]], row["table"], row["config"]) == (dataset, "ACT", f"q_hashes={hashes}"):
            return row["implied_mean_Q_clusters_per_layer"]
    raise KeyError(f"{dataset} {hashes}")


def published(row: dict) -> Row:
    """A row of ``published.json``."""
    _, dataset, table = row["section"]
    method = "dense" if row["method"] == "Segmenter" else table
    columns = {}
    if method == "Ours":
        columns = {"alpha": row["alpha"], "grid": pair(row["h_x_w"])}
    elif method == "EViT":
        columns = {"keep": number(row["keep_rate"])}
    elif method == "ToMe":
        columns = {"share": number(row["r%"])}
    elif method == "ACT":
        columns = {"hashes": int(row["#query-hashes"])}
    estimate, others = _estimate(method, dataset, columns)
    return published_row(
        row,
        estimate,
        where=dataset,
        dense=method == "dense",
        others=others,
        parameters=parameters(sizes(dataset)),
        note=SOLVED if estimate.given else "",
    )


def counted(file: str) -> list[Row]:
    """The rows of ``segmenter_flops.json``."""
    rows = []
    for place, row in enumerate(read(file)["rows"]):
        dataset, table = _SHORT[row["dataset"]], row["table"]
        method = "dense" if table == "Segmenter" else table
        estimate, others = _estimate(method, dataset, _columns(method, row["config"]))
        rows.append(
            Row(
                id=f"{file}/{place:03d}",
                system=SYSTEMS[0],
                method="Segmenter" if method == "dense" else f"Segmenter + {table}",
                backbone="ViT-L/16",
                setting=f"{dataset}, {row['config']}",
                estimate=estimate,
                published_gflops=row["published"],
                others=others,
                parameters=parameters(sizes(dataset)),
                note=row.get("note", SOLVED if estimate.given else ""),
            )
        )
    return rows


def _columns(method, config):
    """``"alpha=16, 28x28"`` and the like."""
    if method == "Ours":
        alpha, grid = config.split(", ")
        return {"alpha": alpha.removeprefix("alpha="), "grid": pair(grid)}
    value = config.partition("=")[2]
    if method == "ACT":
        return {"hashes": int(value)}
    return {"EViT": {"keep": float(value)}, "ToMe": {"share": float(value)}}[method] if value else {}
