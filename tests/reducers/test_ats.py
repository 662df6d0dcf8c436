# SPDX-License-Identifier: Apache-2.0
"""ATS against the formulas of its paper and of its published code, written out plainly."""

import math
from functools import partial
from unittest import mock

import pytest
import tokenprune_ext
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.ops._register import call
from tokenprune_ext.reducers.ats import ats_sample, ats_scores, ats_smooth_row

from tests.conformance import needs_library

from . import test_protocol as protocol
from .common import DEPTH, HEADS, WIDTH, compile_over_counts, dense, pack_ragged, split, tiny_blocks, tokens, walk

FACTS = {"depth": DEPTH, "embed_dim": WIDTH, "num_prefix": 1, "class_token": True}
OPTIONS = [
    {"layers": [1, 3]},
    {"layers": [0, 1, 2], "drop_tokens": False, "residual": "normed"},
    {"layers": [1, 2], "per_image": False, "residual": "normed"},
    {"layers": [0, 3], "per_image": False, "drop_tokens": False},
]
make = partial(reducers.create, "ats", FACTS)


def scores_of(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 1e-3


def plain_sample(scores, points):
    """Places, by loops, for one image whose tokens are all candidates."""
    scores = (scores / scores.sum()).tolist()
    order = sorted(range(len(scores)), key=lambda j: (scores[j], j))
    total, cdf = 0.0, []
    for j in order:
        total += scores[j]
        cdf.append(total)
    low, high = cdf[0], cdf[-1]
    if not high > low:
        return order, cdf, [], list(range(len(order)))
    cdf = [(c - low) / (high - low) for c in cdf]
    first = min(c for c in cdf if c > 0)
    steps = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    grid = [first + (steps[i] * (points - 1) - first * i) / (points - 1) for i in range(points)]
    pick = [min(range(len(cdf)), key=lambda j, y=y: (abs(y - cdf[j]), j)) for y in grid]
    return order, cdf, grid, pick


@pytest.mark.parametrize(("patches", "points"), [(16, 16), (16, 40), (5, 16), (2, 9), (1, 1), (1, 8), (3, 2)])
def test_sample_matches_the_formulas(patches, points, device):
    scores = scores_of(6, patches, seed=patches)
    scores[1] = 1.0  # ties everywhere
    scores[2, patches // 2] = 50.0
    for published in (False, True):
        sample = ats_sample(scores.to(device), points, published=published)
        for i in range(6):
            order, cdf, grid, pick = plain_sample(scores[i], points)
            kept = sorted(set(pick))
            if grid:
                torch.testing.assert_close(sample.cdf[i].tolist(), cdf)
                torch.testing.assert_close(sample.grid[i].tolist(), grid)
                if i != 1:  # the grid points of equal scores lie between two of them
                    assert sample.pick[i].tolist() == pick
                kept = sorted(set(sample.pick[i].tolist()))
                kept = [] if published and kept[-1] == 1 else kept
            if i != 1 or not published:
                assert sample.order[i].tolist() == order
            assert sample.kept[i].nonzero()[:, 0].tolist() == kept
            rows = sample.order[i, kept].tolist()
            assert sample.rows[i].tolist() == rows + [-1] * (patches - len(rows))


def test_the_least_significant_patch_is_dropped(device):
    sample = ats_sample(scores_of(4, 12).to(device), 12)
    assert not sample.kept[:, 0].any() and bool(sample.kept[:, -1].all())


def test_candidates_are_sampled_as_if_alone(device):
    scores, counts = scores_of(3, 14), [14, 5, 1]
    valid = torch.rand(3, 14, generator=torch.Generator().manual_seed(2)).argsort(1) < torch.tensor(counts)[:, None]
    grid_counts = torch.tensor([20, 9, 4], device=device)
    sample = ats_sample(scores.to(device), 20, grid_counts=grid_counts, valid=valid.to(device))
    for i, count in enumerate(counts):
        places = valid[i].nonzero()[:, 0]
        alone = ats_sample(scores[i : i + 1, places].to(device), int(grid_counts[i]))
        rows = alone.rows[0][alone.rows[0] >= 0].cpu().long()
        assert sample.rows[i, : len(rows)].tolist() == places[rows].tolist()
        assert bool((sample.rows[i, len(rows) :] == -1).all()) and len(rows) == max(1, min(len(rows), count - 1))


def test_published_code_can_keep_the_least_candidate(device):
    scores = scores_of(1, 12).to(device)
    valid = torch.arange(12, device=device)[None] < 8
    published, corrected = (ats_sample(scores, 12, valid=valid, published=mode) for mode in (True, False))
    least = int(torch.where(valid, scores, 9).argmin())
    assert least in published.rows[0].tolist() and least not in corrected.rows[0].tolist()
    assert not published.kept[0, :4].any()


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_scores_without_a_distribution_keep_all(bad, device):
    scores = torch.full((2, 5), bad, device=device)
    scores[1] = torch.rand(5, device=device)
    valid = torch.tensor([[1, 1, 0, 1, 1]] * 2, device=device) > 0
    sample = ats_sample(scores, 5, valid=valid)
    assert sorted(sample.rows[0].tolist()) == [-1, 0, 1, 3, 4]
    assert ats_sample(scores[:, :0], 5).rows.shape == (2, 0)
    assert ats_sample(scores[:0], 5).rows.shape == (0, 5)


def test_scores_are_attention_times_value_norms(device):
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1] * 7], dtype=torch.float64)
    row = ats_smooth_row(logits.to(device), policy.to(device), 0.1).cpu()
    visible = policy.clone()
    visible[:, 0] = 1
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * visible[:, None]
    torch.testing.assert_close(row, (weights + 0.1 / 7) / (weights.sum(-1, keepdim=True) + 0.1))
    torch.testing.assert_close(ats_smooth_row(logits, eps=0.0), logits.softmax(-1))
    expected = [[sum(row[b, h, j] for h in range(3)) * v[b, j].norm() for j in range(7)] for b in range(2)]
    torch.testing.assert_close(ats_scores(row.to(device), v.to(device)).cpu(), torch.tensor(expected, dtype=row.dtype))


