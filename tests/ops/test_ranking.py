# SPDX-License-Identifier: Apache-2.0
"""Tokens by rank: the order, the best with the others fused, running scores."""

import math
from itertools import pairwise

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample, needs_library
from tests.ops.common import expect

raw = torch.ops.tokenprune

SCHEMAS = [
    "rank_tokens(Tensor score, SymInt num_prefix, SymInt count) -> (Tensor order, Tensor rows, Tensor cu_seqlens)",
    "keep_top_tokens(Tensor x, Tensor score, SymInt num_prefix, SymInt keep, bool fuse, bool by_rank) -> "
    "(Tensor y, Tensor order)",
    "keep_marked_tokens(Tensor x, Tensor keep, Tensor cu_seqlens, Tensor? weights) -> "
    "(Tensor y, Tensor source, Tensor cu_out)",
    "running_scores(Tensor score, Tensor latest, Tensor? rows, float weight) -> Tensor",
]

NAN, INF = math.nan, math.inf


# ---------------------------------------------------------------- samples and functions under test


def _score(rng, batch, tokens):
    """Scores of which some tie, and which every dtype tells apart or ties alike."""
    return torch.randint(-40, 40, (batch, tokens), generator=rng).double() / 8


def make_rank(rng, batch, tokens, prefix=0, count=None):
    prefix = min(prefix, tokens)
    return Sample({"score": _score(rng, batch, tokens)}, {"count": count, "num_prefix": prefix})


def rank(score, **options):
    order, index = ops.rank_tokens(score, **options)
    assert index.max_seqlen == (score.shape[1] if options["count"] is None else options["count"])
    return order, index.indices, index.cu_seqlens


def _ranked(score, prefix):
    """One row, by the words of the docstring."""
    patches = [(math.isnan(s), -s if not math.isnan(s) else 0.0, i) for i, s in enumerate(score) if i >= prefix]
    return [*range(prefix), *(i for *_, i in sorted(patches))]


def oracle_rank(score, count, num_prefix):
    batch, tokens = score.shape
    count = tokens if count is None else count
    rows = [_ranked(row, num_prefix) for row in score.tolist()]
    flat = [b * tokens + i for b, row in enumerate(rows) for i in row[:count]]
    return (
        torch.tensor(rows, dtype=torch.int64).view(batch, tokens),
        torch.tensor(flat, dtype=torch.int32),
        torch.arange(batch + 1, dtype=torch.int32) * count,
    )


def make_keep(rng, batch, tokens, channels, keep=2, prefix=0, fuse=True, by_rank=True):
    prefix = min(prefix, tokens)
    keep = min(keep, tokens - prefix)
    x = torch.randn(batch, tokens, channels, generator=rng, dtype=torch.float64)
    # distinct, so that small changes of a gradient check do not change the order
    score = (
        torch.stack([torch.randperm(tokens, generator=rng) for _ in range(batch)]) if batch else torch.zeros(0, tokens)
    )
    score = (score.double() + 1) / 64
    return Sample({"x": x, "score": score}, {"keep": keep, "num_prefix": prefix, "fuse": fuse, "by_rank": by_rank})


def oracle_keep(x, score, keep, num_prefix, fuse, by_rank):
    order = oracle_rank(score, None, num_prefix)[0][:, : num_prefix + keep]
    order = order if by_rank else torch.tensor([sorted(row) for row in order.tolist()]).view(order.shape).long()
    y = torch.stack([image[row] for image, row in zip(x, order, strict=True)]) if len(x) else x[:, : num_prefix + keep]
    if fuse:
        rest = torch.ones_like(score).scatter(1, order, 0)
        y = torch.cat([y, torch.einsum("bn,bnc->bc", (score * rest).to(x.dtype), x)[:, None]], 1)
    return y, order


def make_marked(rng, lengths, channels, share=0.4, fuse=True, behind=0):
    """``behind``: rows of no sequence."""
    total = sum(lengths) + behind
    inputs = {
        "x": torch.randn(total, channels, generator=rng, dtype=torch.float64),
        "keep": torch.rand(total, generator=rng) < share,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }
    weights = {"weights": torch.rand(total, generator=rng, dtype=torch.float64)} if fuse else {}
    return Sample(inputs | weights, {})


