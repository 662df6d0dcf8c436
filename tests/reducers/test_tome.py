# SPDX-License-Identifier: Apache-2.0
"""ToMe against the formulas of its paper, written out plainly."""

from unittest import mock

import pytest
import tokenprune_ext
import torch
import torch.nn.functional as F
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.ops._register import call
from tokenprune_ext.reducers import parse_r

from tests.conformance import needs_library

from .common import DEPTH, pack_ragged, split, tiny_blocks, tokens, walk


def reference(blocks, x, r, prop_attn=True, class_token=True):
    """Merge by loops, image by image; returns tokens, sizes and the groups of original tokens."""
    images, sizes, groups = [], [], []
    for image in x:
        image, size, members = image[None], None, [{i} for i in range(x.shape[1])]
        for block, merges in zip(blocks, r):
            bias = size.log() if prop_attn and size is not None else None
            y, _, keys = block.attend(image, bias)
            image = image + y
            if merges > 0:
                size = torch.ones(image.shape[:2], dtype=x.dtype) if size is None else size
                image, size, members = merge(image, size, members, keys.mean(2)[0], merges, class_token)
            image = block.feed(image)
        images.append(image)
        sizes.append(size)
        groups.append(members)
    return torch.cat(images), None if sizes[0] is None else torch.cat(sizes), groups


def merge(image, size, members, metric, r, class_token):
    r = min(r, (image.shape[1] - int(class_token)) // 2)
    metric = F.normalize(metric, dim=-1)
    scores = metric[::2] @ metric[1::2].T
    if class_token:
        scores[0] = float("-inf")
    best, partner = scores.max(1)
    order = best.argsort(descending=True, stable=True).tolist()
    merged, rest = order[:r], order[r:]
    rest = sorted(rest) if class_token else rest
    out = [[2 * i] for i in rest] + [
        [2 * j + 1] + [2 * i for i in merged if partner[i] == j] for j in range(scores.shape[1])
    ]
    weights = torch.stack([size[0, group].sum() for group in out])
    values = torch.stack([(image[0, g] * size[0, g, None]).sum(0) / size[0, g].sum() for g in out])
    return values[None], weights[None], [set().union(*(members[i] for i in group)) for group in out]


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("r", [3, [4, 0, 2], 50])
def test_matches_the_formulas(r, class_token, prop_attn):
    blocks, x = tiny_blocks(), tokens()
    reducer = reducers.create(
        "tome", r=r, depth=DEPTH, prop_attn=prop_attn, class_token=class_token, trace_source=True, fast_idle=False
    )
    y, state = walk(blocks, x, reducer, TokenState(num_prefix=int(class_token)))
    expected, size, groups = reference(blocks, x, reducer.r, prop_attn, class_token)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.size, size)
    for image, members in enumerate(groups):
        parent = state.carry["parent"][image]
        assert [set((parent == row).nonzero().flatten().tolist()) for row in range(len(members))] == members
        first = [min(group) - int(class_token) for group in members]
        assert state.index[image].tolist() == [max(patch, -1) for patch in first]


