# SPDX-License-Identifier: Apache-2.0
"""What gather_linear promises besides the battery, its errors, and the switch of the sm_90a unit."""

import pytest
import torch
from tokenprune_ext import _library, ops
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance import assert_same, needs_library
from tests.ops.common import expect, ints

raw = torch.ops.tokenprune


def layer(device, width=3, channels=4, tokens=6):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=rng).to(device) for s in ((2, tokens, channels), (width, channels), (width,)))


def test_equals_gather_linear_scatter(device):
    x, weight, bias = layer(device)
    features = torch.randn(2, 6, 3, device=device)
    index = ops.select_tokens(torch.rand(2, 6, device=device) < 0.5)
    tokens = torch.nn.functional.linear(ops.gather_tokens(x, index), weight, bias)
    assert_same([ops.gather_linear(x, weight, bias, index=index)], [tokens], exact=False)
    written = ops.gather_linear(x, weight, bias, index=index, features=features, add=True)
    assert_same([written], [ops.scatter_tokens(features, tokens, index, add=True)], exact=False)


def test_rows_may_come_from_one_place_and_go_to_another(device):
    x, weight, bias = layer(device)
    features = torch.zeros(4, 3, device=device)
    out = ops.gather_linear(
        x, weight, bias, index=ints([0, 11, -1], device), features=features, scatter=ints([3, -1, 0], device)
    )
    dense = torch.nn.functional.linear(x.flatten(0, 1), weight, bias)
    assert_same([out], [torch.stack([bias, features[1], features[2], dense[0]])], exact=False)
    assert features.sum() == 0


def test_half_precision_layer_beside_a_float32_map(device):
    x, weight, bias = (t.bfloat16() for t in layer(device))
    features = torch.randn(12, 3, device=device)
    index = ints([5, 2], device)
    out = ops.gather_linear(x, weight, bias, index=index, features=features, add=True)
    assert out.dtype == torch.float32
    tokens = ops.gather_linear(x, weight, bias, index=index)
    assert_same([out], [ops.scatter_tokens(features, tokens, index, add=True)])


@needs_library
def test_flops_are_those_of_the_kept_tokens(device):
    x, weight, bias = layer(device)
    with FlopCounterMode(display=False) as counter:
        ops.gather_linear(x, weight, bias, index=ints([1, 7, 2], device))
    assert counter.get_total_flops() == 2 * 3 * 3 * 4


