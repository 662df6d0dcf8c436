# SPDX-License-Identifier: Apache-2.0
"""Kinds of attention under a key policy (DynamicViT, SPViT)."""

import torch
from tokenprune_ext import ops
from torch.nn.functional import linear

from tests.golden.harness import kind


@kind("classification/policy_softmax", {"B": int, "H": int, "N": int, "eps": float})
def policy_softmax(golden):
    """No op takes logits: with identity keys and values, queries are logits, outputs probabilities."""
    attn, policy = golden.leaf("in.attn"), golden.leaf("in.policy")
    batch, heads, tokens, _ = attn.shape
    identity = torch.eye(tokens, device=attn.device)[None, :, None].expand(batch, -1, heads, -1)
    out = ops.policy_attention(
        attn.transpose(1, 2), identity, identity, policy[..., 0], golden.config["eps"], scale=1.0
    )
    prob = out.transpose(1, 2)
    return {"out.prob": prob} | golden.gradients({"prob": prob}, {"attn": attn, "policy": policy})


@kind(
    "classification/policy_attention",
    {
        "B": int,
        "N": int,
        "dim": int,
        "eps": float,
        "mode": ("eval", "train"),
        "num_heads": int,
        "qkv_bias": bool,
        "scale_applied_to": ("q before the product",),
    },
)
def policy_attention(golden):
    config = golden.config
    leaves = {n: golden.leaf(f"param.{n}") for n in golden.group("param")}
    leaves |= {n: golden.leaf(f"in.{n}") for n in ("x", "policy")}
    assert ("qkv.bias" in leaves) == config["qkv_bias"]
    x, heads = leaves["x"], config["num_heads"]
    qkv = linear(x, leaves["qkv.weight"], leaves.get("qkv.bias")).unflatten(-1, (3, heads, config["dim"] // heads))
    mixed = ops.policy_attention(*qkv.unbind(2), leaves["policy"][..., 0], config["eps"])
    y = linear(mixed.flatten(2), leaves["proj.weight"], leaves["proj.bias"])
    return {"out.y": y} | golden.gradients({"y": y}, leaves)
