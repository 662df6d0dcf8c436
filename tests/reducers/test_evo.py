# SPDX-License-Identifier: Apache-2.0
"""Evo-ViT against its formulas, written out plainly with tokens that really move, as in the published code."""

import pytest
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState, run_block

from .common import DEPTH, dense, pack_ragged, split, tiny_blocks, tokens, walk

RATIO = [1.0, 0.6, 1.0, 0.4]


def reference(blocks, x, ratio, tradeoff, summary=False):
    """One image at a time; returns tokens and scores in the original order."""
    images, scores = [], []
    for image in x:
        place = torch.arange(len(image) - 1)
        score = None
        for block, share, own in zip(blocks, ratio, tradeoff):
            patches = image[1:]
            slow = int(len(patches) * share)
            if share != 1:
                order = sorted(range(len(patches)), key=lambda j, s=score: (-s[j].item(), j))
                patches, score, place = patches[order], score[order], place[order]
            rest = patches[slow:]
            inside = [image[:1], patches[:slow]]
            if summary and len(rest):
                weight = score[slow:] / score[slow:].sum()
                inside.append((weight[:, None] * rest).sum(0, keepdim=True))
            inside = torch.cat(inside)[None]
            branch, weights, _ = block.attend(inside)
            after = block.feed(inside + branch)[0]
            attention = weights[0, :, 0].mean(0)[1 : 1 + slow]
            score = (
                attention if score is None else torch.cat([(1 - own) * score[:slow] + own * attention, score[slow:]])
            )
            if summary and len(rest):
                rest = rest + (after[-1] - inside[0, -1])
            image = torch.cat([after[: 1 + slow], rest])
        back = place.argsort()
        images.append(torch.cat([image[:1], image[1:][back]]))
        scores.append(score[back])
    return torch.stack(images), torch.stack(scores)


def make(**options):
    return reducers.create("evo", depth=DEPTH, fast_idle=False, **options)


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("tradeoff", [0.5, [0.5, 0.3, 1.0, 0.0]])
@pytest.mark.parametrize("ratio", [RATIO, [1.0, 0.0, 0.9, 0.5], 0.45])
def test_matches_the_formulas(ratio, tradeoff, summary):
    blocks, x = tiny_blocks(), tokens(3, 22).requires_grad_()
    reducer = make(ratio=ratio, layer=2, tradeoff=tradeoff, summary=summary)
    y, state = walk(blocks, x, reducer, TokenState(num_prefix=1).with_trace(x))
    expected, score = reference(blocks, x, reducer.ratio, reducer.tradeoff, summary)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(state.carry["score"][:, 1:], score, atol=1e-12, rtol=1e-12)
    assert torch.equal(state.carry["parent"], torch.arange(22, dtype=torch.int32).expand(3, -1))
    weight = torch.randn_like(y)
    grads = [torch.autograd.grad((out * weight).sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("summary", [False, True])
def test_ragged_batch_equals_single_images(summary):
    blocks = tiny_blocks()
    images = [tokens(1, count, seed=count) for count in (17, 2, 12, 23)]
    x, state = pack_ragged(images)
    x.requires_grad_()
    y, state = walk(blocks, x, make(ratio=RATIO, summary=summary), state)
    for image, part in zip(images, split(y, state)):
        alone, _ = walk(blocks, image, make(ratio=RATIO, summary=summary))
        torch.testing.assert_close(part, alone[0], atol=1e-10, rtol=1e-10)
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_plan_and_record_count_the_slow_tokens(packed, summary):
    x, state, record = tokens(2, 17), TokenState(num_prefix=1), []
    x, state = state.as_packed(x) if packed else (x, state)
    reducer = make(ratio=RATIO, summary=summary)
    walk(tiny_blocks(), x, reducer, state, record)
    assert [(int(step.attention[0]), int(step.mlp[1])) for step in record] == reducer.plan(DEPTH, 17)
    extra = int(summary)
    assert [n for n, _ in reducer.plan(DEPTH, 17)] == [17, 10 + extra, 17, 7 + extra]


@pytest.mark.parametrize(
    ("tokens_", "ratio", "slow"), [(1025, 0.4, 410), (1025, 0.6, 615), (1370, 0.5, 685), (1370, 0.3, 411)]
)
def test_counts_are_truncated_in_double_precision(tokens_, ratio, slow):
    reducer = reducers.create("evo", depth=6, ratio=ratio, layer=4)
    assert [n for n, _ in reducer.plan(6, tokens_)] == [tokens_] * 4 + [slow] * 2


def test_other_prefix_tokens_are_always_slow():
    x, record = tokens(2, 20), []
    reducer = make(ratio=0.3, layer=1, num_prefix=4)
    walk(tiny_blocks(), x, reducer, TokenState(num_prefix=4).with_trace(x), record)
    for step in record[1:]:
        index = step.state.index.view(2, -1)
        assert index.shape[1] == 8 and bool((index[:, :4] == -1).all()) and bool((index[:, 4:] >= 0).all())


def test_plain_layers_behind_the_last_pruned_one_make_no_scores():
    blocks, x = tiny_blocks(), tokens()
    ratio = [1.0, 0.5, 1.0, 1.0]
    y, state = walk(blocks, x, reducers.create("evo", depth=DEPTH, ratio=ratio))
    half, before = walk(blocks[:2], x, make(ratio=ratio))
    assert torch.equal(y, dense(blocks[2:], half))
    assert torch.equal(state.carry["score"], before.carry["score"])


def test_scores_of_nan_rank_last():
    blocks, x = tiny_blocks(1), tokens(1, 5)
    score = torch.tensor([[0.0, float("nan"), 0.2, 0.3, 0.1]], dtype=x.dtype)
    reducer = reducers.create("evo", depth=2, ratio=[1.0, 0.5])
    state = TokenState(num_prefix=1, carry={"score": score})
    _, state = run_block(blocks[0].parts(), x, state, 1, reducer)
    assert state.carry["order"].tolist() == [[0, 3, 2, 4, 1]]


def test_pruning_needs_a_score():
    reducer, block = reducers.create("evo", depth=2, ratio=[1.0, 0.5]), tiny_blocks(1)[0]
    with pytest.raises(ValueError, match="must hold 'score' in front of pruned layer 1"):
        run_block(block.parts(), tokens(), TokenState(num_prefix=1), 1, reducer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "layer 0 must be a plain one"),
        ({"layer": -1}, r"layer must be whole and in \[0, 4\], got -1"),
        ({"layer": 5}, r"in \[0, 4\], got 5"),
        ({"layer": 1.5}, "layer must be whole and in .*, got 1.5"),
        ({"ratio": 1.5}, r"ratio must lie in \[0, 1\]"),
        ({"ratio": [1.0, 1.0, 1.0, 1.5]}, r"ratio must be 4 numbers in \[0, 1\]"),
        ({"ratio": [1.0, 0.5]}, "ratio must be 4 numbers"),
        ({"tradeoff": -0.1}, "tradeoff must be 4 numbers"),
        ({"class_token": False}, "must have a class token"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        reducers.create("evo", depth=4, **options)
