# SPDX-License-Identifier: Apache-2.0
"""Kinds of Evo-ViT."""

import torch
from tokenprune_ext.nn import TokenState, run_block
from tokenprune_ext.reducers import create

from tests.golden.harness import kind
from tests.golden.kinds.evit import swag_block
from tests.golden.kinds.swag import NETWORK, run_swag


def sorted_view(x, state):
    """Tokens and scores in the order of the original implementation, which moves them."""
    score = state.carry["score"]
    order = state.carry.get("order")
    if order is None:
        order = torch.arange(score.shape[1], device=x.device).expand_as(score)
    return x.gather(1, order[..., None].expand_as(x)), score.gather(1, order)[:, 1:], order[:, 1:] - 1


@kind(
    "swag_methods/evo_block",
    {
        "B": int,
        "N": int,
        "hidden_dim": int,
        "layout": ("B,N,D", "N,B,D"),
        "method": ("evo_block", "evo_block_summary_token"),
        "mlp_dim": int,
        "num_heads": int,
        "prune_ratio": float,
        "tradeoff": float,
    },
)
def evo_block(golden):
    config = golden.config
    parts, _ = swag_block(golden, config["hidden_dim"], config["mlp_dim"], config["num_heads"])
    swapped = config["layout"] == "N,B,D"
    x = golden["in.x"].transpose(0, 1) if swapped else golden["in.x"]
    summary = config["method"] == "evo_block_summary_token"
    reducer = create("evo", depth=2, ratio=[1.0, config["prune_ratio"]], tradeoff=config["tradeoff"], summary=summary)
    before = torch.nn.functional.pad(golden["in.global_attn"], (1, 0))
    state = TokenState(num_prefix=1, carry={"score": before})
    y, state = run_block(parts, x, state, 1, reducer)
    y, score, order = sorted_view(y, state)
    y = y.transpose(0, 1) if swapped else y
    return {"out.y": y, "out.global_attn": score, "out.order": order, "out.patch_ids": order}


@kind(
    "swag_methods/evo_vit",
    NETWORK
    | {
        "batch": int,
        "method": ("evo_vit",),
        "prune_location": int,
        "prune_ratio": (float, [float]),
        "seed": int,
        "slow_tokens_per_layer": [int],
        "tradeoff": (float, [float]),
    },
)
def evo_vit(golden):
    config = golden.config
    options = {"ratio": config["prune_ratio"], "layer": config["prune_location"], "tradeoff": config["tradeoff"]}
    run = run_swag(golden, "evo", fast_idle=False, **options)
    reducer = create("evo", depth=config["num_layers"], **options)
    patches = (config["image_size"] // config["patch_size"]) ** 2
    assert [count - 1 for count, _ in reducer.plan(config["num_layers"], patches + 1)] == config[
        "slow_tokens_per_layer"
    ]
    result = run.results(golden)
    before = torch.arange(patches, device=golden.device).expand(config["batch"], -1)
    for layer, (x, state) in enumerate(run.layers):
        x, score, order = sorted_view(x, state)
        place = torch.empty_like(before).scatter(1, before, torch.arange(patches, device=x.device).expand_as(before))
        result |= {
            f"mid.layer_{layer}.out": x.transpose(0, 1),
            f"out.layer_{layer}.global_attn": score,
            f"out.layer_{layer}.order": place.gather(1, order),
            f"out.layer_{layer}.patch_ids": order,
        }
        before = order
    return result
