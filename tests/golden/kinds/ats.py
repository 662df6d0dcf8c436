# SPDX-License-Identifier: Apache-2.0
"""Kinds of ATS."""

import torch
from tokenprune_ext import ops
from tokenprune_ext.nn import TokenState, run_block
from tokenprune_ext.reducers import create
from tokenprune_ext.reducers.ats import ats_sample, ats_scores, ats_smooth_row

from tests.golden.harness import kind
from tests.golden.kinds.evit import swag_block
from tests.golden.kinds.swag import NETWORK, run_swag

EPS = 1e-6


def whole_attention(logits, policy):
    """The op takes no logits: with identity keys and values, queries are logits, outputs probabilities."""
    batch, heads, tokens, _ = logits.shape
    identity = torch.eye(tokens, device=logits.device)[None, :, None].expand(batch, -1, heads, -1)
    return ops.policy_attention(logits.transpose(1, 2), identity, identity, policy, EPS, scale=1.0).transpose(1, 2)


def places(sample):
    """Places of the distinct picks, ``[B, G]``, behind them the number of tokens less one."""
    patches, points = sample.kept.shape[1], sample.grid.shape[1]
    place = torch.arange(patches, device=sample.kept.device)
    ordered = torch.where(sample.kept, place, patches).sort(1).values
    return torch.nn.functional.pad(ordered, (0, points), value=patches)[:, :points]


def selected(values, sample):
    """Row 0 and the kept rows of ``values [B, N, ...]``, zeros behind them."""
    rows = torch.nn.functional.pad(torch.where(sample.rows < 0, -1, sample.rows + 1), (1, 0))
    batch, tokens = values.shape[:2]
    start = torch.arange(batch, device=values.device)[:, None] * tokens
    flat = torch.where(rows < 0, -1, rows + start).flatten()
    return ops.gather_tokens(values.flatten(2), flat).view(values.shape)


@kind(
    "swag_methods/ats_core",
    {"B": int, "H": int, "N": int, "head_dim": int, "method": ("ats_sampling",), "n_ref_tokens": int},
)
def ats_core(golden):
    policy = golden["in.policy"][..., 0]
    attention = whole_attention(golden["in.logits"], policy)
    first = ats_smooth_row(golden["in.logits"][:, :, 0], policy, EPS)
    torch.testing.assert_close(first, attention[:, :, 0])
    scores = ats_scores(first, golden["in.v"].transpose(1, 2))[:, 1:]
    points = golden.config["n_ref_tokens"] - 1
    sample = ats_sample(scores, points, valid=policy[:, 1:] > 0, published=True)
    ordered = scores.gather(1, sample.order) / scores.sum(1, keepdim=True)
    kept = torch.nn.functional.pad(sample.rows >= 0, (1, 0), value=True)
    return {
        "out.attn": attention,
        "out.sorted_scores": ordered,
        "out.sorted_idx": sample.order,
        "out.pick": sample.pick,
        "out.unique": places(sample),
        "out.attn_selected": selected(attention.transpose(1, 2), sample).transpose(1, 2),
        "out.selected_x": selected(golden["in.raw_x"], sample),
        "out.policy": kept[..., None].float(),
        "mid.normalized_cdf": sample.cdf,
        "mid.ys": sample.grid,
    }


@kind(
    "swag_methods/ats_block",
    {
        "B": int,
        "N": int,
        "drop_tokens": bool,
        "hidden_dim": int,
        "incoming_counts": [int],
        "layout": ("N,B,D",),
        "method": ("ats_block",),
        "mlp_dim": int,
        "n_ref_tokens": int,
        "num_heads": int,
        "residual": ("layer_normed_input (port)",),
    },
)
def ats_block(golden):
    config = golden.config
    parts, parameters = swag_block(golden, config["hidden_dim"], config["mlp_dim"], config["num_heads"])
    leaf, policy = golden.leaf("in.x"), golden["in.policy"][..., 0]
    assert policy.sum(1).tolist() == config["incoming_counts"]
    reducer = create(
        "ats", depth=1, layers=[0], per_image=False, residual="normed", eps=EPS, drop_tokens=config["drop_tokens"]
    )
    initial = torch.ones(config["B"], config["n_ref_tokens"], dtype=torch.bool, device=leaf.device)
    state = TokenState(num_prefix=1, carry={"ats.initial": initial, "ats.policy": policy})
    y, state = run_block(parts, leaf.transpose(0, 1), state, 0, reducer)
    y = y.transpose(0, 1)
    result = {"out.y": y, "out.policy": state.carry["ats.policy"][..., None].float()}
    leaves = {"x": leaf} | {f"param.{n}": p for n, p in parameters.items()}
    return result | golden.gradients({"y": y}, leaves)


@kind(
    "swag_methods/ats_vit",
    NETWORK
    | {
        "ats_blocks": [int],
        "batch": int,
        "drop_tokens": bool,
        "method": ("ats",),
        "num_tokens": int,
        "residual": ("layer_normed_input (port)",),
        "seed": int,
    },
)
def ats_vit(golden):
    config = golden.config
    assert config["num_tokens"] > (config["image_size"] // config["patch_size"]) ** 2  # fewer never worked
    options = {"per_image": False, "residual": "normed", "eps": EPS, "drop_tokens": config["drop_tokens"]}
    run = run_swag(golden, "ats", trace=True, layers=config["ats_blocks"], **options)
    result = run.results(golden) | run.outputs()
    for layer in config["ats_blocks"]:
        state = run.layers[layer][1]
        rows = state.carry[f"ats.rows.{layer}"]
        result |= {
            f"out.layer_{layer}.pos": rows[:, 1:],
            f"out.layer_{layer}.count": (rows >= 0).sum(1),
            f"out.layer_{layer}.patch_ids": state.index[:, 1:],
        }
    return result
