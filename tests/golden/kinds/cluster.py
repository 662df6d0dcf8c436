# SPDX-License-Identifier: Apache-2.0
"""Kinds of token clustering, reconstruction and unpooling (SWAG and Segmenter dialects of Expedit)."""

import torch
from tokenprune_ext import ops

from tests.golden.harness import kind


def tokens(maps):
    """[B, C, H, W] -> [B, H * W, C]."""
    return maps.flatten(2).transpose(1, 2)


def home_maps(size, clusters, device):
    """Home cell of every token, from the public function: with one iteration and a window of one cell, a center is
    the mean of its tokens, and only theirs."""
    height, width = size
    one_hot = torch.eye(height * width, dtype=torch.float64, device=device)[None]
    centers = ops.cluster_tokens(one_hot, size, clusters, iters=1, window=1)
    return centers[0].argmax(0)


def neighbours(size, clusters, window, device):
    """Which tokens each center may see: where the last weights can be more than zero, from the gradient."""
    x = torch.zeros(1, size[0] * size[1], 1, dtype=torch.float64, device=device, requires_grad=True)
    centers = ops.cluster_tokens(x, size, clusters, iters=1, window=window)
    rows = [torch.autograd.grad(c, x, retain_graph=True)[0].flatten() > 0 for c in centers[0, :, 0]]
    return torch.stack(rows)


@kind(
    "swag/cluster",
    {
        "B": int,
        "C": int,
        "H": int,
        "W": int,
        "grid_h": int,
        "grid_w": int,
        "n_iters": int,
        "op": ("token_cluster",),
        "temperature": float,
        "window_size": int,
    },
)
def swag_cluster(golden):
    config = golden.config
    size, clusters = (config["H"], config["W"]), (config["grid_h"], config["grid_w"])
    options = {"temperature": config["temperature"], "window": config["window_size"]}
    leaf = golden.leaf("in.x")
    centers, labels = ops.cluster_tokens(
        tokens(leaf), size, clusters, iters=config["n_iters"], return_labels=True, **options
    )
    result = {
        "out.centers": centers,
        "out.hard_labels": labels,
        "mid.init_centers": ops.cluster_tokens(tokens(leaf), size, clusters, iters=0),
        "mid.init_label_map": home_maps(size, clusters, leaf.device).expand(len(leaf), -1).float(),
    }
    for i in range(1, config["n_iters"] + 1):
        result[f"mid.centers_after_iter{i}"] = ops.cluster_tokens(tokens(leaf), size, clusters, iters=i, **options)
    if "mid.neighbour_mask" in golden:
        result["mid.neighbour_mask"] = neighbours(size, clusters, config["window_size"], leaf.device)[None].to(
            torch.uint8
        )
    return result | golden.gradients({"centers": centers}, {"x": leaf})


@kind(
    "segmenter/cluster_block",
    {"n_iters": int, "num_clusters": [int], "temperature": float, "window_size": int},
)
def segmenter_cluster(golden):
    config = golden.config
    leaf = golden.leaf("in.features")
    size, clusters = tuple(leaf.shape[2:]), tuple(config["num_clusters"])
    if len(clusters) == 1:
        clusters = clusters[0]
    centers, labels = ops.cluster_tokens(
        tokens(leaf),
        size,
        clusters,
        iters=config["n_iters"],
        temperature=config["temperature"],
        window=config["window_size"],
        return_labels=True,
    )
    result = {
        "out.centroids": centers,
        "out.hard_labels": labels,
        "mid.init_centroids": ops.cluster_tokens(tokens(leaf), size, clusters, iters=0).transpose(1, 2),
        "mid.init_labels": home_maps(size, clusters, leaf.device).expand(len(leaf), -1).float(),
    }
    return result | golden.gradients({"centroids": centers}, {"features": leaf})


def reconstruct(golden, out):
    config = golden.config
    leaves = {n: golden.leaf(f"in.{n}") for n in ("x", "feat_before", "feat_after")}
    before, after = leaves["feat_before"], leaves["feat_after"]
    y = ops.reconstruct_tokens(before, after, leaves["x"], k=config["k"], temperature=config["temperature"])
    result = {f"out.{out}": y}
    if "mid.sqdist" in golden and (golden["mid.sqdist"] * config["temperature"]).max() < 80:  # no weight is 0
        result["mid.kept_count"] = kept_counts(before, after, config)
    return result | golden.gradients({out: y}, leaves)


def kept_counts(before, after, config):
    """How many centers a token uses: with identity values the output is the weights."""
    identity = torch.eye(after.shape[1], device=after.device).expand(len(after), -1, -1)
    weights = ops.reconstruct_tokens(
        before, after, identity, k=config["k"], temperature=config["temperature"], norm="l1"
    )
    return (weights > 0).sum(-1)


@kind(
    "swag/reconstruct",
    {
        "B": int,
        "C": int,
        "C_x": int,
        "K": int,
        "N": int,
        "k": int,
        "normalisation": ("l2 (as in the code)",),
        "op": ("token_reconstruct",),
        "temperature": float,
    },
)
def swag_reconstruct(golden):
    return reconstruct(golden, "y")


@kind("segmenter/reconstruct_block", {"k": int, "temperature": float})
def segmenter_reconstruct(golden):
    return reconstruct(golden, "x")


@kind("swag/naive_unpool", {"B": int, "C": int, "K": int, "N": int, "op": ("naive_unpool",)})
def naive_unpool(golden):
    leaf = golden.leaf("in.x")
    y = ops.unpool_tokens(leaf, golden["in.labels"])
    return {"out.y": y} | golden.gradients({"y": y}, {"x": leaf})
