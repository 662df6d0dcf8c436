# SPDX-License-Identifier: Apache-2.0
"""SWAG models with the token reductions of the tables of "Expediting Large-Scale Vision Transformer for Dense Prediction"
(Liang et al., arXiv 2210.01035), under the names and keywords of the published hub functions.

A method adds no parameter: all load the same official file. What the tables were measured with is the default, quirks
included (EViT's score is the attention received from all tokens, ATS carries on normalised tokens and takes padding for
tokens, SMYRF's clusters cross images); ``tokenprune_ext.patch`` on the dense model offers the methods as in their
papers. Defaults of the keywords are the published ones, except where those would reduce nothing or not run: the
resolution is that of the weights (published: 224), and ToMe, Hourglass and ATS start with the first row of their table
(published: no merging; a number of clusters that is no square; no layer).
"""

from collections.abc import Callable
from dataclasses import dataclass

from .._patch import patch
from ._base import check_options, register
from .swag import OPTIONS, SIZES, swag_sized

__all__ = ["METHODS", "HubMethod"]

# First rows of the tables of L/16 and H/14; B/16 is in none: the same shares of its depth and map.
_CLUSTERED = {"b16": (6, 17 * 17), "l16": (12, 23 * 23), "h14": (10, 26 * 26)}
_SAMPLED = {"b16": 10, "l16": 20, "h14": 18}


@dataclass(frozen=True)
class HubMethod:
    """A method of the tables.

    Attributes:
        reducer: its name, see :func:`tokenprune_ext.patch`.
        names: keyword of the hub function -> option of the reducer; None: only ``options`` reads it.
        defaults: of the keywords, by size and depth.
        options: further options of the reducer, by keywords and depth; they win.
    """

    reducer: str
    names: dict[str, str | None]
    defaults: Callable[[str, int], dict]
    options: Callable[[dict, int], dict]


def _plugged(hub, start, stop, depth):
    """Layers from one number on to another; a stop that is not behind the start means the end."""
    first, last = hub[start], hub[stop]
    return list(range(first, min(last, depth) if last > first else depth))


def _hourglass_options(hub, depth):
    location = hub["clustering_location"]
    # Behind the output of a layer is in front of the next one; -1 never clusters.
    return {"layer": location + 1} if hub["cluster_after_output"] and location >= 0 else {}


def _smyrf_options(hub, depth):
    sizes = hub["smyrf_q_cluster_size"], hub["smyrf_k_cluster_size"]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"smyrf_vit: smyrf_q_cluster_size must equal smyrf_k_cluster_size, got {sizes[0]} and {sizes[1]}"
        )
    return {"layers": _plugged(hub, "smyrf_plug_in_index", "smyrf_plug_out_index", depth), "per_row": False}


METHODS = {
    "hourglass_vit": HubMethod(
        "hourglass",
        {
            "clustering_location": "layer",
            "num_cluster": "clusters",
            "cluster_iters": "iters",
            "cluster_temperture": "temperature",  # spelled so in the published interface
            "cluster_window_size": "window",
            "cluster_after_output": None,
        },
        lambda size, depth: {
            "clustering_location": _CLUSTERED[size][0],
            "num_cluster": _CLUSTERED[size][1],
            "cluster_after_output": False,
        },
        _hourglass_options,
    ),
    "tome_vit": HubMethod(
        "tome", {"tome_r": "r"}, lambda size, depth: {"tome_r": 10}, lambda hub, depth: {"prop_attn": True}
    ),
    "e_vit": HubMethod(
        "evit",
        {"base_keep_rate": "keep", "drop_loc": "layers", "fuse_token": "fuse_token"},
        lambda size, depth: {
            "base_keep_rate": 0.7,
            "drop_loc": [depth // 4, depth // 2, 3 * depth // 4],
            "fuse_token": False,
        },
        lambda hub, depth: {"score_mode": "mean", "layers": list(hub["drop_loc"])},
    ),
    "evo_vit": HubMethod(
        "evo",
        {"evo_prune_ratio": "ratio", "evo_prune_location": "layer", "evo_tradeoff": "tradeoff"},
        lambda size, depth: {"evo_prune_ratio": 0.5, "evo_prune_location": 4},
        lambda hub, depth: {},
    ),
    "ats_vit": HubMethod(
        "ats",
        {"ats_blocks": "layers", "drop_tokens": "drop_tokens", "num_tokens": None},
        lambda size, depth: {"ats_blocks": [_SAMPLED[size]], "drop_tokens": True, "num_tokens": None},
        lambda hub, depth: {"layers": list(hub["ats_blocks"]), "per_image": False, "residual": "normed"},
    ),
    "act_vit": HubMethod(
        "act",
        {
            "act_plug_in_index": None,
            "act_plug_out_index": None,
            "act_group_q": "group_q",
            "act_group_k": "group_k",
            "act_q_hashes": "q_hashes",
            "act_k_hashes": "k_hashes",
        },
        lambda size, depth: {"act_plug_in_index": 0, "act_plug_out_index": -1},
        lambda hub, depth: {"layers": _plugged(hub, "act_plug_in_index", "act_plug_out_index", depth)},
    ),
    "smyrf_vit": HubMethod(
        "smyrf",
        {
            "smyrf_plug_in_index": None,
            "smyrf_plug_out_index": None,
            "smyrf_n_hashes": "rounds",
            "smyrf_q_cluster_size": "cluster_size",
            "smyrf_k_cluster_size": None,
        },
        lambda size, depth: {
            "smyrf_plug_in_index": 0,
            "smyrf_plug_out_index": -1,
            "smyrf_n_hashes": 32,
            "smyrf_q_cluster_size": 64,
            "smyrf_k_cluster_size": 64,
        },
        _smyrf_options,
    ),
}


def _check_num_tokens(name, wanted, model):
    """Published sampling runs with the full number of tokens only; the option says so or is refused."""
    tokens = model.pos_embed.shape[1]
    if wanted is not None and wanted != 1.0 and wanted < tokens:
        raise ValueError(f"{name}: num_tokens must be at least the {tokens} tokens of the model, or 1.0, got {wanted}")


def _register(prefix, size):
    name, method = f"{prefix}_{size}_in1k", METHODS[prefix]

    def build(**options):
        check_options(name, options, [*OPTIONS, *method.names])
        given = {key: options.pop(key) for key in method.names if key in options}
        model = swag_sized(size, **options)
        depth = len(model.blocks)
        hub = method.defaults(size, depth) | given
        _check_num_tokens(name, hub.get("num_tokens"), model)
        named = {method.names[key]: value for key, value in hub.items() if method.names[key] is not None}
        return patch(model, method.reducer, **named | method.options(hub, depth))

    keywords = ", ".join(f"``{key}``" for key in method.names)
    build.__doc__ = (
        f"SWAG ViT-{size[0].upper()}/{size[1:]} with method ``{method.reducer}``. Keywords of the published hub function: "
        f"{keywords}; all others as in :func:`tokenprune_ext.models.swag.swag_vit`."
    )
    build.__module__ = __name__
    register(name)(build)


for _prefix in METHODS:
    for _size in SIZES:
        _register(_prefix, _size)
