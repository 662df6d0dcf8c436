# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching, its fixed-k and random variants, merging, unmerging and source tracking."""

import math

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample, assert_same, needs_library
from tests.ops.common import expect, ints

raw = torch.ops.tokenprune

SCHEMAS = [
    "bipartite_soft_matching(Tensor metric, SymInt r, bool class_token, bool distill_token, SymInt num_prefix) -> "
    "(Tensor unm, Tensor src, Tensor dst, Tensor parent)",
    "nearest_tokens(Tensor metric, Tensor a_index, Tensor b_index) -> (Tensor score, Tensor nearest)",
    "merge_tokens(Tensor x, Tensor parent, SymInt out_len, Tensor? size, int mode) -> (Tensor y, Tensor size_out)",
    "merge_tokens_backward(Tensor grad, Tensor x, Tensor y, Tensor parent, Tensor? size, Tensor size_out, "
    "Tensor? grad_size_out, int mode) -> (Tensor grad_x, Tensor grad_size)",
]


# ---------------------------------------------------------------- samples and functions under test


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def make_metric(rng, batch, tokens, channels, r, **options):
    return Sample({"metric": normal(rng, batch, tokens, channels)}, {"r": r, **options})


def make_random(rng, batch, tokens, channels, r):
    noise = (
        torch.stack([torch.randperm(tokens, generator=rng) for _ in range(batch)])
        if batch
        else torch.zeros(0, tokens)
    )
    return Sample(
        {"metric": normal(rng, batch, tokens, channels), "noise": noise.double() / max(tokens, 1)}, {"r": r}
    )


def make_kth(rng, batch, tokens, channels, k):
    return Sample({"metric": normal(rng, batch, tokens, channels)}, {"k": k})


def make_merge(rng, batch, tokens, channels, out_len, mode="mean", size=False):
    parent = (
        torch.randint(-1, max(out_len, 0), (batch, tokens), generator=rng)
        if out_len
        else torch.full((batch, tokens), -1)
    )
    inputs = {"x": normal(rng, batch, tokens, channels), "parent": parent.to(torch.int32)}
    if size:
        inputs["size"] = torch.randint(1, 6, (batch, tokens), generator=rng).double()
    return Sample(inputs, {"out_len": out_len, "mode": mode})


def make_unmerge(rng, batch, tokens, channels, out_len):
    sample = make_merge(rng, batch, tokens, channels, out_len)
    return Sample({"y": normal(rng, batch, out_len, channels), "parent": sample.inputs["parent"]})


def make_step(rng, batch, tokens, channels, r):
    return Sample(
        {"x": normal(rng, batch, tokens, channels), "metric": normal(rng, batch, tokens, 8)}, {"r": r}
    )


def parent_of(matching, like):
    batch, tokens = like.shape[:2]
    identity = torch.arange(tokens, dtype=torch.int32, device=like.device).expand(batch, -1)
    return identity if matching.parent is None else matching.parent


def match(metric, r, **options):
    matching = ops.bipartite_soft_matching(metric, r, **options)
    return matching.unm, matching.src, matching.dst, parent_of(matching, metric)


def kth(metric, k):
    matching = ops.kth_bipartite_soft_matching(metric, k)
    return matching.src, matching.dst, parent_of(matching, metric)


def random_match(metric, noise, r):
    matching = ops.random_bipartite_soft_matching(metric, r, noise=noise)
    return matching.src, matching.dst, parent_of(matching, metric)


def matching_of(parent, out_len):
    none = parent[:, :0]
    return ops.Matching(none, none, none, parent, out_len)


def merge(x, parent, out_len, mode, size=None):
    return ops.merge_tokens(x, matching_of(parent, out_len), size=size, mode=mode)


def unmerge(y, parent):
    return ops.unmerge_tokens(y, matching_of(parent, y.shape[1]))


def step(x, metric, r):
    """One layer of ToMe: match, merge, and the way back."""
    matching = ops.bipartite_soft_matching(metric, r, class_token=True)
    y, size = ops.merge_tokens(x, matching, mode="weighted")
    return y, size, ops.unmerge_tokens(y, matching)


# ---------------------------------------------------------------- oracles: loops over tokens


