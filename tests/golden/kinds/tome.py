# SPDX-License-Identifier: Apache-2.0
"""Kinds of the ToMe operators."""

import torch
from tokenprune_ext import ops

from tests.golden.harness import kind


def source_matrix(parent, batch, tokens, rows):
    """The 0/1 matrix [B, rows, tokens] of which original tokens each row stands for."""
    if parent is None:
        parent = torch.arange(tokens).expand(batch, -1)
    return (torch.arange(rows, device=parent.device)[None, :, None] == parent[:, None]).to(torch.uint8)


@kind(
    "swag/tome_matching",
    {
        "op": ("bipartite_soft_matching",),
        "B": int,
        "T": int,
        "C": int,
        "class_token": bool,
        "distill_token": bool,
        "r": int,
        "r_effective": int,
    },
)
def tome_matching(golden):
    config = golden.config
    x, metric, size = golden.leaf("in.x"), golden.leaf("in.metric"), golden["in.size"][..., 0]
    matching = ops.bipartite_soft_matching(
        metric, config["r"], class_token=config["class_token"], distill_token=config["distill_token"]
    )
    assert matching.num_tokens_out == config["T"] - config["r_effective"]
    values = {mode: ops.merge_tokens(x, matching, mode=mode)[0] for mode in ("sum", "mean", "amax")}
    values["wavg"], size_out = ops.merge_tokens(x, matching, size=size, mode="weighted")
    values["wavg_nosize"], size_nosize = ops.merge_tokens(x, matching, mode="weighted")
    values["unmerged"] = ops.unmerge_tokens(values["wavg"], matching)
    gradients = golden.gradients(values, {"x": x, "metric": metric})
    source = source_matrix(ops.merge_sources(matching), config["B"], config["T"], matching.num_tokens_out)
    values |= {
        "size": size_out[..., None],
        "size_nosize": size_nosize[..., None],
        "source": source,
        "unm_idx": matching.unm,
        "src_idx": matching.src,
        "dst_idx": matching.dst,
    }
    return {f"out.{n}": t for n, t in values.items()} | gradients


@kind("swag/tome_chain", {"op": ("tome_chain",), "B": int, "T": int, "C": int, "class_token": bool, "r": [int]})
def tome_chain(golden):
    config, result = golden.config, {}
    leaf = x = golden.leaf("in.x")
    size = parent = None
    for i, r in enumerate(config["r"]):
        matching = ops.bipartite_soft_matching(golden[f"in.metric{i}"], r, class_token=config["class_token"])
        x, size = ops.merge_tokens(x, matching, size=size, mode="weighted")
        parent = ops.merge_sources(matching, parent)
        source = source_matrix(parent, config["B"], config["T"], matching.num_tokens_out)
        step = {"x": x, "size": size[..., None], "source": source}
        result |= {f"mid.{n}{i}": t for n, t in step.items()} | {f"out.{n}": t for n, t in step.items()}
    return result | golden.gradients({"x": x}, {"x": leaf})


def merged(golden, x, matching, tokens):
    values = {mode: ops.merge_tokens(x, matching, mode=mode)[0] for mode in ("sum", "mean")}
    values["unmerged"] = ops.unmerge_tokens(values["mean"], matching)[:, :tokens]
    return {f"out.{n}": t for n, t in values.items()} | golden.gradients(values, {"x": x})


@kind("swag/tome_kth", {"op": ("kth_bipartite_soft_matching",), "B": int, "T": int, "C": int, "k": int})
def tome_kth(golden):
    tokens, k = golden.config["T"], golden.config["k"]
    matching = ops.kth_bipartite_soft_matching(golden["in.metric"], k)
    kept = tokens // k * k if k > 1 else tokens  # tokens behind the last full run are dropped
    return merged(golden, golden.leaf("in.x"), matching, kept) | {"out.dst_idx": matching.dst}


@kind("swag/tome_random", {"op": ("random_bipartite_soft_matching",), "B": int, "T": int, "C": int, "r": int})
def tome_random(golden):
    noise = golden["in.noise"][..., 0]
    matching = ops.random_bipartite_soft_matching(golden["in.metric"], golden.config["r"], noise=noise)
    result = merged(golden, golden.leaf("in.x"), matching, golden.config["T"])
    # the destinations are the rows of the output, in order: find the token that sits in each of them
    parent = matching.parent
    is_source = torch.zeros(parent.shape).scatter(1, matching.src.cpu().long(), 1).to(parent.device)
    rows = torch.where(is_source > 0, matching.num_tokens_out, parent).argsort(1)[:, : matching.num_tokens_out]
    return result | {"out.a_idx": matching.src, "out.b_idx": rows, "out.dst_idx": matching.dst}
