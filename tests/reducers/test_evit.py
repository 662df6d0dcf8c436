# SPDX-License-Identifier: Apache-2.0
"""EViT against the formulas of its paper, written out plainly."""

import math

import pytest
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState

from .common import DEPTH, nearest_rows, pack_ragged, split, tiny_blocks, tokens, walk

KEEP = [1.0, 0.6, 0.7, 0.5]


def reference(blocks, x, keep, fuse, mode, prefix=1):
    """Selection by loops; returns tokens and, per layer, the kept patches of each image."""
    chosen = []
    for block, rate in zip(blocks, keep):
        y, weights, _ = block.attend(x)
        x = x + y
        count = x.shape[1] - prefix
        left = math.ceil(rate * count)
        if left < count:
            score = (weights[:, :, 0] if mode == "cls" else weights.mean(2)).mean(1)[:, prefix:]
            order = [sorted(range(count), key=lambda j, s=s: (-s[j].item(), j)) for s in score]
            chosen.append([o[:left] for o in order])
            rows = []
            for image, o, s in zip(x, order, score):
                patches = image[prefix:]
                fused = [sum(s[j] * patches[j] for j in sorted(o[left:]))] if fuse else []
                rows.append(torch.stack([*image[:prefix], *(patches[j] for j in o[:left]), *fused]))
            x = torch.stack(rows)
        x = block.feed(x)
    return x, chosen


@pytest.mark.parametrize("mode", ["cls", "mean"])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("prefix", [1, 3])
def test_matches_the_formulas(prefix, fuse, mode):
    blocks, x = tiny_blocks(), tokens(3, 22).requires_grad_()
    reducer = reducers.create("evit", keep=KEEP, depth=DEPTH, fuse_token=fuse, score_mode=mode, num_prefix=prefix)
    y, state = walk(blocks, x, reducer, TokenState(num_prefix=prefix).with_trace(x))
    expected, chosen = reference(blocks, x, KEEP, fuse, mode, prefix)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    for layer, kept in zip((1, 2, 3), chosen):
        assert state.carry[f"kept.{layer}"].tolist() == kept
    weight = torch.randn_like(y)
    grads = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("count", "rate", "after"), [(197, 0.7, [140, 100, 72]), (101, 0.55, [58]), (1025, 0.7, [719, 505, 355])]
)
def test_counts_round_up_in_double_precision(count, rate, after):
    reducer = reducers.create("evit", keep=[rate] * len(after), depth=len(after))
    assert [mlp for _, mlp in reducer.plan(len(after), count)] == after
    without = reducers.create("evit", keep=[0.7, 0.7, 0.7], depth=3, fuse_token=False)
    assert [mlp for _, mlp in without.plan(3, 1025)] == [718, 503, 353]


def test_trace_follows_every_token():
    blocks, x = tiny_blocks(), tokens(2, 17)
    for fuse in (True, False):
        reducer = reducers.create("evit", keep=KEEP, depth=DEPTH, fuse_token=fuse)
        y, state = walk(blocks, x, reducer, TokenState(num_prefix=1).with_trace(x))
        parent, index = state.carry["parent"], state.index
        assert bool((parent[:, 0] == 0).all()) and index.shape == y.shape[:2]
        for image in range(2):
            for row, patch in enumerate(index[image].tolist()):
                if patch >= 0:
                    assert parent[image, patch + 1] == row
            others = set(range(16)) - set(index[image].tolist())
            rows = [int(parent[image, patch + 1]) for patch in others]
            assert all(row >= 0 and index[image, row] == -1 for row in rows) if fuse else set(rows) == {-1}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("keep", [KEEP, [0.4, 1.0, 0.9, 0.5]])
def test_ragged_batch_equals_single_images(keep, fuse):
    blocks = tiny_blocks()
    images = [tokens(1, count, seed=count) for count in (17, 2, 12, 23)]
    x, state = pack_ragged(images)
    x.requires_grad_()
    y, state = walk(blocks, x, reducers.create("evit", keep=keep, depth=DEPTH, fuse_token=fuse), state.with_trace(x))
    lengths = state.cu_seqlens.diff().tolist()
    assert max(lengths) <= state.max_seqlen
    total = 0
    for image, part, parent, index in zip(images, split(y, state), state.carry["parent"], state.index.split(lengths)):
        single = TokenState(num_prefix=1).with_trace(image)
        z, alone = walk(blocks, image, reducers.create("evit", keep=keep, depth=DEPTH, fuse_token=fuse), single)
        torch.testing.assert_close(part, z[0], atol=1e-10, rtol=1e-10)
        assert torch.equal(parent[: image.shape[1]], alone.carry["parent"][0])
        assert torch.equal(index, alone.index[0])
        total = total + z.sum()
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@pytest.mark.parametrize("fuse", [True, False])
def test_restore_goes_back_stage_by_stage(fuse):
    blocks, x = tiny_blocks(), tokens(2, 17)
    reducer = reducers.create("evit", keep=KEEP, depth=DEPTH, fuse_token=fuse)
    y, state = walk(blocks, x, reducer, TokenState(num_prefix=1).with_trace(x))
    full = reducer.restore(y[:, 1:], state)
    assert full.shape == (2, 16, y.shape[-1])
    for image in range(2):
        current = y[image, 1:]
        for layer in (3, 2, 1):
            kept, features = state.carry[f"kept.{layer}"][image].long(), state.carry[f"features.{layer}"][image]
            nearest = nearest_rows(features, kept)
            nearest[kept] = torch.arange(len(kept))
            current = current[: len(kept)][nearest]
        assert torch.equal(full[image], current)
    with pytest.raises(ValueError, match="traced"):
        reducer.restore(y[:, 1:], TokenState(num_prefix=1))


def test_scores_with_nan_rank_last():
    class Scored:
        def add(self, x, state, want):
            return x, torch.tensor([[0.1, 0.2, float("nan"), 0.3, 0.4]], dtype=x.dtype)

    reducer = reducers.create("evit", keep=[0.5], depth=1, fuse_token=False)
    x = tokens(1, 5)
    y, _ = reducer.attention(x, TokenState(num_prefix=1), 0, Scored())
    assert torch.equal(y, x[:, [0, 4, 3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "rates in"),
        ({"keep": [0.5]}, "4 rates"),
        ({"layers": [4]}, "layers must lie in"),
        ({"score_mode": "row"}, "score_mode"),
        ({"class_token": False}, "needs a class token"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        reducers.create("evit", depth=4, **options)
