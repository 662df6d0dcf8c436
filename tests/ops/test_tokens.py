# SPDX-License-Identifier: Apache-2.0
"""select, gather, gather + LayerNorm and scatter-back of tokens."""

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample, assert_same, needs_library
from tests.ops.common import expect, ints

raw = torch.ops.tokenprune

SCHEMAS = [
    "select_tokens(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)",
    "select_tokens_capacity(Tensor mask, SymInt capacity) -> (Tensor indices, Tensor cu_seqlens)",
    "gather_tokens(Tensor x, Tensor indices) -> Tensor",
    "gather_tokens_backward(Tensor grad, Tensor indices, SymInt rows) -> Tensor",
    "gather_layer_norm(Tensor x, Tensor indices, Tensor? weight, Tensor? bias, float eps) -> "
    "(Tensor out, Tensor mean, Tensor rstd)",
    "gather_layer_norm_backward(Tensor grad, Tensor x, Tensor indices, Tensor? weight, Tensor mean, Tensor rstd) -> "
    "(Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)",
    "scatter_tokens(Tensor features, Tensor tokens, Tensor indices, Tensor? scale, bool add) -> Tensor",
    "scatter_tokens_(Tensor(a!) features, Tensor tokens, Tensor indices, Tensor? scale, bool add) -> ()",
    "scatter_tokens_backward(Tensor grad, Tensor? tokens, Tensor indices, Tensor? scale, bool add) -> "
    "(Tensor grad_features, Tensor grad_tokens, Tensor grad_scale)",
]


# ---------------------------------------------------------------- samples and oracles


def make_mask(rng, batch, tokens, keep=50, capacity=None):
    mask = torch.rand(batch, tokens, generator=rng) * 100 < keep
    return Sample({"mask": mask}, {} if capacity is None else {"capacity": capacity})


def select(mask, capacity=None):
    index = ops.select_tokens(mask, capacity=capacity)
    return index.indices, index.cu_seqlens


