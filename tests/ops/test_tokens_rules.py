# SPDX-License-Identifier: Apache-2.0
"""What the token ops promise besides the battery, and their errors."""

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import assert_same, needs_library
from tests.ops.common import expect, ints
from tests.spec import DTYPES

raw = torch.ops.tokenprune


def test_token_index_of_select(device):
    mask = torch.tensor([[True, False, True], [False, False, True]], device=device)
    index = ops.select_tokens(mask)
    assert index.indices.dtype == index.cu_seqlens.dtype == torch.int32
    assert index.indices.tolist() == [0, 2, 5] and index.cu_seqlens.tolist() == [0, 2, 3]
    assert 2 <= index.max_seqlen <= 3


def test_round_trip_preserves_the_map(device):
    x = torch.randn(2, 6, 5, device=device)
    index = ops.select_tokens(torch.rand(2, 6, device=device) < 0.5)
    tokens = ops.gather_tokens(x, index)
    assert_same([ops.scatter_tokens(x, tokens, index)], [x])
    doubled = ops.scatter_tokens(x, tokens, index, add=True)
    assert_same([ops.gather_tokens(doubled, index)], [2 * tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [31, 33, 97])
def test_rows_of_a_map_beyond_the_caches(channels, dtype, device):
    rng = torch.Generator().manual_seed(channels)
    x = torch.randn(9001, channels, generator=rng).to(device, dtype)
    index = torch.randperm(9001, generator=rng)[:500].where(torch.rand(500, generator=rng) < 0.9, -1).to(device)
    found, kept = ops.gather_tokens(x, index), index >= 0
    assert torch.equal(found, x[index] * kept[:, None])
    expected = x.clone()
    expected[index[kept]] = found[kept] + 1
    assert torch.equal(ops.scatter_tokens(x, found + 1, index), expected)


def test_index_may_be_int64(device):
    x = torch.randn(4, 3, device=device)
    assert_same(
        [ops.gather_tokens(x, ints([3, -1], device, torch.int64))],
        [torch.stack([x[3], torch.zeros_like(x[0])])],
    )


def test_scatter_leaves_its_argument_alone_and_in_place_does_not(device):
    features, tokens, index = (
        torch.zeros(4, 3, device=device),
        torch.ones(2, 3, device=device),
        ints([2, -1], device),
    )
    result = ops.scatter_tokens(features, tokens, index)
    assert features.sum() == 0 and result.sum() == 3
    assert ops.scatter_tokens_(features, tokens, index) is features
    assert_same([features], [result])


def test_scatter_in_place_refuses_to_lose_a_gradient(device):
    features, index = torch.zeros(2, 3, device=device), ints([0], device)
    tokens = torch.ones(1, 3, device=device, requires_grad=True)
    expect(RuntimeError, "scatter_tokens_", "require", ops.scatter_tokens_, features, tokens, index)
    expect(
        RuntimeError,
        "scatter_tokens_",
        "require",
        ops.scatter_tokens_,
        features + tokens,
        tokens.detach(),
        index,
    )
    with torch.no_grad():
        ops.scatter_tokens_(features, tokens, index)


@needs_library
def test_duplicates_sum_in_index_order(device):
    """Gradients of a row taken many times accumulate in float32 even for half precision."""
    x = torch.zeros(3, 2, dtype=torch.float16, device=device, requires_grad=True)
    ops.gather_tokens(x, ints([1] * 4096, device)).backward(
        torch.full((4096, 2), 1.0, dtype=torch.float16, device=device)
    )
    assert x.grad.tolist() == [[0, 0], [4096, 4096], [0, 0]]


def test_scatter_mixed_precision_tokens(device):
    """A half-precision branch beside a float32 residual stream, as autocast leaves it."""
    features, tokens = torch.zeros(2, 3, device=device), torch.ones(1, 3, dtype=torch.bfloat16, device=device)
    assert ops.scatter_tokens(features, tokens, ints([1], device), add=True).dtype == torch.float32


@needs_library
@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_vmap(name, device):
    x, tokens = torch.randn(3, 6, 4, device=device), torch.randn(3, 2, 4, device=device)
    index = ints([[0, 5], [2, -1], [1, 1]] if name == "gather" else [[0, 5], [2, -1], [1, 3]], device)
    function = ops.gather_tokens if name == "gather" else ops.scatter_tokens
    args = (x, index) if name == "gather" else (x, tokens, index)
    expected = torch.stack([function(*row) for row in zip(*args, strict=True)])
    assert_same([torch.vmap(function)(*args)], [expected])


X, INDEX, T = torch.zeros(2, 3, 4), ints([0, 5]), torch.zeros(2, 4)
MASK = torch.ones(2, 3, dtype=torch.bool)
PUBLIC_ERRORS = {
    "mask_dtype": (TypeError, "select_tokens", "mask must", ops.select_tokens, MASK.float()),
    "mask_rank": (ValueError, "select_tokens", "mask must", ops.select_tokens, MASK[0]),
    "x_rank": (ValueError, "gather_tokens", "x must", ops.gather_tokens, X[0, 0], INDEX),
    "x_dtype": (TypeError, "gather_tokens", "x must", ops.gather_tokens, X.int(), INDEX),
    "index_dtype": (TypeError, "gather_tokens", "index must", ops.gather_tokens, X, INDEX.float()),
    "index_rank": (ValueError, "gather_tokens", "index must", ops.gather_tokens, X, INDEX[None]),
    "index_device": (ValueError, "gather_tokens", "index must", ops.gather_tokens, X, INDEX.to("meta")),
    "norm_rank": (ValueError, "gather_layer_norm", "x must", ops.gather_layer_norm, X[0, 0], INDEX),
    "norm_weight": (
        ValueError,
        "gather_layer_norm",
        "weight must",
        ops.gather_layer_norm,
        X,
        INDEX,
        torch.ones(3),
    ),
    "norm_bias": (
        ValueError,
        "gather_layer_norm",
        "bias must",
        ops.gather_layer_norm,
        X,
        INDEX,
        None,
        torch.ones(4, 1),
    ),
    "features_rank": (ValueError, "scatter_tokens", "features must", ops.scatter_tokens, X[0, 0], T, INDEX),
    "tokens_channels": (ValueError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T[:, :3], INDEX),
    "tokens_count": (ValueError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T[:1], INDEX),
    "tokens_dtype": (TypeError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T.int(), INDEX),
    "tokens_device": (
        ValueError,
        "scatter_tokens",
        "tokens must",
        ops.scatter_tokens,
        X,
        T.to("meta"),
        INDEX,
    ),
    "in_place_layout": (
        ValueError,
        "scatter_tokens_",
        "features must",
        ops.scatter_tokens_,
        X.transpose(0, 1),
        T,
        INDEX,
    ),
}


@pytest.mark.parametrize("case", PUBLIC_ERRORS)
def test_public_errors(case):
    error, op, rule, function, *args = PUBLIC_ERRORS[case]
    expect(error, op, rule, function, *args)


def test_public_errors_of_options():
    expect(ValueError, "select_tokens", "capacity must", ops.select_tokens, MASK, capacity=-1)
    expect(ValueError, "scatter_tokens", "scale must", ops.scatter_tokens, X, T, INDEX, scale=torch.ones(3))
    meta = torch.ones(2, device="meta")
    expect(ValueError, "scatter_tokens", "scale must", ops.scatter_tokens, X, T, INDEX, scale=meta)


R = X.view(6, 4)
RAW_ERRORS = {
    "mask_dtype": ("select_tokens", "mask must", MASK.int()),
    "mask_rank": ("select_tokens", "mask must", MASK[0]),
    "capacity": ("select_tokens_capacity", "capacity must", MASK, -1),
    "x_rank": ("gather_tokens", "x must", X, INDEX),
    "x_dtype": ("gather_tokens", "x must", R.int(), INDEX),
    "index_dtype": ("gather_tokens", "indices must", R, INDEX.long()),
    "index_rank": ("gather_tokens", "indices must", R, INDEX[None]),
    "backward_rank": ("gather_tokens_backward", "grad must", X, INDEX, 6),
    "backward_count": ("gather_tokens_backward", "grad must|indices must", T[:1], INDEX, 6),
    "backward_rows": ("gather_tokens_backward", "rows must", T, INDEX, -1),
    "norm_rank": ("gather_layer_norm", "x must", X, INDEX, None, None, 1e-5),
    "norm_weight": ("gather_layer_norm", "weight must", R, INDEX, torch.ones(3), None, 1e-5),
    "norm_weight_dtype": ("gather_layer_norm", "weight must", R, INDEX, torch.ones(4).double(), None, 1e-5),
    "norm_bias": ("gather_layer_norm", "bias must", R, INDEX, None, torch.ones(3), 1e-5),
    "features_rank": ("scatter_tokens", "features must", X, T, INDEX, None, False),
    "tokens_channels": ("scatter_tokens", "tokens must", R, T[:, :3], INDEX, None, False),
    "tokens_count": ("scatter_tokens", "tokens must|indices must", R, T[:1], INDEX, None, False),
    "tokens_dtype": ("scatter_tokens", "tokens must", R, T.double(), INDEX, None, False),
    "scale_dtype": ("scatter_tokens", "scale must", R, T, INDEX, torch.ones(2).double(), False),
    "scale_count": ("scatter_tokens", "scale must", R, T, INDEX, torch.ones(3), False),
    "in_place": ("scatter_tokens_", "tokens must", R.clone(), T[:, :3], INDEX, None, False),
}


@needs_library
@pytest.mark.parametrize("case", RAW_ERRORS)
def test_raw_errors(case):
    op, rule, *args = RAW_ERRORS[case]
    expect(RuntimeError, op, rule, getattr(raw, op), *args)


@needs_library
@pytest.mark.parametrize(
    "bad", [[0, 6], [0, -2], [2**30, 1], [-(2**31), 1]], ids=["large", "negative", "huge", "lowest"]
)
def test_index_contents_are_checked_on_the_cpu(bad):
    index = ints(bad)
    calls = {
        "gather_tokens": (ops.gather_tokens, (X, index)),
        "gather_layer_norm": (ops.gather_layer_norm, (X, index)),
        "scatter_tokens": (ops.scatter_tokens, (X, T, index)),
        "scatter_tokens_": (ops.scatter_tokens_, (X.clone(), T, index)),
    }
    for op, (function, args) in calls.items():
        expect(RuntimeError, op, "must", function, *args)
    expect(RuntimeError, "gather_tokens", "must", raw.gather_tokens, R, index)
    expect(RuntimeError, "gather_tokens_backward", "must", raw.gather_tokens_backward, T, index, 6)
    expect(RuntimeError, "scatter_tokens", "must", raw.scatter_tokens, R, T, index, None, True)


@needs_library
def test_duplicate_targets_are_an_error():
    twice = ints([3, 3])
    expect(RuntimeError, "scatter_tokens", "must", ops.scatter_tokens, X, T, twice)
    expect(RuntimeError, "scatter_tokens", "must", raw.scatter_tokens, R, T, twice, None, False)
    expect(RuntimeError, "scatter_tokens_", "must", ops.scatter_tokens_, X.clone(), T, twice)
    ops.scatter_tokens(X, T, ints([-1, -1]))  # no token is no duplicate


@needs_library
def test_int64_beyond_int32_does_not_wrap():
    expect(RuntimeError, "gather_tokens", "must", ops.gather_tokens, X, ints([2**32 + 1], dtype=torch.int64))


@needs_library
def test_too_small_a_capacity_is_an_error_on_the_cpu():
    expect(RuntimeError, "select_tokens_capacity", "must", ops.select_tokens, MASK, capacity=5)
    expect(RuntimeError, "select_tokens_capacity", "must", raw.select_tokens_capacity, MASK, 0)
