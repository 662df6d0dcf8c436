# SPDX-License-Identifier: Apache-2.0
"""Kinds of ACT."""

import torch
from tokenprune_ext.reducers.act import (
    act_attention,
    act_broadcast,
    act_codes,
    act_groups,
    act_weighted_sum,
)

from tests.golden.harness import kind
from tests.golden.kinds.swag import NETWORK, run_swag


def plugged(config, method, depth):
    """Layers between plug-in and plug-out; -1, or nothing behind the plug-in, is the end."""
    first, end = config.get(f"{method}_plug_in_index", 0), config.get(f"{method}_plug_out_index", -1)
    return list(range(first, end if end > first else depth))


def cut(groups):
    """Counts without the slots that no row fills."""
    return groups.counts[:, : int(groups.ids.max()) + 1]


@kind(
    "swag_methods/act_hash", {"BH": int, "D": int, "N": int, "method": ("act_hash_cluster",), "n_hashes": int, "r": int}
)
def act_hash(golden):
    codes = act_codes(golden["in.vectors"], golden["in.proj"], golden["in.bias"], width=golden.config["r"])
    groups = act_groups(codes)
    return {"out.hashes": codes, "out.groups": groups.ids, "out.counts": cut(groups)}


@kind("swag_methods/act_cluster_codes", {"method": ("act_cluster",)})
def act_cluster_codes(golden):
    groups = act_groups(golden["in.hashes"])
    return {"out.groups": groups.ids, "out.counts": cut(groups)}


@kind("swag_methods/act_weighted_sum", {"B": int, "C": int, "D": int, "N": int, "method": ("act_weighted_sum",)})
def weighted_sum(golden):
    x, weights = golden.leaf("in.x"), golden.leaf("in.weights")
    y = act_weighted_sum(x, golden["in.groups"], weights)
    return {"out.y": y} | golden.gradients({"y": y}, {"x": x, "weights": weights})


@kind("swag_methods/act_broadcast", {"B": int, "C": int, "D": int, "N": int, "method": ("act_broadcast",)})
def broadcast(golden):
    y, weights = golden.leaf("in.y"), golden.leaf("in.weights")
    x = act_broadcast(y, golden["in.groups"], weights)
    return {"out.x": x} | golden.gradients({"x": x}, {"y": y, "weights": weights})


@kind(
    "swag_methods/act_attention",
    {
        "BH": int,
        "N": int,
        "S": int,
        "group_K": bool,
        "group_Q": bool,
        "head_dim": int,
        "k_hashes": int,
        "method": ("act_attention",),
        "q_hashes": int,
        "r": int,
        "softmax_temp": float,
    },
)
def attention(golden):
    config = golden.config
    leaves = {name: golden.leaf(f"in.{name}") for name in "qkv"}
    groups, result = {}, {}
    for name in "qk":
        if not config[f"group_{name.upper()}"]:
            continue
        projection, offset = golden[f"in.proj_{name}"], golden[f"in.bias_{name}"]
        assert projection.shape[-1] == config[f"{name}_hashes"]
        groups[name] = act_groups(act_codes(leaves[name], projection, offset, width=config["r"]))
        result |= {f"mid.{name}_groups": groups[name].ids, f"mid.{name}_counts": cut(groups[name])}
    y = act_attention(*leaves.values(), groups.get("q"), groups.get("k"), scale=float(config["softmax_temp"]))
    return result | {"out.y": y} | golden.gradients({"y": y}, leaves)


@kind(
    "swag_methods/act_vit",
    NETWORK
    | {
        "act_group_k": (True,),
        "act_k_hashes": int,
        "act_layers": [int],
        "act_plug_in_index": int,
        "act_plug_out_index": int,
        "act_q_hashes": int,
        "batch": int,
        "method": ("act",),
        "seed": int,
    },
)
def act_vit(golden):
    config = golden.config
    layers = plugged(config, "act", config["num_layers"])
    assert layers == config["act_layers"]
    options = {name: config[f"act_{name}"] for name in ("group_k", "q_hashes", "k_hashes") if f"act_{name}" in config}
    names = ["q", "k"] if options.get("group_k") else ["q"]
    carry = {}
    for layer in layers:
        for name in names:
            carry[f"act.{name}_projection.{layer}"] = golden[f"in.layer_{layer}.proj_{name}"]
            carry[f"act.{name}_offset.{layer}"] = golden[f"in.layer_{layer}.bias_{name}"]
    run = run_swag(golden, "act", carry=carry, layers=layers, **options)
    result = run.results(golden) | run.outputs()
    for layer in layers:
        for name in names:
            ids = run.state.carry[f"act.{name}_groups.{layer}"].flatten(0, 1)
            numbers = torch.arange(int(ids.max()) + 1, device=ids.device)
            result[f"out.layer_{layer}.{name}_groups"] = ids
            result[f"out.layer_{layer}.{name}_counts"] = (ids[..., None] == numbers).sum(1)
    return result
