# SPDX-License-Identifier: Apache-2.0
"""Kinds of EViT."""

import math

import torch
from tokenprune_ext.nn import AttentionBranch, BlockParts, MlpBranch, TokenState, run_block
from tokenprune_ext.reducers import create
from torch import nn

from tests.golden.harness import kind
from tests.golden.kinds.swag import NETWORK, run_swag

SCORES = {"cls_row_mean_over_heads": "cls", "mean_over_all_queries": "mean"}


def swag_block(golden, width, hidden, heads):
    """A SWAG encoder block with the file's parameters: its parts, its parameters by official name."""
    modules = {
        "ln_1": nn.LayerNorm(width, eps=1e-6),
        "self_attention.in_proj": nn.Linear(width, 3 * width),
        "self_attention.out_proj": nn.Linear(width, width),
        "ln_2": nn.LayerNorm(width, eps=1e-6),
        "mlp.linear_1": nn.Linear(width, hidden),
        "mlp.linear_2": nn.Linear(hidden, width),
    }
    parameters = {}
    for name, module in modules.items():
        for part, parameter in module.named_parameters():
            official = f"{name}_{part}" if name.endswith("in_proj") else f"{name}.{part}"
            parameters[official] = parameter
            parameter.data = golden[f"param.{official}"]
    assert set(parameters) == set(golden.group("param"))
    norm_1, in_proj, out_proj, norm_2, first, second = modules.values()
    attention = AttentionBranch(norm_1, in_proj, out_proj, num_heads=heads, head_dim=width // heads)
    return BlockParts(attention, MlpBranch(norm_2, nn.Sequential(first, nn.GELU(), second))), parameters


@kind(
    "swag_methods/evit_block",
    {
        "B": int,
        "N": int,
        "fuse_token": bool,
        "hidden_dim": int,
        "keep_rate": float,
        "layout": ("B,N,D", "N,B,D"),
        "method": ("evit_block",),
        "mlp_dim": int,
        "num_heads": int,
        "score_mode": tuple(SCORES),
    },
)
def evit_block(golden):
    config = golden.config
    parts, parameters = swag_block(golden, config["hidden_dim"], config["mlp_dim"], config["num_heads"])
    leaf = golden.leaf("in.x")
    x = leaf.transpose(0, 1) if config["layout"] == "N,B,D" else leaf
    score_mode = SCORES[config["score_mode"]]
    reducer = create(
        "evit", depth=1, keep=[config["keep_rate"]], fuse_token=config["fuse_token"], score_mode=score_mode
    )
    state = TokenState(num_prefix=1).with_trace(x)
    score = parts.attention(x, state, want=score_mode)[1][:, 1:]
    y, state = run_block(parts, x, state, 0, reducer)
    left = math.ceil(config["keep_rate"] * (config["N"] - 1))
    kept = state.index[:, 1 : 1 + left]
    dropped = torch.ones(score.shape, device=score.device).scatter(1, kept.long(), 0)
    y = y.transpose(0, 1) if config["layout"] == "N,B,D" else y
    result = {
        "out.y": y,
        "out.idx": kept,
        "mid.score": score,
        "mid.complement_idx": dropped.nonzero()[:, 1].view(config["B"], -1),
    }
    leaves = {"x": leaf} | {f"param.{n}": p for n, p in parameters.items()}
    return result | golden.gradients({"y": y}, leaves)


@kind(
    "swag_methods/evit_vit",
    NETWORK
    | {
        "batch": int,
        "fuse_token": bool,
        "keep_rate": [float],
        "method": ("evit",),
        "score_mode": tuple(SCORES),
        "seed": int,
    },
)
def evit_vit(golden):
    config = golden.config
    mode = SCORES[config["score_mode"]]
    run = run_swag(
        golden, "evit", trace=True, keep=config["keep_rate"], fuse_token=config["fuse_token"], score_mode=mode
    )
    result = run.results(golden) | run.outputs()
    for layer, (_, state) in enumerate(run.layers):
        if f"kept.{layer}" in state.carry:
            result[f"out.layer_{layer}.idx"] = state.carry[f"kept.{layer}"]
            result[f"out.layer_{layer}.patch_ids"] = state.index[:, 1:]
    return result
