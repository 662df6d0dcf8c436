# SPDX-License-Identifier: Apache-2.0
"""Hourglass: where it clusters, what it keeps, what it gives back. The clustering itself is tested with the ops."""

import pytest
import torch
from tokenprune_ext import ops, reducers
from tokenprune_ext.nn import TokenState

from .common import DEPTH, dense, pack_ragged, tiny_blocks, tokens, walk

GRID = (4, 6)
SETTING = {"iters": 3, "temperature": 0.2, "window": 3}


def make(**options):
    return reducers.create("hourglass", {"depth": DEPTH, "num_prefix": 1}, **SETTING | options)


def start(prefix=1):
    return TokenState(grid=GRID, num_prefix=prefix)


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("clusters", [4, (2, 3)])
def test_patches_are_replaced_by_centers(layer, clusters):
    blocks, x = tiny_blocks(), tokens(2, 25)
    y, state = walk(blocks, x, make(layer=layer, clusters=clusters), start())
    full = dense(blocks[:layer], x)
    grid = (2, 2) if clusters == 4 else clusters
    centers = ops.cluster_tokens(full[:, 1:], GRID, grid, **SETTING)
    expected = dense(blocks[layer:], torch.cat([full[:, :1], centers], 1))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(state.carry["features"], full[:, 1:]) and torch.equal(state.carry["centers"], centers)


@pytest.mark.parametrize("layer", [-1, None, DEPTH])
def test_never_clusters(layer):
    blocks, x = tiny_blocks(), tokens(2, 25)
    reducer = make(layer=layer)
    y, state = walk(blocks, x, reducer, start())
    assert torch.equal(y, dense(blocks, x)) and reducer.restore(y, state) is y
    assert reducer.plan(DEPTH, 25) == [(25, 25)] * DEPTH


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_prefix_tokens_are_not_clustered(prefix):
    blocks, x = tiny_blocks(), tokens(2, 24 + prefix)
    record = []
    y, _ = walk(blocks, x, make(layer=1, clusters=4, num_prefix=prefix), start(prefix), record)
    assert y.shape[1] == prefix + 4
    full = dense(blocks[:1], x)
    centers = ops.cluster_tokens(full[:, prefix:], GRID, (2, 2), **SETTING)
    torch.testing.assert_close(y, dense(blocks[1:], torch.cat([full[:, :prefix], centers], 1)), atol=1e-12, rtol=1e-12)
    counts = [(int(step.attention[0]), int(step.mlp[0])) for step in record]
    assert counts == make(layer=1, clusters=4, num_prefix=prefix).plan(DEPTH, 24 + prefix)


def test_trace_names_the_nearest_center():
    blocks, x = tiny_blocks(), tokens(2, 25)
    _, state = walk(blocks, x, make(layer=2, clusters=(2, 3)), start().with_trace(x))
    features, centers = state.carry["features"], state.carry["centers"]
    nearest = ((features[:, :, None] - centers[:, None]) ** 2).sum(-1).argmin(-1)
    parent = state.carry["parent"]
    assert torch.equal(parent[:, 1:], nearest.to(torch.int32) + 1) and bool((parent[:, 0] == 0).all())
    for image in range(2):
        for row, patch in enumerate(state.index[image].tolist()[1:]):
            members = (nearest[image] == row).nonzero().flatten().tolist()
            assert patch == (members[0] if members else -1)
    assert bool((state.index[:, 0] == -1).all())


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("k", [3, 100, -1])
def test_restore_reconstructs_from_the_nearest_centers(k, norm):
    blocks, x = tiny_blocks(), tokens(2, 25)
    reducer = make(layer=1, clusters=(2, 3), k=k, restore_temperature=0.05, norm=norm)
    y, state = walk(blocks, x, reducer, start())
    features, centers = state.carry["features"], state.carry["centers"]
    weight = (-0.05 * ((features[:, :, None] - centers[:, None]) ** 2).sum(-1)).exp()
    if 0 < k < 6:
        weight = torch.where(weight >= weight.topk(k, -1).values[..., -1:], weight, 0)
    weight = torch.nn.functional.normalize(weight, dim=-1, p=2 if norm == "l2" else 1)
    torch.testing.assert_close(reducer.restore(y[:, 1:], state), weight @ y[:, 1:], atol=1e-10, rtol=1e-10)
    logits = y[:, 1:, :6].unflatten(2, (2, 3))
    full = reducer.restore(logits, state)
    assert full.shape == (2, 24, 2, 3) and reducer.restore(y[:, 1:, 0], state).shape == (2, 24)
    torch.testing.assert_close(full.flatten(2), weight @ y[:, 1:, :6], atol=1e-10, rtol=1e-10)
    assert reducer.restore_at == "logits"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (TokenState(num_prefix=1), "must fill the patch grid None, got 24"),
        (TokenState(num_prefix=1, grid=(5, 5)), r"must fill the patch grid \(5, 5\), got 24"),
        (TokenState(num_prefix=1, grid=GRID, size=torch.ones(2, 25)), "merged or hidden"),
    ],
)
def test_only_a_full_map_is_clustered(state, message):
    with pytest.raises(ValueError, match=message):
        walk(tiny_blocks(), tokens(2, 25), make(layer=1), state)


def test_images_of_different_sizes_are_refused():
    x, state = pack_ragged([tokens(1, 25), tokens(1, 13)])
    with pytest.raises(ValueError, match="must all have max_seqlen"):
        walk(tiny_blocks(), x, make(layer=1), state.replace(grid=GRID))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1000}, "square number or .rows, columns., got 1000"),
        ({"clusters": 0}, "square number"),
        ({"clusters": (3, 0)}, "clusters must be positive"),
        ({"layer": 5}, r"layer must lie in \[-1, 4\]"),
        ({"iters": -1}, "iters must be >= 0"),
        ({"layer": 1.5}, "layer must be a whole number"),
        ({"iters": 2.5}, "iters must be a whole number"),
        ({"clusters": (2.5, 2)}, "clusters must be positive whole"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("inf")}, "temperature must be positive and finite"),
        ({"restore_temperature": -1.0}, "restore_temperature must be positive"),
        ({"window": 4}, "window must be odd"),
        ({"k": 0}, "k must not be 0"),
        ({"norm": "l3"}, "norm must be"),
        ({"restore_at": "pixels"}, "restore_at must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
