# SPDX-License-Identifier: Apache-2.0
"""What matching and merging promise besides the battery, and their errors."""

import pytest
import torch
from tokenprune_ext import ops
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance import assert_same, needs_library
from tests.ops.common import expect, ints
from tests.ops.test_merge import matching_of, merge

raw = torch.ops.tokenprune


def one_hot_rows(order, device):
    return torch.eye(8, device=device)[torch.tensor(order)][None]


def test_ties_take_the_lowest_index(device):
    # even tokens 0, 2, 4, 6 are equal, and equal to the odd tokens 3 and 5
    metric = one_hot_rows([0, 1, 0, 0, 0, 0, 0, 2], device)
    matching = ops.bipartite_soft_matching(metric, 2)
    assert matching.src.tolist() == [[0, 1]] and matching.dst.tolist() == [[1, 1]] and matching.unm.tolist() == [[2, 3]]


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
        torch.stack(rows)
        for rows in zip(*(merge(a, b, 3, "mean") for a, b in zip(x, parent, strict=True)), strict=True)
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
    "b_negative": ("nearest_tokens", "b_index must", M, A, ints([[0, 1], [-2, 2]])),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, dim", [(1, 16), (3, 20), (6, 64)])
def test_keys_of_all_heads_are_averaged(heads, dim, dtype, device):
    """[B, T, H, D] matches as its mean does, also as a view of a packed projection."""
    rng = torch.Generator().manual_seed(heads)
    qkv = torch.randn(2, 21, 3, heads, dim, generator=rng).to(device, dtype)
    keys = qkv[:, :, 1]
    ours = ops.bipartite_soft_matching(keys, 4, class_token=True)
    mean = ops.bipartite_soft_matching(keys.mean(2), 4, class_token=True)
    assert torch.equal(ours.parent, mean.parent) and torch.equal(ours.dst, mean.dst)


def test_a_metric_without_heads_is_refused(device):
    if device.type != "cpu":
        pytest.skip("averaged before the op elsewhere")
    with pytest.raises(RuntimeError, match="metric must have at least one head"):
        ops.bipartite_soft_matching(torch.randn(1, 8, 0, 4), 2)


@needs_library
def test_flops_of_matching_do_not_depend_on_how_keys_come(device):
    keys = torch.randn(2, 21, 3, 16, device=device)
    counts = []
    for metric in (keys, keys.mean(2)):
        with FlopCounterMode(display=False) as counter:
            ops.bipartite_soft_matching(metric, 4)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 11 * 10 * 16] * 2


def test_errors_of_match_and_merge(device):
    x, call = torch.randn(2, 9, 4, device=device), ops.match_and_merge
    for error, message, arguments in [
        (ValueError, "metric must be of", (x, x[:, :8], 2)),
        (ValueError, r"metric must have shape \[B, T, C\] or", (x, x[0], 2)),
        (TypeError, "metric must be a float32", (x, x.int(), 2)),
        (ValueError, "r must be >= 0, got -1", (x, x, -1)),
    ]:
        expect(error, "match_and_merge", message, call, *arguments)
    expect(TypeError, "match_and_merge", "x must be a float32", call, x.int(), x, 2)
    expect(ValueError, "match_and_merge", "num_prefix must not be given", call, x, x, 2, class_token=True, num_prefix=1)
    expect(ValueError, "merge_tokens", r"size must have shape", call, x, x, 2, size=x[:, :3, 0])


@needs_library
def test_direct_calls_of_match_and_merge_are_checked():
    x = torch.randn(2, 9, 4)
    for message, arguments in [
        (r"match_and_merge: metric must have shape \[2, 9, ...\]", (x, x[:, :8], 2, None, False, False, 0)),
        (r"match_and_merge: x must have shape \[B, T, C\]", (x[0], x, 2, None, False, False, 0)),
        (r"r must be in \[0, 4\], got 5", (x, x, 5, None, True, False, 0)),
        ("num_prefix must be >= 0", (x, x, 2, None, False, False, -1)),
        ("size must be float32", (x, x, 2, x[..., 0].double(), False, False, 0)),
        ("metric must be float32, float64", (x, x.int(), 2, None, False, False, 0)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            raw.match_and_merge(*arguments)
