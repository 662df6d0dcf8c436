# SPDX-License-Identifier: Apache-2.0
"""Windowed soft k-means, nearest centers, reconstruction and unpooling."""

import math

import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample

SCHEMAS = [
    "cluster_tokens(Tensor x, SymInt height, SymInt width, SymInt rows, SymInt cols, SymInt iters, float temperature, "
    "SymInt window, bool affinity) -> (Tensor centers, Tensor mass, Tensor affinity)",
    "cluster_tokens_backward(Tensor grad, Tensor mass, Tensor affinity, SymInt height, SymInt width, SymInt rows, "
    "SymInt cols, SymInt iters, SymInt window) -> Tensor",
    "nearest_centers(Tensor features, Tensor centers) -> Tensor",
    "reconstruct_tokens(Tensor features, Tensor centers, Tensor values, SymInt k, float temperature, bool l1) -> Tensor",
    "reconstruct_tokens_backward(Tensor grad, Tensor features, Tensor centers, Tensor values, SymInt k, "
    "float temperature, bool l1) -> (Tensor grad_features, Tensor grad_centers, Tensor grad_values)",
]


# ---------------------------------------------------------------- samples and functions under test


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def make_map(rng, batch, height, width, channels, rows, cols, shift=0.0, **options):
    x = normal(rng, batch, height, width, channels) + shift * normal(rng, channels)
    options.setdefault("temperature", 1 / max(channels, 1))
    return Sample({"x": x}, {"clusters": (rows, cols), **options})