def oracle_select(mask, capacity=None):
    kept = [
        b * mask.shape[1] + i for b, row in enumerate(mask.tolist()) for i, keep in enumerate(row) if keep
    ]
    starts = [0]
    for row in mask.tolist():
        starts.append(starts[-1] + sum(row))
    kept += [-1] * (0 if capacity is None else capacity - len(kept))
    return torch.tensor(kept, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def some_rows(rng, rows, count, unique):
    """Row numbers with some -1 among them; ``unique`` forbids taking a row twice."""
    if unique:
        taken = torch.randperm(rows + count, generator=rng)[:count]
    else:
        taken = torch.randint(0, rows + max(1, rows // 8), (count,), generator=rng)
    return torch.where(taken < rows, taken, -1).to(torch.int32)


def make_gather(rng, batch, tokens, channels, count, flat=False, affine=None):
    shape = (batch * tokens, channels) if flat else (batch, tokens, channels)
    inputs = {
        "x": torch.randn(shape, generator=rng, dtype=torch.float64),
        "index": some_rows(rng, batch * tokens, count, unique=False),
    }
    if affine in ("weight", "both"):
        inputs["weight"] = torch.rand(channels, generator=rng, dtype=torch.float64) + 0.5
    if affine == "both":
        inputs["bias"] = torch.randn(channels, generator=rng, dtype=torch.float64)
    return Sample(inputs)


def oracle_gather(x, index):
    rows = x if x.dim() == 2 else x.flatten(0, 1)
    one_hot = index.long()[:, None] == torch.arange(rows.shape[0], device=x.device)
    return one_hot.to(x.dtype) @ rows


def oracle_layer_norm(x, index, weight=None, bias=None):
    normed = torch.nn.functional.layer_norm(oracle_gather(x, index), x.shape[-1:], weight, bias, 1e-5)
    return torch.where(index[:, None] >= 0, normed, 0)


def make_scatter(rng, batch, tokens, channels, count, add=False, scale=False, flat=False):
    shape = (batch * tokens, channels) if flat else (batch, tokens, channels)
    inputs = {
        "features": torch.randn(shape, generator=rng, dtype=torch.float64),
        "tokens": torch.randn(count, channels, generator=rng, dtype=torch.float64),
        "index": some_rows(rng, batch * tokens, count, unique=True),
    }
    if scale:
        inputs["scale"] = torch.randn(count, generator=rng, dtype=torch.float64)
    return Sample(inputs, {"add": bool(add)})


def scatter(features, tokens, index, scale=None, add=False):
    return ops.scatter_tokens(features, tokens, index, add=add, scale=scale)


def scatter_in_place(features, tokens, index, scale=None, add=False):
    with torch.no_grad():
        return ops.scatter_tokens_(features.contiguous().clone(), tokens, index, add=add, scale=scale)


def oracle_scatter(features, tokens, index, scale=None, add=False):
    rows = features if features.dim() == 2 else features.flatten(0, 1)
    one_hot = (index.long()[None] == torch.arange(rows.shape[0], device=index.device)[:, None]).to(rows.dtype)
    update = one_hot @ (tokens if scale is None else tokens * scale[:, None])
    kept = 1.0 if add else 1.0 - one_hot.sum(1, keepdim=True)
    return (rows * kept + update).view(features.shape)


def sized(channels=16, **extra):
    return lambda n: {"batch": 2, "tokens": n, "channels": channels, "count": 2 * n - 5, **extra}


CASES = {
    "ragged": {"batch": 3, "tokens": 11, "channels": 20, "count": 17},
    "rows": {"batch": 2, "tokens": 9, "channels": 7, "count": 30, "flat": True},
    "wide": {"batch": 2, "tokens": 40, "channels": 197, "count": 50},
    "many": {"batch": 4, "tokens": 300, "channels": 64, "count": 700},
    "one": {"batch": 1, "tokens": 1, "channels": 1, "count": 1},
    "no_index": {"batch": 2, "tokens": 5, "channels": 4, "count": 0},
    "no_tokens": {"batch": 0, "tokens": 5, "channels": 4, "count": 3},
    "no_channels": {"batch": 2, "tokens": 5, "channels": 0, "count": 3},
}
SELECT_CASES = {
    "half": {"batch": 3, "tokens": 37},
    "none": {"batch": 2, "tokens": 9, "keep": 0},
    "all": {"batch": 2, "tokens": 9, "keep": 101},
    "large": {"batch": 9, "tokens": 3000, "keep": 30},
    "one": {"batch": 1, "tokens": 1, "keep": 101},
    "no_tokens": {"batch": 3, "tokens": 0},
    "no_images": {"batch": 0, "tokens": 7},
}
NORM_CASES = {
    **{n: c for n, c in CASES.items() if n != "no_channels"},
    "one": {**CASES["one"], "channels": 5},
}
FUZZ = {"batch": (0, 3), "tokens": (0, 9), "channels": (1, 40), "count": (0, 20)}
SMALL = {"batch": 2, "tokens": 3, "channels": 4, "count": 5}


def layer_norm(x, index, weight=None, bias=None):
    return ops.gather_layer_norm(x, index, weight, bias, 1e-5)


def norm_spec(name, affine, grads):
    return OpSpec(
        name,
        layer_norm,
        oracle_layer_norm,
        make_gather,
        {n: {**c, "affine": affine} for n, c in NORM_CASES.items()},
        sized(affine=affine),
        {**FUZZ, "channels": (5, 40), "affine": [affine]},
        {**SMALL, "affine": affine},
        grads,
    )


def scatter_spec(name, grads, call=scatter, **extra):
    return OpSpec(
        name,
        call,
        oracle_scatter,
        make_scatter,
        {n: {**c, **extra} for n, c in CASES.items()},
        sized(**extra),
        {**FUZZ, **{n: [v] for n, v in extra.items()}},
        {**SMALL, **extra} if grads else None,
        grads,
        frozenset({"scale"}),
    )


SPECS = [
    OpSpec(
        "select_tokens",
        select,
        oracle_select,
        make_mask,
        SELECT_CASES,
        lambda n: {"batch": 2, "tokens": n},
        {"batch": (0, 4), "tokens": (0, 40), "keep": (0, 101)},
        dtypes=(torch.float32,),
    ),
    OpSpec(
        "select_tokens_capacity",
        select,
        oracle_select,
        make_mask,
        {n: {**c, "capacity": c["batch"] * c["tokens"] + 3} for n, c in SELECT_CASES.items()},
        lambda n: {"batch": 2, "tokens": n, "capacity": 131},
        {"batch": (0, 4), "tokens": (0, 40), "keep": (0, 101), "capacity": (160, 200)},
        dtypes=(torch.float32,),
    ),
    OpSpec(
        "gather_tokens",
        ops.gather_tokens,
        oracle_gather,
        make_gather,
        CASES,
        sized(),
        FUZZ,
        SMALL,
        ("x",),
        inductor=True,
    ),
    norm_spec("gather_layer_norm", "both", ("x", "weight", "bias")),
    norm_spec("gather_layer_norm_weight", "weight", ("x", "weight")),
    norm_spec("gather_layer_norm_plain", None, ("x",)),
    scatter_spec("scatter_tokens", ("features", "tokens")),
    scatter_spec("scatter_tokens_add", ("features", "tokens"), add=True),
    scatter_spec("scatter_tokens_scale", ("features", "tokens", "scale"), scale=True),
    scatter_spec("scatter_tokens_add_scale", ("features", "tokens", "scale"), add=True, scale=True),
    scatter_spec("scatter_tokens_", (), scatter_in_place, add=True, scale=True),
]


class TestBattery(Conformance):
    specs = SPECS


# ---------------------------------------------------------------- what the family promises besides


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


X, I, T = torch.zeros(2, 3, 4), ints([0, 5]), torch.zeros(2, 4)
MASK = torch.ones(2, 3, dtype=torch.bool)
PUBLIC_ERRORS = {
    "mask_dtype": (TypeError, "select_tokens", "mask must", ops.select_tokens, MASK.float()),
    "mask_rank": (ValueError, "select_tokens", "mask must", ops.select_tokens, MASK[0]),
    "x_rank": (ValueError, "gather_tokens", "x must", ops.gather_tokens, X[0, 0], I),
    "x_dtype": (TypeError, "gather_tokens", "x must", ops.gather_tokens, X.int(), I),
    "index_dtype": (TypeError, "gather_tokens", "index must", ops.gather_tokens, X, I.float()),
    "index_rank": (ValueError, "gather_tokens", "index must", ops.gather_tokens, X, I[None]),
    "index_device": (ValueError, "gather_tokens", "index must", ops.gather_tokens, X, I.to("meta")),
    "norm_rank": (ValueError, "gather_layer_norm", "x must", ops.gather_layer_norm, X[0, 0], I),
    "norm_weight": (
        ValueError,
        "gather_layer_norm",
        "weight must",
        ops.gather_layer_norm,
        X,
        I,
        torch.ones(3),
    ),
    "norm_bias": (
        ValueError,
        "gather_layer_norm",
        "bias must",
        ops.gather_layer_norm,
        X,
        I,
        None,
        torch.ones(4, 1),
    ),
    "features_rank": (ValueError, "scatter_tokens", "features must", ops.scatter_tokens, X[0, 0], T, I),
    "tokens_channels": (ValueError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T[:, :3], I),
    "tokens_count": (ValueError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T[:1], I),
    "tokens_dtype": (TypeError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T.int(), I),
    "tokens_device": (ValueError, "scatter_tokens", "tokens must", ops.scatter_tokens, X, T.to("meta"), I),
    "in_place_layout": (
        ValueError,
        "scatter_tokens_",
        "features must",
        ops.scatter_tokens_,
        X.transpose(0, 1),
        T,
        I,
    ),
}


@pytest.mark.parametrize("case", PUBLIC_ERRORS)
def test_public_errors(case):
    error, op, rule, function, *args = PUBLIC_ERRORS[case]
    expect(error, op, rule, function, *args)


def test_public_errors_of_options():
    expect(ValueError, "select_tokens", "capacity must", ops.select_tokens, MASK, capacity=-1)
    expect(ValueError, "scatter_tokens", "scale must", ops.scatter_tokens, X, T, I, scale=torch.ones(3))
    meta = torch.ones(2, device="meta")
    expect(ValueError, "scatter_tokens", "scale must", ops.scatter_tokens, X, T, I, scale=meta)


R = X.view(6, 4)
RAW_ERRORS = {
    "mask_dtype": ("select_tokens", "mask must", MASK.int()),
    "mask_rank": ("select_tokens", "mask must", MASK[0]),
    "capacity": ("select_tokens_capacity", "capacity must", MASK, -1),
    "x_rank": ("gather_tokens", "x must", X, I),
    "x_dtype": ("gather_tokens", "x must", R.int(), I),
    "index_dtype": ("gather_tokens", "indices must", R, I.long()),
    "index_rank": ("gather_tokens", "indices must", R, I[None]),
    "backward_rank": ("gather_tokens_backward", "grad must", X, I, 6),
    "backward_count": ("gather_tokens_backward", "grad must|indices must", T[:1], I, 6),
    "backward_rows": ("gather_tokens_backward", "rows must", T, I, -1),
    "norm_rank": ("gather_layer_norm", "x must", X, I, None, None, 1e-5),
    "norm_weight": ("gather_layer_norm", "weight must", R, I, torch.ones(3), None, 1e-5),
    "norm_weight_dtype": ("gather_layer_norm", "weight must", R, I, torch.ones(4).double(), None, 1e-5),
    "norm_bias": ("gather_layer_norm", "bias must", R, I, None, torch.ones(3), 1e-5),
    "features_rank": ("scatter_tokens", "features must", X, T, I, None, False),
    "tokens_channels": ("scatter_tokens", "tokens must", R, T[:, :3], I, None, False),
    "tokens_count": ("scatter_tokens", "tokens must|indices must", R, T[:1], I, None, False),
    "tokens_dtype": ("scatter_tokens", "tokens must", R, T.double(), I, None, False),
    "scale_dtype": ("scatter_tokens", "scale must", R, T, I, torch.ones(2).double(), False),
    "scale_count": ("scatter_tokens", "scale must", R, T, I, torch.ones(3), False),
    "in_place": ("scatter_tokens_", "tokens must", R.clone(), T[:, :3], I, None, False),
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