def oracle_marked(x, keep, cu_seqlens, weights=None):
    rows, source, starts = [x[:0]], [], [0]
    for begin, end in pairwise(cu_seqlens.tolist()):
        own = [t for t in range(begin, end) if keep[t]]
        rows.append(x[own])
        source += own
        if weights is not None:
            rest = [t for t in range(begin, end) if not keep[t]]
            rows.append((weights[rest].to(x.dtype)[:, None] * x[rest]).sum(0, keepdim=True))
            source.append(-1)
        starts.append(len(source))
    return torch.cat(rows), torch.tensor(source, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def make_running(rng, scores, latest=None, weight=0.5):
    inputs = {"score": torch.randn(scores, generator=rng, dtype=torch.float64)}
    if latest is not None:
        latest = min(latest, scores)
        rows = torch.randperm(scores, generator=rng)[:latest].to(torch.int32)
        inputs["index"] = torch.cat([rows, rows.new_full((2,), -1)])  # two that speak of nothing
        latest += 2
    inputs["latest"] = torch.randn(scores if latest is None else latest, generator=rng, dtype=torch.float64)
    return Sample(inputs, {"weight": weight})


def running(score, latest, index=None, *, weight):
    return ops.running_scores(score, latest, weight, index)


def oracle_running(score, latest, index=None, *, weight):
    out = score.clone()
    rows = range(len(score)) if index is None else index.tolist()
    for place, value in zip(rows, latest, strict=True):
        if place >= 0:
            out[place] = (1 - weight) * score[place] + weight * value
    return out


STATS = (torch.float32, torch.float64)
MARKED = {
    "several": {"lengths": [20, 33], "channels": 20},
    "ragged": {"lengths": [5, 0, 40, 1], "channels": 7, "behind": 3},
    "wide": {"lengths": [50], "channels": 1100},
    "all_kept": {"lengths": [9, 4], "channels": 5, "share": 2.0},
    "none_kept": {"lengths": [9, 4], "channels": 5, "share": -1.0},
    "no_tokens": {"lengths": [0, 0], "channels": 4},
    "no_sequences": {"lengths": [], "channels": 4},
    "no_channels": {"lengths": [6], "channels": 0},
}

SPECS = [
    OpSpec(
        "rank_tokens",
        rank,
        oracle_rank,
        make_rank,
        cases={
            "plain": {"batch": 2, "tokens": 33},
            "prefix": {"batch": 3, "tokens": 50, "prefix": 5, "count": 20},
            "none_counted": {"batch": 2, "tokens": 7, "prefix": 1, "count": 0},
            "all_prefix": {"batch": 2, "tokens": 4, "prefix": 4},
            "one": {"batch": 1, "tokens": 1, "prefix": 1},
            "long": {"batch": 1, "tokens": 3000, "prefix": 1, "count": 1000},
            "no_tokens": {"batch": 2, "tokens": 0},
            "no_images": {"batch": 0, "tokens": 5, "count": 3},
        },
        sized=lambda tokens: {"batch": 2, "tokens": tokens, "prefix": 1, "count": 4},
        fuzz={"batch": (0, 3), "tokens": (0, 80), "prefix": (0, 3)},
    ),
    OpSpec(
        "keep_top_tokens",
        ops.keep_top_tokens,
        oracle_keep,
        make_keep,
        cases={
            "fused": {"batch": 2, "tokens": 33, "channels": 20, "keep": 9, "prefix": 1},
            "wide": {"batch": 1, "tokens": 40, "channels": 1100, "keep": 11, "prefix": 2},
            "plain": {"batch": 3, "tokens": 21, "channels": 7, "keep": 5, "fuse": False},
            "in_order": {"batch": 2, "tokens": 30, "channels": 7, "keep": 12, "prefix": 1, "by_rank": False},
            "all_kept": {"batch": 2, "tokens": 6, "channels": 5, "keep": 6},
            "none_kept": {"batch": 2, "tokens": 6, "channels": 5, "keep": 0},
            "one": {"batch": 1, "tokens": 1, "channels": 1, "prefix": 1, "keep": 0},
            "no_tokens": {"batch": 2, "tokens": 0, "channels": 4, "keep": 0},
            "no_images": {"batch": 0, "tokens": 5, "channels": 4},
            "no_channels": {"batch": 2, "tokens": 5, "channels": 0},
        },
        sized=lambda tokens: {"batch": 2, "tokens": tokens, "channels": 12, "keep": 3, "prefix": 1},
        fuzz={
            "batch": (0, 2),
            "tokens": (0, 40),
            "channels": (0, 40),
            "keep": (0, 9),
            "prefix": (0, 2),
            "fuse": [False, True],
            "by_rank": [False, True],
        },
        gradcheck={"batch": 2, "tokens": 6, "channels": 3, "keep": 2, "prefix": 1},
        grads=("x", "score"),
        stats=frozenset({"score"}),
        inductor=True,
    ),
    *(
        OpSpec(
            f"keep_marked_tokens{name}",
            ops.keep_marked_tokens,
            oracle_marked,
            make_marked,
            cases={case: {**dims, "fuse": fuse} for case, dims in MARKED.items()},
            sized=lambda tokens, fuse=fuse: {"lengths": [tokens, 7], "channels": 12, "fuse": fuse},
            fuzz={
                "lengths": [[3], [20, 1], [0, 9, 4], [7] * 5],
                "channels": (0, 40),
                "fuse": [fuse],
                "behind": (0, 2),
            },
            gradcheck={"lengths": [4, 3], "channels": 3, "behind": 1, "fuse": fuse},
            grads=("x", "weights") if fuse else ("x",),
            stats=frozenset({"weights"}),
        )
        for name, fuse in (("", False), ("_fused", True))
    ),
    OpSpec(
        "running_scores",
        running,
        oracle_running,
        make_running,
        cases={
            "all": {"scores": 33},
            "some": {"scores": 60, "latest": 21, "weight": 0.9},
            "nothing_new": {"scores": 5, "latest": 0, "weight": 1.0},
            "none": {"scores": 0},
        },
        sized=lambda tokens: {"scores": tokens, "latest": 5, "weight": 0.25},
        fuzz={"scores": (0, 40), "latest": [None, 0, 3, 30], "weight": [0.0, 0.3, 0.5, 1.0]},
        dtypes=STATS,
    ),
]


class TestBattery(Conformance):
    specs = SPECS


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_order_of_special_scores(dtype):
    score = torch.tensor([[NAN, -INF, 0.0, INF, -0.0, NAN, 3.0, INF, 1.0]], dtype=dtype)
    assert ops.rank_tokens(score)[0].tolist() == [[3, 7, 6, 8, 2, 4, 1, 0, 5]]
    assert ops.rank_tokens(score, num_prefix=2)[0].tolist() == [[0, 1, 3, 7, 6, 8, 2, 4, 5]]


@needs_library
def test_dropped_tokens_alone_are_fused():
    """What is kept does not enter the sum, whatever it holds."""
    x = torch.tensor([[[INF], [2.0], [3.0], [NAN]]])
    y, order = ops.keep_top_tokens(x, torch.tensor([[1.0, 0.5, 0.25, 2.0]]), 2, fuse=True)
    assert order.tolist() == [[3, 0]]
    if not x.is_cuda:
        assert y[0, 2].item() == 2 * 0.5 + 3 * 0.25


def test_no_sequences_have_no_gradients():
    x, weights = torch.randn(3, 2, requires_grad=True), torch.rand(3, requires_grad=True)
    y, *_ = ops.keep_marked_tokens(x, torch.ones(3) > 0, torch.zeros(1, dtype=torch.int32), weights)
    grads = torch.autograd.grad(y.sum(), (x, weights), allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in grads)


def test_running_scores_are_differentiable():
    score, latest = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b: ops.running_scores(a, b, 0.3, index), (score, latest))