def reference(blocks, image, layers, residual, eps, prefix=1):
    """One image ``[1, N, C]``; nothing is padded. Tokens, and the original rows that are left behind each layer."""
    points, left, history = image.shape[1] - prefix, list(range(image.shape[1])), []
    x = image
    for layer, block in enumerate(blocks):
        if layer not in layers:
            x = block(x)
            continue
        z, count = block.norm1(x), x.shape[1]
        q, k, v = block.qkv(z)[0].unflatten(-1, (3, HEADS, -1)).unbind(1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        weights = (weights + eps / count) / (weights.sum(-1, keepdim=True) + eps)
        scores = (weights[:, 0].sum(0) * v.flatten(1).norm(dim=-1))[prefix:].detach()
        order, *_, pick = plain_sample(scores, points)
        rows = list(range(prefix)) + [prefix + order[place] for place in sorted(set(pick))]
        mixed = torch.einsum("hqk,khd->qhd", weights[:, rows], v).flatten(1)
        x = (z if residual == "normed" else x)[:, rows] + block.proj(mixed)
        x = block.feed(x)
        left = [left[row] for row in rows]
        history.append(left)
    return x, history


@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("residual", ["input", "normed"])
@pytest.mark.parametrize("layers", [[1], [0, 1, 2, 3]])
def test_padded_images_do_not_depend_on_each_other(layers, residual, drop_tokens):
    blocks, x = tiny_blocks(), tokens(3, 18).requires_grad_()
    reducer = make(layers=layers, residual=residual, drop_tokens=drop_tokens)
    y, state = walk(blocks, x, reducer, TokenState(num_prefix=1).with_trace(x))
    weight = torch.randn(y.shape[-1], dtype=y.dtype)
    losses = [0, 0]
    for i in range(3):
        expected, history = reference(blocks, x[i : i + 1], layers, residual, 0.0)
        count = expected.shape[1]
        torch.testing.assert_close(y[i, :count], expected[0], atol=1e-10, rtol=1e-10)
        assert bool((state.key_bias[i, count:] == -math.inf).all()) and not state.key_bias[i, :count].any()
        assert state.index[i, :count].tolist() == [row - 1 for row in history[-1]]
        assert bool((state.index[i, count:] == -1).all())
        parent = [history[-1].index(n) if n in history[-1] else -1 for n in range(18)]
        assert state.carry["parent"][i].tolist() == parent
        losses = [losses[0] + (y[i, :count] @ weight).sin().sum(), losses[1] + (expected[0] @ weight).sin().sum()]
    assert drop_tokens == (y.shape[1] < 18)
    grads = [torch.autograd.grad(loss, x)[0] for loss in losses]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("drop_tokens", [True, False])
def test_published_mode_with_one_image(drop_tokens):
    blocks, x = tiny_blocks(), tokens(1, 18).requires_grad_()
    reducer = make(layers=[2], per_image=False, residual="normed", drop_tokens=drop_tokens, eps=1e-3)
    y, state = walk(blocks[:3], x, reducer)
    expected, history = reference(blocks[:3], x, [2], "normed", 1e-3)
    count = expected.shape[1]
    torch.testing.assert_close(y[:, :count], expected, atol=1e-10, rtol=1e-10)
    assert not y[:, count:].any() and state.key_bias is None
    assert state.carry["ats.rows.2"][0, :count].tolist() == history[0]
    grads = [torch.autograd.grad(o.sin().sum(), x)[0] for o in (y[:, :count], expected)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


def test_published_mode_depends_on_the_batch():
    blocks, x = tiny_blocks(), tokens(3, 18)
    reducer = make(layers=[1], per_image=False, residual="normed")
    y, state = walk(blocks, x, reducer)
    count = (state.carry["ats.rows.1"] >= 0).sum(1)
    shortest = int(count.argmin())
    alone, _ = walk(blocks, x[shortest : shortest + 1], reducer)
    assert y.shape[1] == int(count.max()) > alone.shape[1] == int(count.min())
    assert (y[shortest, : alone.shape[1]] - alone[0]).abs().max() > 1e-3


@pytest.mark.parametrize("drop_tokens", [True, False])
def test_ragged_batch_equals_single_images(drop_tokens):
    blocks, reducer = tiny_blocks(), make(layers=[0, 2], drop_tokens=drop_tokens)
    images = [tokens(1, count, seed=count) for count in (17, 2, 12, 1, 23)]
    x, state = pack_ragged(images)
    x.requires_grad_()
    y, state = walk(blocks, x, reducer, state.with_trace(x))
    parts = split(y, state)
    for i, (image, part) in enumerate(zip(images, parts)):
        single, alone = walk(blocks, image, reducer, TokenState(num_prefix=1).with_trace(image))
        single = single[0, : part.shape[0]]
        torch.testing.assert_close(part, single, atol=1e-10, rtol=1e-10)
        parent = alone.carry["parent"][0]
        assert torch.equal(state.carry["parent"][i, : image.shape[1]], parent)
        assert int(parent.max()) + 1 == part.shape[0]
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()
    with pytest.raises(ValueError, match="per_image must be True"):
        walk(blocks, x, make(layers=[0], per_image=False), state)


def test_packed_equals_padded():
    blocks, x, reducer = tiny_blocks(), tokens(3, 18), make(layers=[1, 2])
    y, padded = walk(blocks, x, reducer, TokenState(num_prefix=1).with_trace(x))
    rows, state = TokenState(num_prefix=1).with_trace(x).as_packed(x)
    z, packed = walk(blocks, rows, reducer, state)
    assert packed.cu_seqlens.diff().tolist() == (padded.carry["ats.rows.2"] >= 0).sum(1).tolist()
    assert z.shape[0] == int(packed.cu_seqlens[-1])
    for image, part in zip(y, split(z, packed)):
        torch.testing.assert_close(part, image[: part.shape[0]], atol=1e-12, rtol=1e-12)
    assert torch.equal(padded.carry["parent"], packed.carry["parent"])
    assert packed.index.tolist() == [n for row, bias in zip(padded.index, padded.key_bias) for n in row[bias == 0]]


@pytest.mark.parametrize("per_image", [True, False])
def test_prefix_tokens_stay_in_front(per_image):
    x = tokens(2, 20)
    y, state = walk(tiny_blocks(), x, make(layers=[0, 2], per_image=per_image), TokenState(num_prefix=4).with_trace(x))
    assert state.carry["ats.rows.2"][:, :4].tolist() == [[0, 1, 2, 3]] * 2
    assert state.carry["parent"][:, :4].tolist() == [[0, 1, 2, 3]] * 2
    assert y.shape[1] < 20


def test_hidden_tokens_are_no_candidates():
    blocks, x, reducer = tiny_blocks(), tokens(1, 18), make(layers=[1, 2])
    bias = torch.zeros(1, 18, dtype=x.dtype)
    bias[:, 11:] = -math.inf
    y, _ = walk(blocks, x, reducer, TokenState(num_prefix=1, key_bias=bias))
    alone, _ = walk(blocks, x[:, :11], reducer)
    torch.testing.assert_close(y, alone, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="per_image must be True"):
        walk(blocks, x, make(layers=[0], per_image=False), TokenState(num_prefix=1, key_bias=bias))


@needs_library
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed", "one", "one_hidden"])
@pytest.mark.parametrize("drop_tokens", [True, False])
@torch.no_grad()
def test_packed_weights_sample_in_one_call(drop_tokens, layout, traced):
    blocks, reducer = tokenprune_ext.pack(tiny_blocks()), make(layers=[0, 2], drop_tokens=drop_tokens)
    x = tokens(1 if layout.startswith("one") else 3, 18)
    state = TokenState(num_prefix=1)
    if layout == "one_hidden":
        state = state.replace(key_bias=torch.zeros(1, 18, dtype=x.dtype))
        state.key_bias[:, 4:9] = -math.inf
    state = state.with_trace(x) if traced else state
    x, state = state.as_packed(x) if layout == "packed" else (x, state)
    with mock.patch("tokenprune_ext.nn.block.call", wraps=call) as calls:
        y, after = walk(blocks, x, reducer, state)
    assert [c.args[0] for c in calls.mock_calls] == ["packed_attention_sampled", "packed_attention"] * 2
    with mock.patch("tokenprune_ext.nn.block.in_one_call", return_value=False):
        expected, same = walk(blocks, x, reducer, state)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    for name in ("cu_seqlens", "max_seqlen", "index", "key_bias"):
        got, wanted = getattr(after, name), getattr(same, name)
        assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted
    assert after.carry.keys() == same.carry.keys()
    assert all(torch.equal(after.carry[name], same.carry[name]) for name in same.carry)


def test_one_image_needs_no_padding():
    blocks, x = tiny_blocks(), tokens(1, 18)
    for drop_tokens in (True, False):
        _, state = walk(blocks, x, make(layers=[1], drop_tokens=drop_tokens))
        assert (state.key_bias is None) == ("ats.policy" not in state.carry) == drop_tokens


@pytest.mark.parametrize("packed", [False, True])
def test_restore_puts_patches_back(packed):
    blocks, x, reducer = tiny_blocks(), tokens(3, 18), make(layers=[1, 2])
    state = TokenState(num_prefix=1).with_trace(x)
    x, state = state.as_packed(x) if packed else (x, state)
    y, state = walk(blocks, x, reducer, state)
    images = split(y, state) if packed else y
    patches = torch.cat([image[1:] for image in images]) if packed else y[:, 1:]
    full = reducer.restore(patches, state)
    for image, places, parent in zip(images, full, state.carry["parent"]):
        for place, row in zip(places, parent[1:].tolist()):
            assert torch.equal(place, image[row] if row >= 0 else torch.zeros_like(place))


def test_pooling_means_over_the_patches_that_are_left():
    x, reducer = tokens(3, 18), make(layers=[1, 2])
    y, state = walk(tiny_blocks(), x, reducer)
    pooled = reducer.pool(y, state)
    for image, mean, rows in zip(y, pooled[:, 1:].mean(1), state.carry["ats.rows.2"]):
        torch.testing.assert_close(mean, image[1 : int((rows >= 0).sum())].mean(0))
    assert torch.equal(pooled[:, 0], y[:, 0])
    published = make(layers=[1], per_image=False)
    y, state = walk(tiny_blocks(), x, published)
    assert published.pool(y, state) is y


@pytest.mark.parametrize("fast_idle", [True, False])
def test_inactive_runs_the_original_blocks(fast_idle):
    y, _ = walk(tiny_blocks(), tokens(), make(layers=[], fast_idle=fast_idle))
    torch.testing.assert_close(y, dense(tiny_blocks(), tokens()), atol=1e-12, rtol=1e-12)
    assert not fast_idle or torch.equal(y, dense(tiny_blocks(), tokens()))
    assert make(layers=[]).plan(3, 9) == [(9, 9)] * 3


CHECKS = [
    protocol.test_nothing_is_stored_or_changed,
    protocol.test_plan_equals_what_runs,
    protocol.test_gradients,
    protocol.test_autocast_and_half,
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_protocol(check, options):
    check("ats", options)


@pytest.mark.parametrize("options", OPTIONS[2:])
def test_protocol_of_packed_tokens(options):
    protocol.test_padded_and_packed_are_equal("ats", options)


@pytest.mark.skipif(not protocol._library.cpu_loaded(), reason="the references read lengths on the host")
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.extended)])
@pytest.mark.parametrize(
    "options", [*OPTIONS[:1], *(pytest.param(options, marks=pytest.mark.extended) for options in OPTIONS[1:])]
)
def test_compiles_once(options, packed):
    fixed = options.get("drop_tokens") is False and (not packed or options.get("per_image") is False)
    reducer = make(**{**options, "layers": [0, 1]})
    compile_over_counts(tiny_blocks(2), reducer, packed=packed, capture_dynamic_output_shape_ops=not fixed)


@pytest.mark.extended
@pytest.mark.skipif(not protocol._library.cpu_loaded(), reason="the references read lengths on the host")
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_training_step(options):
    protocol.test_compiled_training_step("ats", options)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"sample_rows: scores must have shape \[B, n\]"):
        ats_sample(torch.zeros(5), 5)
    with pytest.raises(TypeError, match="sample_rows: scores must be a float32"):
        ats_sample(torch.zeros(2, 5, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="sample_rows: grid_points must be >= 0, got -1"):
        ats_sample(torch.zeros(2, 5), -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, r"layers must lie in \[0, 4\)"),
        ({"residual": "none"}, "residual must be 'input' or 'normed', got 'none'"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"class_token": False}, "must have a class token"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"ATS: .*{message}"):
        make(**options)