@needs_library
def test_a_direct_call_keeps_its_dtype_under_autocast(device):
    x, weight, bias = layer(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = raw.gather_linear(x.flatten(0, 1), weight, bias, None, None, None, False, 0)
    assert out.dtype == torch.float32


def test_errors(device):
    x, weight, bias = layer(device)
    op, index = "gather_linear", ints([1], device)
    expect(ValueError, op, "activation must be None or 'gelu'", ops.gather_linear, x, weight, activation="relu")
    expect(ValueError, op, r"weight must have shape \[M, 4\]", ops.gather_linear, x, weight[:, :2])
    expect(ValueError, op, r"bias must have shape \[3\]", ops.gather_linear, x, weight, bias[:2])
    expect(TypeError, op, "weight must have the dtype of x", ops.gather_linear, x, weight.double())
    expect(ValueError, op, r"x must have shape \[B, N, C\]", ops.gather_linear, x[0, 0], weight)
    expect(ValueError, op, "scatter must come with features", ops.gather_linear, x, weight, scatter=index)
    expect(ValueError, op, "add must come with features", ops.gather_linear, x, weight, add=True)
    features = torch.zeros(5, 3, device=device)
    expect(ValueError, op, "scatter must be given", ops.gather_linear, x, weight, features=features)
    expect(ValueError, op, r"features must have shape \[F, 3\]", ops.gather_linear, x, weight, index=index, features=x)
    expect(
        ValueError,
        op,
        r"scatter must have one row per token \(1\)",
        ops.gather_linear,
        x,
        weight,
        index=index,
        features=features,
        scatter=ints([1, 2], device),
    )


RAW_ERRORS = {
    "rank of x": ({"x": torch.zeros(2, 6, 4)}, ValueError, r"x must have shape \[R, C\]"),
    "weight": ({"weight": torch.zeros(3, 5)}, ValueError, r"weight must have shape \[M, 4\]"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[3\]"),
    "dtype": ({"bias": torch.zeros(3).double()}, TypeError, "bias must have the dtype of x"),
    "integers": ({"x": torch.zeros(6, 4, dtype=torch.int32)}, TypeError, "x must be a float32"),
    "activation": ({"activation": 2}, ValueError, r"activation must be one of \[0, 1\], got 2"),
    "long index": ({"index": torch.tensor([1])}, TypeError, "index must be int32"),
    "rank of index": ({"index": ints([[1]], "cpu")}, ValueError, "index must have 1 dimension"),
    "lone scatter": ({"scatter": ints([1], "cpu")}, ValueError, "features must come with scatter"),
    "features": ({"features": torch.zeros(5, 4), "scatter": ints([1] * 6, "cpu")}, ValueError, r"shape \[F, 3\]"),
    "rows": ({"features": torch.zeros(5, 3), "scatter": ints([1], "cpu")}, ValueError, r"one row per token \(6\)"),
}


@needs_library
@pytest.mark.parametrize("kind", ["cpu", "meta"])
@pytest.mark.parametrize("case", RAW_ERRORS)
def test_raw_errors(case, kind):
    wrong, error, rule = RAW_ERRORS[case]
    given = dict.fromkeys(("bias", "index", "features", "scatter")) | {"add": False, "activation": 0}
    given |= {"x": torch.zeros(6, 4), "weight": torch.zeros(3, 4)} | wrong
    given = {name: value.to(kind) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    expect(error, "gather_linear", rule, raw.gather_linear, **given)


@needs_library
def test_raw_errors_of_the_backward():
    op, x, weight = raw.gather_linear_backward, torch.zeros(6, 4), torch.zeros(3, 4)
    name = "gather_linear_backward"
    expect(ValueError, name, "grad must have the shape of the result", op, x, x, weight, None, None, None, False, 0)
    grad, rows = torch.zeros(5, 3), ints([1], "cpu")
    expect(ValueError, name, "scatter must have one row per", op, grad, x, weight, None, None, rows, False, 0)


@needs_library
def test_wrong_rows_are_an_error_on_the_cpu():
    x, weight, _ = layer("cpu")
    expect(RuntimeError, "gather_tokens", r"-1 or in \[0, 12\)", ops.gather_linear, x, weight, index=ints([12], "cpu"))
    features = torch.zeros(5, 3)
    twice = {"index": ints([0, 1], "cpu"), "features": features, "scatter": ints([2, 2], "cpu")}
    expect(RuntimeError, "scatter_tokens", "duplicates", ops.gather_linear, x, weight, **twice)


# ---------------------------------------------------------------- the sm_90a unit


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of capability 9.0 and a unit, neither of which is there."""
    monkeypatch.setenv("TOKENPRUNE_HOPPER", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda")


def test_the_unit_is_off_unless_asked_for(hopper, monkeypatch):
    monkeypatch.setattr(torch.ops.tokenprune_sm90a, "an_op", type("Packet", (), {"default": "unit"}), raising=False)
    assert _library.hopper_unit("an_op", hopper) == "unit"
    assert _library.hopper_unit("another", hopper) is None
    assert _library.hopper_unit("an_op", torch.device("cpu")) is None
    for off in ("0", ""):
        monkeypatch.setenv("TOKENPRUNE_HOPPER", off)
        assert _library.hopper_unit("an_op", hopper) is None
    monkeypatch.setenv("TOKENPRUNE_HOPPER", "yes")
    with pytest.raises(ValueError, match="TOKENPRUNE_HOPPER must be 0 or 1, got 'yes'"):
        _library.hopper_unit("an_op", hopper)


def test_the_unit_stays_off_on_other_gpus(hopper, monkeypatch):
    monkeypatch.setattr(torch.ops.tokenprune_sm90a, "an_op", type("Packet", (), {"default": "unit"}), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert _library.hopper_unit("an_op", hopper) is None