X, SCORE = torch.randn(2, 5, 3), torch.rand(2, 5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "score must be a float32", lambda: ops.rank_tokens(SCORE.int())),
        (ValueError, r"score must have shape \[B, N\]", lambda: ops.rank_tokens(SCORE[0])),
        (ValueError, r"count must be in \[0, 5\], got 6", lambda: ops.rank_tokens(SCORE, 6)),
        (ValueError, r"num_prefix must be in \[0, 5\], got -1", lambda: ops.rank_tokens(SCORE, num_prefix=-1)),
    ],
)
def test_errors_of_rank_tokens(error, message, call):
    expect(error, "rank_tokens", message, call)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x must be a float32", {"x": X.int()}),
        (ValueError, r"x must have shape \[B, N, C\]", {"x": X[0]}),
        (ValueError, r"score must have shape \[2, 5\]", {"score": SCORE[:, :4]}),
        (ValueError, r"keep must be in \[0, 5\], got 6", {"keep": 6}),
        (ValueError, r"keep must be in \[0, 4\], got 5", {"keep": 5, "num_prefix": 1}),
        (ValueError, r"keep must be in \[0, 5\], got -1", {"keep": -1}),
        (ValueError, r"num_prefix must be in \[0, 5\], got 6", {"num_prefix": 6}),
    ],
)
def test_errors_of_keep_top_tokens(error, message, change):
    arguments = {"x": X, "score": SCORE, "keep": 2, **change}
    expect(error, "keep_top_tokens", message, ops.keep_top_tokens, **arguments)