def make_rows(rng, batch, tokens, clusters, channels, copies=1, near=False):
    """Every center `copies` times; `near`: tokens lie close to centers, so distances are small beside the norms."""
    centers = normal(rng, batch, -(-clusters // copies), channels).repeat_interleave(copies, 1)[:, :clusters]
    features = normal(rng, batch, tokens, channels)
    if near:
        features = 0.2 * features + centers[:, torch.arange(tokens) % clusters]
    return Sample({"features": features, "centers": centers})


def make_values(rng, batch, tokens, clusters, channels, width, copies=1, near=False, **options):
    sample = make_rows(rng, batch, tokens, clusters, channels, copies, near)
    options.setdefault("temperature", 1 / max(channels, 1))
    return Sample({**sample.inputs, "values": normal(rng, batch, clusters, width)}, options)


def make_labels(rng, batch, tokens, clusters, channels):
    labels = torch.randint(0, max(clusters, 1), (batch, tokens), generator=rng)
    return Sample({"x": normal(rng, batch, clusters, channels), "labels": labels})


def cluster(x, clusters, **options):
    """The map as [B, H, W, C]."""
    return ops.cluster_tokens(x.flatten(1, 2), x.shape[1:3], clusters, **options)


def there_and_back(x, clusters, temperature):
    """What a dense-prediction model does: cluster, refine, reconstruct."""
    centers, labels = cluster(x, clusters, temperature=temperature, iters=2, return_labels=True)
    x = x.flatten(1, 2)
    refined = torch.tanh(centers)
    y = ops.reconstruct_tokens(x, centers, refined, k=3, temperature=temperature)
    return y, ops.unpool_tokens(refined, labels)


# ---------------------------------------------------------------- oracles: dense masks, as the paper writes them


def home_cells(size, cells):
    """The float32 nearest-neighbour rule."""
    scale = torch.tensor(cells, dtype=torch.float32) / torch.tensor(max(size, 1), dtype=torch.float32)
    return [min(int(torch.tensor(i, dtype=torch.float32) * scale), cells - 1) for i in range(size)]


def candidates(grid, clusters, window):
    """Which centers [h * w] see which tokens [H * W]."""
    near = [
        (torch.arange(cells)[:, None] - torch.tensor(home_cells(size, cells), dtype=torch.long)).abs() <= window // 2
        for size, cells in zip(grid, clusters, strict=True)
    ]
    return (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2, 3).flatten(0, 1)


def pool(maps, clusters):
    """Adaptive average pooling, cell by cell."""
    edges = [
        [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]
        for size, cells in zip(maps.shape[1:3], clusters, strict=True)
    ]
    cells = [maps[:, y0:y1, x0:x1].flatten(1, 2) for y0, y1 in edges[0] for x0, x1 in edges[1]]
    return torch.stack([c.mean(1) if c.shape[1] else c.sum(1) for c in cells], 1)


def squared_distances(a, b):
    return (a[:, :, None] - b[:, None]).square().sum(-1)


def oracle_cluster(x, clusters, iters=5, temperature=1.0, window=5):
    centers = pool(x, clusters)
    mask = candidates(x.shape[1:3], clusters, window)
    x = x.flatten(1, 2)
    for _ in range(iters):
        with torch.no_grad():
            logits = -temperature * squared_distances(centers, x)
            weights = logits.masked_fill(~mask, -math.inf).softmax(1)
            weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-16)
        centers = weights @ x
    return centers


def oracle_nearest(features, centers):
    return squared_distances(features, centers).argmin(-1)


def oracle_reconstruct(features, centers, values, k, temperature, norm="l2"):
    distances = squared_distances(features, centers)
    weights = torch.exp(-temperature * distances)
    if 0 < k < centers.shape[1]:
        kth = distances.detach().sort(-1).values[..., k - 1 : k]
        weights = weights * (distances.detach() <= kth)
    sums = weights.sum(-1, keepdim=True) if norm == "l1" else weights.square().sum(-1, keepdim=True).sqrt()
    return weights / sums.clamp(min=1e-12) @ values


def oracle_unpool(x, labels):
    return (labels[..., None] == torch.arange(x.shape[1])).to(x.dtype) @ x


def oracle_there_and_back(x, clusters, temperature):
    centers = oracle_cluster(x, clusters, 2, temperature)
    x = x.flatten(1, 2)
    refined = torch.tanh(centers)
    y = oracle_reconstruct(x, centers, refined, 3, temperature)
    return y, oracle_unpool(refined, oracle_nearest(x, centers))


# ---------------------------------------------------------------- specs


def grid_case(height, width, rows, cols, channels=8, batch=1, **options):
    dims = {"batch": batch, "height": height, "width": width, "rows": rows, "cols": cols, "channels": channels}
    return {**dims, **options}


CLUSTER_CASES = {
    "square": grid_case(8, 8, 4, 4, channels=20, batch=2),
    "ragged": grid_case(7, 11, 3, 4, channels=33, batch=2, iters=3, window=3),
    "vit_l": grid_case(32, 32, 23, 23, channels=12),
    "vit_h": grid_case(37, 37, 26, 26, channels=16, iters=2),
    "float32_rule": grid_case(46, 3, 28, 2, channels=5, iters=2),
    "wide_window": grid_case(12, 9, 7, 9, channels=65, iters=2, window=9),
    "window_of_all": grid_case(6, 6, 4, 4, iters=2, window=99),
    "window_one": grid_case(7, 7, 3, 3, window=1),
    "large_cells": grid_case(19, 23, 3, 4, channels=40, iters=2, window=3),
    "more_centers": grid_case(3, 5, 7, 8, iters=2),
    "all_kept": grid_case(6, 5, 6, 5, channels=130, iters=2),
    "one_center": grid_case(6, 5, 1, 1, batch=3),
    "offset": grid_case(8, 8, 4, 4, channels=48, batch=2, shift=20.0),
    "sharp": grid_case(8, 8, 5, 5, channels=16, temperature=1.0, iters=2),
    "pooled": grid_case(9, 7, 4, 5, channels=20, batch=2, iters=0),
    "pooled_up": grid_case(3, 4, 5, 6, channels=20, iters=0),
    "one_token": grid_case(1, 1, 1, 1),
    "row": grid_case(1, 17, 1, 6, iters=2),
    "no_tokens": grid_case(0, 5, 2, 3),
    "no_images": grid_case(6, 5, 2, 3, batch=0),
    "no_channels": grid_case(6, 5, 2, 3, channels=0),
}


def row_case(tokens, clusters, channels, batch=1, **options):
    return {"batch": batch, "tokens": tokens, "clusters": clusters, "channels": channels, **options}


ROW_CASES = {
    "ragged": row_case(50, 13, 33, batch=2),
    "many": row_case(97, 300, 20),
    "ties": row_case(20, 12, 16, copies=3),
    "few": row_case(1, 2, 1),
    "no_tokens": row_case(0, 4, 5),
    "no_images": row_case(4, 4, 5, batch=0),
}
VALUE_CASES = {
    **{n: {**c, "width": 20, "k": 5} for n, c in ROW_CASES.items()},
    "usual": row_case(64, 25, 16, batch=2, width=10, k=20, temperature=0.02),
    "sparse": row_case(60, 150, 24, width=70, k=20),
    "blocks": row_case(140, 90, 33, batch=2, width=300, k=9),
    "blocks_few_tokens": row_case(20, 150, 24, width=140, k=20),
    "long": row_case(70, 30, 1024, width=16, k=5, temperature=0.002, near=True),
    "nearest": row_case(40, 30, 24, width=33, k=1),
    "all": row_case(49, 7, 8, batch=2, width=8, k=-1),
    "too_many": row_case(10, 7, 8, width=8, k=99),
    "nothing": row_case(0, 0, 5, width=3, k=3),
    "no_values": row_case(10, 7, 8, width=0, k=3),
    "no_channels": row_case(10, 7, 0, width=4, k=3, temperature=1.0),
}


def value_spec(name, **options):
    return OpSpec(
        name,
        ops.reconstruct_tokens,
        oracle_reconstruct,
        make_values,
        {n: {**c, **options} for n, c in VALUE_CASES.items()},
        lambda n: {**row_case(n, 9, 12, batch=2), "width": 20, "k": 4, **options},
        {
            "batch": (0, 2),
            "tokens": (0, 60),
            "clusters": (1, 40),
            "channels": (1, 40),
            "width": (0, 40),
            "k": [-1, 1, 2, 5, 30],
            "copies": [1, 2],
            **{n: [o] for n, o in options.items()},
        },
        {**row_case(5, 4, 3), "width": 2, "k": 2, **options},
        ("features", "centers", "values"),
    )


SPECS = [
    OpSpec(
        "cluster_tokens",
        cluster,
        oracle_cluster,
        make_map,
        CLUSTER_CASES,
        lambda n: grid_case(n, 4, 3, 2, channels=12, batch=2, iters=2),
        {
            "batch": (0, 2),
            "height": (1, 20),
            "width": (1, 20),
            "rows": (1, 12),
            "cols": (1, 12),
            "channels": (1, 70),
            "iters": (0, 3),
            "window": [1, 3, 5, 7, 11],
        },
        grid_case(5, 4, 2, 3, channels=3, iters=0),  # otherwise the affinities are constants only to autograd
        ("x",),
    ),
    OpSpec(
        "nearest_centers",
        ops.nearest_centers,
        oracle_nearest,
        make_rows,
        ROW_CASES,
        lambda n: row_case(n, 9, 12, batch=2),
        {"batch": (0, 2), "tokens": (0, 60), "clusters": (1, 40), "channels": (1, 40), "copies": [1, 2]},
    ),
    value_spec("reconstruct_tokens"),
    value_spec("reconstruct_tokens_l1", norm="l1"),
    OpSpec(
        "unpool_tokens",
        ops.unpool_tokens,
        oracle_unpool,
        make_labels,
        {
            "ragged": row_case(15, 6, 7, batch=2),
            "no_tokens": row_case(0, 4, 5),
            "no_images": row_case(4, 4, 5, batch=0),
        },
        lambda n: row_case(n, 9, 12, batch=2),
        {"batch": (0, 2), "tokens": (0, 60), "clusters": (1, 40), "channels": (1, 40)},
        row_case(5, 4, 3),
        ("x",),
    ),
    OpSpec(
        "there_and_back",
        there_and_back,
        oracle_there_and_back,
        make_map,
        {"usual": grid_case(9, 10, 4, 5, channels=20, batch=2)},
        lambda n: grid_case(n, 3, 3, 2, channels=12, batch=3),
        grads=("x",),
        dtypes=(torch.float32, torch.float64),
        inductor=True,
    ),
]


class TestBattery(Conformance):
    specs = SPECS
