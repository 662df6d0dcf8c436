# SPDX-License-Identifier: Apache-2.0
"""Tables of SWAG models with token reductions (arXiv 2210.01035): rows, and the counter behind their GFLOPs.

The authors trace one image and add up, with a multiply-add as one: linear layers with the bias as one more input column,
convolutions without bias, matrix products, LayerNorm (4 per element), softmax (5), and one per element for GELU,
additions, scalings and dropout (in evaluation too). Sorting, selection, means and gathers are free.
"""

import math

from torch import nn

from .. import reducers
from ._base import GIGA, Estimate, Row, meta_model, pair, published_row, read
from ._vit import Counts, Dims, Layer, dims_of, is_swag, planned

SYSTEMS = ("expedit-swag",)
FILES = ("swag_flops", "swag_methods_flops")
RULE = "traced operators: bias as a column, LayerNorm 4, softmax 5, elementwise 1"

_SIZES = {"ViT-B/16": "b16", "ViT-L/16": "l16", "ViT-H/14": "h14"}
# Method of a published row -> prefix of the model's name, and its keywords from the columns.
_COLUMNS = {
    "SWAG": ("vit", lambda row: {}),
    "SWAG + Ours": (
        "hourglass_vit",
        lambda row: {"clustering_location": int(row["alpha"]), "num_cluster": math.prod(pair(row["h_x_w"]))},
    ),
    "SWAG + EViT": ("e_vit", lambda row: {"base_keep_rate": float(row["keep_rate"])}),
    "SWAG + ToMe": ("tome_vit", lambda row: {"tome_r": int(row["r"])}),
    "SWAG + ACT": ("act_vit", lambda row: {"act_q_hashes": int(row["q_hashes"])}),
    "SWAG + ATS": ("ats_vit", lambda row: {"ats_blocks": [int(row["alpha"])]}),
    "SWAG + Evo-ViT": (
        "evo_vit",
        lambda row: {
            "evo_prune_location": int(row["pruning_location"]),
            "evo_prune_ratio": float(row["pruning_ratio"]),
        },
    ),
    "SWAG + SMYRF": (
        "smyrf_vit",
        lambda row: {
            "smyrf_plug_in_index": int(row["alpha"]),
            "smyrf_n_hashes": int(row["rounds"]),
            "smyrf_q_cluster_size": int(row["q_cluster_size"]),
            "smyrf_k_cluster_size": int(row["k_cluster_size"]),
        },
    ),
}


def _linear(n, inputs, outputs):
    return n * outputs * (inputs + 1)


def _head_of_block(d: Dims, n, mixing):
    """LayerNorm, projections with dropout and residual; ``mixing`` is what happens between them."""
    return 4 * n * d.width + _linear(n, d.width, 3 * d.width) + mixing + _linear(n, d.width, d.width) + 2 * n * d.width


def _mixing(d: Dims, n):
    """Scaling of the queries, two products, softmax."""
    return n * d.width + 2 * n * n * d.width + 5 * d.heads * n * n


def _mlp(d: Dims, n):
    """LayerNorm, two linear layers, GELU, dropout twice, residual."""
    linear = _linear(n, d.width, d.hidden) + _linear(n, d.hidden, d.width)
    return 4 * n * d.width + linear + 2 * n * d.hidden + 2 * n * d.width


def _block(d: Dims, layer: Layer):
    return _head_of_block(d, layer.attention, _mixing(d, layer.attention)) + _mlp(d, layer.mlp)


def _frame(d: Dims, last):
    """Embedding (position and dropout included), last LayerNorm, classifier."""
    head = _linear(1, d.width, d.classes) if d.classes else 0
    return d.stem + 2 * d.tokens * d.width + 4 * last * d.width + head


def _plain(d, reducer, counts):
    return sum(_block(d, layer) for layer in counts.layers)


