# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching, its fixed-k and random variants, merging, unmerging and source tracking."""

import math

import torch
from tokenprune_ext import ops
from tokenprune_ext.ops.merge import _composed_step

from tests.conformance import Conformance, OpSpec, Sample, assert_same, needs_library

raw = torch.ops.tokenprune

SCHEMAS = [
    "bipartite_soft_matching(Tensor metric, SymInt r, bool class_token, bool distill_token, SymInt num_prefix) -> "
    "(Tensor unm, Tensor src, Tensor dst, Tensor parent)",
    "nearest_tokens(Tensor metric, Tensor a_index, Tensor b_index) -> (Tensor score, Tensor nearest)",
    "merge_tokens(Tensor x, Tensor parent, SymInt out_len, Tensor? size, int mode) -> (Tensor y, Tensor size_out)",
    "merge_tokens_backward(Tensor grad, Tensor x, Tensor y, Tensor parent, Tensor? size, Tensor size_out, "
    "Tensor? grad_size_out, int mode) -> (Tensor grad_x, Tensor grad_size)",
    "match_and_merge(Tensor x, Tensor metric, SymInt r, Tensor? size, bool class_token, bool distill_token, "
    "SymInt num_prefix) -> (Tensor y, Tensor size_out, Tensor log_size, Tensor parent)",
]


# ---------------------------------------------------------------- samples and functions under test


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def make_metric(rng, batch, tokens, channels, r, **options):
    return Sample({"metric": normal(rng, batch, tokens, channels)}, {"r": r, **options})


def make_random(rng, batch, tokens, channels, r):
    noise = (
        torch.stack([torch.randperm(tokens, generator=rng) for _ in range(batch)]) if batch else torch.zeros(0, tokens)
    )
    return Sample({"metric": normal(rng, batch, tokens, channels), "noise": noise.double() / max(tokens, 1)}, {"r": r})


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


def make_whole(rng, batch, tokens, channels, r, size=True, heads=0, **options):
    metric = normal(rng, batch, tokens, heads, 8) if heads else normal(rng, batch, tokens, 8)
    inputs = {"x": normal(rng, batch, tokens, channels), "metric": metric}
    if size:
        inputs["size"] = torch.randint(1, 6, (batch, tokens), generator=rng).double()
    return Sample(inputs, {"r": r, **options})


def make_step(rng, batch, tokens, channels, r):
    return Sample({"x": normal(rng, batch, tokens, channels), "metric": normal(rng, batch, tokens, 8)}, {"r": r})


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


def whole(x, metric, r, size=None, **options):
    *values, parent = ops.match_and_merge(x, metric, r, size=size, **options)
    return *values, parent_of(ops.Matching(metric, metric, metric, parent, 0), x)


def step(x, metric, r):
    """One layer of ToMe: match, merge, and the way back."""
    matching = ops.bipartite_soft_matching(metric, r, class_token=True)
    y, size = ops.merge_tokens(x, matching, mode="weighted")
    return y, size, ops.unmerge_tokens(y, matching)


# ---------------------------------------------------------------- oracles: loops over tokens


def nearest_of(metric, sources, destinations):
    """Best (score, position) of every source among the destinations; NaN never wins; ties: lowest index."""
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
    return tuple(int_tensor([row[i] for row in rows], width) for i, width in enumerate((half - r, r, r, tokens)))


def oracle_groups(metric, sources, destinations, width):
    """Every source merges into its nearest destination, and the output is the destinations."""
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
    return oracle_groups(metric, [sources] * len(metric), [list(range(k - 1, last, k))] * len(metric), len(sources))


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


def oracle_whole(x, metric, r, size=None, **options):
    metric = metric.mean(2) if metric.dim() == 4 else metric
    *_, parent = oracle_match(metric, r, **options)
    out_len = x.shape[1] - oracle_match(metric, r, **options)[1].shape[1]
    y, size = oracle_merge(x, parent, out_len, "weighted", size)
    return y, size, size.log(), parent


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


WHOLE_CASES = {
    "class": {"batch": 2, "tokens": 17, "channels": 20, "r": 4, "class_token": True},
    "distill": {
        "batch": 2,
        "tokens": 18,
        "channels": 8,
        "r": 3,
        "heads": 3,
        "class_token": True,
        "distill_token": True,
    },
    "prefix": {"batch": 1, "tokens": 21, "channels": 8, "r": 6, "num_prefix": 5},
    "clamped": {"batch": 2, "tokens": 13, "channels": 8, "r": 100},
    "nothing": {"batch": 2, "tokens": 9, "channels": 4, "r": 0},
    "one": {"batch": 1, "tokens": 1, "channels": 4, "r": 3, "class_token": True},
    "no_tokens": {"batch": 2, "tokens": 0, "channels": 4, "r": 1},
    "no_images": {"batch": 0, "tokens": 9, "channels": 4, "r": 2},
}


def whole_spec(name, size, grads):
    extra = {"size": size}
    return OpSpec(
        name,
        whole,
        oracle_whole,
        make_whole,
        {n: {**c, **extra} for n, c in WHOLE_CASES.items()},
        lambda n: {"batch": 3, "tokens": n, "channels": 12, "r": 2, "class_token": True, **extra},
        {
            "batch": (0, 2),
            "tokens": (0, 20),
            "channels": (1, 20),
            "r": (0, 12),
            "num_prefix": [None, 1],
            "size": [size],
        },
        {"batch": 1, "tokens": 7, "channels": 3, "r": 2, **extra},
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
    whole_spec("match_and_merge", True, ("x", "size")),
    whole_spec("match_and_merge_ones", False, ("x",)),
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


@needs_library
def test_a_whole_step_made_of_its_parts():
    """What runs on CUDA under the op's name."""
    x, keys = torch.randn(2, 33, 8), torch.randn(2, 33, 3, 4)
    size = torch.randint(1, 5, (2, 33)).float()
    for given, metric in ((size, keys), (None, keys.mean(2))):
        arguments = x, metric, 7, given, True, False, 0
        assert_same(_composed_step(*arguments), raw.match_and_merge(*arguments), exact=False)