def test_clamped_to_nothing_still_sets_the_size():
    blocks, x = tiny_blocks(1), tokens(count=2)
    y, state = walk(blocks, x, reducers.create("tome", r=3, depth=1))
    torch.testing.assert_close(y, blocks[0](x))
    assert torch.equal(state.size, torch.ones(2, 2, dtype=x.dtype))


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_prefix_tokens_never_merge(prefix):
    reducer = reducers.create(
        "tome", r=4, depth=DEPTH, class_token=True, distill_token=prefix == 2, num_prefix=prefix, trace_source=True
    )
    x = tokens(count=23)
    y, state = walk(tiny_blocks(), x, reducer, TokenState(num_prefix=prefix))
    assert torch.equal(state.carry["parent"][:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
    assert bool((state.carry["parent"][:, prefix:] >= prefix).all()) or prefix <= 2
    assert [after for _, after in reducer.plan(DEPTH, 23)][-1] == y.shape[1]
    if prefix == 5:  # registers take nothing in either; a class token is a source only, so it cannot
        assert bool((state.size[:, :prefix] == 1).all())


def test_ragged_batch_equals_single_images():
    blocks, r = tiny_blocks(), [3, 2, 0, 1]
    images = [tokens(1, count, seed=count) for count in (17, 12, 23)]
    x, state = pack_ragged(images)
    y, state = walk(blocks, x, reducers.create("tome", r=r, depth=DEPTH, trace_source=True), state)
    for image, part, parent, size in zip(
        images, split(y, state), state.carry["parent"], state.size.split(state.cu_seqlens.diff().tolist())
    ):
        single, alone = walk(blocks, image, reducers.create("tome", r=r, depth=DEPTH, trace_source=True))
        torch.testing.assert_close(part, single[0], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(size, alone.size[0])
        assert torch.equal(parent[: image.shape[1]], alone.carry["parent"][0])
        assert bool((parent[image.shape[1] :] == -1).all())


def test_ragged_batch_refuses_more_merges_than_fit():
    x, state = pack_ragged([tokens(1, 17), tokens(1, 5)])
    with pytest.raises(ValueError, match=r"ToMe: r must be at most half .*2.*, got 3"):
        walk(tiny_blocks(1), x, reducers.create("tome", r=3, depth=1), state)


@pytest.mark.parametrize("packed", [False, True])
def test_restore_gives_every_patch_its_token(packed):
    reducer = reducers.create("tome", r=3, depth=DEPTH, trace_source=True)
    x, state = tokens(), TokenState(num_prefix=1)
    x, state = state.as_packed(x) if packed else (x, state)
    y, state = walk(tiny_blocks(), x, reducer, state)
    images = split(y, state) if packed else y
    patches = torch.cat([image[1:] for image in images]) if packed else y[:, 1:]
    full = reducer.restore(patches, state)
    for image in range(2):
        for patch in range(16):
            row = state.carry["parent"][image, patch + 1] if not packed else None
            row = int(state.carry["parent"][image, patch + 1]) if row is None else int(row)
            # A patch may have merged into no prefix token, so row 0 never occurs.
            assert torch.equal(full[image, patch], images[image][row])


def test_restore_needs_the_sources():
    reducer = reducers.create("tome", r=3, depth=DEPTH)
    y, state = walk(tiny_blocks(), tokens(), reducer)
    with pytest.raises(ValueError, match="trace_source"):
        reducer.restore(y[:, 1:], state)


def test_schedules():
    assert parse_r(4, 8) == [8, 8, 8, 8]
    assert parse_r(4, [5, 1]) == [5, 1, 0, 0]
    assert parse_r(2, [5, 1, 7]) == [5, 1, 7]
    assert parse_r(4, (8, -1.0)) == [16, 10, 5, 0]
    assert parse_r(4, (8, 1.0)) == [0, 5, 10, 16]
    assert parse_r(12, (8, 0.0)) == [8] * 12
    assert parse_r(1, 8) == [8]
    assert parse_r(1, (8, 0.5)) == [4]
    with pytest.raises(ValueError, match="negative"):
        reducers.create("tome", r=-1, depth=2)


@pytest.mark.parametrize("r", [2.5, "8", [3, 1.5], True, (8, 2.0), (8,), (True, 0), (8, True), None])
def test_other_schedules_are_refused(r):
    with pytest.raises(ValueError, match="ToMe: r must be an int, a list of ints or"):
        reducers.create("tome", r=r, depth=2)


@needs_library
@pytest.mark.parametrize("prefix", [1, 3])
@torch.no_grad()
def test_packed_weights_merge_in_one_call(prefix):
    blocks, x = tokenprune_ext.pack(tiny_blocks()), tokens(2, 18)
    reducer = reducers.create("tome", depth=DEPTH, r=[3, 0, 100, 2], num_prefix=prefix, trace_source=True)
    state = TokenState(num_prefix=prefix)
    with mock.patch("tokenprune_ext.nn.block.call", wraps=call) as calls:
        y, after = walk(blocks, x, reducer, state)
    assert [c.args[0] for c in calls.mock_calls][:3] == [f"packed_attention{end}" for end in ("_merged", "", "_merged")]
    with mock.patch("tokenprune_ext.nn.block.in_one_call", return_value=False):
        expected, same = walk(blocks, x, reducer, state)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    for name in ("size", "key_bias", "index"):
        torch.testing.assert_close(getattr(after, name), getattr(same, name))
    assert torch.equal(after.carry["parent"], same.carry["parent"])