KEEP, STARTS = torch.tensor([True, False, True, True, False]), torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x must be a float32", {"x": X[0].int()}),
        (ValueError, r"x must have shape \[T, C\]", {"x": X}),
        (TypeError, "keep must be bool", {"keep": KEEP.int()}),
        (ValueError, r"keep must have shape \[5\]", {"keep": KEEP[:4]}),
        (ValueError, r"weights must have shape \[5\]", {"weights": SCORE[0, :4]}),
        (TypeError, "cu_seqlens must be int32 or int64", {"cu_seqlens": STARTS.float()}),
    ],
)
def test_errors_of_keep_marked_tokens(error, message, change):
    arguments = {"x": X[0], "keep": KEEP, "cu_seqlens": STARTS, **change}
    expect(error, "keep_marked_tokens", message, ops.keep_marked_tokens, **arguments)


def test_errors_of_running_scores():
    score, call = torch.rand(4), ops.running_scores
    expect(TypeError, "running_scores", "score must be a float32", call, score.int(), score.int(), 0.5)
    expect(TypeError, "running_scores", "latest must have the dtype of score", call, score, score.double(), 0.5)
    expect(ValueError, "running_scores", r"score must have shape \[R\]", call, score[None], score, 0.5)
    expect(ValueError, "running_scores", r"latest must have shape \[4\]", call, score, score[:3], 0.5)
    index = torch.tensor([0, 3], dtype=torch.int32)
    expect(ValueError, "running_scores", r"latest must have shape \[2\]", call, score, score, 0.5, index)
    expect(TypeError, "running_scores", "index must be int32 or int64", call, score, score, 0.5, score)


@needs_library
@pytest.mark.parametrize("byte", [2, 128, 255])
def test_any_byte_but_zero_marks_a_token(byte):
    """Masks of images come as 0 and 255."""
    marks = torch.arange(300) % 3 == 0
    odd = (marks.to(torch.uint8) * byte).view(torch.bool)
    x, starts = torch.randn(300, 4), torch.tensor([0, 120, 300], dtype=torch.int32)
    for weights in (None, torch.rand(300)):
        for got, expected in zip(*(ops.keep_marked_tokens(x, keep, starts, weights) for keep in (odd, marks))):
            assert torch.equal(got, expected)
    draws = torch.randn(4, 3), torch.rand(3)
    for got, expected in zip(*(ops.hash_groups(x[None], *draws, valid=valid[None]) for valid in (odd, marks))):
        assert torch.equal(got, expected)
    for got, expected in zip(*(torch.ops.tokenprune.select_tokens(keep[None]) for keep in (odd, marks))):
        assert torch.equal(got, expected)