def nearest_of(metric, sources, destinations):
    """Best (score, position) of every source among the destinations; NaN never wins; the lowest index on ties."""
    result = []
    for s in sources:
        best = (-math.inf, 0)
        for position, d in enumerate(destinations):
            cosine = float(metric[s] @ metric[d] / (metric[s].norm() * metric[d].norm()))
            if cosine > best[0]:
                best = (cosine, position)
        result.append(best)
    return result


def match_one(metric, r, class_token, distill_token, prefix):
    tokens = metric.shape[0]
    even, odd = list(range(0, tokens, 2)), list(range(1, tokens, 2))
    free = [t for t in odd if t >= prefix and not (distill_token and t == 1)]
    best = nearest_of(metric, even, free)
    keep = {t for t in even if t < prefix or (class_token and t == 0)}
    order = sorted(even, key=lambda t: (t in keep, -best[t // 2][0], t))
    src, unm = order[:r], order[r:]
    if class_token or prefix:
        unm = sorted(unm)
    target = {s: free[best[s // 2][1]] for s in src}
    front = list(range(prefix)) if prefix else ([unm[0], 1] if distill_token else [])
    output = front + [t for t in unm + odd if t not in front]
    row = {t: i for i, t in enumerate(output)}
    parent = [row[target.get(t, t)] for t in range(tokens)]
    return [t // 2 for t in unm], [t // 2 for t in src], [target[s] // 2 for s in src], parent


def int_tensor(rows, width):
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), width)


def oracle_match(metric, r, class_token=False, distill_token=False, num_prefix=None):
    tokens = metric.shape[1]
    r = max(0, min(r, (tokens - (class_token + distill_token if num_prefix is None else num_prefix)) // 2))
    half = (tokens + 1) // 2
    rows = [
        match_one(m, r, class_token, distill_token, num_prefix or 0)
        if r
        else (list(range(half)), [], [], list(range(tokens)))
        for m in metric.double()
    ]
    return tuple(
        int_tensor([row[i] for row in rows], width) for i, width in enumerate((half - r, r, r, tokens))
    )


def oracle_groups(metric, sources, destinations, width):
    """Parent vectors when every source merges into its nearest destination and the output is the destinations."""
    tokens = metric.shape[1]
    nearest, parents = [], []
    for m, s, d in zip(metric.double(), sources, destinations, strict=True):
        nearest.append([position for _, position in nearest_of(m, s, d)])
        row = {t: i for i, t in enumerate(d)} | dict(zip(s, nearest[-1], strict=True))
        parents.append([row.get(t, -1) for t in range(tokens)])
    return int_tensor(sources, width), int_tensor(nearest, width), int_tensor(parents, tokens)


def oracle_kth(metric, k):
    last = metric.shape[1] // k * k
    sources = [t for t in range(last) if t % k != k - 1]
    return oracle_groups(
        metric, [sources] * len(metric), [list(range(k - 1, last, k))] * len(metric), len(sources)
    )


def oracle_random(metric, noise, r):
    order = noise.argsort(1).tolist()
    return oracle_groups(metric, [o[:r] for o in order], [o[r:] for o in order], r)


def oracle_merge(x, parent, out_len, mode, size=None):
    one_hot = parent.long()[:, None] == torch.arange(out_len)[None, :, None]  # [B, out, T]
    member = one_hot.to(x.dtype)
    weight = x.new_ones(x.shape[:2]) if size is None else size
    size_out = torch.einsum("bot,bt->bo", member, weight)
    if mode == "amax":
        spread = torch.where(one_hot[..., None], x[:, None], float("-inf"))
        y = spread.amax(2) if x.shape[1] else x.new_zeros(x.shape[0], out_len, x.shape[2])
        return torch.where(one_hot.any(2)[..., None], y, 0), size_out
    y = member @ (x * weight[..., None] if mode == "weighted" else x)
    if mode == "sum":
        return y, size_out
    divisor = size_out if mode == "weighted" else member.sum(2)
    return y / torch.where(divisor == 0, 1, divisor)[..., None], size_out


def oracle_unmerge(y, parent):
    return (parent.long()[..., None] == torch.arange(y.shape[1])).to(y.dtype) @ y


def oracle_step(x, metric, r):
    parent = oracle_match(metric, r, class_token=True)[3]
    y, size = oracle_merge(x, parent, x.shape[1] - r, "mean")
    return y, size, oracle_unmerge(y, parent)


# ---------------------------------------------------------------- specs

MATCH_CASES = {
    "plain": {"batch": 2, "tokens": 16, "channels": 8, "r": 5},
    "class": {"batch": 2, "tokens": 17, "channels": 20, "r": 4, "class_token": True},
    "distill": {"batch": 2, "tokens": 18, "channels": 8, "r": 3, "class_token": True, "distill_token": True},
    "distill_only": {"batch": 2, "tokens": 13, "channels": 8, "r": 4, "distill_token": True},
    "prefix": {"batch": 2, "tokens": 21, "channels": 8, "r": 6, "num_prefix": 5},
    "prefix_even": {"batch": 1, "tokens": 14, "channels": 8, "r": 3, "num_prefix": 4},
    "no_prefix": {"batch": 1, "tokens": 14, "channels": 8, "r": 3, "num_prefix": 0},
    "clamped": {"batch": 2, "tokens": 13, "channels": 8, "r": 100, "class_token": True},
    "clamped_prefix": {"batch": 2, "tokens": 12, "channels": 8, "r": 100, "num_prefix": 3},
    "wide": {"batch": 1, "tokens": 197, "channels": 64, "r": 16, "class_token": True},
    "identity": {"batch": 2, "tokens": 9, "channels": 4, "r": 0},
    "all_prefix": {"batch": 1, "tokens": 4, "channels": 4, "r": 3, "num_prefix": 9},
    "one": {"batch": 1, "tokens": 1, "channels": 4, "r": 3},
    "two": {"batch": 1, "tokens": 2, "channels": 4, "r": 1},
    "no_tokens": {"batch": 2, "tokens": 0, "channels": 4, "r": 1},
    "no_images": {"batch": 0, "tokens": 9, "channels": 4, "r": 2},
}
MERGE_CASES = {
    "ragged": {"batch": 2, "tokens": 13, "channels": 20, "out_len": 7},
    "wide": {"batch": 2, "tokens": 60, "channels": 197, "out_len": 40},
    "grow": {"batch": 1, "tokens": 4, "channels": 5, "out_len": 9},
    "single": {"batch": 2, "tokens": 50, "channels": 3, "out_len": 1},
    "one": {"batch": 1, "tokens": 1, "channels": 1, "out_len": 1},
    "no_output": {"batch": 2, "tokens": 3, "channels": 4, "out_len": 0},
    "no_tokens": {"batch": 2, "tokens": 0, "channels": 4, "out_len": 3},
    "no_images": {"batch": 0, "tokens": 3, "channels": 4, "out_len": 2},
    "no_channels": {"batch": 2, "tokens": 3, "channels": 0, "out_len": 2},
}
SMALL = {"batch": 2, "tokens": 5, "channels": 3, "out_len": 3}
FUZZ = {"batch": (0, 2), "tokens": (0, 12), "channels": (1, 20), "out_len": (0, 8)}


def merge_spec(name, mode, size, grads):
    extra = {"mode": mode, "size": size}
    return OpSpec(
        name,
        merge,
        oracle_merge,
        make_merge,
        {n: {**c, **extra} for n, c in MERGE_CASES.items()},
        lambda n: {"batch": 2, "tokens": n, "channels": 12, "out_len": 4, **extra},
        {**FUZZ, "mode": [mode], "size": [size]},
        {**SMALL, **extra},
        grads,
        frozenset({"size"}),
    )


SPECS = [
    OpSpec(
        "bipartite_soft_matching",
        match,
        oracle_match,
        make_metric,
        MATCH_CASES,
        lambda n: {"batch": 2, "tokens": n, "channels": 12, "r": 2, "class_token": True},
        {
            "batch": (0, 2),
            "tokens": (0, 20),
            "channels": (4, 20),
            "r": (0, 12),
            "num_prefix": [None, 0, 1, 2, 3],
        },
    ),
    OpSpec(
        "kth_bipartite_soft_matching",
        kth,
        oracle_kth,
        make_kth,
        {
            "pairs": {"batch": 2, "tokens": 12, "channels": 8, "k": 2},
            "remainder": {"batch": 2, "tokens": 14, "channels": 8, "k": 4},
            "one_group": {"batch": 1, "tokens": 3, "channels": 8, "k": 3},
        },
        lambda n: {"batch": 2, "tokens": n, "channels": 12, "k": 3},
    ),
    OpSpec(
        "random_bipartite_soft_matching",
        random_match,
        oracle_random,
        make_random,
        {
            "some": {"batch": 2, "tokens": 14, "channels": 8, "r": 5},
            "most": {"batch": 2, "tokens": 9, "channels": 8, "r": 8},
            "no_images": {"batch": 0, "tokens": 9, "channels": 8, "r": 3},
        },
        lambda n: {"batch": 2, "tokens": n, "channels": 12, "r": 3},
        stats=frozenset({"noise"}),
    ),
    merge_spec("merge_sum", "sum", False, ("x",)),
    merge_spec("merge_mean", "mean", False, ("x",)),
    merge_spec("merge_mean_size", "mean", True, ("x", "size")),
    merge_spec("merge_amax", "amax", True, ("x", "size")),
    merge_spec("merge_weighted", "weighted", True, ("x", "size")),
    merge_spec("merge_weighted_ones", "weighted", False, ("x",)),
    OpSpec(
        "unmerge_tokens",
        unmerge,
        oracle_unmerge,
        make_unmerge,
        MERGE_CASES,
        lambda n: {"batch": 2, "tokens": n, "channels": 12, "out_len": 4},
        FUZZ,
        SMALL,
        ("y",),
    ),
    OpSpec(
        "tome_step",
        step,
        oracle_step,
        make_step,
        {"usual": {"batch": 2, "tokens": 17, "channels": 20, "r": 4}},
        lambda n: {"batch": 3, "tokens": n, "channels": 12, "r": 2},
        grads=("x",),
        gradcheck={"batch": 1, "tokens": 7, "channels": 3, "r": 2},
        inductor=True,
    ),
]


class TestBattery(Conformance):
    specs = SPECS


# ---------------------------------------------------------------- what the family promises besides


def one_hot_rows(order, device):
    return torch.eye(8, device=device)[torch.tensor(order)][None]


def test_ties_take_the_lowest_index(device):
    # even tokens 0, 2, 4, 6 are equal, and equal to the odd tokens 3 and 5
    metric = one_hot_rows([0, 1, 0, 0, 0, 0, 0, 2], device)
    matching = ops.bipartite_soft_matching(metric, 2)
    assert (
        matching.src.tolist() == [[0, 1]]
        and matching.dst.tolist() == [[1, 1]]
        and matching.unm.tolist() == [[2, 3]]
    )


def test_nan_ranks_last_and_attracts_nothing(device):
    metric = torch.randn(1, 14, 6, generator=torch.Generator().manual_seed(0)).to(device)
    metric[0, 4], metric[0, 5], metric[0, 8] = float("nan"), float("nan"), 0.0
    matching = ops.bipartite_soft_matching(metric, 5)
    assert not {2, 4} & set(matching.src[0].tolist()) and 2 not in matching.dst[0].tolist()
    assert {2, 4} <= set(matching.unm[0].tolist())
    everything = ops.bipartite_soft_matching(torch.full((1, 6, 3), float("nan"), device=device), 2)
    assert everything.parent.min() >= 0 and everything.parent.max() < everything.num_tokens_out


@pytest.mark.parametrize("prefix", [1, 2, 3, 4, 5])
def test_prefix_tokens_stay_in_place_and_alone(prefix, device):
    metric = torch.randn(2, 15, 4, generator=torch.Generator().manual_seed(1)).to(device)
    metric[:, prefix:] = metric[:, :1] + 0.01 * metric[:, prefix:]  # everything resembles token 0
    matching = ops.bipartite_soft_matching(metric, 99, num_prefix=prefix)
    assert matching.num_tokens_out == 15 - (15 - prefix) // 2
    assert (matching.parent[:, :prefix].cpu() == torch.arange(prefix)).all()
    assert matching.parent[:, prefix:].min() >= prefix


def test_identity_returns_the_tensor_itself(device):
    x = torch.randn(2, 5, 3, device=device)
    matching = ops.bipartite_soft_matching(x, 0)
    y, size = ops.merge_tokens(x, matching, mode="weighted")
    assert matching.parent is None and matching.num_tokens_out == 5
    assert y is x and ops.unmerge_tokens(y, matching) is x and size.tolist() == [[1] * 5] * 2


def test_no_gradient_flows_to_the_metric(device):
    x = torch.randn(1, 8, 4, device=device, requires_grad=True)
    matching = ops.bipartite_soft_matching(x, 2)
    assert not any(t.requires_grad for t in (matching.unm, matching.src, matching.dst, matching.parent))


def test_sources_compose(device):
    first = matching_of(ints([[0, 1, 0, 2, -1]], device), 3)
    second = matching_of(ints([[1, -1, 0]], device), 2)
    assert ops.merge_sources(first).tolist() == [[0, 1, 0, 2, -1]]
    assert ops.merge_sources(second, ops.merge_sources(first)).tolist() == [[1, -1, 1, 0, -1]]


def test_random_draws_its_own_noise(device):
    metric = torch.randn(2, 9, 4, device=device)
    matching = ops.random_bipartite_soft_matching(metric, 4)
    assert matching.num_tokens_out == 5 and sorted(set(matching.parent[0].tolist())) == list(range(5))


def test_sums_accumulate_in_float32(device):
    x = torch.full((1, 4096, 2), 1.0, dtype=torch.float16, device=device)
    parent = torch.zeros(1, 4096, dtype=torch.int32, device=device)
    assert merge(x, parent, 1, "sum")[0].tolist() == [[[4096, 4096]]]


def test_sizes_of_zero_do_not_divide_by_zero(device):
    x = torch.randn(1, 4, 3, device=device, requires_grad=True)
    size = torch.zeros(1, 4, device=device, requires_grad=True)
    y, size_out = merge(x, ints([[0, 0, 1, 1]], device), 2, "weighted", size)
    assert y.abs().max() == 0 and size_out.tolist() == [[0, 0]]
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (x, size)))


def test_amax_gradient_goes_to_one_of_the_largest(device):
    x = torch.tensor([[[1.0], [3.0], [3.0], [2.0]]], device=device, requires_grad=True)
    merge(x, ints([[0, 0, 0, 0]], device), 1, "amax")[0].backward(torch.full((1, 1, 1), 6.0, device=device))
    assert x.grad.sum() == 6 and x.grad.flatten()[[0, 3]].tolist() == [0, 0]


@needs_library
def test_vmap_of_merge(device):
    x = torch.randn(3, 2, 6, 4, device=device)
    parent = torch.randint(-1, 3, (3, 2, 6), dtype=torch.int32, device=device)
    expected = [
        torch.stack(rows) for rows in zip(*(merge(a, b, 3, "mean") for a, b in zip(x, parent)), strict=True)
    ]
    assert_same(torch.vmap(lambda a, b: merge(a, b, 3, "mean"))(x, parent), expected)


# ---------------------------------------------------------------- errors

M = torch.zeros(2, 6, 4)
PARENT = ints([[0, 1, 2, 0, 1, -1], [2, 2, 2, 2, 2, 2]])
MATCHING = matching_of(PARENT, 3)
MERGE_ARGS = {"x": M, "matching": MATCHING}


def call_merge(**changes):
    arguments = {**MERGE_ARGS, **changes}
    return ops.merge_tokens(arguments.pop("x"), arguments.pop("matching"), **arguments)


MATCH = ops.bipartite_soft_matching
PUBLIC_ERRORS = {
    "metric_rank": (ValueError, "bipartite_soft_matching", "metric must", lambda: MATCH(M[0], 1)),
    "metric_dtype": (TypeError, "bipartite_soft_matching", "metric must", lambda: MATCH(M.int(), 1)),
    "r_negative": (ValueError, "bipartite_soft_matching", "r must", lambda: MATCH(M, -1)),
    "prefix_and_flag": (
        ValueError,
        "bipartite_soft_matching",
        "num_prefix must",
        lambda: MATCH(M, 1, class_token=True, num_prefix=1),
    ),
    "prefix_negative": (
        ValueError,
        "bipartite_soft_matching",
        "num_prefix must",
        lambda: MATCH(M, 1, num_prefix=-1),
    ),
    "k_large": (
        ValueError,
        "kth_bipartite_soft_matching",
        "k must",
        lambda: ops.kth_bipartite_soft_matching(M, 7),
    ),
    "r_all": (
        ValueError,
        "random_bipartite_soft_matching",
        "r must",
        lambda: ops.random_bipartite_soft_matching(M, 6),
    ),
    "noise": (
        ValueError,
        "random_bipartite_soft_matching",
        "noise must",
        lambda: ops.random_bipartite_soft_matching(M, 2, noise=torch.zeros(2, 5)),
    ),
    "noise_device": (
        ValueError,
        "random_bipartite_soft_matching",
        "noise must",
        lambda: ops.random_bipartite_soft_matching(M, 2, noise=torch.zeros(2, 6, device="meta")),
    ),
    "x_rank": (ValueError, "merge_tokens", "x must", lambda: call_merge(x=M[0])),
    "x_dtype": (TypeError, "merge_tokens", "x must", lambda: call_merge(x=M.int())),
    "x_tokens": (ValueError, "merge_tokens", "matching must", lambda: call_merge(x=M[:, :5])),
    "x_device": (ValueError, "merge_tokens", "matching must", lambda: call_merge(x=M.to("meta"))),
    "mode": (ValueError, "merge_tokens", "mode must", lambda: call_merge(mode="median")),
    "size_shape": (ValueError, "merge_tokens", "size must", lambda: call_merge(size=torch.ones(2, 6, 1))),
    "size_device": (
        ValueError,
        "merge_tokens",
        "size must",
        lambda: call_merge(size=torch.ones(2, 6, device="meta")),
    ),
    "y_rank": (ValueError, "unmerge_tokens", "y must", lambda: ops.unmerge_tokens(M[0], MATCHING)),
    "y_tokens": (ValueError, "unmerge_tokens", "y must", lambda: ops.unmerge_tokens(M, MATCHING)),
}


@pytest.mark.parametrize("case", PUBLIC_ERRORS)
def test_public_errors(case):
    expect(*PUBLIC_ERRORS[case])


SIZE = torch.ones(2, 6)
A = ints([[0, 2], [0, 2]])
RAW_ERRORS = {
    "metric_rank": ("bipartite_soft_matching", "metric must", M[0], 1, False, False, 0),
    "metric_dtype": ("bipartite_soft_matching", "metric must", M.int(), 1, False, False, 0),
    "r_large": ("bipartite_soft_matching", "r must", M, 4, False, False, 0),
    "r_large_class": ("bipartite_soft_matching", "r must", M, 3, True, False, 0),
    "r_negative": ("bipartite_soft_matching", "r must", M, -1, False, False, 0),
    "prefix_negative": ("bipartite_soft_matching", "num_prefix must", M, 1, False, False, -1),
    "a_dtype": ("nearest_tokens", "a_index must", M, A.long(), A),
    "a_rank": ("nearest_tokens", "a_index must", M, A[0], A),
    "b_batch": ("nearest_tokens", "b_index must", M, A, A[:1]),
    "a_large": ("nearest_tokens", "a_index must", M, ints([[0, 6], [0, 2]]), A),
    "b_negative": ("nearest_tokens", "b_index must", M, A, ints([[0, 1], [-1, 2]])),
    "x_rank": ("merge_tokens", "x must", M[0], PARENT, 3, None, 0),
    "parent_dtype": ("merge_tokens", "parent must", M, PARENT.long(), 3, None, 0),
    "parent_shape": ("merge_tokens", "parent must", M, PARENT[:, :5], 3, None, 0),
    "parent_large": ("merge_tokens", "parent must", M, PARENT, 2, None, 0),
    "parent_negative": ("merge_tokens", "parent must", M, PARENT - 1, 3, None, 0),
    "out_len": ("merge_tokens", "out_len must", M, PARENT, -1, None, 0),
    "mode": ("merge_tokens", "mode must", M, PARENT, 3, None, 4),
    "weighted_without_size": ("merge_tokens", "size must", M, PARENT, 3, None, 3),
    "size_shape": ("merge_tokens", "size must", M, PARENT, 3, SIZE[:, :5], 3),
    "size_dtype": ("merge_tokens", "size must", M, PARENT, 3, SIZE.double(), 3),
    "backward_grad": (
        "merge_tokens_backward",
        "grad must",
        M,
        M,
        M[:, :3],
        PARENT,
        None,
        SIZE[:, :3],
        None,
        0,
    ),
}


@needs_library
@pytest.mark.parametrize("case", RAW_ERRORS)
def test_raw_errors(case):
    op, rule, *args = RAW_ERRORS[case]
    expect(RuntimeError, op, rule, getattr(raw, op), *args)


@needs_library
def test_parent_contents_are_checked_through_the_public_function():
    expect(RuntimeError, "merge_tokens", "parent must", ops.merge_tokens, M, matching_of(PARENT, 2))