def _hourglass(d, reducer, counts):
    # Dropout behind the embedding runs in front of every layer there.
    total = _plain(d, reducer, counts) + d.width * (sum(layer.attention for layer in counts.layers) - d.tokens)
    if not reducer.active:
        return total
    p, k, t, width = d.patches, math.prod(reducer.clusters), reducer.iters, d.width
    products = 2 * t * k * p * width  # distances and means over all centres, not only the neighbours
    norms = t * (p * width + k * width + 2 * k * p)
    weights = k * p + t * k * p + 2 * k * p + 2 * t * k * p + 5 * t * k * p + t * k * width
    return total + products + norms + weights


def _tome(d, reducer, counts):
    total, head_dim, sized = 0, d.width // d.heads, False
    for layer, merges in zip(counts.layers, reducer.r):
        n, m = layer
        total += _block(d, layer)
        if merges == 0:
            continue
        total += math.ceil(n / 2) * (n // 2) * head_dim + n * head_dim + d.width * (n + m)
        if sized and reducer.prop_attn:
            total += d.heads * n * n
        sized = True
    return total


def _evit(d, reducer, counts):
    total = 0
    for n, m in counts.layers:
        total += _block(d, Layer(n, m))
        if m != n:  # mean over the heads, and the fused token
            left = m - d.prefix - int(reducer.fuse_token)
            total += n * n + int(reducer.fuse_token) * (n - d.prefix - left) * d.width
    return total


def _evo(d, reducer, counts):
    return sum(_block(d, layer) + layer.attention**2 for layer in counts.layers)


def _smyrf(d, reducer, counts):
    total, heads, head_dim = 0, d.heads, d.width // d.heads
    rounds, size = reducer.rounds, reducer.cluster_size
    for place, layer in enumerate(counts.layers):
        if place not in reducer.layers:
            total += _block(d, layer)
            continue
        n = layer.attention
        hashes = 2 * (heads + heads * n) + 2 * (heads * n * (head_dim + 2) * rounds + heads * n * rounds)
        products = 2 * rounds * heads * n * size * head_dim + 3 * rounds * heads * n * size
        merging = 2 * rounds * heads * n + 2 * rounds * heads * n + rounds * heads * n * head_dim
        total += _head_of_block(d, n, hashes + products + merging) + _mlp(d, layer.mlp)
    return total


def _act(d, reducer, counts):
    if set(reducer.hashes) - {"q"}:
        return None  # the tables group queries only
    total = 0
    for place, layer in enumerate(counts.layers):
        if place not in reducer.layers:
            total += _block(d, layer)
            continue
        n, groups = layer.attention, counts.groups[place]
        mixing = n * d.width + 2 * groups * n * d.width + 6 * d.heads * groups * n
        total += _head_of_block(d, n, mixing) + _mlp(d, layer.mlp)
    return total


def _ats(d, reducer, counts):
    total, first = 0, d.tokens
    for place, layer in enumerate(counts.layers):
        n, m = layer
        if place not in reducer.layers:
            total += _block(d, layer)
            continue
        attention = 8 * n * d.width + _linear(n, d.width, 3 * d.width) + 2 * n * n * d.width
        scores = 2 * n * n + 5 * d.heads * n * n + d.heads * n + n * d.width + n
        sampling = 6 * (n - 1) + (first - 1) ** 2 + 8 * (first - 1) + 4 * m
        total += attention + scores + sampling + _linear(m, d.width, d.width) + 6 * m * d.width + _mlp(d, m)
    return total


# Name of a reducer -> its blocks; None stands for the dense model.
_METHODS = {
    None: _plain,
    "hourglass": _hourglass,
    "tome": _tome,
    "evit": _evit,
    "evo": _evo,
    "smyrf": _smyrf,
    "act": _act,
    "ats": _ats,
}


def serves(model: nn.Module) -> bool:
    """Whether this is a SWAG model."""
    return is_swag(model)


def rule(model: nn.Module, counts: Counts) -> Estimate | None:
    """The tables' count of a SWAG model, dense or with one of their methods."""
    dims, reducer = dims_of(model), getattr(model, "token_reducer", None)
    method = next((name for name in _METHODS if name and isinstance(reducer, reducers.get(name))), None)
    if dims is None or (reducer is not None and method is None):
        return None
    total = _METHODS[method](dims, reducer, counts)
    if total is None:
        return None
    last = dims.tokens if method == "evo" else counts.layers[-1].mlp  # placeholders are still there
    return Estimate((total + _frame(dims, last)) / GIGA, RULE)


def published(row: dict) -> Row:
    """A row of ``published.json``."""
    prefix, keywords = _COLUMNS[row["method"]]
    model, options = f"{prefix}_{_SIZES[row['backbone']]}_in1k", keywords(row)
    counts, given, note = _counts(model, options)
    estimate = rule(meta_model(model, **options), counts)
    ours = Estimate(estimate.gflops, RULE, given)
    return published_row(row, ours, dense=prefix == "vit", model=model, options=options, note=note)


def counted(file: str) -> list[Row]:
    """The rows of one of ``FILES``: settings of the published table, spelled out."""
    rows = []
    for place, row in enumerate(read(file)["rows"]):
        method, backbone, options = _spelled_out(row)
        model = f"{_COLUMNS[method][0]}_{_SIZES[backbone]}_in1k"
        counts, given, note = _counts(model, options)
        estimate = rule(meta_model(model, **options), counts)
        rows.append(
            Row(
                id=f"{file}/{place:03d}",
                system=SYSTEMS[0],
                method=method,
                backbone=backbone,
                setting=", ".join(f"{key}={value}" for key, value in options.items()) or "dense",
                estimate=Estimate(estimate.gflops, RULE, given),
                published_gflops=row.get("published_gflops", row.get("published_GFLOPs")),
                model=model,
                options=options,
                note=note,
            )
        )
    return rows


def _spelled_out(row):
    """Method, backbone and keywords of a row of ``FILES``."""
    method, backbone = row["method"], row["backbone"].split("@")[0]
    method = method if method.startswith("SWAG") else f"SWAG + {method}"
    if "params" not in row:
        options = {"tome_r": row["r"]} if "r" in row else {}
        if "alpha" in row:
            options = {"clustering_location": row["alpha"], "num_cluster": row["num_cluster"]}
        return method, backbone, options
    names = {"q_cluster_size": "smyrf_q_cluster_size", "k_cluster_size": "smyrf_k_cluster_size"}
    left_out = ("layers", "tradeoff", "num_tokens")  # all layers, fixed, any number that is large enough
    options = {names.get(key, key): value for key, value in row["params"].items() if key not in left_out}
    return method, backbone, options


def _counts(model, options):
    """Tokens per layer; for counts that depend on the data those which the published figure implies."""
    built = meta_model(model, **options)
    dims, reducer = dims_of(built), getattr(built, "token_reducer", None)
    if isinstance(reducer, reducers.get("act")):
        groups = _implied(model, options)["implied_mean_clusters"]
        counts = Counts(tuple(planned(built)), dict.fromkeys(reducer.layers, groups))
        return counts, {"clusters": groups}, "clusters per layer solved for from the published figure"
    if isinstance(reducer, reducers.get("ats")):
        kept = _implied(model, options)["implied_kept_tokens"][0]
        (place,) = reducer.layers
        layers = [
            Layer(dims.tokens if i <= place else kept, dims.tokens if i < place else kept) for i in range(dims.depth)
        ]
        return Counts(tuple(layers), {}), {"kept_tokens": kept}, "kept tokens solved for from the published figure"
    return Counts(tuple(planned(built)), {}), None, ""


def _implied(model, options):
    for row in read("swag_methods_flops")["rows"]:
        method, backbone, spelled = _spelled_out(row)
        if f"{_COLUMNS[method][0]}_{_SIZES[backbone]}_in1k" == model and options.items() <= spelled.items():
            return row
    raise KeyError(f"{model} {options}")