@needs_library
def test_direct_calls_are_checked():
    index = torch.tensor([1, 4], dtype=torch.int32)
    for message, call in [
        (r"rank_tokens: score must have shape \[B, N\]", lambda: raw.rank_tokens(SCORE[0], 0, 0)),
        ("rank_tokens: score must be float32, float64", lambda: raw.rank_tokens(SCORE.int(), 0, 0)),
        (r"rank_tokens: num_prefix must be in \[0, 5\], got -1", lambda: raw.rank_tokens(SCORE, -1, 0)),
        (r"rank_tokens: count must be in \[0, 5\], got 6", lambda: raw.rank_tokens(SCORE, 0, 6)),
        (r"rank_tokens: count must be in \[0, 5\], got -1", lambda: raw.rank_tokens(SCORE, 0, -1)),
        (r"keep_top_tokens: x must have shape \[B, N, C\]", lambda: raw.keep_top_tokens(X[0], SCORE, 0, 1, True, True)),
        ("keep_top_tokens: score must be float32", lambda: raw.keep_top_tokens(X, SCORE.half(), 0, 1, True, True)),
        ("keep_top_tokens: score must be float64", lambda: raw.keep_top_tokens(X.double(), SCORE, 0, 1, True, True)),
        ("keep_top_tokens: score must have size 5", lambda: raw.keep_top_tokens(X, SCORE[:, :4], 0, 1, True, True)),
        (r"keep_top_tokens: keep must be in \[0, 4\], got 5", lambda: raw.keep_top_tokens(X, SCORE, 1, 5, True, True)),
        ("keep_top_tokens: num_prefix must be in", lambda: raw.keep_top_tokens(X, SCORE, 1 << 60, 5, True, True)),
        (r"keep_marked_tokens: x must have shape \[T, C\]", lambda: raw.keep_marked_tokens(X, KEEP, STARTS, None)),
        ("keep_marked_tokens: keep must be bool", lambda: raw.keep_marked_tokens(X[0], KEEP.int(), STARTS, None)),
        ("keep_marked_tokens: keep must have size 5", lambda: raw.keep_marked_tokens(X[0], KEEP[1:], STARTS, None)),
        ("cu_seqlens must be int32", lambda: raw.keep_marked_tokens(X[0], KEEP, STARTS.long(), None)),
        ("cu_seqlens must have at least one", lambda: raw.keep_marked_tokens(X[0], KEEP, STARTS[:0], None)),
        ("cu_seqlens must end within the 5 rows", lambda: raw.keep_marked_tokens(X[0], KEEP, STARTS * 2, None)),
        ("cu_seqlens must not decrease", lambda: raw.keep_marked_tokens(X[0], KEEP, STARTS * -1, None)),
        ("weights must have size 5", lambda: raw.keep_marked_tokens(X[0], KEEP, STARTS, SCORE[0, 1:])),
        ("weights must be float32", lambda: raw.keep_marked_tokens(X[0], KEEP, STARTS, SCORE[0].half())),
        ("running_scores: latest must have size 5", lambda: raw.running_scores(SCORE[0], SCORE[0, :4], None, 0.5)),
        ("running_scores: score must be float32 or float64", lambda: raw.running_scores(index, index, None, 0.5)),
        ("running_scores: rows must have size 5", lambda: raw.running_scores(SCORE[0], SCORE[0], index, 0.5)),
        (
            r"running_scores: rows must be -1 or in \[0, 4\), got 4 at 1",
            lambda: raw.running_scores(SCORE[0, :4], SCORE[0, :2], index, 0.5),
        ),
        (
            "running_scores: rows must not contain duplicates",
            lambda: raw.running_scores(SCORE[0], SCORE[0, :2], index.new_ones(2), 0.5),
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
