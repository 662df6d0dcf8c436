# SPDX-License-Identifier: Apache-2.0
"""Kinds of whole models with ToMe, and of its picture."""

from contextlib import contextmanager
from unittest import mock

import torch
from tokenprune_ext._visualize import group_colours, source_picture
from tokenprune_ext.ops import bipartite_soft_matching
from tokenprune_ext.reducers import parse_r
from tokenprune_ext.reducers import tome as method

from tests.golden.harness import kind
from tests.golden.kinds.swag import NETWORK, RATES, Probe, run_swag
from tests.golden.kinds.tome import source_matrix

TOME = {"prop_attn": bool, "r": (int, [int]), "r_per_layer": [int], "trace_source": bool}
TUPLE = {"r.tuple": [float]}
TIMM = {
    "depth": int,
    "embed_dim": int,
    "img_size": int,
    "in_chans": int,
    "mlp_ratio": float,
    "norm_eps": float,
    "num_classes": int,
    "num_heads": int,
    "patch_size": int,
    "qkv_bias": bool,
}


@contextmanager
def watched_matchings():
    """The matchings that a forward pass makes, in order."""
    made, original = [], method.match_and_merge

    def watched(x, metric, r, *, size=None, **protected):
        made.append(bipartite_soft_matching(metric, r, **protected))
        return original(x, metric, r, size=size, **protected)

    with mock.patch.object(method, "match_and_merge", watched):
        yield made


def schedule(config, depth):
    """The option r, checked against the file's list."""
    r = tuple(config["r.tuple"]) if "r.tuple" in config else config["r"]
    assert parse_r(depth, r) == config["r_per_layer"]
    return r


def merges(golden, state, made, batch, tokens):
    """What ToMe leaves behind: sizes, sources and every layer's matching."""
    result = {}
    if state.size is not None:
        result["out.size"] = state.size
        result["out.source"] = source_matrix(state.carry.get("parent"), batch, tokens, state.size.shape[1])
    assert made or not any(name.startswith("mid.match") for name in golden.tensors)
    for i, matching in enumerate(made):
        # Some files list the pairs by source instead of by similarity.
        listed = golden.tensors.get(f"mid.match{i}.src_idx", matching.src)
        ascending = torch.equal(listed, listed.sort(1).values)
        order = matching.src.argsort(1) if ascending else torch.arange(matching.src.shape[1]).expand(batch, -1)
        result |= {
            f"mid.match{i}.unm_idx": matching.unm,
            f"mid.match{i}.src_idx": matching.src.gather(1, order.to(matching.src.device)),
            f"mid.match{i}.dst_idx": matching.dst.gather(1, order.to(matching.src.device)),
        }
    return result


@kind("swag/tome_swag", NETWORK | RATES | TOME | TUPLE | {"classifier": ("token", "gap"), "model": ("tome_swag_vit",)})
def tome_swag(golden):
    config = golden.config
    with watched_matchings() as made:
        run = run_swag(
            golden,
            r=schedule(config, config["num_layers"]),
            prop_attn=config["prop_attn"],
            trace_source=config["trace_source"],
        )
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + int(config["classifier"] == "token")
    return run.results(golden) | merges(golden, run.state, made, golden["in.image"].shape[0], tokens)


def run_timm(golden, cls, **options):
    """A model of timm with the file's weights, under timm's names."""
    from functools import partial

    from timm.layers import LayerNorm
    from tokenprune_ext import load_checkpoint, patch

    config = golden.config
    network = {key: config[key] for key in TIMM if key in config and key != "norm_eps"}
    for key in ("class_token", "global_pool"):
        if key in config and key not in options:
            options[key] = config[key]
    weighted = options.pop("weighted_pool", False)
    model = cls(**network, norm_layer=partial(LayerNorm, eps=config["norm_eps"]), **options).to(golden.device).eval()
    reduction = {"prop_attn": config["prop_attn"], "trace_source": config["trace_source"], "weighted_pool": weighted}
    patch(model, "tome", r=schedule(config, config["depth"]), **reduction)
    load_checkpoint(model, golden.group("param"))
    leaves = {name: value.clone().requires_grad_() for name, value in golden.group("param").items()}
    leaves["image"] = golden.leaf("in.image")
    parameters = {f"model.{name}": value for name, value in leaves.items() if name != "image"}
    with watched_matchings() as made:
        logits, layers = torch.func.functional_call(Probe(model), parameters, (leaves["image"], False, None))
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    result = {"out.logits": logits} | golden.gradients({"logits": logits}, leaves)
    return result | merges(golden, layers[-1][1], made, leaves["image"].shape[0], tokens)


@kind(
    "swag/tome_timm",
    TIMM
    | TOME
    | TUPLE
    | {
        "class_token": bool,
        "global_pool": ("avg",),
        "model": ("VisionTransformer", "VisionTransformerDistilled"),
        "patch": ("timm",),
    },
)
def tome_timm(golden):
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    distilled = golden.config["model"] == "VisionTransformerDistilled"
    return run_timm(golden, VisionTransformerDistilled if distilled else VisionTransformer)


@kind("swag/tome_mae", TIMM | TOME | {"global_pool": bool, "model": ("MAEViT",), "patch": ("mae",)})
def tome_mae(golden):
    from timm.models.vision_transformer import VisionTransformer

    average = golden.config["global_pool"]
    return run_timm(golden, VisionTransformer, global_pool="avg" if average else "token", weighted_pool=average)


@kind("swag/tome_visualization", {"class_token": bool, "op": ("make_visualization",), "patch_size": int})
def tome_visualization(golden):
    image, source, config = golden["in.image"], golden["in.source"], golden.config
    picture = source_picture(image, source, config["patch_size"], class_token=config["class_token"])
    groups = int(source.argmax(1)[:, int(config["class_token"]) :].max()) + 1
    return {"out.image": picture, "mid.colormap": group_colours(groups)}
